"""A program is proven before it runs: no device, no tensors, only what each action needs and leaves."""

from __future__ import annotations

from lf.layouts import Layout
from lf.schedule.draw import draw
from lf.schedule.ir import Action, Program, ProgramError


def check(program: Program, layout: Layout, microbatches: int) -> tuple[int, ...]:
    """Peak number of microbatches alive on each rank. Raises ProgramError with the program drawn and the failing action marked when

    a forward runs twice, a backward comes before its forward or twice, a layer is reduced before its last backward, twice or never, an action
    names a stage, layer or microbatch that is not there, or activations stay alive at the end.
    """
    if len(program) != layout.mesh.pp:
        raise ProgramError(f"the program is for {len(program)} pipeline ranks; mesh {layout.mesh} has pp={layout.mesh.pp}")
    stages = range(len(layout.stages))
    peaks, done = [], set[Action]()
    for rank, actions in enumerate(program):
        alive: set[tuple[int, int | None]] = set()
        peak = 0
        for i, a in enumerate(actions):

            def fail(why: str, rank: int = rank, i: int = i, a: Action = a) -> ProgramError:
                return ProgramError(f"{a} on rank {rank}: {why}\n{draw(program, mark=(rank, i))}")

            if a.op not in ("F", "B", "REDUCE"):
                raise fail(f"unknown op {a.op!r}; there are F, B, REDUCE")
            if a.stage not in stages:
                raise fail(f"there are {len(stages)} stages, 0 to {len(stages) - 1}")
            if a in done:
                raise fail("it stands twice")
            if a.op == "REDUCE":
                if a.segment not in layout.layers(a.stage):
                    raise fail(f"stage {a.stage} has no layer {a.segment!r}; it has {', '.join(layout.layers(a.stage))}")
                missing = [m for m in range(microbatches) if Action("B", a.stage, m) not in done]
                if missing:
                    raise fail(f"the gradients of microbatches {missing} would come after it")
            elif a.microbatch not in range(microbatches):
                raise fail(f"there are {microbatches} microbatches, 0 to {microbatches - 1}")
            elif a.op == "F":
                alive.add((a.stage, a.microbatch))
            elif (a.stage, a.microbatch) not in alive:
                raise fail(f"its forward {Action('F', a.stage, a.microbatch)} has not run")
            else:
                alive.remove((a.stage, a.microbatch))
            done.add(a)
            peak = max(peak, len(alive))
        peaks.append(peak)
        if alive:
            kept = ", ".join(f"{s}F{m}" for s, m in sorted(alive, key=str))
            raise ProgramError(f"rank {rank}: activations stay alive, there is no backward for {kept}\n{draw(program)}")
    wanted = [Action("B", s, m) for s in stages for m in range(microbatches)]
    wanted += [Action("REDUCE", s, segment=layer) for s in stages for layer in layout.layers(s)]
    if missing_actions := [str(a) for a in wanted if a not in done]:
        raise ProgramError(f"missing: {', '.join(missing_actions)}; without them gradients would be lost\n{draw(program)}")
    return tuple(peaks)

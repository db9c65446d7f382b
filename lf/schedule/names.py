"""What a program names is there: ops, stages, microbatches, layers; the part of `check` that looks at each action alone."""

from __future__ import annotations

from lf.layouts import Layout
from lf.schedule.draw import WIDTH, draw
from lf.schedule.ir import COMPUTE, MOVES, OPS, PARAMETERS, Action, Program, ProgramError, flat, microbatches, placement
from lf.schedule.pieces import stages


def check_names(program: Program, layout: Layout | None = None, count: int | None = None) -> None:
    """Raises ProgramError for an action that names what is not there, and for an OVERLAP whose two cannot interleave. `count`: the microbatches."""
    total = microbatches(program) if count is None else count
    known = stages(program, layout) if layout else ()
    every = len(layout.stages) if layout else 1 + max((a.stage for row in program for a in flat(row)), default=-1)
    for rank, actions in enumerate(program):
        for i, whole in enumerate(actions):

            def fail(why: str, a: Action, at: tuple[int, int] = (rank, i)) -> ProgramError:
                return ProgramError(f"{a} on rank {at[0]}: {why}\n{draw(program, at)}")

            if whole.op == "OVERLAP":
                if len(whole.pair) != 2 or any(a.op not in COMPUTE for a in whole.pair):
                    raise fail(f"an OVERLAP is of two actions of compute, {', '.join(COMPUTE)}", whole)
                if _follow(*whole.pair):
                    raise fail("one of the two needs what the other makes: write them one after the other, or pair two microbatches", whole)
            for a in flat((whole,)):
                if a.op in PARAMETERS:
                    words = ", ".join((*PARAMETERS, "UNSHARD and RESHARD in torch's CSV"))
                    raise fail(f"parameters that are gathered for an action are not built yet; leave out {words}", a)
                if a.op not in OPS:
                    raise fail(f"unknown op {a.op!r}; there are {', '.join(OPS)}", a)
                if a.chain:
                    raise fail(f"it is of chain {a.chain!r}; models of several chains are not built yet", a)
                if not 0 <= a.stage < every:
                    raise fail(f"there are {every} stages, 0 to {every - 1}", a)
                if a.op != "REDUCE" and (a.microbatch is None or not 0 <= a.microbatch < total):
                    raise fail(f"there are {total} microbatches, 0 to {total - 1}", a)
                if a.op == "REDUCE" and a.microbatch is not None:
                    raise fail("a REDUCE is of all microbatches: leave the number out", a)
                if a.op in MOVES and a.segment is not None:
                    raise fail(f"a message is of a whole stage: leave out {a.segment!r}", a)
                if a.ops and a.op != "REMAT":
                    raise fail(f"only a REMAT names ops, not a {a.op}: leave out {', '.join(a.ops)}", a)
                if layout and layout.placement[a.stage] != rank:
                    raise fail(f"stage {a.stage} lies on rank {layout.placement[a.stage]}", a)
                if a.op == "FREE":
                    if a.segment not in ("SEND_F", "SEND_B"):
                        raise fail(f"a FREE names what was sent, SEND_F or SEND_B, not {a.segment!r}", a)
                elif known and a.op != "REDUCE" and known[a.stage].span(a.segment) is None:
                    raise fail(f"stage {a.stage} has no layer or segment {a.segment!r}; it has {', '.join(dict.fromkeys(known[a.stage].layers))}", a)
    try:
        placement(program)
    except ProgramError as error:
        raise ProgramError(f"{error}\n{draw(program, width=WIDTH)}") from None


def _follow(a: Action, b: Action) -> bool:
    """Whether two actions of one rank work on the same: a stage and microbatch, or two stages of which one hands on to the other."""
    if a.microbatch != b.microbatch:
        return False
    hands_on = (a.op == "F") == (b.op == "F") and {a.op, b.op} <= {"F", "B", "I"}
    return a.stage == b.stage or (abs(a.stage - b.stage) == 1 and hands_on)

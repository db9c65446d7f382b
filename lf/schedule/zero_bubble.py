"""Zero-bubble generators: a backward is I, which the stage before waits for, and W, which nobody does and which fills what would be a bubble.

Units and bounds as in `generate`. A microbatch is held until its W.
"""

from __future__ import annotations

from lf.schedule.generate import Stages, alternate, laps, single
from lf.schedule.ir import Action, Program, ProgramError
from lf.schedule.place import placed, vee


def zb_h1(stages: Stages, microbatches: int) -> Program:
    """1F1B whose W comes r microbatches late on rank r (Qi et al. 2023): what it held less of than rank 0 is held for W.

    One stage on each rank. Bubble p-1 for m ≥ p, 2p-1-m below. Peak min(m, p) on each rank.
    """
    placement = single("zb_h1", "interleaved_zb", placed(stages, microbatches))
    rows: list[tuple[Action, ...]] = [()] * len(placement)
    for s, rank in enumerate(placement):
        visits = [(s, m) for m in range(microbatches)]
        rows[rank] = alternate(visits, visits, ahead=len(placement) - 1 - s, lag=s)
    return tuple(rows)


def interleaved_zb(stages: Stages, microbatches: int) -> Program:
    """`interleaved` with W apart, r microbatches late on rank r. On a loop, even or not.

    Bubble p-1 for m ≥ p, at most 3(S-v) below; at most that where p does not divide S. Peak v·p where p divides m, (v-1)g + p with groups of g.
    """
    return laps("interleaved_zb", placed(stages, microbatches), microbatches, steps=1, split=True)


def zb_v(stages: Stages, microbatches: int) -> Program:
    """Zero bubble on a V (Qi et al. 2024, Pipeline Parallelism with Controllable Memory).

    Stage r and stage 2p-1-r stand on rank r. Bubble p-1 and peak 2p for m ≥ 2p-1; below, the program for 2p-1 without the microbatches
    that are not there.
    """
    placement = placed(stages, microbatches)
    ranks = max(placement) + 1
    if placement != vee(ranks):
        raise ProgramError(f"zb_v needs the placement vee({ranks}) = {vee(ranks)}, not {placement}; greedy_zb takes any")
    n = max(microbatches, 2 * ranks - 1)
    rows = []
    for r in range(ranks):
        there, back = r, 2 * ranks - 1 - r
        count: dict[tuple[str, int], int] = {}
        row: list[Action] = []

        def add(stage: int, *ops: str, row: list[Action] = row, count: dict[tuple[str, int], int] = count) -> None:
            for op in ops:
                m = count[op, stage] = count.get((op, stage), -1) + 1
                if m < microbatches:
                    row.append(Action(op, stage, m))

        def done(op: str, stage: int, count: dict[tuple[str, int], int] = count) -> int:
            return count.get((op, stage), -1) + 1

        for _ in range(2 * (ranks - r) - 1):
            add(there, "F")
        for _ in range(r):
            add(back, "F")
            add(there, "F")
        for _ in range(ranks - r):
            add(back, "F", "I", "W")
        while done("F", there) < n or done("F", back) < n:
            if done("F", there) < n:
                add(there, "F")
            add(there, "I", "W")
            add(back, "F", "I", "W")
        for _ in range(r):
            add(there, "I")
            add(back, "I")
        for _ in range(ranks - r):
            add(there, "I", "W")
        for stage in (back, there):
            while done("W", stage) < n:
                add(stage, "W")
        rows.append(tuple(row))
    return tuple(rows)


def merge(program: Program) -> Program:
    """A W right after its I becomes one B: the same work without keeping what lies between the two."""
    rows = []
    for actions in program:
        row: list[Action] = []
        for a in actions:
            if a.op == "W" and row and row[-1] == Action("I", a.stage, a.microbatch, a.segment, chain=a.chain):
                row[-1] = Action("B", a.stage, a.microbatch, a.segment, chain=a.chain)
            else:
                row.append(a)
        rows.append(tuple(row))
    return tuple(rows)

"""Zero-bubble generators: a backward is I, which the stage before waits for, and W, which nobody does and which fills what would be a bubble.

Units and bounds as in `generate`. A microbatch is held until its W.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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

    Bubble p-1 for m ≥ p, (v+1)p - 1 + (v-1)·max(p, 2m) - (3v-2)m below; at most that where p does not divide S. Peak v·p where p divides m,
    at most (v-1)g + p with groups of g.
    """
    return laps("interleaved_zb", placed(stages, microbatches), microbatches, steps=1, split=True)


def zb_v(stages: Stages, microbatches: int) -> Program:
    """Zero bubble on a V (Qi et al. 2024, Pipeline Parallelism with Controllable Memory): once full, a rank goes F I W down, F I W up, over and over.

    Stages r and 2p-1-r stand on rank r. The program of at least 2p-1 microbatches; of fewer it is that without those that are not there.
    Bubble p-1 for m ≥ 2p-1, max(p-1, 4(p-1) - 2(m-1)) below. Peak 2p on each rank.
    """
    placement = placed(stages, microbatches)
    p = max(placement) + 1
    if placement != vee(p):
        raise ProgramError(f"zb_v needs the placement vee({p}) = {vee(p)}, not {placement}; greedy_zb takes any")
    n, rows = max(microbatches, 2 * p - 1), []
    for r in range(p):
        down, up = [{op: (op, stage) for op in "FIW"} for stage in (r, 2 * p - 1 - r)]
        plan = [down["F"]] * (2 * (p - r) - 1) + [up["F"], down["F"]] * r + [*up.values()] * (p - r)
        for k in range(n - p):
            plan += [down["F"]] * (k < n - (2 * p - 1 - r)) + [down["I"], down["W"], *up.values()]
        plan += [down["I"], up["I"]] * r + [down["I"], down["W"]] * (p - r) + [up["W"]] * r + [down["W"]] * r
        rows.append(numbered(plan, microbatches))
    return tuple(rows)


def numbered(plan: Sequence[tuple[str, int]], microbatches: int) -> tuple[Action, ...]:
    """The k-th (op, stage) of a plan is for microbatch k; those that are not there are left out."""
    seen, row = Counter[tuple[str, int]](), []
    for op, stage in plan:
        if seen[op, stage] < microbatches:
            row.append(Action(op, stage, seen[op, stage]))
        seen[op, stage] += 1
    return tuple(row)

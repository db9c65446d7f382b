"""Generators write the compute of a program; passes (`lower`) add the rest.

Each takes the stages (a number: one on each rank; or a placement) and a number of microbatches. Bounds are in units in which a stage's forward,
input gradient and weight gradient take 1 each, so a backward 2; p ranks, S stages, at most v of them on a rank, m microbatches. The bubble is
what the busiest rank waits. Peaks count a microbatch of a stage as 1; v of them are a microbatch of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from lf.mesh import shares
from lf.schedule.ir import Action, Placement, Program, ProgramError
from lf.schedule.place import placed, stages_of

Stages = int | Sequence[int]


def breadth_first(stages: Stages, microbatches: int) -> Program:
    """Every microbatch of a stage before the next stage, then back (Lamy-Poirier 2022). Any placement; stages that follow each other on one rank
    are as one.

    On a loop: bubble 3(p-1) for m ≥ p, 3(p-1) + 3(v-1)(p-m) below. Peak v·m. On a V: 3(S-2). Never above GPipe's 3(S-v) on either.
    """
    placement = placed(stages, microbatches)
    blocks = [[*group] for _, group in groupby(range(len(placement)), key=lambda s: placement[s])]
    rows: list[list[Action]] = [[] for _ in stages_of(placement)]
    for block in blocks:
        rows[placement[block[0]]] += [Action("F", s, m) for m in range(microbatches) for s in block]
    for block in reversed(blocks):
        rows[placement[block[0]]] += [Action("B", s, m) for m in range(microbatches) for s in reversed(block)]
    return tuple(map(tuple, rows))


def gpipe(stages: Stages, microbatches: int) -> Program:
    """All forwards, then all backwards (Huang et al. 2018). With several stages a rank it is `breadth_first`, which keeps this order.

    Bubble 3(p-1), peak m, with one stage a rank.
    """
    return breadth_first(stages, microbatches)


def forward_only(stages: Stages, microbatches: int) -> Program:
    """The forwards of `breadth_first`: for evaluation. Bubble p-1 on a loop with m ≥ p."""
    return tuple(tuple(a for a in row if a.op == "F") for row in breadth_first(stages, microbatches))


def one_f_one_b(stages: Stages, microbatches: int) -> Program:
    """One forward, one backward (Narayanan et al. 2019): rank r makes p-1-r forwards ahead, then a forward and a backward in turn.

    One stage on each rank, in any order. Bubble 3(p-1), peak min(m, p - s) on the rank of stage s.
    """
    placement = single("one_f_one_b", "interleaved", placed(stages, microbatches))
    rows: list[tuple[Action, ...]] = [()] * len(placement)
    for s, rank in enumerate(placement):
        visits = [(s, m) for m in range(microbatches)]
        rows[rank] = alternate(visits, visits, ahead=len(placement) - 1 - s)
    return tuple(rows)


def interleaved(stages: Stages, microbatches: int) -> Program:
    """One forward, one backward over several stages a rank (Narayanan et al. 2021): groups of about p microbatches pass round the loop.

    On a loop, even or not. Where p does not divide m, the m // p groups are larger; fewer than p microbatches are one group.
    Bubble 3(p-1) for m ≥ p, 3(p-1) + 3(v-1)(p-m) below; at most that where p does not divide S. Peak (v+1)p - 1 where p divides m > p,
    at most (v-1)g + 2p - 1 with groups of g.
    """
    return laps("interleaved", placed(stages, microbatches), microbatches, steps=2)


def laps(name: str, placement: Placement, microbatches: int, steps: int, split: bool = False) -> Program:
    """Groups of microbatches round a loop. A rank is `steps` forwards ahead of the next one. Where the last lap is not full, the program is that
    of a full one without the actions of what is not there: what is left only has less to wait for."""
    ranks = max(placement) + 1
    if any(rank != s % ranks for s, rank in enumerate(placement)):
        raise ProgramError(f"{name} has stage s on rank s mod {ranks}, placement {placement} has not; greedy and breadth_first take any")
    groups, per_rank = groups_of(microbatches, ranks), -(-len(placement) // ranks)
    rows = []
    for r in range(ranks):
        stages = range(r, ranks * per_rank, ranks)
        ahead = (per_rank - 1) * groups[0] + steps * (ranks - 1 - r)
        row = alternate(visits(stages, groups), visits(stages[::-1], groups), ahead, lag=r if split else None)
        rows.append(tuple(a for a in row if a.stage < len(placement)))
    return tuple(rows)


def single(name: str, other: str, placement: Placement) -> Placement:
    if len(placement) != max(placement) + 1:
        raise ProgramError(f"{name} has one stage on each rank, placement {placement} has more; {other} is for several")
    return placement


def groups_of(microbatches: int, ranks: int) -> tuple[int, ...]:
    """Sizes of groups of at least `ranks` microbatches, balanced, larger ones first: a smaller one would wait for its own end to come round."""
    return tuple(sorted(shares(microbatches, max(1, microbatches // ranks)), reverse=True))


def visits(stages: Sequence[int], groups: Sequence[int]) -> list[tuple[int, int]]:
    """(stage, microbatch) in the order in which groups pass these stages of a rank."""
    starts = [sum(groups[:g]) for g in range(len(groups))]
    return [(s, m) for start, size in zip(starts, groups) for s in stages for m in range(start, start + size)]


def alternate(forwards: Sequence[tuple[int, int]], backwards: Sequence[tuple[int, int]], ahead: int, lag: int | None = None) -> tuple[Action, ...]:
    """`ahead` forwards, then a forward and a backward in turn. With `lag` a backward is I, and its W comes after that many more."""
    row = [Action("F", *visit) for visit in forwards[:ahead]]
    for k, visit in enumerate(backwards):
        row += [Action("F", *forwards[k + ahead])] if k + ahead < len(forwards) else []
        row.append(Action("B" if lag is None else "I", *visit))
        if lag is not None and k >= lag:
            row.append(Action("W", *backwards[k - lag]))
    if lag is not None:
        row += [Action("W", *visit) for visit in backwards[max(0, len(backwards) - lag) :]]
    return tuple(row)

"""Programs changed action by action, and actions of a whole stage cut into those of its pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import attrs

from lf.schedule.ir import COMPUTE, OVERLAP, Action, Program


def each(program: Program, change: Callable[[Action], Sequence[Action]]) -> Program:
    """The program with each action replaced by `change(action)`; the parts of an OVERLAP's two are paired as far as they go."""

    def row(actions: Sequence[Action]) -> Iterator[Action]:
        for a in actions:
            if a.op != "OVERLAP":
                yield from change(a)
                continue
            for one, other in zip_longest(*(change(part) for part in a.pair)):
                yield OVERLAP(one, other) if one and other else one or other

    return tuple(tuple(row(actions)) for actions in program)


def refine(program: Program, names: Callable[[Action], Sequence[str] | None]) -> Program:
    """Each action of a whole stage for which `names` gives pieces, as one action a piece: forwards in their order, backwards from the last."""

    def change(a: Action) -> Sequence[Action]:
        pieces = names(a) if a.segment is None and a.op in COMPUTE else None
        if not pieces:
            return (a,)
        return [attrs.evolve(a, segment=p) for p in (pieces if a.op == "F" else reversed(pieces))]

    return each(program, change)

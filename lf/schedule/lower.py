"""Passes from the compute of a program to all that a rank does; each is a pure function."""

from __future__ import annotations

from lf.layouts import Layout
from lf.schedule.ir import Action, Program


def add_reduce(program: Program, layout: Layout) -> Program:
    """REDUCE of each layer right after the last backward of its stage, in the order in which backward finishes them: last layer first."""
    out = []
    for actions in program:
        last = {a.stage: i for i, a in enumerate(actions) if a.op == "B"}
        row: list[Action] = []
        for i, action in enumerate(actions):
            row.append(action)
            if last.get(action.stage) == i:
                row += [Action("REDUCE", action.stage, segment=layer) for layer in reversed(layout.layers(action.stage))]
        out.append(tuple(row))
    return tuple(out)

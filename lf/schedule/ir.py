"""A training step is a program: for each pipeline rank, a tuple of actions. It is data: print it, check it, draw it, run it.

    F   forward of a stage for a microbatch       B        its backward: gradients of the input and of the weights
    REDUCE  sum a layer's gradients over the ranks that hold it; starts the collectives, the end of the program waits

The text form of an action is '0F3' (stage, op, microbatch); a REDUCE names its layer: '0REDUCE[layers.2]'.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Action:
    """`segment` is the layer of a REDUCE; `microbatch` is None there."""

    op: str
    stage: int
    microbatch: int | None = None
    segment: str | None = None

    def __str__(self) -> str:
        place = "" if self.segment is None else f"[{self.segment}]"
        return f"{self.stage}{self.op}{'' if self.microbatch is None else self.microbatch}{place}"


Program = tuple[tuple[Action, ...], ...]


class ProgramError(ValueError):
    """A program that cannot be run, with the action that fails."""

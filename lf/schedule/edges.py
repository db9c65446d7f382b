"""What edges carry, on one rank, as a program is run: from what a unit has made to what another one takes, and the gradient of that, back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lf.schedule.bind import Bound, Piece
from lf.schedule.feed import Feed
from lf.schedule.ir import Action
from lf.schedule.shapes import Brought

At = tuple[str, int, int]  # chain, stage, unit


class Edges:
    def __init__(self, bound: Bound, feed: Feed, ctx: Any):
        self.bound, self.feed, self.ctx = bound, feed, ctx

    def brought(self, chain: str) -> Callable[[int, int], Mapping[int, Tensor]]:
        return lambda stage, unit: {}

    def widths(self, chain: str) -> Callable[[int], Mapping[str, Brought]]:
        return lambda unit: {}

    def forward(self, a: Action) -> None: ...

    def backward(self, a: Action) -> None: ...

    def finish(self) -> None: ...

    def left(self) -> list[Any]:
        return []

    def take(self, at: At, piece: Piece, carry: dict[str, Tensor]) -> dict[str, Tensor]:
        return carry

    def done(self, at: At) -> None: ...

    def settle(self, a: Action) -> None: ...

    def returned(self, at: At, piece: Piece) -> dict[str, Tensor]:
        return {}

    def give_back(self, at: At, piece: Piece, dy: dict[str, Tensor]) -> dict[str, Tensor]:
        return dy

    def gone_back(self, at: At) -> None: ...

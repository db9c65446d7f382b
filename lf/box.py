"""Boxes: rectangular pieces of a logical tensor, one (start, stop) per dim. Resharding anything is intersecting boxes."""

from __future__ import annotations

import math

Box = tuple[tuple[int, int], ...]


def whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, n) for n in shape)


def shape(box: Box) -> tuple[int, ...]:
    return tuple(max(hi - lo, 0) for lo, hi in box)


def volume(box: Box) -> int:
    return math.prod(shape(box))


def intersect(a: Box, b: Box) -> Box:
    """The common part; its volume is 0 when there is none."""
    return tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))


def slices(box: Box, origin: Box) -> tuple[slice, ...]:
    """Where `box` lies in a tensor that holds `origin`."""
    return tuple(slice(lo - o, hi - o) for (lo, hi), (o, _) in zip(box, origin, strict=True))

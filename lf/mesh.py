"""Mesh: pure rank arithmetic over two factorings of the same ranks. No process, no device, no torch.

    dense   (pp, dp,  cp, tp)     every parameter but the experts
    expert  (pp, edp, ep, etp)    parameters whose axes name `expert`

The last axis is the fastest, so tp neighbours sit on neighbouring ranks. The two share only pp: ep and etp *refold* the ranks that dp, cp and
tp span, they never multiply them (Parallel Folding, Liu et al. 2025, arXiv 2504.14960).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import attrs

DENSE = ("pp", "dp", "cp", "tp")
EXPERT = ("pp", "edp", "ep", "etp")
FIELDS = ("pp", "dp", "cp", "tp", "ep", "etp")


class MeshError(ValueError):
    """A mesh that cannot be, or that does not match the ranks there are."""


def _size(mesh: Mesh, field: attrs.Attribute, value: object) -> None:
    if field.name == "dp" and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise MeshError(f"mesh axis {field.name}={value!r} must be a whole number")
    if value < 1:
        raise MeshError(f"mesh axis {field.name}={value} must be at least 1; leave the axis out to not use it")


@attrs.frozen
class Mesh:
    """Sizes of the parallel axes. `dp=None` fills what is left of the world: `mesh.fill(world)`."""

    pp: int = attrs.field(default=1, validator=_size)
    dp: int | None = attrs.field(default=None, validator=_size)
    cp: int = attrs.field(default=1, validator=_size)
    tp: int = attrs.field(default=1, validator=_size)
    ep: int = attrs.field(default=1, validator=_size)
    etp: int = attrs.field(default=1, validator=_size)

    def __attrs_post_init__(self) -> None:
        if self.dp is not None and (self.dp * self.cp * self.tp) % (self.ep * self.etp):
            raise MeshError(
                f"ep*etp = {self.ep}*{self.etp} = {self.ep * self.etp} must divide dp*cp*tp = {self.dp}*{self.cp}*{self.tp} = "
                f"{self.dp * self.cp * self.tp}: the expert axes refold the ranks of the dense ones"
            )

    @staticmethod
    def parse(text: str) -> Mesh:
        """'tp=2,dp=2' → Mesh(dp=2, tp=2). Raises MeshError that names the word it could not read."""
        sizes: dict[str, int] = {}
        for word in filter(None, (w.strip() for w in text.split(","))):
            axis, eq, size = (s.strip() for s in word.partition("="))
            if axis not in FIELDS:
                raise MeshError(f"mesh {text!r}: unknown axis {axis!r}; the axes are {', '.join(FIELDS)}")
            if not eq or not re.fullmatch("-?[0-9]{1,9}", size):
                raise MeshError(f"mesh {text!r}: {word!r} should read {axis}=N")
            if axis in sizes:
                raise MeshError(f"mesh {text!r}: axis {axis!r} is given twice")
            sizes[axis] = int(size)
        return Mesh(**sizes)

    def fill(self, world: int = 0) -> Mesh:
        """This mesh with dp known: what is left of `world` ranks (0: dp = 1 unless given). Raises MeshError showing both products."""
        rest = self.pp * self.cp * self.tp
        if self.dp is not None or not world:
            mesh = self if self.dp is not None else attrs.evolve(self, dp=1)
        elif world % rest:
            raise MeshError(f"mesh {self} needs a multiple of pp*cp*tp = {self.pp}*{self.cp}*{self.tp} = {rest} ranks; the world has {world}")
        else:
            mesh = attrs.evolve(self, dp=world // rest)
        if world and mesh.size != world:
            raise MeshError(
                f"mesh {mesh} has pp*dp*cp*tp = {mesh.pp}*{mesh.dp}*{mesh.cp}*{mesh.tp} = {mesh.size} ranks; the world has {world}. "
                f"Change the mesh, or leave dp out: it fills what is left"
            )
        return mesh

    def _dp(self) -> int:
        if self.dp is None:
            raise MeshError(f"mesh {self}: dp is open until the number of ranks is known; use mesh.fill(world) or give dp=")
        return self.dp

    @property
    def edp(self) -> int:
        return self._dp() * self.cp * self.tp // (self.ep * self.etp)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.pp * self._dp() * self.cp * self.tp

    def __getitem__(self, axis: str) -> int:
        """Size of an axis, `edp` included."""
        if axis not in DENSE + EXPERT:
            raise MeshError(f"unknown mesh axis {axis!r}; the axes are {', '.join(dict.fromkeys(DENSE + EXPERT))}")
        return self._dp() if axis == "dp" else getattr(self, axis)

    def __str__(self) -> str:
        return ",".join(f"{n}={v}" for n in FIELDS if (v := getattr(self, n)) not in (1, None)) or "one rank"

    def coords(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank on every axis of both factorings."""
        if not 0 <= rank < self.size:
            raise MeshError(f"rank {rank} is outside mesh {self} of {self.size} ranks")
        out = {}
        for grid in (EXPERT, DENSE):
            left = rank
            for axis in reversed(grid):
                left, out[axis] = divmod(left, self[axis])
        return out

    def rank(self, **coords: int) -> int:
        """The rank at these coordinates of one factoring; an axis left out is 0."""
        rank = 0
        for axis in self.grid(tuple(coords)):
            at = coords.get(axis, 0)
            if not 0 <= at < self[axis]:
                raise MeshError(f"coordinate {axis}={at} is outside mesh {self}: that axis has {self[axis]}")
            rank = rank * self[axis] + at
        return rank

    def grid(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """The factoring that has all these axes. Raises MeshError when they mix the two."""
        for grid in (DENSE, EXPERT):
            if set(axes) <= set(grid):
                return grid
        raise MeshError(f"axes {axes} belong to no single factoring: {DENSE} or {EXPERT}")

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Ranks that share every coordinate of `rank` but those on `axes` (all of one factoring), in row-major order."""
        grid, mine = self.grid(axes), self.coords(rank)
        sizes = [self[a] if a in axes else 1 for a in grid]
        return tuple(
            self.rank(**{a: (at[i] if a in axes else mine[a]) for i, a in enumerate(grid)}) for at in _indices(sizes)
        )


def _indices(sizes: list[int]) -> Iterator[tuple[int, ...]]:
    for n in range(math.prod(sizes)):
        at = []
        for size in reversed(sizes):
            n, i = divmod(n, size)
            at.append(i)
        yield tuple(reversed(at))


def shares(n: int, ranks: int) -> tuple[int, ...]:
    """Balanced whole shares of n things: rank r gets those from r*n//ranks to (r+1)*n//ranks. Some are 0 when n < ranks."""
    return tuple((r + 1) * n // ranks - r * n // ranks for r in range(ranks))

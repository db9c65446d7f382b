"""One rank of any mesh on meta tensors: every collective gives a tensor of the right shape and dtype, and nothing is sent.

The same two classes as `lf/axes.py` and `lf/axes_sim.py` have; model code cannot tell. Sizes of axes are worked out without the ranks on them, so
that one of 30,000 ranks costs what one of two does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lf.axes import of_world, placed
from lf.axis import at_once, check_rows
from lf.mesh import Mesh, MeshError


class MetaAxis:
    """The same as `lf.axis.Axis`, for tensors without data. `ranks` is worked out when it is asked for."""

    def __init__(self, mesh: Mesh, rank: int, names: tuple[str, ...], of: Sequence[int]):
        self.mesh, self.rank, self.names, self.name, self.of = mesh, rank, names, "·".join(names) or "self", of
        coords = mesh.coords(rank)
        self.size, self.index, self.every = 1, 0, slice(None)
        for axis in mesh.grid(names):  # row-major, as mesh.group orders them
            if axis in names:
                self.size, self.index = self.size * mesh[axis], self.index * mesh[axis] + coords[axis]

    def part(self, n: int) -> tuple[MetaAxis, MetaAxis]:
        """The two of `lf.axes.Axes.part`."""
        inner, outer = (MetaAxis(self.mesh, self.rank, self.names, self.of) for _ in range(2))
        inner.name, inner.size, inner.index, inner.every = f"{self.name}/{n}", n, self.index % n, slice(self.index // n * n, self.index // n * n + n)
        outer.name, outer.size, outer.index, outer.every = f"{self.name}%{n}", self.size // n, self.index // n, slice(self.index % n, None, n)
        return inner, outer

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.of[r] for r in (self.mesh.group(self.rank, *self.names) if self.names else (self.rank,)))[self.every]

    def sum(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)

    def max(self, x: Tensor) -> Tensor:
        return self.all_reduce(x, "max")

    def all_reduce(self, x: Tensor, op: str = "sum", later: bool = False, spend: bool = False) -> Any:
        return at_once(self._like(x, x.shape), later)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "all_gather", x.shape[dim], sizes[self.index])
        return at_once(self._like(x, _resized(x, dim, sum(sizes))), later)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "reduce_scatter", x.shape[dim], sum(sizes))
        return at_once(self._like(x, _resized(x, dim, sizes[self.index])), later)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], dim: int = 0, join: int | None = None, later: bool = False
    ) -> Any:
        join = dim if join is None else join
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "all_to_all", x.shape[dim], sum(send))
        if join % x.dim() == dim % x.dim():
            return at_once(self._like(x, _resized(x, dim, sum(recv))), later)
        check_rows(self, "all_to_all", x.shape[join], recv[self.index])
        cut = _resized(x, dim, send[self.index])
        cut[join] = sum(recv)
        return at_once(self._like(x, cut), later)

    def gather_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        for x, each, dim in zip(xs, sizes, dims):
            if self.size > 1:
                check_rows(self, "gather_many", x.shape[dim], each[self.index])
                self._like(x, x.shape)
        return _nothing if later else None

    def scatter_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        for x, each, dim in zip(xs, sizes, dims):
            check_rows(self, "scatter_many", x.shape[dim], sum(each))
            self._like(x, x.shape)
        return _nothing if later else None

    def sum_many(self, xs: Sequence[Tensor], later: bool = False) -> Any:
        for x in xs:
            self._like(x, x.shape)
        return _nothing if later else None

    def shift(self, x: Tensor, k: int) -> Tensor:
        return self._like(x, x.shape)

    def barrier(self) -> None:
        pass

    def _like(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        if self.size == 1:
            return x.detach()
        if not x.is_meta:
            raise ValueError(
                f"{self.name} of {self.size} ranks is on paper: it takes meta tensors, and this one, {tuple(x.shape)}, has data on {x.device}. "
                "lf.sim.spmd runs ranks with data, lf.connect real ones"
            )
        return x.new_empty(list(shape))


class MetaAxes:
    """The same as `lf.axes.Axes`: the axes of the rank `rank` of `mesh`. `ranks`: those of the world that the mesh numbers 0, 1, …"""

    def __init__(self, mesh: Mesh, rank: int = 0, ranks: Sequence[int] | None = None):
        self.mesh, self.rank, self.whole = mesh.fill(), rank, ranks is None
        self.ranks = range(self.mesh.size) if ranks is None else tuple(ranks)
        self.coords = self.mesh.coords(rank)
        self._axes: dict[tuple[str, ...], MetaAxis] = {}

    def __getitem__(self, names: str | tuple[str, ...]) -> MetaAxis:
        names = (names,) if isinstance(names, str) else tuple(names)
        if names not in self._axes:
            self._axes[names] = MetaAxis(self.mesh, self.rank, names, self.ranks)
        return self._axes[names]

    def part(self, names: str | tuple[str, ...], n: int) -> tuple[MetaAxis, MetaAxis]:
        names = (names,) if isinstance(names, str) else tuple(names)
        whole = self[names]
        if n < 1 or whole.size % n:
            raise MeshError(f"{whole.name} has {whole.size} ranks, which {n} does not divide: take a divisor")
        return whole.part(n)

    def over(self, mesh: Mesh, ranks: Sequence[int], parts: Sequence[tuple[tuple[str, ...], int]] = ()) -> MetaAxes | None:
        mesh, place = placed(self, mesh, ranks)
        return None if place is None else MetaAxes(mesh, place, ranks)

    def links(self) -> MetaAxis:
        of_world(self, "links")
        return self.world

    def pipe(self) -> MetaAxis:
        return self["pp"]

    @property
    def world(self) -> MetaAxis:
        return self["pp", "dp", "cp", "tp"]

    @property
    def first_of_node(self) -> bool:
        return self.ranks[self.rank] == 0


def _nothing() -> None:
    """What waits for what is there already."""


def _resized(x: Tensor, dim: int, n: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = n
    return shape

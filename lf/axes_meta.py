"""One rank of any mesh on meta tensors: every collective gives a tensor of the right shape and dtype, and nothing is sent.

The same two classes as `lf/axes.py` and `lf/axes_sim.py` have; model code cannot tell. What a collective needs beside its result, it makes here as
it does over processes, so that memory is what it is there. Sizes of axes are worked out without the ranks on them: one of 30,000 ranks costs what
one of two does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.axes import of_world, placed
from lf.axis import Axis, Later
from lf.mesh import Mesh, MeshError
from lf.position import Position


class NobodyAxis(Axis):
    """An axis whose group is nobody: what it makes, and for how long, is what an axis over processes makes; what stands in it is nothing."""

    def __init__(self, ranks: tuple[int, ...], index: int, name: str):
        self.ranks, self.size, self.index, self.name, self._slot, self.ways = ranks, len(ranks), index, name, None, None

    def shift(self, x: Tensor, k: int) -> Tensor:
        if k % self.size == 0:
            return x.detach()
        return torch.empty_like(self._taken(x.detach().contiguous()))

    def send(self, x: Tensor, to: int, what: str) -> Callable[[], None]:
        x = self._taken(x.detach().contiguous())

        def wait() -> None:
            assert x.dim() >= 0  # held here, as where it has to leave

        return wait

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int, what: str) -> Later:
        out = self._taken(torch.empty(tuple(shape), dtype=dtype, device=device))
        return lambda: out

    def barrier(self) -> None:
        pass

    def _pack(self, x: Tensor, packed: Tensor, sizes: Sequence[int], dim: int) -> None:
        """Nothing to copy; there may be thousands of ranks."""

    def _unpack(self, packed: Tensor, out: Tensor, sizes: Sequence[int], dim: int) -> None:
        """The same."""

    def _start(self, collective: Callable[..., Any], *args: Any) -> Any:
        self._taken(args[0])
        return _Done()

    def _launched(self, into: list[Tensor], given: list[Tensor], name: str) -> Callable[[], None]:
        for x in given:
            self._taken(x)
        return super()._launched(into, given, name)

    def _group(self) -> Any:
        return _Nobody()

    def _taken(self, x: Tensor) -> Tensor:
        """What is given to nobody."""
        return x


class MetaAxis(NobodyAxis):
    """The same as `lf.axis.Axis`, for tensors without data. `ranks` is worked out when it is asked for."""

    def __init__(self, mesh: Mesh, rank: int, names: tuple[str, ...], of: Sequence[int]):
        self.mesh, self.rank, self.names, self.name, self.of = mesh, rank, names, "·".join(names) or "self", of
        self._slot, self.ways = None, None
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
    def ranks(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.of[r] for r in (self.mesh.group(self.rank, *self.names) if self.names else (self.rank,)))[self.every]

    def _taken(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise ValueError(
                f"{self.name} of {self.size} ranks is on paper: it takes meta tensors, and this one, {tuple(x.shape)}, has data on {x.device}. "
                "lf.sim.spmd runs ranks with data, lf.connect real ones"
            )
        return x


class _Done:
    """What was started where nobody is."""

    def wait(self) -> None:
        pass


class _Nobody:
    """A group of processes that takes everything and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., _Done]:
        return lambda *args: _Done()


class MetaAxes:
    """The same as `lf.axes.Axes`: the axes of the rank `rank` of `mesh`. `ranks`: those of the world that the mesh numbers 0, 1, …"""

    def __init__(self, mesh: Mesh, rank: int = 0, ranks: Sequence[int] | None = None, position: Position | None = None):
        self.mesh, self.rank, self.whole = mesh.fill(), rank, ranks is None
        self.ranks = range(self.mesh.size) if ranks is None else tuple(ranks)
        self.coords = self.mesh.coords(rank)
        self.position = Position(self.ranks[rank]) if position is None else position
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
        return None if place is None else MetaAxes(mesh, place, ranks, self.position)

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

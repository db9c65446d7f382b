"""What travels over each axis, counted where it is asked for: the axes of `lf/axes.py`, `lf/axes_sim.py` or `lf/axes_meta.py`, in a wrapper.

    traffic = Traffic()
    axes = CountedAxes(axes, traffic)
    …
    traffic["tp", "all_gather"]     → Count(calls, payload, sent)

payload is the whole tensor, in bytes; sent is what leaves this rank of it. On an axis of n ranks, of a whole of N bytes:

    all_gather, reduce_scatter   N · (n-1)/n           as rings and trees with the least traffic do, rounded down
    all_reduce                   2 · N · (n-1)/n       a reduce_scatter and an all_gather
    all_to_all, send, shift      what goes to others   of N bytes that this rank has
    recv                         0                     N is what comes

Rows that a backend is given to make uneven pieces even do not count. An axis of one rank has no traffic. The *_many of an axis are one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from lf.mesh import Mesh

SHARES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""How often the (n-1)/n of a collective leave a rank."""


def sent(kind: str, payload: int, ranks: int) -> int:
    """Bytes that leave each of `ranks` in one of SHARES, of a whole of `payload` bytes."""
    return SHARES[kind] * payload * (ranks - 1) // ranks


@attrs.frozen
class Count:
    """Calls, and bytes of them together."""

    calls: int = 0
    payload: int = 0
    sent: int = 0


class Traffic(Mapping[tuple[str, str], Count]):
    """(name of the axis, kind) → Count, of one rank. Kinds: all_reduce, all_gather, reduce_scatter, all_to_all, shift, send, recv."""

    def __init__(self) -> None:
        self._counts = dict[tuple[str, str], Count]()

    def __getitem__(self, key: tuple[str, str]) -> Count:
        return self._counts[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(sorted(self._counts))

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, axis: str, kind: str, payload: int, sent: int) -> None:
        c = self._counts.get((axis, kind), Count())
        self._counts[axis, kind] = Count(c.calls + 1, c.payload + payload, c.sent + sent)

    def of_axes(self) -> dict[str, int]:
        """Bytes that leave this rank, by axis."""
        out = dict[str, int]()
        for axis, kind in self:
            out[axis] = out.get(axis, 0) + self[axis, kind].sent
        return out


class CountedAxis:
    """The same as the axis that it is of."""

    def __init__(self, axis: Any, traffic: Traffic):
        self.axis, self.traffic = axis, traffic

    def __getattr__(self, name: str) -> Any:
        return getattr(self.axis, name)

    def sum(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)

    def max(self, x: Tensor) -> Tensor:
        return self.all_reduce(x, "max")

    def all_reduce(self, x: Tensor, op: str = "sum", later: bool = False, spend: bool = False) -> Any:
        self._count("all_reduce", _bytes(x))
        return self.axis.all_reduce(x, op, later, spend)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        self._count("all_gather", _bytes(x, dim, sum(sizes)))
        return self.axis.all_gather(x, sizes, dim, later)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        self._count("reduce_scatter", _bytes(x))
        return self.axis.reduce_scatter(x, sizes, dim, later)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], dim: int = 0, join: int | None = None, later: bool = False
    ) -> Any:
        self._count("all_to_all", _bytes(x), _bytes(x) - _bytes(x, dim, send[self.axis.index]))
        return self.axis.all_to_all(x, send, recv, dim, join, later)

    def gather_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        self._count("all_gather", sum(map(_bytes, outs)))
        return self.axis.gather_many(outs, xs, sizes, dims, later)

    def scatter_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        self._count("reduce_scatter", sum(map(_bytes, xs)))
        return self.axis.scatter_many(outs, xs, sizes, dims, later)

    def sum_many(self, xs: Sequence[Tensor], later: bool = False) -> Any:
        self._count("all_reduce", sum(map(_bytes, xs)))
        return self.axis.sum_many(xs, later)

    def shift(self, x: Tensor, k: int) -> Tensor:
        if k % self.axis.size:
            self._count("shift", _bytes(x), _bytes(x))
        return self.axis.shift(x, k)

    def send(self, x: Tensor, to: int, what: str) -> Callable[[], None]:
        self._count("send", _bytes(x), _bytes(x))
        return self.axis.send(x, to, what)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int, what: str) -> Callable[[], Tensor]:
        self._count("recv", math.prod(shape) * dtype.itemsize, 0)
        return self.axis.recv(shape, dtype, device, source, what)

    def _count(self, kind: str, payload: int, leaves: int | None = None) -> None:
        if self.axis.size > 1:
            self.traffic.add(self.axis.name, kind, payload, sent(kind, payload, self.axis.size) if leaves is None else leaves)


class CountedAxes:
    """The same as the axes that they are of, whatever these are."""

    def __init__(self, axes: Any, traffic: Traffic):
        self.axes, self.traffic = axes, traffic

    def __getattr__(self, name: str) -> Any:
        return getattr(self.axes, name)

    def __getitem__(self, names: str | tuple[str, ...]) -> CountedAxis:
        return self._counted(self.axes[names])

    def part(self, names: str | tuple[str, ...], n: int) -> tuple[CountedAxis, CountedAxis]:
        inner, outer = self.axes.part(names, n)
        return self._counted(inner), self._counted(outer)

    def over(self, mesh: Mesh, ranks: Sequence[int], parts: Sequence[tuple[tuple[str, ...], int]] = ()) -> CountedAxes | None:
        axes = self.axes.over(mesh, ranks, parts)
        return None if axes is None else CountedAxes(axes, self.traffic)

    def links(self) -> CountedAxis:
        return self._counted(self.axes.links())

    def pipe(self) -> CountedAxis:
        return self._counted(self.axes.pipe())

    @property
    def world(self) -> CountedAxis:
        return self._counted(self.axes.world)

    def _counted(self, axis: Any) -> CountedAxis:
        return CountedAxis(axis, self.traffic)


def _bytes(x: Tensor, dim: int = 0, rows: int | None = None) -> int:
    """Of x, or with so many rows along `dim`."""
    n = x.numel() if rows is None else math.prod(rows if d == dim % x.dim() else k for d, k in enumerate(x.shape))
    return n * x.element_size()

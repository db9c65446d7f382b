"""Simulated axes under a meter: what a rank makes for a collective is what it makes over processes, and the simulation itself does not count.

Each collective runs twice: over nobody, which makes what is to be made, where the meter sees it, and over the threads, whose numbers it then gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.axes_meta import NobodyAxis
from lf.axes_sim import SimAxes, SimAxis
from lf.axis import at_once
from lf.mesh import Mesh
from lf.meter import Meter


class MeteredAxis:
    """The same as the axis that it is of, which is of threads."""

    def __init__(self, axis: SimAxis, meter: Meter):
        self.axis, self.meter = axis, meter
        self.nobody = NobodyAxis(axis.ranks, axis.index, axis.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.axis, name)

    def sum(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)

    def max(self, x: Tensor) -> Tensor:
        return self.all_reduce(x, "max")

    def all_reduce(self, x: Tensor, op: str = "sum", later: bool = False, spend: bool = False) -> Any:
        return self._made(lambda axis, x, later: axis.all_reduce(x, op, later, spend), x, later)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        return self._made(lambda axis, x, later: axis.all_gather(x, sizes, dim, later), x, later)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        return self._made(lambda axis, x, later: axis.reduce_scatter(x, sizes, dim, later), x, later)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], dim: int = 0, join: int | None = None, later: bool = False
    ) -> Any:
        return self._made(lambda axis, x, later: axis.all_to_all(x, send, recv, dim, join, later), x, later)

    def gather_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        return self._filled(lambda axis, outs, xs: axis.gather_many(outs, xs, sizes, dims, True), outs, xs, later)

    def scatter_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        return self._filled(lambda axis, outs, xs: axis.scatter_many(outs, xs, sizes, dims, True), outs, xs, later)

    def sum_many(self, xs: Sequence[Tensor], later: bool = False) -> Any:
        return self._filled(lambda axis, outs, _: axis.sum_many(outs, True), xs, (), later)

    def shift(self, x: Tensor, k: int) -> Tensor:
        return self._made(lambda axis, x, later: at_once(axis.shift(x, k), later), x, False)

    def send(self, x: Tensor, to: int, what: str) -> Callable[[], None]:
        left = self.nobody.send(x, to, what)
        with self.meter.quiet():
            self.axis.send(x, to, what)  # who simulates sending never waits
        return left

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int, what: str) -> Callable[[], Tensor]:
        here, arrived = self.nobody.recv(shape, dtype, device, source, what), self.axis.recv(shape, dtype, device, source, what)
        meter = self.meter

        def wait() -> Tensor:
            with meter.quiet():
                return here().copy_(arrived())

        return wait

    def _made(self, collective: Callable[[Any, Tensor, bool], Any], x: Tensor, later: bool) -> Any:
        """collective(axis, x, later), whose result is new."""
        if self.axis.size == 1:
            return collective(self.axis, x, later)
        meter, made = self.meter, collective(self.nobody, x, True)
        with meter.quiet():
            value = collective(self.axis, x.detach().clone(), False)  # a clone: others hold it until the last has looked at it

        def wait() -> Tensor:
            out = made()
            with meter.quiet():
                return out.copy_(value)

        return wait if later else wait()

    def _filled(
        self, collective: Callable[[Any, Sequence[Tensor], Sequence[Tensor]], Any], outs: Sequence[Tensor], xs: Sequence[Tensor], later: bool
    ) -> Any:
        """collective(axis, outs, xs), which returns what waits until `outs` are filled."""
        meter, made = self.meter, collective(self.nobody, outs, xs)
        with meter.quiet():
            values = [out.detach().clone() for out in outs]
            done = collective(self.axis, values, [x.detach().clone() for x in xs])

        def wait() -> None:
            made()
            with meter.quiet():
                done()
                for out, value in zip(outs, values):
                    out.copy_(value)

        return wait if later else wait()


class MeteredAxes:
    """The same as the axes that they are of, which are of threads."""

    def __init__(self, axes: SimAxes, meter: Meter):
        self.axes, self.meter = axes, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.axes, name)

    def __getitem__(self, names: str | tuple[str, ...]) -> MeteredAxis:
        return MeteredAxis(self.axes[names], self.meter)

    def part(self, names: str | tuple[str, ...], n: int) -> tuple[MeteredAxis, MeteredAxis]:
        inner, outer = self.axes.part(names, n)
        return MeteredAxis(inner, self.meter), MeteredAxis(outer, self.meter)

    def over(self, mesh: Mesh, ranks: Sequence[int], parts: Sequence[tuple[tuple[str, ...], int]] = ()) -> MeteredAxes | None:
        axes = self.axes.over(mesh, ranks, parts)
        return None if axes is None else MeteredAxes(axes, self.meter)

    def links(self) -> MeteredAxis:
        return MeteredAxis(self.axes.links(), self.meter)

    def pipe(self) -> MeteredAxis:
        return MeteredAxis(self.axes.pipe(), self.meter)

    @property
    def world(self) -> MeteredAxis:
        return MeteredAxis(self.axes.world, self.meter)

"""Ranks without machines: `spmd` runs every rank of a mesh in this process, with real data; `trace` one rank of any mesh on paper.

    found = lf.sim.trace(mesh, rank, fn, …)            fn(axes, …) on meta tensors, with lf.devices.paper as its device
    each = lf.sim.spmd(mesh, lf.sim.measured, fn, …)   the same of every rank, with data
    found.traffic, found.flops, found.peak, found.peak_by_kind, found.assumed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from lf.axes_counted import CountedAxes, Traffic
from lf.axes_meta import MetaAxes
from lf.axes_metered import MeteredAxes
from lf.axes_sim import CollectiveMismatch, Deadlock, SimAxes, spmd
from lf.mesh import Mesh
from lf.meter import Meter
from lf.paper import Paper

__all__ = ["CollectiveMismatch", "Deadlock", "Trace", "measured", "spmd", "trace"]


@attrs.frozen
class Trace:
    """What a function did on one rank. traffic: (axis, kind) → calls and bytes (lf/axes_counted.py) · flops: operations of matrix products · peak:
    bytes of tensors at most, peak_by_kind: what they were then (lf/meter.py) · assumed: what the trace takes for granted because only data would
    say it, in words · result: of the function; on paper its tensors have no data."""

    traffic: Traffic
    flops: int
    peak: int
    peak_by_kind: dict[str, int]
    assumed: tuple[str, ...]
    result: Any


def trace(mesh: Mesh, rank: int, fn: Callable[..., Any], *args: Any) -> Trace:
    """fn(axes, *args) for one rank of a mesh, however large, as it would run there: its axes are on paper, and its device is to be
    `lf.devices.paper`, whose tensors have no data. Tensors of `args` may have some: a batch has its documents from there.

    With a step made by `lf.train.make` this is the real step, of which each collective, product and storage is counted and nothing computed.
    Mixtures of experts without a limit to what an expert takes are taken to be loaded evenly; `assumed` says so.
    """
    traffic, paper = Traffic(), Paper()
    with paper, Meter(device="meta", read=paper.read) as meter:
        result = fn(CountedAxes(MetaAxes(mesh, rank), traffic), *args)
    return Trace(traffic, meter.flops, meter.peak, meter.peak_by_kind, paper.assumed, result)


def measured(axes: Any, fn: Callable[..., Any], *args: Any, device: str = "cpu") -> Trace:
    """fn(axes, *args), counted on this rank with its data: what `trace` foretells. device: the type of the device whose memory counts."""
    traffic, meter = Traffic(), Meter(device=device)
    with meter:
        result = fn(CountedAxes(MeteredAxes(axes, meter) if isinstance(axes, SimAxes) else axes, traffic), *args)
    return Trace(traffic, meter.flops, meter.peak, meter.peak_by_kind, (), result)

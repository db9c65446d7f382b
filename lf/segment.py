"""A model is a tuple of segments: pure functions over trees of tensors.

    apply(params, x, batch, ctx) -> (x, terms)

    params  {name: Tensor}   this rank's piece of each parameter, in the compute dtype; tied ones under their name here
    x       Tensor           (tokens of this rank, dim), from the segment before; an empty dict enters the first
    batch   Batch            as `shard_batch` leaves it
    terms   {"losses": {objective: sum}}   sums over own tokens, never means; from any segment; {} when there are none
            {"outputs": {name: Tensor}}    (rows of this rank, width), what edges carry into other chains (lf/chains.py)
            {"sums": {name: Tensor}}       counts over own tokens, without a gradient, of a fixed shape (`Model.sums`)

A segment with `inputs` gets a dict x: what the segment before gives, as "x" where that is a tensor, and each input by its name.

`apply` is a module-level function (a partial of one over a frozen config), shared by equal layers, so that each distinct one compiles once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import attrs
from torch import Tensor

from lf.batch import Batch
from lf.spec import LayoutError, Param, Tied

Terms = dict[str, dict[str, Tensor]]
Apply = Callable[[dict[str, Tensor], Any, Batch, Any], tuple[Any, Terms]]


@attrs.frozen
class Segment:
    """`layer` groups segments: the unit of reduction, recompute and compilation. `name` is global, and the checkpoint key. `products`: the
    parameters that arrive as a W, each the weight of one column_linear or row_linear. `flops(batch)`: floating-point operations of forward and
    backward of one microbatch, worked out on the host; equal segments share one function. `host`: the host reads what the device has worked out,
    so that it cannot be compiled. `inputs`: what edges bring to it, `outputs`: what edges take from it."""

    name: str
    layer: str
    params: dict[str, Param | Tied]
    apply: Apply
    products: tuple[str, ...] = ()
    flops: Callable[[Batch], float] | None = None
    host: bool = False
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        if unknown := [name for name in self.products if name not in self.params]:
            have = ", ".join(self.params) or "none"
            raise LayoutError(f"segment {self.name!r}: products names {', '.join(map(repr, unknown))}; its parameters are {have}")


def by_layer(segments: Iterable[Segment]) -> dict[str, tuple[Segment, ...]]:
    """The segments of each layer, in the order in which layers first occur."""
    out: dict[str, list[Segment]] = {}
    for segment in segments:
        out.setdefault(segment.layer, []).append(segment)
    return {layer: tuple(mine) for layer, mine in out.items()}


@attrs.frozen
class Objective:
    """What is minimised: weight · (sum of the loss over all tokens) / (sum of `count`). `count(batch)` is a scalar that needs the plan only."""

    weight: float
    count: Callable[[Batch], Tensor]


def _any_batch(batch: Batch) -> None:
    pass


def _as_it_is(batch: Batch, ctx: Any) -> Batch:
    return batch


def _nothing_new(held: dict[str, Tensor], sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


def _nothing_said(sums: dict[str, Tensor]) -> dict[str, float]:
    return {}


@attrs.frozen
class Model:
    """`config` is what it was built from. `rules`: the layout rules that its segments are written for, where they cannot follow any.

    `accepts(batch)` raises BatchError for a batch that the model cannot take; it reads the plan on the host, before anything is computed.
    `prepare(batch, ctx)` adds to `batch.derived` what several layers need of a batch that lies on the device already, once a microbatch.
    `sums`: what segments count in a step, 'segment/name' → shape. `after_step(held, sums)`: from the tensors of what is not learned that a rank
    holds, by path, and the sums over the step and all ranks, the new ones. `report(sums)`: what a record says of them, numbers by name, on the host.
    """

    config: Any
    segments: tuple[Segment, ...]
    objectives: dict[str, Objective]
    rules: dict[str, str] | None = None
    accepts: Callable[[Batch], None] = _any_batch
    prepare: Callable[[Batch, Any], Batch] = _as_it_is
    sums: dict[str, tuple[int, ...]] = attrs.field(factory=dict)
    after_step: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]] = _nothing_new
    report: Callable[[dict[str, Tensor]], dict[str, float]] = _nothing_said

    @property
    def flops(self) -> Callable[[Batch], float] | None:
        """Floating-point operations of forward and backward of one microbatch over all segments; None where one of them does not say its own."""
        each = Counter(s.flops for s in self.segments)
        if None in each:
            return None
        return lambda batch: float(sum(n * of(batch) for of, n in each.items() if of))

    def layers(self) -> dict[str, tuple[Segment, ...]]:
        """The segments of each layer, in the order in which layers first occur."""
        return by_layer(self.segments)

    def params(self) -> dict[str, Param]:
        """Every parameter once, by path 'segment/name'."""
        return {f"{s.name}/{k}": p for s in self.segments for k, p in s.params.items() if isinstance(p, Param)}

    def __attrs_post_init__(self) -> None:
        names = [s.name for s in self.segments]
        if twice := {n for n in names if names.count(n) > 1}:
            raise LayoutError(f"segment names must be unique; {sorted(twice)} stand twice")
        runs = [layer for layer, _ in groupby(s.layer for s in self.segments)]
        if apart := sorted({layer for layer in runs if runs.count(layer) > 1}):
            raise LayoutError(f"the segments of a layer must follow one another; those of {', '.join(apart)} have others in between")
        known = self.params()
        for segment in self.segments:
            for name, param in segment.params.items():
                if isinstance(param, Tied) and param.path not in known:
                    raise LayoutError(f"{segment.name}/{name} is tied to {param.path!r}, which is no parameter of the model")


def path_of(segment: Segment, name: str) -> str:
    """The path of the logical parameter that the segment calls `name`."""
    param = segment.params[name]
    return param.path if isinstance(param, Tied) else f"{segment.name}/{name}"

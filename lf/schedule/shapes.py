"""What travels between stages, known before anything runs: no shape is sent, each rank works them out from the model and the batch's plan.

`trace` runs the model on meta tensors, for the coordinates of this rank: parameters are their local shapes, axes are on paper
(`lf/axes_meta.py`), ops are the readable twins (`lf/ops`). Layers that are alike are run once. `key` says which batches have one trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lf import ops
from lf.axes_meta import MetaAxes
from lf.batch import Batch
from lf.devices import op_table
from lf.layouts import Layout
from lf.meter import quiet
from lf.parallel.product import Seen, W
from lf.segment import Segment, path_of
from lf.spec import Param

Carry = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""The shape and dtype of each tensor of a carry, by name; one that has no name is "x"."""


Brought = Carry
"""The same of what edges bring to a segment, by input."""


class ShapeError(ValueError):
    """Shapes that cannot be known before a step."""


@attrs.frozen
class Shapes:
    """`inputs`: what enters each stage, nothing the first one · `output`: what leaves the last · `products`: of each segment, what each of its
    `products` sees and gives (rows' shape and dtype, dy's shape and dtype: `probe_of`) · `losses`: the objectives of each stage."""

    inputs: tuple[Carry, ...]
    output: Carry
    products: dict[str, dict[str, Seen]]
    losses: tuple[frozenset[str], ...]


def key(batch: Batch) -> tuple[Any, ...]:
    """Hashable. Batches with equal keys have equal shapes throughout the model."""
    kinds = {"plan": batch.plan, "payload": batch.payload}
    return tuple((kind, name, tuple(v.shape), v.dtype) for kind, values in kinds.items() for name, v in sorted(values.items()))


def trace(layout: Layout, batch: Batch, ctx: Any, brought: Mapping[str, Brought] | None = None, done: dict[Any, Any] | None = None) -> Shapes:
    """The shapes on the rank of `ctx`, for a batch as it is given (its data is not read). No tensor is allocated, no rank is asked. `brought`: to
    each segment that edges bring something to. `done`: what earlier traces of the same layout and context have found of single segments.

    Raises ShapeError that names the segment which reads data on the host, or uses one of its `products` otherwise than as the weight of one
    column_linear or row_linear.
    """
    table = SimpleNamespace(**{**vars(ctx.ops), **vars(op_table(ops))})
    ctx = attrs.evolve(ctx, axes=MetaAxes(layout.mesh, ctx.axes.rank), ops=table)
    done, of_batch = {} if done is None else done, key(batch)
    inputs: list[Carry] = []
    products: dict[str, dict[str, Seen]] = {}
    losses: list[frozenset[str]] = []
    x: Any = {}
    with torch.no_grad(), quiet():  # no memory of the step, and no operation
        derived = batch.derived  # by its shapes, where there is any; else worked out here
        batch = attrs.evolve(batch, plan=_meta(batch.plan), payload=_meta(batch.payload), derived=_meta(derived))
        if not derived:
            batch = _run("Model.prepare", layout.model.prepare, batch, ctx)
        for stage in layout.stages:
            inputs.append(_carry(x))
            found: set[str] = set()
            for segment in stage:
                if new := (brought or {}).get(segment.name):
                    here = {n: torch.empty(shape, dtype=dtype, device="meta") for n, (shape, dtype) in new.items()}
                    x = {**(x if isinstance(x, dict) else {"x": x}), **here}
                shapes = {name: layout.specs[path_of(segment, name)].local_shape(ctx.axes.coords) for name in segment.params}
                like = (of_batch, segment.apply, segment.products, tuple(shapes.items()), tuple(_carry(x).items()))
                if like not in done:
                    done[like] = _segment(segment, shapes, x, batch, ctx)
                x, products[segment.name], objectives = done[like]
                found |= objectives
            losses.append(frozenset(found))
    return Shapes(tuple(inputs), _carry(x), products, tuple(losses))


def _segment(segment: Segment, shapes: dict[str, tuple[int, ...]], x: Any, batch: Batch, ctx: Any) -> tuple[Any, dict[str, Seen], frozenset[str]]:
    """(what leaves the segment, what each of its products has seen, its objectives)."""
    compute, values = ctx.precision.compute, dict[str, Any]()
    for n, shape in shapes.items():
        dtype = param.used_in(compute) if isinstance(param := segment.params[n], Param) else compute
        values[n] = torch.empty(shape, dtype=dtype, device="meta")
    values.update({n: W(values[n], seen=[]) for n in segment.products})
    y, terms = _run(f"segment {segment.name!r}", segment.apply, values, x, batch, ctx)
    for n in segment.products:
        if (times := len(values[n].seen)) != 1:
            raise ShapeError(
                f"segment {segment.name!r} declares {n!r} in `products` and uses it in {times} calls of column_linear or row_linear; such a weight "
                f"is used in exactly one. Leave {n!r} out of `products`: then it arrives as a tensor, and its gradient comes with the backward"
            )
    if isinstance(y, dict) and y.keys() == {"x"}:
        y = y["x"]
    return y, {n: values[n].seen[0] for n in segment.products}, frozenset(terms.get("losses", {}))


def _run(what: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ShapeError(
            f"{what} cannot run on meta tensors: {type(error).__name__}: {error}. The shapes between stages come from such a run, so nothing may "
            f"depend on data that is read on the host (.item(), .tolist(), bool()), and no tensor be made on a device by name: take x.device"
        ) from error


def _meta(values: Any) -> Any:
    """The same tree with its tensors on paper."""
    return tree_map(lambda v: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v, values)


def _carry(x: Any) -> Carry:
    return {name: (tuple(v.shape), v.dtype) for name, v in (x if isinstance(x, dict) else {"x": x}).items()}

"""The interpreter: it runs any program over any layout, one rank's actions in their order. There is no other training step.

`bind` joins a program with a layout once; `run` is a step's work. Its state is `live` (values: written once, taken once, nothing left at the
end) and the gradient sums. Autograd is cut at layer boundaries: a forward keeps, for each layer, its input, its output and its losses; a
backward walks the layers from the last to the first. Where memory runs out, the error says in which action and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from lf.batch import Batch
from lf.layouts import Layout
from lf.parallel.reduce import reduce_gradients
from lf.schedule.ir import Action
from lf.schedule.memory import memory_at
from lf.segment import Segment, Terms, path_of
from lf.spec import Spec


@attrs.frozen
class _Kept:
    """What the forward of one layer leaves for its backward."""

    x: dict[str, Tensor]
    y: dict[str, Tensor]
    losses: dict[str, Tensor]
    paths: tuple[str, ...]


@attrs.frozen
class Layer:
    """The segments of one layer of a stage, each with (its name for a parameter, the path), and the paths it uses and the specs it reduces."""

    segments: tuple[tuple[Segment, tuple[tuple[str, str], ...]], ...]
    paths: tuple[str, ...]
    specs: tuple[Spec, ...]


@attrs.frozen
class Bound:
    """A rank's actions joined with a layout: all that does not change from step to step."""

    actions: tuple[Action, ...]
    layers: tuple[dict[str, Layer], ...]  # of each stage, by name
    paths: tuple[str, ...]


def bind(actions: Sequence[Action], layout: Layout) -> Bound:
    layers = tuple(_layers(layout, stage) for stage in range(len(layout.stages)))
    paths = dict.fromkeys(p for stage in layers for layer in stage.values() for p in layer.paths)
    return Bound(tuple(actions), layers, tuple(paths))


def _layers(layout: Layout, stage: int) -> dict[str, Layer]:
    owned = layout.layer_paths(stage)
    out = {}
    for name, segments in layout.layers(stage).items():
        named = tuple((s, tuple((n, path_of(s, n)) for n in s.params)) for s in segments)
        paths = dict.fromkeys(path for _, pairs in named for _, path in pairs)
        out[name] = Layer(named, tuple(paths), tuple(layout.specs[p] for p in owned[name]))
    return out


def run(
    bound: Bound, params: dict[str, Any], batches: Sequence[Batch], seeds: Mapping[str, Tensor], ctx: Any
) -> tuple[dict[str, Tensor], Terms, Tensor]:
    """(gradients of Σ_k seeds[k] · Σ losses_k by path, reduced over the ranks that hold them; terms summed over microbatches; finite).

    params: {segment: {name: Tensor}}, the compute copy. seeds: objective → λ_k / N_k, a scalar. Gradients come in the master dtype, terms as
    this rank's own sums (P over all ranks). finite, (microbatches,) bool: whether the losses of each microbatch on this rank, and the gradient
    at the first layer of its stages, were finite.
    """
    dtype = ctx.precision.master
    leaves = {path: _lookup(params, path).detach().requires_grad_() for path in bound.paths}
    live: dict[tuple[int, int | None], list[_Kept]] = {}
    grads: dict[str, Tensor] = {}
    terms: Terms = {}
    waits: list[Callable[[], None]] = []
    true = torch.ones((), dtype=torch.bool, device=next(iter(leaves.values())).device)
    seen = [[true] for _ in batches]  # of each microbatch, whether what was looked at is finite

    for a in bound.actions:
        if a.op == "F":
            assert a.microbatch is not None
            x: Any = {}
            kept: list[_Kept] = []
            for name, layer in bound.layers[a.stage].items():
                with memory_at(f"the forward of {name}, action {a}", (len(kept) + 1) / len(bound.layers[a.stage]), grads):
                    done = _forward(layer, leaves, x, batches[a.microbatch], ctx)
                _add_terms(terms, {"losses": done.losses})
                x = done.y
                kept.append(done)
                seen[a.microbatch] += [torch.isfinite(loss.detach()) for loss in done.losses.values()]
            live[a.stage, a.microbatch] = kept
        elif a.op == "B":
            assert a.microbatch is not None
            dy: dict[str, Tensor] = {}
            first: dict[str, Tensor] = {}
            kept, names = live.pop((a.stage, a.microbatch)), [*bound.layers[a.stage]]
            while kept:  # a layer's activations go as soon as its backward is done
                with memory_at(f"the backward of {names[len(kept) - 1]}, action {a}", 1.0, grads):
                    dy = _backward(kept.pop(), leaves, dy, seeds, grads, dtype)
                first = dy or first  # nothing leaves the layer that takes in the tokens
            seen[a.microbatch] += [torch.isfinite(g).all() for g in first.values()]
        else:
            assert a.segment is not None
            specs = bound.layers[a.stage][a.segment].specs
            with memory_at(f"the sum of gradients of {a.segment}, action {a}", 1.0, grads):
                for spec in specs:  # a parameter that no loss reached: its sum over the holders is still a collective that all must join
                    if spec.path not in grads:
                        grads[spec.path] = torch.zeros_like(leaves[spec.path], dtype=dtype, requires_grad=False)
                waits.append(reduce_gradients(specs, grads, ctx.axes))
    for wait in waits:
        wait()
    if live:
        raise AssertionError(f"the program left activations alive: {sorted(live, key=str)}")  # `check` proves that this cannot be
    return grads, terms, torch.stack([torch.stack(flags).all() for flags in seen])


def run_forward(segments: Sequence[Segment], params: dict[str, Any], batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    """The segments one after another, without gradients: (the last x, terms)."""
    x: Any = {}
    terms: Terms = {}
    with torch.no_grad():
        for segment in segments:
            x, new = segment.apply({n: _lookup(params, path_of(segment, n)) for n in segment.params}, x, batch, ctx)
            _add_terms(terms, new)
    return x, terms


def _forward(layer: Layer, leaves: dict[str, Tensor], carry: dict[str, Tensor], batch: Batch, ctx: Any) -> _Kept:
    """One layer, from a cut: its input is a leaf of a graph of its own."""
    x = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in carry.items()}
    losses: dict[str, Tensor] = {}
    with torch.enable_grad():
        y: Any = _unwrap(x)
        for segment, named in layer.segments:
            y, terms = segment.apply({name: leaves[path] for name, path in named}, y, batch, ctx)
            losses.update(terms.get("losses", {}))
    return _Kept(x, _wrap(y), losses, layer.paths)


def _backward(
    layer: _Kept, leaves: dict[str, Tensor], dy: dict[str, Tensor], seeds: Mapping[str, Tensor], grads: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Adds the layer's weight gradients to `grads`; returns the gradient of its input."""
    outputs = [(layer.y[k], g) for k, g in dy.items() if layer.y[k].requires_grad]
    outputs += [(loss, seeds[k].to(loss.dtype)) for k, loss in layer.losses.items()]
    inputs = {k: v for k, v in layer.x.items() if v.requires_grad}
    wanted = [*inputs.values(), *(leaves[p] for p in layer.paths)]
    got: Sequence[Tensor | None] = [None] * len(wanted)
    if outputs:  # none where nothing that is differentiated leaves the layer
        with torch.enable_grad():
            root = _Root.apply([g for _, g in outputs], *(y for y, _ in outputs))
        got = torch.autograd.grad(root, wanted, allow_unused=True)
    for path, g in zip(layer.paths, got[len(inputs) :]):
        if g is None:
            continue
        if path in grads:
            grads[path] += g
        else:  # a copy: autograd may hand one tensor to several leaves, and later microbatches are added in place
            grads[path] = g.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(inputs.items(), got)}


class _Root(torch.autograd.Function):
    """A scalar whose gradient by each output is the one given. autograd.grad takes these too, but loads sympy to compare their shapes: 36 MiB and
    half a second on every rank.
    """

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *ctx.grads


# A carry is a tensor or a dict of tensors; inside the interpreter it is always a dict.
_ONLY = "x"


def _wrap(x: Any) -> dict[str, Tensor]:
    return x if isinstance(x, dict) else {_ONLY: x}


def _unwrap(x: dict[str, Tensor]) -> Any:
    return x[_ONLY] if x.keys() == {_ONLY} else x


def _lookup(params: dict[str, Any], path: str) -> Tensor:
    segment, _, name = path.partition("/")
    return params[segment][name]


def _add_terms(total: Terms, new: Terms) -> None:
    for kind, values in new.items():
        for name, value in values.items():
            sums = total.setdefault(kind, {})
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()

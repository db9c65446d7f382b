"""What a layer costs, found out once for all that are alike: memory, traffic and operations of its forward and backward on one rank.

    layers, tally = Layers(seq_len), Tally(meter, traffic)
    lf.train.make(…, compile=layers.stand_ins(ctx, tally))      each layer is a stand-in that costs what the layer does

A layer is run once, on paper, under a meter of its own. From then on a stand-in takes its place, one node of autograd's graph: it gives tensors of
the same shapes, keeps as many bytes for its backward as the layer does, and for a moment takes up as many more as the layer does at most. So the
interpreter that runs a step runs one of stand-ins, under the meter that measures a step, in a small part of the time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lf.axes_counted import CountedAxes, Traffic
from lf.batch import Batch
from lf.layouts import Layout
from lf.meter import BATCH, GRADIENT, PARAMETER, Meter
from lf.parallel.product import W
from lf.schedule.compiled import Fed, LayerFn, Told, layer_fn
from lf.schedule.vjp import ends, vjp
from lf.segment import Apply, Segment, path_of

Values = Sequence[dict[str, Tensor | W]]
Sent = tuple[str, str, int, int]
"""A collective: its axis, its kind, bytes of the whole, and bytes that leave this rank."""


@attrs.frozen
class Way:
    """One way through a layer, forward or backward. peak: bytes at most beyond those that are there when it begins · flops: operations of products ·
    moved: bytes that all else reads and writes · sent: its collectives, in their order."""

    peak: int = 0
    flops: int = 0
    moved: int = 0
    sent: tuple[Sent, ...] = ()


@attrs.frozen
class Made:
    """A tensor that a way gives, on a storage of `bytes` that it has together with all of the same `place`; or, `given`, on that of a tensor that
    went in, by number; or `value`, itself, what lies on the host. live: it has a gradient. saved: the backward keeps it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    bytes: int
    place: int
    given: int | None = None
    value: Tensor | None = None
    live: bool = False
    saved: bool = False


@attrs.frozen
class Costs:
    """Of a layer, on one rank, for a microbatch. kept: bytes that its forward keeps for its backward besides what went in and came out · saved:
    numbers of the tensors that went in and that the backward keeps by itself · outputs: what comes out, and `names`, where · grads: what its
    backward gives for each tensor that went in and wants one, None for nothing."""

    forward: Way
    backward: Way
    kept: int
    saved: tuple[int, ...]
    outputs: tuple[Made, ...]
    names: Any
    grads: tuple[Made | None, ...]


@attrs.define
class Tally:
    """What a step comes to: a meter, the traffic of its axes, and bytes that all but products read and write."""

    meter: Meter
    traffic: Traffic
    moved: int = 0

    def add(self, way: Way) -> None:
        """A way through a layer, as the meter and the axes would have seen it."""
        if way.peak:
            torch.empty(way.peak, dtype=torch.uint8, device="meta")  # and gone at once
        self.meter.flops += way.flops
        self.moved += way.moved
        for sent in way.sent:
            self.traffic.add(*sent)


class _Listed(Traffic):
    """Traffic that remembers each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def add(self, axis: str, kind: str, payload: int, sent: int) -> None:
        self.sent.append((axis, kind, payload, sent))

    def taken(self) -> tuple[Sent, ...]:
        """Those since the last time."""
        sent, self.sent = tuple(self.sent), []
        return sent


class Layers:
    """The costs of layers that have been run, by all that they depend on. It may serve many plans: what is alike in them is run once.
    seq_len: tokens of a document."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.known: dict[Any, Costs] = {}

    def stand_ins(self, ctx: Any, tally: Tally) -> Callable[[tuple[Apply, ...]], LayerFn]:
        """(apply functions of its segments) → the stand-in of a layer. ctx: the context of the step, whose axes are `CountedAxes`. Where a program
        moves single tensors of a layer, or makes them again, the layer itself is run."""

        def stand_in(applies: tuple[Apply, ...]) -> LayerFn:
            layer = layer_fn(applies)

            def run(values: Values, x: Any, batch: Any, own: Any, fed: Fed) -> Told:
                carry = x if isinstance(x, dict) else {"x": x}
                if fed or own.ops is not ctx.ops or any(v.grad_fn is not None for v in carry.values()):
                    return layer(values, x, batch, own, fed)
                with tally.meter.quiet():
                    costs = self.costs(applies, values, x, batch, own)
                return _stood_in(costs, inputs(values, carry), tally)

            return run

        return stand_in

    def costs(self, applies: tuple[Apply, ...], values: Values, x: Any, batch: Any, ctx: Any) -> Costs:
        """Of a layer with weights and inputs like these."""
        axes = ctx.axes
        where = tuple((name, axes.mesh[name], axes.coords[name]) for name in ("tp", "cp", "ep", "etp"))
        tensors, shape = tree_flatten([list(values), x, batch.plan, batch.payload, batch.derived])
        looks = tuple((tuple(t.shape), t.stride(), t.dtype, t.requires_grad) if isinstance(t, Tensor) else t for t in tensors)
        key = (applies, looks, str(shape), where, ctx.precision, ctx.dispatch, torch.is_grad_enabled(), tuple(vars(ctx.ops).values()))
        if key not in self.known:
            self.known[key] = _measured(layer_fn(applies), values, x, batch, ctx, self.seq_len)
        return self.known[key]


def inputs(values: Values, carry: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors that go into a layer: the carry, then of each parameter its value and its probes. The sums of gradients do not count."""
    out = [*carry.values()]
    for segment in values:
        for w in segment.values():
            out += [w.value, *(w.probe or ())] if isinstance(w, W) else [w]
    return out


class _Sheet(Meter):
    """The meter of a layer, which also counts the bytes that operations read and write, but for products and views. Of attention it counts the scores
    that are not masked, where the formulas of a meter count all: a document of n tokens has n(n+1)/2."""

    def __init__(self, known: Mapping[str, Any], seq_len: int):
        super().__init__(known, "meta")
        self.moved, self.seq_len = 0, seq_len
        aten, pairs = torch.ops.aten, self._pairs
        forward, backward = partial(_scores, pairs, 1, 1), partial(_scores, pairs, 3, 2)
        self._of = self._of | dict.fromkeys((aten._scaled_dot_product_flash_attention_for_cpu, aten._flash_attention_forward), forward)
        self._of |= dict.fromkeys((aten._scaled_dot_product_flash_attention_for_cpu_backward, aten._flash_attention_backward), backward)

    def _pairs(self, q: Tensor) -> int:
        """Heads and pairs of a query and a key that it sees, for q (tokens, heads, d) or (documents, heads, tokens, d)."""
        return q.numel() // q.shape[-1] * (self.seq_len + 1) // 2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not (func.is_view or func.overloadpacket in self._of or "empty" in func.__name__):
            self.moved += sum(x.numel() * x.element_size() for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out

    def begin(self) -> int:
        """A way is counted from here on. What there is now."""
        self.peak, self.flops, self.moved = self.now, 0, 0
        return self.now


def _scores(pairs: Callable[[Tensor], int], wide: int, narrow: int, *args: Any, **more: Any) -> int:
    """Operations of attention: so many products as wide as a key, and as a value. The scores and what they weigh; backward the scores again, and two
    gradients of each (dy stands before q there)."""
    q, _, v = args[wide // 2 : wide // 2 + 3]
    return 2 * pairs(q) * (wide * q.shape[-1] + narrow * v.shape[-1])


def _measured(layer: LayerFn, values: Values, x: Any, batch: Any, ctx: Any, seq_len: int) -> Costs:
    """What the layer does to tensors like these, which are left as they are."""
    fresh = {name: _fresh(v) for name, v in (x if isinstance(x, dict) else {"x": x}).items()}
    into = inputs(values, fresh)
    numbers, n = {_key(v): i for i, v in reversed([*enumerate(into)])}, len(into)
    sums = [w.acc for segment in values for w in segment.values() if isinstance(w, W)]
    sheet = _Sheet({PARAMETER: into, GRADIENT: sums, BATCH: [batch.plan, batch.payload, batch.derived]}, seq_len)
    traffic = _Listed()
    ctx = attrs.evolve(ctx, axes=CountedAxes(ctx.axes.axes, traffic))
    before = sheet.begin()
    with sheet:
        outs, names = tree_flatten(layer(values, fresh if isinstance(x, dict) else fresh["x"], batch, ctx, ()))
    forward = Way(sheet.peak - before, sheet.flops, sheet.moved, traffic.taken())
    made, places = [], dict[int, int]()
    for y in outs:
        made.append(_made(y, numbers, places))
    if not (graph := [y for y in outs if y.requires_grad]):
        return Costs(forward, Way(), 0, (), tuple(made), names, ())
    held, dys = ends(graph), [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in graph]
    refs = [weakref.ref(y.untyped_storage()) for y in outs]
    del y
    outs.clear()
    graph.clear()
    made = [attrs.evolve(m, saved=m.given is None and m.value is None and ref() is not None) for m, ref in zip(made, refs)]
    kept = sheet.now - before - sum({m.place: m.bytes for m in made if m.saved}.values())
    wanted = [v for v in into if v.requires_grad]
    others = [(i, weakref.ref(v.untyped_storage())) for i, v in enumerate(into) if i < len(fresh) and not v.requires_grad]
    fresh.clear()
    into.clear()
    saved = {i for i, ref in others if ref() is not None}
    sheet.mark(GRADIENT, dys)
    there = sheet.begin()
    with sheet:
        got = vjp(held, dys, wanted)
    backward = Way(sheet.peak - there, sheet.flops, sheet.moved, traffic.taken())
    numbers.update((_key(dy), n + i) for i, dy in enumerate(dys))
    places = {}
    grads = [None if g is None else _made(g, numbers, places) for g in got]
    saved |= {g.given for g in grads if g is not None and g.given is not None and g.given < n}
    return Costs(forward, backward, kept, tuple(sorted(saved)), tuple(made), names, tuple(grads))


def _fresh(v: Tensor) -> Tensor:
    """A tensor like it on a storage of its own; what lies on the host, whose values count, is itself."""
    return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device).requires_grad_(v.requires_grad) if v.is_meta else v


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _made(x: Tensor, numbers: Mapping[int, int], places: dict[int, int]) -> Made:
    """numbers: of what went in, by storage · places: of the storages that were made, as far as they are known."""
    key, value = _key(x), None if x.is_meta else x.detach()
    place = places.setdefault(key, len(places))
    bytes, offset = x.untyped_storage().nbytes(), int(x.storage_offset())
    return Made(tuple(x.shape), x.stride(), offset, x.dtype, bytes, place, numbers.get(key), value, x.requires_grad)


def _make(made: Sequence[Made | None], given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors as they are described. given: what went in, by number, as far as it is needed."""
    out, places = list[Tensor | None](), dict[int, Tensor]()
    for m in made:
        if m is None or m.value is not None:
            out.append(None if m is None else m.value)
            continue
        if m.given is not None:
            base = given[m.given]
            assert base is not None
        elif m.place not in places:
            base = places[m.place] = torch.empty(m.bytes // m.dtype.itemsize, dtype=m.dtype, device="meta")
        else:
            base = places[m.place].view(m.dtype)
        out.append(base.as_strided(m.shape, m.stride, m.offset))
    return out


def _stood_in(costs: Costs, into: list[Tensor], tally: Tally) -> Told:
    if not any(m.live for m in costs.outputs):
        tally.add(costs.forward)
        return tree_unflatten(_make(costs.outputs, into), costs.names)
    rest: list[Any] = []
    live = iter(_Layer.apply(costs, tally, rest, *into))
    return tree_unflatten([next(live) if m.live else y for m, y in zip(costs.outputs, rest)], costs.names)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, costs: Costs, tally: Tally, rest: list[Any], *into: Tensor) -> Any:
        tally.add(costs.forward)
        outs = _make(costs.outputs, into)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(into[i] for i in costs.saved), *(y for y, m in zip(outs, costs.outputs) if m.saved))
        ctx.kept = [torch.empty(costs.kept, dtype=torch.uint8, device="meta")]
        ctx.costs, ctx.tally, ctx.inputs = costs, tally, len(into)
        rest += [None if m.live else y for y, m in zip(outs, costs.outputs)]
        return tuple(y for y, m in zip(outs, costs.outputs) if m.live)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        costs = ctx.costs
        ctx.tally.add(costs.backward)
        given: list[Tensor | None] = [None] * ctx.inputs
        for i, saved in zip(costs.saved, ctx.saved_tensors):
            given[i] = saved
        ctx.kept.clear()  # as a layer lets go of it on the way: what is made now takes its room
        got = iter(_make(costs.grads, [*given, *dys]))
        return None, None, None, *(next(got) if needed else None for needed in ctx.needs_input_grad[3:])


def chain(layout: Layout, batch: Batch, ctx: Any, layers: Layers) -> dict[str, Costs]:
    """The costs of each layer of the model, one after another, on the rank of ctx and whatever its stage. batch: as `shard_batch` leaves it."""
    out: dict[str, Costs] = {}
    x: Any = {}
    for name, segments in layout.model.layers().items():
        values = [_weights(layout, s, ctx) for s in segments]
        with torch.enable_grad():
            costs = out[name] = layers.costs(tuple(s.apply for s in segments), values, x, batch, ctx)
        carry = inputs(values, x if isinstance(x, dict) else {"x": x})
        x = tree_unflatten(_make(costs.outputs, carry), costs.names)[0]
        x = tree_map(lambda v: v.detach().requires_grad_(v.is_floating_point()), x)
    return out


def _weights(layout: Layout, segment: Segment, ctx: Any) -> dict[str, Tensor | W]:
    """What a segment gets where B follows."""
    out: dict[str, Tensor | W] = {}
    for n in segment.params:
        path = path_of(segment, n)
        spec = layout.specs[path]
        shape, trains = spec.local_shape(ctx.axes.coords), path not in layout.frozen
        value = torch.empty(shape, dtype=spec.param.used_in(ctx.precision.compute), device="meta").requires_grad_(trains)
        product = n in segment.products and trains
        out[n] = W(value, torch.empty(shape, dtype=ctx.precision.master, device="meta")) if product else value
    return out

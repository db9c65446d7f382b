"""Shapes on paper are those of the real run, on every rank of uneven layouts; what cannot be on paper is refused by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from helpers import context

import lf
from lf import parity
from lf.axes import solo
from lf.axes_meta import MetaAxes
from lf.batch import Batch
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.models.small import tiny
from lf.parallel.linear import column_linear
from lf.parallel.product import W
from lf.parallel.redistribute import S
from lf.schedule.shapes import ShapeError, Shapes, key, trace
from lf.segment import Model, Segment, path_of
from lf.sim import spmd
from lf.spec import Param, constant


def described(x: Any) -> dict[str, Any]:
    return {n: (tuple(v.shape), v.dtype) for n, v in (x if isinstance(x, dict) else {"x": x}).items()}


def really(layout: lf.layouts.Layout, params: dict[str, Any], batch: Batch, ctx: lf.Context) -> Shapes:
    """The same record, from a run with data."""
    x, inputs, products, losses = {}, [], {}, []
    batch = lf.shard_batch(batch, layout.model, ctx)
    with torch.no_grad():
        for stage in layout.stages:
            inputs.append(described(x))
            names: set[str] = set()
            for segment in stage:
                paths = {n: path_of(segment, n).split("/") for n in segment.params}
                values = {n: params[s][p].to(ctx.precision.compute) for n, (s, p) in paths.items()}
                values |= {n: W(values[n], seen=[]) for n in segment.products}
                x, terms = segment.apply(values, x, batch, ctx)
                products[segment.name] = {n: values[n].seen[0] for n in segment.products}
                names |= set(terms.get("losses", {}))
            losses.append(frozenset(names))
    return Shapes(tuple(inputs), described(x), products, tuple(losses))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "labels", "precision"), [(17, True, "bf16"), (2, True, "fp64"), (12, False, "bf16")])
def test_shapes_are_those_of_the_real_run(ranks: int, tokens: int, labels: bool, precision: str) -> None:
    """Uneven shares of tokens, heads and words, a stage without layers, products and losses; with logits where there are no labels."""
    mesh, model = lf.Mesh(tp=ranks, dp=1), tiny()
    layout = lf.layout(model, mesh, split=(1, 2, 0, 1), placement=(0, 0, 0, 0))
    batch = parity.random_batches(model, 0, 0, 1, tokens)[0]
    if not labels:
        batch = Batch({k: v for k, v in batch.plan.items() if k != "labels"})

    def body(axes):
        ctx = context(axes, precision)
        return really(layout, parity.randomised(layout, ctx, seed=0), batch, ctx)

    for rank, want in enumerate(spmd(mesh, body)):
        got = trace(layout, batch, context(MetaAxes(mesh, rank), precision))
        assert got == want
        assert got.inputs[0] == {}
        assert got.inputs[2] == got.inputs[3] == got.inputs[1]
        assert got.losses[3] == (frozenset({"cross_entropy"}) if labels else frozenset())
        assert set(got.products["layers.1.mlp"]) == {"gate_up", "down"}


def test_layers_that_are_alike_run_once_and_others_do_not() -> None:
    narrow, wide = (Layer(Attention(heads=4, kv_heads=2, head_dim=4), GatedMLP(n)) for n in (8, 12))
    model = decoder(DecoderConfig(vocab=16, dim=8, layers=(narrow,) * 40 + (wide,) + (narrow,) * 20))
    calls: list[str] = []

    def counted(name: str, apply: Any, *args: Any) -> Any:
        calls.append(name)
        return apply(*args)

    one = {apply: partial(counted, name, apply) for name, apply in {s.name: s.apply for s in reversed(model.segments)}.items()}
    model = attrs.evolve(model, segments=tuple(attrs.evolve(s, apply=one[s.apply]) for s in model.segments))
    batch = parity.random_batches(tiny(), 0, 0, 1, 8)[0]
    rows = len(batch.plan["tokens"])
    shapes = trace(lf.layout(model, lf.Mesh(dp=1)), batch, context(solo()))
    assert calls == ["embed", "layers.0.attn", "layers.0.mlp", "layers.40.mlp", "head"]
    assert shapes.products["layers.39.mlp"]["down"][0] == (rows, 8)
    assert shapes.products["layers.40.mlp"]["down"][0] == (rows, 12)
    assert shapes.products["layers.60.mlp"] == shapes.products["layers.0.mlp"]


def test_the_key_of_a_batch_is_its_shapes() -> None:
    one, same, longer = (parity.random_batches(tiny(), seed, 0, 1, n)[0] for seed, n in ((0, 8), (1, 8), (0, 9)))
    assert key(one) == key(same)
    assert key(one) != key(longer)
    assert key(one) != key(Batch({k: v for k, v in one.plan.items() if k != "labels"}))
    assert key(one) != key(attrs.evolve(one, payload={"pixels": torch.zeros(3)}))
    assert key(one) == key(attrs.evolve(one, derived={"anything": 1}))
    assert len({key(one), key(same)}) == 1


def test_one_rank_of_very_many() -> None:
    """More ranks of tp than heads, more stages than layers: some have nothing, and all know what they pass on."""
    mesh, batch = lf.Mesh(pp=8, dp=256, tp=16), parity.random_batches(tiny(), 0, 0, 1, 8)[0]
    shapes = trace(lf.layout(tiny(), mesh), batch, context(MetaAxes(mesh, mesh.size - 1)))
    assert len(shapes.inputs) == 8
    assert shapes.inputs[-1] == {"x": ((1, 15), torch.float64)}
    assert shapes.losses[-1] == {"cross_entropy"}


def first(p: Any, x: Any, batch: Batch, ctx: Any) -> Any:
    return {"x": F.embedding(batch.plan["tokens"], p["table"]), "ids": batch.plan["tokens"]}, {}


def reads(how: str, p: Any, x: Any, batch: Batch, ctx: Any) -> Any:
    h, ids = x["x"], x["ids"]
    if how == "item":
        h = h[: int(ids.sum())]
    if how == "bool" and (ids > 0).any():
        h = h * 2
    if how == "list":
        h = h * len(ids.tolist())
    if how == "device":
        h = h + torch.ones(3)
    if how == "nonzero":
        h = h[ids > 0]
    axis = ctx.axes["tp"]
    if how == "twice":
        return h + column_linear(column_linear(h, p["w"], axis, S(0)), p["w"], axis, S(0)), {}
    if how == "otherwise":
        return h + F.linear(h, p["w"]), {}
    if how == "never":
        return h, {}
    return {"x": column_linear(h, p["w"], axis, S(0)), "ids": ids}, {}


def layout_that(how: str, products: tuple[str, ...] = ("w",)) -> lf.layouts.Layout:
    table, matrix = Param((5, 3), (None, None), constant(1.0)), Param((3, 3), (None, None), constant(1.0))
    segments = (Segment("first", "first", {"table": table}, first), Segment("second", "second", {"w": matrix}, partial(reads, how), products))
    return lf.layout(Model(None, segments, {}), lf.Mesh(dp=1), split=(1, 1), placement=(0, 0))


BATCH = Batch({"tokens": torch.tensor([0, 1, 2, 4])})


def test_a_carry_of_several_tensors() -> None:
    wanted = {"x": ((4, 3), torch.float64), "ids": ((4,), torch.int64)}
    assert trace(layout_that("nothing"), BATCH, context(solo())) == Shapes(
        ({}, wanted), wanted, {"first": {}, "second": {"w": ((4, 3), torch.float64, (4, 3), torch.float64)}}, (frozenset(), frozenset())
    )


@pytest.mark.parametrize("how", ["item", "bool", "list", "device", "nonzero"])
def test_a_segment_that_reads_data_is_named(how: str) -> None:
    with pytest.raises(ShapeError, match=r"segment 'second' cannot run on meta tensors: .*read on the host \(\.item\(\)"):
        trace(layout_that(how), BATCH, context(solo()))


def test_a_prepare_that_reads_data_is_named() -> None:
    layout = layout_that("nothing")
    model = attrs.evolve(layout.model, prepare=lambda batch, ctx: attrs.evolve(batch, derived={"n": batch.plan["tokens"].max().item()}))
    with pytest.raises(ShapeError, match=r"Model\.prepare cannot run on meta tensors"):
        trace(attrs.evolve(layout, model=model), BATCH, context(solo()))


@pytest.mark.parametrize(("how", "words"), [("twice", "in 2 calls"), ("never", "in 0 calls"), ("otherwise", "cannot run on meta tensors.*not W")])
def test_a_product_is_the_weight_of_one_linear(how: str, words: str) -> None:
    with pytest.raises(ShapeError, match=rf"segment 'second' .*{words}"):
        trace(layout_that(how), BATCH, context(solo()))
    if how != "otherwise":
        assert trace(layout_that(how, ()), BATCH, context(solo())).output["x"] == ((4, 3), torch.float64)

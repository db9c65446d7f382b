"""Heads that predict further ahead, against one ordinary graph that knows no program; tables that are tied within a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_models import mixture

import lf
from lf import parity, tree
from lf.batch import IGNORE
from lf.models.mtp import ahead
from lf.schedule import SCHEDULES
from lf.schedule.build import build
from lf.segment import path_of


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_gradients_are_those_of_one_graph(schedule: str, tied: bool) -> None:
    """A tied table is looked up in `enter`, multiplied in `leave` and `head`: each use counts once, whoever adds it."""
    model = mixture("one", heads=2, tied=tied)
    batches = parity.random_batches(model, 3, 0, 2, 21)

    def both(axes: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        ctx = lf.Context(axes, lf.devices.get("cpu"), "fp64")
        layout = lf.layout(model, axes.mesh)
        params = parity.randomised(layout, ctx, 0)
        program = build(layout, 2, SCHEDULES[schedule].generate)
        grads, metrics = lf.train.gradients(layout, program, ctx)(params, batches)
        leaves = {path: w.clone().requires_grad_(path not in layout.frozen) for path, w in tree.items(params)}
        counts = {k: sum(o.count(b) for b in batches) for k, o in model.objectives.items()}
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            x, mine = {}, lf.shard_batch(batch, model, ctx)
            for segment in model.segments:
                x, terms = segment.apply({n: leaves[path_of(segment, n)] for n in segment.params}, x, mine, ctx)
                for k, loss in terms.get("losses", {}).items():
                    total = total + model.objectives[k].weight * loss / counts[k]
        total.backward()
        assert torch.allclose(metrics["loss"], total.detach(), rtol=1e-12)
        return dict(tree.items(grads)), {path: w.grad for path, w in leaves.items() if w.grad is not None}

    ((got, want),) = lf.sim.spmd(lf.Mesh(dp=1), both)
    assert got.keys() == want.keys()
    for path, g in want.items():
        assert (got[path] - g).abs().max() <= 1e-10 * g.abs().max(), path


def test_what_stands_ahead() -> None:
    cu_seqlens = torch.tensor([0, 3, 4, 6, 6], dtype=torch.int32)
    batch = lf.Batch({"cu_seqlens": cu_seqlens})
    x = torch.tensor([1, 2, 3, 4, 5, 6])
    assert ahead(x, 1, batch, 0).tolist() == [2, 3, 0, 0, 6, 0]
    assert ahead(x, 2, batch, 9).tolist() == [3, 9, 9, 9, 9, 9]
    assert ahead(x, 7, batch, 9).tolist() == [9] * 6


def test_labels_are_one_further_ahead_for_each_head() -> None:
    model = mixture("one", heads=2)
    (batch,) = parity.random_batches(model, 0, 0, 1, 30)
    labels, document = batch.plan["labels"], torch.repeat_interleave(batch.plan["cu_seqlens"].diff().clamp_min(0))
    for k in range(2):
        n = k + 1
        want = sum(
            int(labels[i + n] != IGNORE) for i in range(len(labels) - n) if i + n < len(document) and document[i] == document[i + n]
        )
        assert int(model.objectives[f"mtp_{k}"].count(batch)) == want


def test_without_labels_the_heads_do_nothing() -> None:
    """The logits are those of the same model without heads."""
    plan = {k: v for k, v in parity.random_batches(mixture("one"), 0, 0, 1, 21)[0].plan.items() if k != "labels"}

    def logits(axes: Any, heads: int) -> torch.Tensor:
        ctx = lf.Context(axes, lf.devices.get("cpu"), "fp64")
        model = mixture("one", heads=heads)
        out = lf.forward(model, lf.init(lf.layout(model, axes.mesh), ctx, 0), lf.Batch(plan), ctx)
        assert isinstance(out, torch.Tensor)
        return out

    (with_heads,), (without,) = (lf.sim.spmd(lf.Mesh(dp=1), logits, n) for n in (1, 0))
    assert torch.equal(with_heads, without)


def test_a_head_takes_the_token_that_is_further_ahead() -> None:
    """By hand: what `enter` gives token i is made of the embedding of token i + k + 1 and of the normed trunk (or what the head before gave)."""
    model = mixture("one", heads=2)
    (batch,) = parity.random_batches(model, 5, 0, 1, 30)
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp64")
    params = parity.randomised(lf.layout(model, lf.Mesh(dp=1)), ctx, 0)
    tokens, edges = batch.plan["tokens"], batch.plan["cu_seqlens"]
    g = torch.Generator().manual_seed(0)
    trunk, before = (torch.randn(len(tokens), 15, generator=g, dtype=torch.float64) for _ in range(2))

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + model.config.norm_eps).rsqrt() * gain

    for k in range(2):
        segment = next(s for s in model.segments if s.name == f"mtp.{k}.enter")
        mine = {n: params[path_of(segment, n).partition("/")[0]][path_of(segment, n).partition("/")[2]] for n in segment.params}
        carry: Any = trunk if k == 0 else {"trunk": trunk, "x": before}
        out, _ = segment.apply(mine, carry, lf.shard_batch(batch, model, ctx), ctx)
        hidden = norm(trunk, mine["norm"]) if k == 0 else before
        stops = edges[torch.searchsorted(edges, torch.arange(len(tokens)), right=True)].tolist()
        for i, stop in enumerate(stops):
            word = int(tokens[i + k + 1]) if i + k + 1 < stop else 0
            both = torch.cat([norm(mine["embed"][word], mine["norm_embed"]), norm(hidden[i], mine["norm_hidden"])])
            assert torch.allclose(out["x"][i], mine["join"] @ both, rtol=1e-10, atol=1e-12), (k, i)
        assert torch.equal(out["trunk"], trunk)


def test_a_head_is_judged_by_the_label_that_is_further_ahead() -> None:
    model = mixture("one", heads=2)
    (batch,) = parity.random_batches(model, 5, 0, 1, 30)
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp64")
    params = parity.randomised(lf.layout(model, lf.Mesh(dp=1)), ctx, 0)
    labels, edges = batch.plan["labels"], batch.plan["cu_seqlens"]
    x = torch.randn(len(labels), 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stops = edges[torch.searchsorted(edges, torch.arange(len(labels)), right=True)].tolist()
    for k in range(2):
        segment = next(s for s in model.segments if s.name == f"mtp.{k}.leave")
        mine = {"norm": params[f"mtp.{k}.leave"]["norm"], "weight": params["embed"]["weight"]}
        _, terms = segment.apply(mine, {"trunk": x, "x": x}, lf.shard_batch(batch, model, ctx), ctx)
        h = x * (x.square().mean(-1, keepdim=True) + model.config.norm_eps).rsqrt() * mine["norm"]
        scores = (h @ mine["weight"].T).log_softmax(-1)
        judged = [(i, int(labels[i + k + 1])) for i, stop in enumerate(stops) if i + k + 1 < stop and labels[i + k + 1] != IGNORE]
        assert judged
        assert torch.allclose(terms["losses"][f"mtp_{k}"], -torch.stack([scores[i, label] for i, label in judged]).sum(), rtol=1e-10)

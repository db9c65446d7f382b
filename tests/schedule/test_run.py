"""The interpreter: any order that `check` allows gives the gradients of plain autograd over the whole model."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from helpers import context

import lf
from lf import parity, tree
from lf.axes import solo
from lf.models.small import tiny
from lf.schedule import OVERLAP, Action, check, lower, one_f_one_b
from lf.schedule.bind import bind
from lf.schedule.memory import OutOfMemory
from lf.schedule.run import run, run_forward
from lf.segment import Model, Objective, Segment
from lf.spec import Param, constant


def plain(layout, params, batches, ctx) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Σ of the losses and its gradients by one autograd call over all segments and microbatches."""
    leaves = {path: w.clone().requires_grad_() for path, w in tree.items(params)}
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        x = {}
        for segment in layout.model.segments:
            x, terms = segment.apply({n: leaves[lf.segment.path_of(segment, n)] for n in segment.params}, x, batch, ctx)
            total = total + sum(terms.get("losses", {}).values())
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())))), total.detach()


def forwards() -> tuple[Action, ...]:
    return tuple(Action("F", 0, i) for i in range(3))


LAYERS = ("embed", "layers.0", "layers.1", "head")
BACKWARDS = tuple(Action("B", 0, i) for i in range(3))
ORDERS = {
    "one by one": one_f_one_b(1, 3)[0],
    "all forwards first": (*forwards(), *BACKWARDS),
    "backwards the other way": (*forwards(), *(Action("B", 0, i) for i in reversed(range(3)))),
    "weights last": (*forwards(), *(Action("I", 0, i) for i in range(3)), *(Action("W", 0, i) for i in range(3))),
    "by layers": tuple(Action(op, 0, i, n) for i in range(3) for op, names in (("F", LAYERS), ("I", LAYERS[::-1]), ("W", LAYERS)) for n in names),
    "to the host and back by hand": (*forwards()[:1], Action("OFFLOAD", 0, 0), *forwards()[1:], Action("FETCH", 0, 0), *BACKWARDS),
    "interleaved": (
        *(Action("F", 0, 0), OVERLAP(Action("F", 0, 1), Action("B", 0, 0))),
        *(OVERLAP(Action("B", 0, 1), Action("F", 0, 2)), Action("B", 0, 2)),
    ),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_those_of_plain_autograd(tied: bool, order: str) -> None:
    ctx = context(solo())
    layout = lf.layout(tiny(tied), lf.Mesh(dp=1))
    params = parity.randomised(layout, ctx, seed=3)
    batches = [lf.shard_batch(b, layout.model, ctx) for b in parity.random_batches(layout.model, 3, 0, 3, 17)]
    program = lower((ORDERS[order],), layout)
    check(program, layout, 3)
    weight = torch.tensor(0.25, dtype=torch.float64)
    grads, terms, finite = run(bind(program, layout, ctx), params, batches, {"cross_entropy": weight}, ctx)
    assert finite.tolist() == [True] * 3
    want, total = plain(layout, params, batches, ctx)
    assert grads.keys() == want.keys()
    for path, g in grads.items():
        torch.testing.assert_close(g, want[path] * weight, rtol=1e-11, atol=1e-14, msg=path)
        assert want[path].abs().max() > 0, f"{path}: the comparison would say nothing"
    torch.testing.assert_close(terms["losses"]["cross_entropy"], total, rtol=1e-13, atol=0)


def test_forward_leaves_nothing_to_differentiate() -> None:
    ctx = context(solo())
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    params = parity.randomised(layout, ctx, seed=0)
    (batch,) = parity.random_batches(layout.model, 0, 0, 1, 9)
    _, terms = run_forward(layout.model.segments, params, lf.shard_batch(batch, layout.model, ctx), ctx)
    assert not terms["losses"]["cross_entropy"].requires_grad
    plan = {k: v for k, v in batch.plan.items() if k != "labels"}
    logits, terms = run_forward(layout.model.segments, params, lf.shard_batch(lf.Batch(plan), layout.model, ctx), ctx)
    assert logits.shape == (len(plan["tokens"]), layout.model.config.vocab)
    assert terms == {}


def test_params_are_not_changed_by_a_run() -> None:
    ctx = context(solo())
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    params = parity.randomised(layout, ctx, seed=0)
    before = tree.map(torch.clone, params)
    program = lower(one_f_one_b(1, 1), layout)
    batches = [lf.shard_batch(b, layout.model, ctx) for b in parity.random_batches(layout.model, 0, 0, 1, 9)]
    run(bind(program, layout, ctx), params, batches, {"cross_entropy": torch.ones(())}, ctx)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), params, before)
    assert all(w.grad is None for w in tree.leaves(params))


def test_a_gradient_that_two_parameters_share_is_not_added_twice() -> None:
    """Autograd hands one tensor to both terms of a sum; later microbatches are added in place."""

    def apply(p, x, batch, ctx):
        return {}, {"losses": {"loss": ((p["a"] + p["b"]) * batch.plan["tokens"]).sum()}}

    one = Param((2,), (None,), constant(1.0))
    model = Model(None, (Segment("only", "only", {"a": one, "b": one}, apply),), {"loss": Objective(1.0, lambda batch: torch.tensor(1))})
    ctx, layout = context(solo()), lf.layout(model, lf.Mesh(dp=1))
    batches = [lf.Batch({"tokens": torch.tensor([1.0, 10.0], dtype=torch.float64)})] * 3
    program = lower(one_f_one_b(1, 3), layout)
    grads, *_ = run(bind(program, layout, ctx), lf.init(layout, ctx, 0), batches, {"loss": torch.ones((), dtype=torch.float64)}, ctx)
    assert {k: g.tolist() for k, g in grads.items()} == {"only/a": [3.0, 30.0], "only/b": [3.0, 30.0]}


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_microbatch_that_is_not_finite_is_known(where: str) -> None:
    """Infinity in the forward shows in the loss, in the backward alone in the gradient that arrives at the first layer."""

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, bad: bool) -> torch.Tensor:
            ctx.bad = bad
            return x * torch.inf if bad and where == "forward" else x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            return (g * torch.nan if ctx.bad else g), None

    def spoil(p, x, batch, ctx):
        return Spoiled.apply(x, bool(batch.plan["bad"])), {}

    first, *rest = tiny().segments
    model = attrs.evolve(tiny(), segments=(first, Segment("spoil", "spoil", {}, spoil), *rest))
    ctx, layout = context(solo()), lf.layout(model, lf.Mesh(dp=1))
    rows = parity.random_batches(tiny(), 0, 0, 3, 9)
    batches = [lf.shard_batch(lf.Batch({**b.plan, "bad": torch.tensor(i == 1)}), model, ctx) for i, b in enumerate(rows)]
    program = lower(one_f_one_b(1, 3), layout)
    grads, terms, finite = run(bind(program, layout, ctx), parity.randomised(layout, ctx, 0), batches, {"cross_entropy": torch.ones(())}, ctx)
    assert finite.tolist() == [True, False, True]
    assert torch.isfinite(terms["losses"]["cross_entropy"]) == (where == "backward")
    assert not torch.isfinite(grads["embed/weight"]).all()


def test_memory_that_runs_out_says_in_which_action_and_layer() -> None:
    def full(p, x, batch, ctx):
        return x + torch.empty(1 << 60), {}

    first, *rest = tiny().segments
    model = attrs.evolve(tiny(), segments=(first, Segment("full", "full", {}, full), *rest))
    ctx, layout = context(solo()), lf.layout(model, lf.Mesh(dp=1))
    program = lower(one_f_one_b(1, 1), layout)
    params, batches = lf.init(layout, ctx, 0), parity.random_batches(tiny(), 0, 0, 1, 9)
    with pytest.raises(OutOfMemory, match=r"out of memory in the forward of full, action 0F0: .*allocate memory") as caught:
        run(bind(program, layout, ctx), params, batches, {"cross_entropy": torch.ones(())}, ctx)
    assert caught.value.forward == 2 / 5  # embed has run, full has begun; two layers and the head have not
    assert caught.value.wanted == 4 << 60
    assert caught.value.gradients == 0


def test_offload_and_fetch_copy_and_nothing_else_does(monkeypatch) -> None:
    """Right numbers would come of copying nothing, too."""
    calls: list[str] = []
    for name in ("copy_out", "copy_in"):
        real = getattr(lf.devices.cpu, name)
        monkeypatch.setattr(lf.devices.cpu, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    ctx = context(solo())
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    batches = [lf.shard_batch(b, layout.model, ctx) for b in parity.random_batches(layout.model, 3, 0, 3, 17)]
    row = ORDERS["to the host and back by hand"]
    run(bind(lower((row,), layout), layout, ctx), lf.init(layout, ctx, 0), batches, {"cross_entropy": torch.ones((), dtype=torch.float64)}, ctx)
    assert calls[:4] == ["copy_out"] * 3 + ["copy_in"]  # once for each layer of the one microbatch but embed, which keeps nothing but tokens
    assert set(calls[3:]) == {"copy_in"}

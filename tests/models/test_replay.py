"""Recorded choices of routers, given back: bitwise the same run, and what makes less than float64 comparable where scores nearly tie."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
from moe_models import mixture
from torch import Tensor

import lf
from lf import parity
from lf.batch import BatchError
from lf.config import ConfigError
from lf.mesh import Mesh
from lf.models.replay import recorded, replaying, routers
from lf.models.small import tiny
from lf.schedule.build import build
from lf.segment import Model

CPU = lf.devices.get("cpu")


def tied(model: Model, by: float = 1e-9) -> Model:
    """The same model, whose scores are nearly the same for all experts: no float32 tells them apart but by how it rounds."""

    def apply(of: Any, p: dict[str, Tensor], x: Any, batch: lf.Batch, ctx: Any) -> Any:
        return of({**p, "weight": p["weight"][:1] + by * p["weight"], "bias": 0 * p["bias"]}, x, batch, ctx)

    segments = [attrs.evolve(s, apply=partial(apply, s.apply)) if s.name in routers(model) else s for s in model.segments]
    return attrs.evolve(model, segments=tuple(segments))


def choices_of(model: Model, mesh: str, batch: lf.Batch, seed: int = 0) -> Tensor:
    def rank(axes: Any) -> Tensor:
        ctx = lf.Context(axes, CPU, "fp64")
        params = parity.randomised(lf.layout(model, axes.mesh), ctx, seed)
        return recorded(model, params, lf.shard_batch(batch, model, ctx), ctx)

    found = lf.sim.spmd(Mesh.parse(mesh), rank)
    assert all(torch.equal(c, found[0]) for c in found)
    return found[0]


@pytest.mark.parametrize("router", ["sigmoid", "softmax", "groups", "probability", "position", "one"])
def test_its_own_choices_change_no_bit(router: str) -> None:
    model, mesh = mixture(router, heads=1), Mesh(dp=1)
    taking = replaying(model)
    batches = [parity.random_batches(model, 0, step, 2, 21, 3) for step in range(2)]

    def trace(axes: Any, of: Model, given: Any, record: bool) -> parity.Trace:
        layout = lf.layout(of, axes.mesh)
        return parity.trace(axes, layout, build(layout, 2), given, 0, 0.1, 1.0, "cpu", record=record)

    (one,) = lf.sim.spmd(mesh, trace, model, batches, True)
    given = [[attrs.evolve(b, plan={**b.plan, "choices": c}) for b, c in zip(*pair)] for pair in zip(batches, one.choices)]
    (again,) = lf.sim.spmd(mesh, trace, taking, given, True)
    assert all(torch.equal(a, b) for x, y in zip(one.choices, again.choices) for a, b in zip(x, y)), "what was given is what is recorded"
    for ours, theirs in [*zip(one.metrics, again.metrics), *zip(one.gradients, again.gradients), (one.params, again.params)]:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_they_are_those_of_the_whole_row_on_any_mesh() -> None:
    model = mixture("probability", heads=1)
    (batch,) = parity.random_batches(model, 0, 0, 1, 22, 2)
    want = choices_of(model, "", batch)
    assert want.shape == (len(batch.plan["tokens"]), 2, 2)
    assert (want < 0).any(), "of what was dropped, too"
    assert (want[-2:] == 5).all(), "padding goes nowhere"
    for mesh in ("tp=2,ep=2", "tp=3,etp=3"):
        assert torch.equal(choices_of(model, mesh, batch), want), mesh


def test_other_choices_are_taken_and_weighed() -> None:
    """All tokens to the experts that they like least: the loads say so, the capacity of one run is that of the other, and gradients flow."""
    model = replaying(mixture("probability"))
    (batch,) = parity.random_batches(model, 0, 0, 1, 21)
    own = choices_of(mixture("probability"), "", batch)
    live = (own < 5).all(-1)[:, 0]
    other = torch.where(live[:, None, None], torch.tensor([4, -1]), own)  # expert 4, and expert 0, which is full
    given = attrs.evolve(batch, plan={**batch.plan, "choices": other})
    report = parity.compare(mixture("probability"), Mesh(tp=2, dp=1, ep=2), replayed=True)
    assert report.ok, str(report)

    def rank(axes: Any) -> Any:
        ctx, layout = lf.Context(axes, CPU, "fp64"), lf.layout(model, axes.mesh)
        return lf.train.gradients(layout, build(layout, 1), ctx)(parity.randomised(layout, ctx, 0), [given])

    ((grads, metrics),) = lf.sim.spmd(Mesh(dp=1), rank)
    n = int(live.sum())
    assert metrics["layers.1.route/load"].tolist() == [n, 0, 0, 0, n]
    assert metrics["layers.1.route/dropped"] == n
    moved = grads["layers.1.experts"]["down"].flatten(1).abs().amax(1)
    assert moved[4] > 0
    assert (moved[:4] == 0).all()
    assert grads["layers.1.route"]["weight"].abs().max() > 0


@pytest.mark.parametrize(("precision", "mesh"), [("fp32", Mesh(tp=2, dp=2, ep=2, etp=2)), ("bf16", Mesh(pp=2, tp=2, dp=1, ep=2))])
def test_scores_that_nearly_tie_agree_with_recorded_choices_alone(precision: str, mesh: Mesh) -> None:
    model = tied(mixture())
    assert parity.compare(model, mesh, steps=1).ok, "float64 tells them apart"
    ask = partial(parity.compare, model, mesh, steps=1, precision=precision)
    report = ask()
    assert report.ok, str(report)
    assert all(q.tolerance < q.size for q in report.rows if q.name.startswith("gradient") and q.size > 1e-3)
    failed = ask(replayed=False)
    assert "layers.1.route/load" in {q.name for q in failed.bad}, "a token went elsewhere"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_half_is_seen(precision: str) -> None:
    def spoiled(mesh: Mesh, fn: Any, *args: Any) -> Any:
        traces = lf.sim.spmd(mesh, fn, *args)
        traces[1].gradients[0]["layers.1.route/weight"] *= 0.4
        return traces

    report = parity.compare(mixture(), Mesh(tp=2, dp=1, ep=2), steps=1, precision=precision, spmd=spoiled)
    assert [q.name for q in report.bad] == ["gradient layers.1.route/weight"]


def test_what_cannot_be_is_refused() -> None:
    model = mixture()
    taking = replaying(model)
    (batch,) = parity.random_batches(model, 0, 0, 1, 21)
    n = len(batch.plan["tokens"])

    def with_choices(choices: Tensor) -> lf.Batch:
        return attrs.evolve(batch, plan={**batch.plan, "choices": choices})

    with pytest.raises(BatchError, match="need them in the plan, as `choices`; it has tokens, labels"):
        taking.accepts(batch)
    for wrong in (torch.zeros(n, 1, 3, dtype=torch.int64), torch.zeros(n - 1, 1, 2, dtype=torch.int64), torch.zeros(n, 1, 2)):
        with pytest.raises(BatchError, match=rf"should be \(tokens, layers with a router, experts of a token\) = \({n}, 1, 2\), int64"):
            taking.accepts(with_choices(wrong))
    for value in (6, -6):
        with pytest.raises(BatchError, match=f"layer 0 with a router have {value}; there are 5 experts"):
            taking.accepts(with_choices(torch.full((n, 1, 2), value)))
    with pytest.raises(BatchError, match="outside the vocabulary"):
        taking.accepts(attrs.evolve(with_choices(torch.zeros(n, 1, 2, dtype=torch.int64)), plan={**batch.plan, "tokens": batch.plan["tokens"] + 99}))
    silent = attrs.evolve(batch, plan={k: v for k, v in batch.plan.items() if k != "labels"})
    with pytest.raises(BatchError, match=r"mtp\.0\.route chooses nothing in a batch without labels"):
        choices_of(mixture(heads=1), "", silent)
    assert choices_of(mixture(), "", silent).shape == (n, 1, 2)
    dense = tiny()
    assert replaying(dense) is dense
    for ask in (lambda: choices_of(tiny(), "", batch), lambda: parity.compare(tiny(), Mesh(dp=1), replayed=True)):
        with pytest.raises(ConfigError, match="the model has no router"):
            ask()

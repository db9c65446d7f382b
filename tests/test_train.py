"""A step: one normaliser, one norm, an update that is gated, and everything refusable refused before it runs."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from helpers import context

import lf
from lf import parity, tree
from lf.axes import solo
from lf.mesh import MeshError
from lf.models.small import tiny
from lf.schedule import ProgramError, add_reduce, one_f_one_b
from lf.schedule.build import build
from lf.segment import Objective

ONE = lf.Mesh(dp=1)


def made(model=None, microbatches: int = 2, optimizer=None, clip: float | None = None, axes=None, precision: str = "fp64"):
    ctx = context(axes or solo(), precision)
    layout = lf.layout(model or tiny(), ctx.axes.mesh)
    init, step = lf.train.make(layout, optimizer or lf.optim.sgd(0.1), one_f_one_b(1, microbatches), ctx, clip)
    return init(parity.randomised(layout, ctx, 0)), step


def batches(count: int = 2, step: int = 0) -> list[lf.Batch]:
    return parity.random_batches(tiny(), 0, step, count, 15)


def labels(batch: lf.Batch) -> int:
    return int((batch.plan["labels"] != lf.IGNORE).sum())


def test_the_loss_is_the_mean_over_all_labels_not_a_mean_of_means() -> None:
    rows = batches(3)
    state, step = made(microbatches=3)
    _, all_three = step(state, rows)
    singles = []
    for row in rows:
        state, step = made(microbatches=1)
        singles.append(step(state, [row])[1]["loss"].item())
    counts = [labels(r) for r in rows]
    mean = sum(x * n for x, n in zip(singles, counts)) / sum(counts)
    assert all_three["loss"].item() == pytest.approx(mean, rel=1e-12)
    assert all_three["tokens"].item() == sum(counts)
    assert abs(mean - sum(singles) / 3) > 1e-3, "the rows should tell the two apart"


def test_labels_cut_into_other_microbatches_give_the_same_gradients() -> None:
    """The same row twice is the same as once: both sum and count double."""
    row = batches(1)
    grads = []
    for copies in (1, 3):
        ctx = context(solo())
        layout = lf.layout(tiny(), ONE)
        fn = lf.train.gradients(layout, one_f_one_b(1, copies), ctx)
        grads.append(fn(parity.randomised(layout, ctx, 0), row * copies))
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14), grads[0][0], grads[1][0])
    assert grads[0][1]["grad_norm"].item() == pytest.approx(grads[1][1]["grad_norm"].item(), rel=1e-12)


def test_the_norm_is_that_of_the_gradients() -> None:
    ctx = context(solo())
    layout = lf.layout(tiny(), ONE)
    grads, metrics = lf.train.gradients(layout, one_f_one_b(1, 2), ctx)(parity.randomised(layout, ctx, 0), batches())
    flat = torch.cat([g.flatten() for g in tree.leaves(grads)])
    assert metrics["grad_norm"].item() == pytest.approx(flat.norm().item(), rel=1e-12)


@pytest.mark.parametrize("text", ["dp=1", "dp=2", "dp=2,tp=2"])
def test_metrics_are_equal_on_every_rank(text: str) -> None:
    mesh = lf.Mesh.parse(text)

    def body(axes):
        state, step = made(axes=axes)
        dp = axes["dp"]
        state, metrics = step(state, [b for i, b in enumerate(batches(2 * dp.size)) if i % dp.size == dp.index])
        assert metrics.pop("finite").tolist() == [True, True]
        return {k: v.item() for k, v in metrics.items()}

    results = lf.sim.spmd(mesh, body)
    assert all(r == results[0] for r in results)
    assert results[0].keys() == {"loss", "cross_entropy", "grad_norm", "tokens", "lr", "skipped"}
    assert results[0]["skipped"] == 0
    assert results[0]["tokens"] == sum(labels(b) for b in batches(2 * mesh["dp"]))


def test_objectives_are_weighted_and_each_has_its_own_normaliser() -> None:
    base = tiny()
    ones = attrs.evolve(base, objectives={"cross_entropy": Objective(1.0, base.objectives["cross_entropy"].count)})
    tokens = attrs.evolve(base, objectives={"cross_entropy": Objective(3.0, lambda batch: torch.tensor(len(batch.plan["tokens"])))})
    (_, a), (_, b) = (step(state, batches()) for state, step in (made(ones), made(tokens)))
    n, m = sum(labels(x) for x in batches()), sum(len(x.plan["tokens"]) for x in batches())
    assert b["cross_entropy"].item() == pytest.approx(a["cross_entropy"].item() * n / m, rel=1e-12)
    assert b["loss"].item() == pytest.approx(3 * b["cross_entropy"].item(), rel=1e-12)
    assert b["grad_norm"].item() == pytest.approx(3 * a["grad_norm"].item() * n / m, rel=1e-12)


def moved(clip: float | None) -> tuple[torch.Tensor, float]:
    """(all changes of the parameters under SGD with a rate of 1/8, the gradient norm)."""
    state, step = made(clip=clip, optimizer=lf.optim.sgd(0.125))
    before = tree.map(torch.clone, state.params)
    after, metrics = step(state, batches())
    changes = tree.map(lambda a, b: (b - a).flatten(), before, after.params)
    return torch.cat(tree.leaves(changes)), metrics["grad_norm"].item()


def test_clipping_scales_to_the_largest_norm_and_never_up() -> None:
    free, norm = moved(None)
    assert free.norm().item() == pytest.approx(norm / 8, rel=1e-12)
    clipped, _ = moved(norm / 4)
    assert clipped.norm().item() == pytest.approx(norm / 32, rel=1e-5)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm())
    above, same_norm = moved(norm * 4)
    assert torch.equal(above, free)
    assert same_norm == norm  # what is reported is before clipping


def leaves_of(state: lf.State) -> list[torch.Tensor]:
    return [x.clone() for x in [*tree.leaves(state.params), *tree.leaves(state.optimizer)]]


@pytest.mark.parametrize("optimizer", [lf.optim.adamw(0.1), lf.optim.sgd(0.1)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(optimizer, value: float) -> None:
    state, step = made(optimizer=optimizer, clip=1.0)
    state, metrics = step(state, batches())
    assert not metrics["skipped"]
    state.params["head"]["norm"][0] = value
    before = leaves_of(state)
    state, metrics = step(state, batches(step=1))
    assert metrics["skipped"]
    assert state.step.item() == 2
    for a, b in zip(before, leaves_of(state)):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_a_batch_without_a_label_is_no_division_by_zero() -> None:
    rows = [lf.Batch({**b.plan, "labels": torch.full_like(b.plan["labels"], lf.IGNORE)}) for b in batches()]
    state, step = made(clip=1.0)
    before = leaves_of(state)
    state, metrics = step(state, rows)
    assert (metrics["loss"].item(), metrics["grad_norm"].item(), metrics["tokens"].item()) == (0, 0, 0)
    assert not metrics["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(before, leaves_of(state)))


def test_the_master_is_the_truth_and_params_its_copy() -> None:
    state, step = made(precision="bf16", optimizer=lf.optim.adamw(1e-3))
    for i in range(2):
        state, metrics = step(state, batches(step=i))
    assert math.isfinite(metrics["loss"].item())
    for path, w in tree.items(state.optimizer["master"]):
        assert w.dtype == torch.float32
        assert torch.equal(tree.get(state.params, path), w.to(torch.bfloat16))


def test_the_rate_follows_the_step() -> None:
    state, step = made(optimizer=lf.optim.sgd(lf.optim.warmup_cosine(0.4, 2, 6)))
    rates = []
    for i in range(3):
        state, metrics = step(state, batches(step=i))
        rates.append(metrics["lr"].item())
    assert rates == pytest.approx([0.2, 0.4, 0.4])


def test_what_does_not_fit_is_refused_before_the_first_step() -> None:
    ctx, layout = context(solo()), lf.layout(tiny(), ONE)
    sgd, program = lf.optim.sgd(0.1), one_f_one_b(1, 2)
    with pytest.raises(MeshError, match="the layout is for mesh dp=2, the context has mesh one rank"):
        lf.train.make(lf.layout(tiny(), lf.Mesh(dp=2)), sgd, program, ctx)
    with pytest.raises(ProgramError, match=r"the gradients of microbatches \[1\] would come after it"):
        lf.train.make(layout, sgd, (program[0][:-1],), ctx)
    reduced = add_reduce(program, layout)
    with pytest.raises(ProgramError, match=r"missing: 0REDUCE\[embed\]"):
        lf.train.make(layout, sgd, (reduced[0][:-1],), ctx)
    with pytest.raises(ProgramError, match="it stands twice"):
        lf.train.make(layout, sgd, ((reduced[0][0], *reduced[0]),), ctx)
    with pytest.raises(ValueError, match="clip=0 must be above 0"):
        lf.train.make(layout, sgd, program, ctx, clip=0)
    init, step = lf.train.make(layout, sgd, program, ctx)
    params = lf.init(layout, ctx, 0)
    with pytest.raises(ValueError, match="the program is for 2 microbatches; 3 were given"):
        step(init(params), batches(3))
    del params["head"]["norm"]
    with pytest.raises(ValueError, match="parameters are missing: head/norm"):
        init(params)


def test_several_programs_are_one_step_for_several_numbers_of_microbatches() -> None:
    ctx, layout = context(solo()), lf.layout(tiny(), ONE)
    init, step = lf.train.make(layout, lf.optim.sgd(0.1), [one_f_one_b(1, 1), one_f_one_b(1, 3)], ctx, clip=None)
    for n in (1, 3):
        state, alone = made(microbatches=n)
        _, want = alone(state, batches(n))
        _, got = step(init(parity.randomised(layout, ctx, 0)), batches(n))
        assert got["loss"].item() == want["loss"].item()
    with pytest.raises(lf.batch.BatchError, match="the program is for 1 or 3 microbatches; 2 were given"):
        step(init(parity.randomised(layout, ctx, 0)), batches(2))
    with pytest.raises(ProgramError, match="two programs are for 3 microbatches"):
        lf.train.make(layout, lf.optim.sgd(0.1), [one_f_one_b(1, 3)] * 2, ctx)
    with pytest.raises(ProgramError, match=r"the gradients of microbatches \[2\] would come after it"):
        lf.train.make(layout, lf.optim.sgd(0.1), [one_f_one_b(1, 1), (one_f_one_b(1, 3)[0][:-1],)], ctx)


def test_forward_gives_logits_or_terms() -> None:
    ctx = context(solo())
    layout = lf.layout(tiny(), ONE)
    params = parity.randomised(layout, ctx, 0)
    (batch,) = batches(1)
    logits = lf.forward(layout.model, params, lf.Batch({k: v for k, v in batch.plan.items() if k != "labels"}), ctx)
    terms = lf.forward(layout.model, params, batch, ctx)
    want = torch.nn.functional.cross_entropy(logits, batch.plan["labels"], ignore_index=lf.IGNORE, reduction="sum")
    torch.testing.assert_close(terms["losses"]["cross_entropy"], want, rtol=1e-12, atol=0)


def test_logits_are_whole_on_every_rank() -> None:
    (batch,) = batches(1)
    plan = lf.Batch({k: v for k, v in batch.plan.items() if k != "labels"})

    def body(axes):
        ctx = context(axes)
        return lf.forward(tiny(), parity.randomised(lf.layout(tiny(), axes.mesh), ctx, 0), plan, ctx)

    (one,) = lf.sim.spmd(ONE, body)
    for z in lf.sim.spmd(lf.Mesh(dp=1, tp=3), body):
        torch.testing.assert_close(z, one, rtol=1e-12, atol=1e-12)


def test_a_few_steps_lower_the_loss() -> None:
    state, step = made(optimizer=lf.optim.adamw(0.01, weight_decay=0.0), clip=1.0)
    losses = []
    for _ in range(12):
        state, metrics = step(state, batches())
        losses.append(metrics["loss"].item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("tokens", 37, r"tokens\[3\] = 37 is outside the vocabulary of 37"), ("labels", -7, r"labels\[3\] = -7 is outside"), ("tokens", -1, "outside")],
)
def test_an_id_that_no_rank_has_is_refused(name: str, value: int, message: str) -> None:
    (batch,) = batches(1)
    plan = {k: v.clone() for k, v in batch.plan.items()}
    plan[name][3] = value
    state, step = made(microbatches=1)
    with pytest.raises(lf.batch.BatchError, match=message):
        step(state, [lf.Batch(plan)])


def test_a_batch_without_labels_and_a_wrong_number_of_batches_are_refused() -> None:
    (batch,) = batches(1)
    state, step = made(microbatches=1)
    with pytest.raises(lf.batch.BatchError, match="needs labels in its plan; it has tokens"):
        step(state, [lf.Batch({k: v for k, v in batch.plan.items() if k != "labels"})])
    with pytest.raises(lf.batch.BatchError, match="for 1 microbatches; 2 were given"):
        step(state, [batch, batch])


def test_an_objective_that_no_segment_serves_is_named() -> None:
    model = attrs.evolve(tiny(), objectives={**tiny().objectives, "other": Objective(1.0, lambda b: torch.tensor(1))})
    state, step = made(model, microbatches=1)
    with pytest.raises(lf.config.ConfigError, match="no segment gives a loss for objective other; they give cross_entropy"):
        step(state, batches(1))


@pytest.mark.parametrize("optimizer", [lf.optim.sgd(0.1), lf.optim.adamw(0.1, weight_decay=0.5)], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("mesh", "asked"), [("dp=1", {}), ("pp=2,tp=2", {}), ("pp=3", {"split": "e,2,h"}), ("pp=3", {"split": (0, 4, 0)})])
def test_what_is_frozen_has_no_gradient_and_no_moments_and_stays(optimizer: lf.optim.Optimizer, mesh: str, asked: dict[str, Any]) -> None:
    """On some ranks everything is frozen, on some there is nothing at all; the norm is that of what is trained."""
    frozen, rows = ("embed", "layers.1", "head"), batches()
    seen: list[tree.Tree] = []

    def update(state: tree.Tree, grads: tree.Tree, *rest: Any) -> tree.Tree:
        seen.append(tree.map(torch.clone, grads))
        return optimizer.update(state, grads, *rest)

    def body(axes: Any) -> float:
        ctx, layout = context(axes), lf.layout(tiny(), axes.mesh, frozen=frozen, **asked)
        before = parity.randomised(layout, ctx, 0)
        init, step = lf.train.make(layout, attrs.evolve(optimizer, update=update), build(layout, 2), ctx, None)
        state = init(tree.map(torch.clone, before))
        for kind in state.optimizer.keys() & {"m", "v"}:
            assert [path for path, _ in tree.items(state.optimizer[kind])] == list(layout.trained(axes.coords))
        new, metrics = step(state, rows)
        for copy in (new.optimizer["master"], new.params):
            assert [path for path, _ in tree.items(copy)] == list(layout.held(axes.coords))
        for path, w in tree.items(new.optimizer["master"]):
            assert torch.equal(w, tree.get(before, path)) == (path in layout.frozen), path
        return metrics["grad_norm"].item()

    norms = lf.sim.spmd(lf.Mesh.parse(mesh), body)
    paths = {path for grads in seen for path, _ in tree.items(grads)}
    assert paths == {path for path in tiny().params() if path.startswith("layers.0")}
    if len(seen) == 1:
        assert norms[0] == pytest.approx(torch.cat([g.flatten() for g in tree.leaves(seen[0])]).norm().item(), rel=1e-12)
    (alone,) = lf.sim.spmd(ONE, lambda axes: made_norm(axes, frozen, rows))
    assert norms == pytest.approx([alone] * len(norms), rel=1e-9)


def made_norm(axes: Any, frozen: tuple[str, ...], rows: list[lf.Batch]) -> float:
    ctx, layout = context(axes), lf.layout(tiny(), axes.mesh, frozen=frozen)
    return lf.train.gradients(layout, one_f_one_b(1, 2), ctx)(parity.randomised(layout, ctx, 0), rows)[1]["grad_norm"].item()


def test_a_parameter_of_this_rank_that_is_missing_is_named() -> None:
    def body(axes: Any) -> None:
        ctx, layout = context(axes), lf.layout(tiny(), axes.mesh)
        init, _ = lf.train.make(layout, lf.optim.sgd(0.1), build(layout, 1), ctx)
        params = parity.randomised(layout, ctx, 0)
        init(params)  # those of other stages are not missed
        if axes.coords["pp"] == 1:
            del params["head"]["norm"]
        init(params)

    with pytest.raises(ValueError, match="parameters are missing: head/norm"):
        lf.sim.spmd(lf.Mesh(pp=2), body)

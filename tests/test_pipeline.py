"""Law 1 for every schedule: pipelines with tp and dp beside them, uneven and empty stages, fewer microbatches than stages, recompute and offload."""

from __future__ import annotations

import random
import weakref
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED, context, processes

import lf
from lf import parity, tree
from lf.models.decoder import decoder
from lf.models.small import tiny
from lf.schedule import Action, ProgramError, check
from lf.schedule.bind import bind
from lf.schedule.build import build
from lf.schedule.named import SCHEDULES
from lf.schedule.recompute import parse_offload, parse_recompute
from lf.schedule.run import run
from lf.segment import Model, Objective, Segment
from lf.spec import Param, Tied, normal


def deep(tied: bool = True, layers: int = 4) -> Model:
    config = tiny(tied).config
    return decoder(attrs.evolve(config, layers=config.layers[:1] * layers))


def compared(
    name: str,
    mesh: str,
    *,
    recompute: str = "none",
    offload: str = "none",
    tied: bool = True,
    split: str | None = None,
    chunks: int = 0,
    frozen: tuple[str, ...] = (),
    **more: Any,
) -> None:
    schedule, where = SCHEDULES[name], lf.Mesh.parse(mesh)
    written = partial(build, generate=schedule.generate, recomputed=parse_recompute(recompute), offloaded=parse_offload(offload))
    placement = schedule.place(where.pp, chunks or schedule.chunks)
    more = {"steps": 2, **more}
    report = parity.compare(deep(tied), where, placement=placement, split=split, frozen=frozen, program=written, seed=SEED, **more)
    assert report.ok, f"{name}, recompute {recompute}, offload {offload}: {report}"


KEPT = [
    *(("none", "none"), ("full", "none"), ("none", "full;distance=2"), ("full:1", "full")),
    ("segments=mlp;ops=swiglu,rms_norm,rope", "layers=layers.1"),
]
SWEEP = [
    (name, mesh, kept, m, tied)
    for name in SCHEDULES
    for mesh in ("pp=2", "pp=3", "pp=4", "pp=2,tp=2", "pp=2,dp=2", "pp=2,dp=2,tp=2", "pp=3,tp=2", "pp=4,dp=2")
    for kept in KEPT
    for m in (1, 2, 3, 5)
    for tied in (True, False)
]


@pytest.mark.parametrize("name", SCHEDULES)
def test_law_1(name: str) -> None:
    """One case of each schedule, with the rest drawn."""
    random.seed(f"{SEED} {name}")
    _, mesh, (recompute, offload), m, tied = random.choice([case for case in SWEEP if case[0] == name])
    compared(name, mesh, recompute=recompute, offload=offload, microbatches=m, tied=tied)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_law_1_in_full(name: str, kept: tuple[str, str]) -> None:
    for _, mesh, (recompute, offload), m, tied in (case for case in SWEEP if case[0] == name and case[2] == kept):
        compared(name, mesh, recompute=recompute, offload=offload, microbatches=m, tied=tied, steps=1)


@pytest.mark.parametrize(
    ("name", "mesh", "split", "m"),
    [
        ("1f1b", "pp=4", "e,4,0,h", 2),  # an empty stage, which hands on; fewer microbatches than stages
        ("zb-h1", "pp=3", "e+1,3,h", 3),
        ("zb-v", "pp=2", "e,1,3,h", 3),  # the tied table on one rank twice
        ("interleaved", "pp=2", "e+2,0,1,1+h", 1),
        ("gpipe", "pp=3", "0,e+4,h", 1),  # the first stage is the empty one
    ],
)
def test_uneven_and_empty_stages(name: str, mesh: str, split: str, m: int) -> None:
    compared(name, mesh, split=split, microbatches=m)


@pytest.mark.parametrize("frozen", [("embed", "layers.0", "layers.1"), ("layers.3", "head"), ("layers.1", "layers.2.mlp", "*/norm")])
@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_what_is_frozen(name: str, frozen: tuple[str, ...]) -> None:
    compared(name, "pp=2", frozen=frozen, tied=False, recompute="full:1", steps=2)


def test_overlapped_pairs() -> None:
    from lf.schedule import OVERLAP

    def paired(placement: Any, m: int) -> Any:
        """1F1B whose forwards and backwards in the steady part interleave."""
        rows = SCHEDULES["1f1b"].generate(placement, m)
        out = []
        for row in rows:
            new: list[Action] = []
            for a in row:
                last = new[-1] if new else None
                both = last is not None and last.op == "F" and a.op == "B" and last.microbatch != a.microbatch
                new[-1:] = [OVERLAP(last, a)] if both and last else [*new[-1:], a]
            out.append(tuple(new))
        return tuple(out)

    for recompute in ("none", "full"):
        written = partial(build, generate=paired, recomputed=parse_recompute(recompute))
        assert any(a.op == "OVERLAP" for row in written(lf.layout(deep(), lf.Mesh(pp=2, dp=1)), 3) for a in row)
        report = parity.compare(deep(), lf.Mesh(pp=2, tp=2, dp=1), program=written, microbatches=3, steps=1)
        assert report.ok, str(report)


def test_over_processes() -> None:
    """The same over gloo: messages, the sum over two holders of a table, groups that are made while others compute."""
    written = partial(build, generate=SCHEDULES["zb-v"].generate, recomputed=parse_recompute("full:1"))
    report = parity.compare(deep(), lf.Mesh(pp=2, tp=2, dp=1), placement=(0, 1, 1, 0), program=written, microbatches=3, steps=2, spmd=processes)
    assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_over_processes(name: str) -> None:
    compared(name, "pp=2,dp=2", recompute="full:1", offload="full", microbatches=3, spmd=processes)
    compared(name, "pp=4", microbatches=3, spmd=processes)


def test_compiled_layers() -> None:
    """Every layer one full graph, forward and backward; the slow tier has the compiler that is used in earnest."""
    compared("zb-h1", "pp=2", microbatches=2, steps=1, compile="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_compiled_layers_by_inductor(name: str) -> None:
    compared(name, "pp=2", recompute="full:1", microbatches=3, steps=2, compile=True)


def test_evaluation_over_stages_is_that_of_one_rank() -> None:
    def body(axes: Any) -> dict[str, float]:
        ctx, model = context(axes), deep()
        layout = lf.layout(model, axes.mesh, placement=(0, 1, 0, 1) if axes.mesh.pp == 2 else None)
        rows = lf.data.Row
        held = lf.evaluate.HeldOut(lambda k: rows(*_row(k)), 5)
        return lf.evaluate.make(layout, {"x": held}, 2, ctx)(parity.randomised(layout, ctx, 0))

    def _row(k: int) -> Any:
        import numpy as np

        words = np.arange(9 + k) % 31
        return words, np.roll(words, -1), np.array([0, 4])

    (one,) = lf.sim.spmd(lf.Mesh(dp=1), body)
    for mesh in ("pp=2", "pp=2,tp=2,dp=2"):
        for many in lf.sim.spmd(lf.Mesh.parse(mesh), body):
            assert many == pytest.approx(one, rel=1e-12)


def shared() -> Model:
    """A dict between stages, one entry not differentiated; one matrix in three stages; a loss on the first and on the last."""
    w = Param((3, 3), (None, None), normal(0.5))

    def first(p: Any, x: Any, batch: Any, ctx: Any) -> Any:
        h = batch.plan["tokens"][:, None] * p["w"][:1] / 7
        return {"h": h, "skip": h.square(), "ids": batch.plan["tokens"].long()}, {"losses": {"early": h.square().sum()}}

    def middle(p: Any, x: Any, batch: Any, ctx: Any) -> Any:
        return {"h": torch.tanh(x["h"] @ p["w"]), "skip": x["skip"], "ids": x["ids"] + 1}, {}

    def last(p: Any, x: Any, batch: Any, ctx: Any) -> Any:
        y = (x["h"] @ p["w"] + x["skip"]) * x["ids"][:, None]
        return {}, {"losses": {"late": y.pow(2).sum()}}

    segments = (
        Segment("a", "a", {"w": w}, first),
        *(Segment(f"b{i}", f"b{i}", {"w": Tied("a/w")}, middle) for i in range(2)),
        Segment("c", "c", {"w": Tied("a/w")}, last),
    )
    return Model(None, segments, {"early": Objective(0.5, lambda b: torch.tensor(3)), "late": Objective(2.0, lambda b: torch.tensor(5))})


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "gpipe"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_dicts_shared_parameters_and_losses_of_any_stage(name: str, recompute: str) -> None:
    batches = [lf.Batch({"tokens": torch.arange(1.0, 5.0, dtype=torch.float64) + i}) for i in range(3)]
    total = {"early": 0.5 / 9, "late": 2.0 / 15}

    def body(axes: Any) -> Any:
        layout, ctx = lf.layout(shared(), axes.mesh), context(axes)
        program = build(layout, 3, SCHEDULES[name].generate if axes.mesh.pp > 1 else SCHEDULES["1f1b"].generate, parse_recompute(recompute))
        return lf.train.gradients(layout, program, ctx)(lf.init(layout, ctx, 3), batches)

    (grads, metrics), *_ = lf.sim.spmd(lf.Mesh(dp=1), body)
    params = lf.sim.spmd(lf.Mesh(dp=1), lambda axes: lf.init(lf.layout(shared(), axes.mesh), context(axes), 3))[0]
    w = tree.leaves(params)[0].clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:  # by autograd alone
        h = batch.plan["tokens"][:, None] * w[:1] / 7
        skip, ids = h.square(), batch.plan["tokens"] + 2
        loss = loss + total["early"] * h.square().sum()
        loss = loss + total["late"] * ((torch.tanh(torch.tanh(h @ w) @ w) @ w + skip) * ids[:, None]).pow(2).sum()
    (want,) = torch.autograd.grad(loss, w)
    for got, told in [(grads, metrics), *lf.sim.spmd(lf.Mesh(pp=4, dp=1), body), *lf.sim.spmd(lf.Mesh(pp=2, dp=1), body)]:
        torch.testing.assert_close(tree.leaves(got)[0], want, rtol=1e-12, atol=0)
        torch.testing.assert_close(told["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(told["grad_norm"], want.norm(), rtol=1e-12, atol=0)


def test_an_objective_that_no_stage_has_is_refused_on_all() -> None:
    objectives = deep().objectives
    model = attrs.evolve(deep(), objectives={**objectives, "nothing": objectives["cross_entropy"]})

    def body(axes: Any) -> None:
        layout, ctx = lf.layout(model, axes.mesh), context(axes)
        fn = lf.train.gradients(layout, build(layout, 1), ctx)
        fn(lf.init(layout, ctx, 0), parity.random_batches(deep(), 0, 0, 1, 9))

    for mesh in (lf.Mesh(pp=2, dp=1), lf.Mesh(dp=1)):
        with pytest.raises(lf.config.ConfigError, match="no segment gives a loss for objective nothing; they give cross_entropy"):
            lf.sim.spmd(mesh, body)


def test_a_loss_that_no_objective_weighs_is_refused() -> None:
    model = attrs.evolve(deep(), objectives={"other": deep().objectives["cross_entropy"]})
    layout, ctx = lf.layout(model, lf.Mesh(dp=1)), context(lf.solo())
    fn = lf.train.gradients(layout, build(layout, 1), ctx)
    with pytest.raises(ProgramError, match="head gives the loss cross_entropy, which no objective weighs; there are other"):
        fn(lf.init(layout, ctx, 0), parity.random_batches(deep(), 0, 0, 1, 9))


def test_a_program_without_backwards_teaches_nothing() -> None:
    layout = lf.layout(deep(), lf.Mesh(dp=1))
    with pytest.raises(ProgramError, match="no backward, so nothing would be learned"):
        lf.train.gradients(layout, ((Action("F", 0, 0),),), context(lf.solo()))


@pytest.mark.parametrize(("recompute", "kept"), [("none", 4), ("full", 0), ("segments=mlp", 0), ("full:2", 2)])
def test_what_is_made_again_is_not_kept(recompute: str, kept: int) -> None:
    """Of four layers, how many still hold what their mlp has made when the forward is done."""
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[int] = []

    def spied(apply: Any) -> Any:
        def fn(p: Any, x: Any, batch: Any, ctx: Any) -> Any:
            inner = (x * 2).sin()
            alive.append(weakref.ref(inner))
            y, terms = apply(p, x + inner.square() - inner.square().detach(), batch, ctx)
            return y, terms

        return fn

    def last(apply: Any) -> Any:
        def fn(p: Any, x: Any, batch: Any, ctx: Any) -> Any:
            if not seen:
                seen.append(sum(r() is not None for r in alive))
            return apply(p, x, batch, ctx)

        return fn

    model = deep()
    by_name = {"mlp": spied, "head": last}
    segments = [attrs.evolve(s, apply=by_name.get(s.name.split(".")[-1], lambda f: f)(s.apply)) for s in model.segments]
    model = attrs.evolve(model, segments=tuple(segments))
    layout, ctx = lf.layout(model, lf.Mesh(dp=1)), context(lf.solo())
    program = build(layout, 1, recomputed=parse_recompute(recompute))
    check(program, layout)
    batches = [lf.shard_batch(b, model, ctx) for b in parity.random_batches(deep(), 0, 0, 1, 9)]
    run(bind(program, layout, ctx), lf.init(layout, ctx, 0), batches, {"cross_entropy": torch.ones((), dtype=torch.float64)}, ctx)
    assert seen == [kept]

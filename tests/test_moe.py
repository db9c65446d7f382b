"""Law 1 for mixtures of experts: every dense mesh folded with every expert mesh, uneven routing, all losses of routers, schedules."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import SEED, processes
from moe_models import ROUTERS, mixture

import lf
from lf import parity
from lf.layouts import Layout
from lf.mesh import Mesh
from lf.schedule import OVERLAP, SCHEDULES, Action, Program
from lf.schedule.build import build, complete
from lf.schedule.recompute import parse_offload, parse_recompute


def factorings(n: int, axes: int) -> list[tuple[int, ...]]:
    """All tuples of so many factors whose product is n."""
    if axes == 1:
        return [(n,)]
    return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in factorings(n // d, axes - 1)]


FOLDINGS = [
    Mesh(pp=pp, dp=dp, tp=tp, ep=ep, etp=etp)
    for pp, dp, tp in factorings(8, 3)
    if pp <= 4  # a stage more than the model has layers is one without any
    for ep, etp, _ in factorings(8 // pp, 3)
    if ep * etp > 1
]
AWKWARD = [Mesh(dp=2, tp=3, ep=3, etp=2), Mesh(dp=3, ep=3), Mesh(tp=5, ep=5), Mesh(dp=7, ep=7), Mesh(tp=6, ep=2, etp=3), Mesh(pp=3, dp=2, etp=2)]


def holds(mesh: Mesh, router: str, rng: random.Random, **more: Any) -> parity.Report:
    """Law 1 there, with what is not said drawn."""
    schedule = SCHEDULES[rng.choice([*SCHEDULES]) if mesh.pp > 1 else "1f1b"]
    chunks = schedule.chunks
    again, away = parse_recompute(rng.choice(["none", "full"])), parse_offload(rng.choice(["none", "full"]))
    generate = partial(build, generate=schedule.generate, recomputed=again, offloaded=away)
    asked = {
        "microbatches": rng.choice((1, 2, 4)) * (mesh.pp if mesh.pp > 1 else 1),
        "tokens": rng.choice((4, 21)),  # of 4 some ranks have none
        "padding": rng.choice((0, 3)),
        "dispatch": rng.choice(("exchange", "gather")),
        "seed": SEED,
        "steps": 2,
        "program": generate,
        "placement": schedule.place(mesh.pp, chunks) if mesh.pp > 1 else None,
        **more,
    }
    about = {k: v for k, v in asked.items() if k != "program"}
    report = parity.compare(mixture(router, heads=rng.choice((0, 0, 1))), mesh, **asked)
    assert report.ok, f"router {router}, {schedule}, {about}: {report}"
    return report


@pytest.mark.parametrize("i", range(10))
def test_law_1_of_a_folding(i: int) -> None:
    rng = random.Random(f"{SEED} {i}")
    holds(rng.choice(FOLDINGS if i % 4 else AWKWARD), [*ROUTERS][(i + SEED) % len(ROUTERS)], rng)


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mesh", [*FOLDINGS, *AWKWARD], ids=str)
def test_law_1_of_every_folding(mesh: Mesh, router: str) -> None:
    for dispatch in ("exchange", "gather"):
        holds(mesh, router, random.Random(f"{SEED} {mesh} {router}"), dispatch=dispatch)


@pytest.mark.parametrize("dispatch", ["exchange", "gather"])
@pytest.mark.parametrize("router", ROUTERS)
def test_law_1_of_each_router(router: str, dispatch: str) -> None:
    """On dp, tp, ep and etp at once, with every quantity large enough to compare."""
    # with padding, a document lies across the cut of tp; without, one begins there
    report = parity.compare(mixture(router), Mesh(dp=2, tp=2, ep=2, etp=2), dispatch=dispatch, seed=SEED, steps=2, padding=7)
    assert report.ok, str(report)
    names = {q.name for q in report.rows}
    assert {"layers.1.route/load", "gradient layers.1.experts/gate_up", "gradient layers.1.route/weight"} <= names
    assert "gradient layers.1.route/bias" not in names, "a bias that is not learned has no gradient"
    assert "parameter layers.1.route/bias" in names
    if "capacity" in ROUTERS[router]:
        dropped = next(q for q in report.rows if q.name == "layers.1.route/dropped")
        assert dropped.size > 0, "nothing was dropped"


@pytest.mark.parametrize("dispatch", ["exchange", "gather"])
def test_law_1_where_other_ranks_have_the_same_experts(dispatch: str) -> None:
    report = parity.compare(mixture(), Mesh(dp=4, tp=2, ep=2, etp=2), dispatch=dispatch, seed=SEED, steps=1)
    assert report.ok, str(report)


@pytest.mark.parametrize("mesh", [Mesh(tp=2, etp=2), Mesh(tp=3, ep=3), Mesh(dp=2, tp=4, etp=4)], ids=str)
def test_law_1_where_tokens_have_the_same_past(mesh: Mesh) -> None:
    """Of so few words documents begin alike, and with a word again and again: such tokens have the same weights, and some of them are dropped."""
    report = parity.compare(mixture("probability", vocab=3), mesh, microbatches=8, padding=3, seed=SEED, steps=1)
    assert report.ok, str(report)


def by_segments(layout: Layout, n: int) -> Program:
    """Each microbatch forth and back, segment by segment."""
    names = [s.name for s in layout.stages[0]]
    row = [Action(op, 0, m, name) for m in range(n) for op in "FB" for name in (names if op == "F" else reversed(names))]
    return complete((tuple(row),), layout, n)


def beside_each_other(layout: Layout, n: int) -> Program:
    """The segments of a microbatch's forward each beside one of the backward before it: rows travel while experts compute."""
    names = [s.name for s in layout.stages[0]]
    row = [Action("F", 0, 0, name) for name in names]
    for m in range(n):
        back = [Action("B", 0, m, name) for name in reversed(names)]
        row += [OVERLAP(Action("F", 0, m + 1, name), b) for name, b in zip(names, back)] if m + 1 < n else back
    return complete((tuple(row),), layout, n)


@pytest.mark.parametrize("dispatch", ["exchange", "gather"])
@pytest.mark.parametrize("program", [by_segments, beside_each_other])
def test_a_program_goes_into_the_segments_of_a_mixture(program: Callable[[Layout, int], Program], dispatch: str) -> None:
    report = parity.compare(mixture(), Mesh(tp=2, ep=2), program=program, dispatch=dispatch, microbatches=3, steps=2, seed=SEED)
    assert report.ok, str(report)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1", "zb-v"])
def test_law_1_of_schedules(schedule: str) -> None:
    rng = random.Random(f"{SEED} {schedule}")
    named = SCHEDULES[schedule]
    program = partial(build, generate=named.generate)
    report = parity.compare(
        mixture(heads=1), Mesh(pp=2, dp=2, tp=1, ep=2), program=program, placement=named.place(2, named.chunks), microbatches=4, steps=1,
        dispatch=rng.choice(("exchange", "gather")), seed=SEED,
    )  # fmt: skip
    assert report.ok, str(report)


@pytest.mark.parametrize("dispatch", ["exchange", "gather"])
def test_law_1_over_processes(dispatch: str) -> None:
    report = parity.compare(mixture(), Mesh(dp=2, tp=2, ep=2, etp=2), dispatch=dispatch, steps=1, seed=SEED, spmd=processes)
    assert report.ok, str(report)


def test_routing_is_as_uneven_as_it_is_meant_to_be() -> None:
    """One expert with half of all rows (two of each token, and it has one of them nearly always), some with none."""
    loads = []

    def look(axes: Any) -> None:
        model = mixture()
        layout = lf.layout(model, axes.mesh)
        trace = parity.trace(axes, layout, build(layout, 2), [parity.random_batches(model, SEED, 0, 2, 21)], SEED, 0.1, 1.0, "cpu")
        loads.append(trace.metrics[0]["layers.1.route/load"])

    lf.sim.spmd(Mesh(dp=1), look)
    (load,) = loads
    assert load.max() >= 0.4 * load.sum()
    assert (load == 0).any()


def test_a_frozen_mixture_still_moves_its_bias() -> None:
    """What is not learned is no matter of training the experts."""
    for frozen in (("layers.1.experts",), ("layers.1.route", "layers.1.combine")):
        report = parity.compare(mixture(), Mesh(dp=2, ep=2), frozen=frozen, steps=2, seed=SEED)
        assert report.ok, str(report)


def test_the_bias_moves_against_the_load_and_the_fraction_is_the_load() -> None:
    model = mixture()
    load = torch.tensor([8.0, 0.0, 4.0, 4.0, 4.0])
    held = {"layers.1.route/bias": torch.zeros(5), "layers.1.route/fraction": torch.full((5,), 0.2)}
    new = model.after_step(held, {"layers.1.route/load": load})
    assert torch.equal(new["layers.1.route/bias"], torch.tensor([-1e-3, 1e-3, 0, 0, 0]))
    assert torch.equal(new["layers.1.route/fraction"], load / 20)
    none = model.after_step(held, {"layers.1.route/load": torch.zeros(5)})
    assert torch.equal(none["layers.1.route/fraction"], held["layers.1.route/fraction"])
    assert torch.equal(none["layers.1.route/bias"], held["layers.1.route/bias"])


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    model = mixture()

    def spoiled(axes: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        ctx = lf.Context(axes, lf.devices.get("cpu"), "fp32")
        layout = lf.layout(model, axes.mesh)
        init, step = lf.train.make(layout, lf.optim.sgd(0.1), build(layout, 1), ctx)
        params = lf.init(layout, ctx, 0)
        params["head"]["norm"][0] = torch.nan
        before = {k: params["layers.1.route"][k].clone() for k in ("bias", "fraction")}
        state, metrics = step(init(params), parity.random_batches(model, 0, 0, 1, 21))
        assert metrics["skipped"]
        return before, {k: state.params["layers.1.route"][k] for k in before}

    ((before, after),) = lf.sim.spmd(Mesh(dp=1), spoiled)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_bias_stays_wide_in_bf16() -> None:
    def used(axes: Any) -> dict[str, torch.dtype]:
        ctx = lf.Context(axes, lf.devices.get("cpu"), "bf16")
        layout = lf.layout(mixture(), axes.mesh)
        init, step = lf.train.make(layout, lf.optim.adamw(1e-3), build(layout, 1), ctx)
        state, _ = step(init(lf.init(layout, ctx, 0)), parity.random_batches(mixture(), 0, 0, 1, 21))
        assert "layers.1.route" not in state.optimizer["m"] or "bias" not in state.optimizer["m"]["layers.1.route"]
        return {k: v.dtype for k, v in state.params["layers.1.route"].items()}

    (dtypes,) = lf.sim.spmd(Mesh(dp=1), used)
    assert dtypes["bias"] == dtypes["fraction"] == torch.float32
    assert dtypes["weight"] == torch.bfloat16

"""Law 1 of several chains: an encoder, a decoder and a head, wherever they lie and however the encoder is placed, against one rank that has all."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED, processes
from trio_oracle import reference, sample_batches

import lf
from lf import parity, tree
from lf.chain_context import chain_context
from lf.chain_layouts import Layouts, Place, chain_layouts
from lf.models.trio import trio
from lf.models.trio_data import sample
from lf.schedule import Beside, Program, build_chains
from lf.schedule.named import SCHEDULES
from lf.schedule.recompute import Offload, Recompute, parse_offload, parse_recompute

MODEL = trio()
ONE = lf.Mesh(dp=1)


def at(mesh: str, *ranks: int, frozen: tuple[str, ...] = (), placement: tuple[int, ...] | None = None) -> Place:
    return Place(lf.Mesh.parse(mesh), ranks or None, frozen=frozen, placement=placement)


# fmt: off
# name → (places of vision, decoder and head, placements of vision that go with them)
SAME = ("inline", "decoupled", "nested")
MESHES: dict[str, tuple[dict[str, Place], tuple[str, ...]]] = {
    "one row, encoder tp < decoder tp": ({"vision": at("dp=2"), "decoder": at("tp=2"), "head": at("dp=2")}, SAME),
    "one row, encoder tp > decoder tp": ({"vision": at("tp=2"), "decoder": at("dp=2"), "head": at("tp=2")}, SAME),
    "encoder dp = world": ({"vision": at("dp=2"), "decoder": at("pp=2"), "head": at("dp=1", 1)}, SAME),
    "encoder dp = world of 4": ({"vision": at("dp=4"), "decoder": at("pp=2,tp=2"), "head": at("tp=2", 2, 3)}, SAME),
    "encoder on the first stage": ({"vision": at("dp=2", 0, 1), "decoder": at("pp=2,tp=2"), "head": at("dp=2", 2, 3)}, SAME),
    "encoder tp in each row": ({"vision": at("dp=2,tp=2"), "decoder": at("pp=2,dp=2"), "head": at("dp=2", 2, 3)}, SAME),
    "encoder tp over the rows": ({"vision": at("tp=2"), "decoder": at("pp=2"), "head": at("dp=1", 1)}, SAME),
    "three stages": ({"vision": at("dp=3"), "decoder": at("pp=3"), "head": at("dp=1", 2)}, SAME),
    "encoder of two stages, decoder of one": ({"vision": at("pp=2"), "decoder": at("dp=2"), "head": at("dp=2")}, ("inline", "decoupled")),
    "encoder of two stages over four": ({"vision": at("pp=2,dp=2"), "decoder": at("pp=4"), "head": at("dp=1", 3)}, ("decoupled",)),
    "encoder of four stages over two": ({"vision": at("pp=4"), "decoder": at("pp=2,tp=2"), "head": at("tp=2", 2, 3)}, ("inline", "decoupled")),
    "ranks of its own": ({"vision": at("dp=1", 2), "decoder": at("pp=2", 0, 1), "head": at("dp=1", 1)}, ("dedicated",)),
    "ranks of its own in front": ({"vision": at("tp=2", 0, 1), "decoder": at("pp=2", 2, 3), "head": at("dp=1", 3)}, ("dedicated",)),
    "stages of its own": ({"vision": at("pp=2", 2, 3), "decoder": at("pp=2", 0, 1), "head": at("dp=1", 1)}, ("dedicated",)),
    "encoder on one of two rows": ({"vision": at("dp=1", 3), "decoder": at("pp=2,dp=2"), "head": at("tp=2", 2, 3)}, ("decoupled", "nested")),
    "head on one of two rows": ({"vision": at("pp=2"), "decoder": at("dp=2"), "head": at("dp=1", 0)}, ("inline", "decoupled")),
    "in another order": ({"vision": at("dp=2", 1, 0), "decoder": at("pp=2"), "head": at("dp=1", 1)}, SAME),
}
FROZEN = {
    "nothing": {},
    "encoder": {"vision": ("vision.*",)},
    "decoder": {"decoder": ("decoder.*",)},
    "all but the projectors": {
        "vision": ("vision.embed*", "vision.layers.?.attn", "vision.layers.?.mlp"), "decoder": ("decoder.*",), "head": ("head.*",),
    },
    "head": {"head": ("head.*",)},
    "encoder and head": {"vision": ("vision.*",), "head": ("head.*",)},
    "all but norms of the decoder": {"vision": ("vision.*",), "head": ("head.*",), "decoder": ("decoder.embed*", "*/qkv", "*/out", "*/up", "*/down")},
}
# fmt: on
KEPT = (("none", "none"), ("full", "none"), ("ops=swiglu", "none"), ("none", "full"))
ONE_STAGE = ("gpipe", "1f1b", "zb-h1")


def data(step: int, i: int, multiple: int) -> lf.Batch:
    return sample(MODEL.config, SEED * 1000 + step, i, 0, multiple)


def named(patterns: tuple[str, ...], chain: str) -> tuple[str, ...]:
    """Those that the chain has: a list of names for all sizes of the model."""
    out = []
    for pattern in patterns:
        try:
            lf.layout(MODEL.chains[chain].model, ONE, frozen=(pattern,), whole=False)
            out.append(pattern)
        except lf.spec.LayoutError:
            continue
    return tuple(out)


def compared(
    mesh: str, kind: str, schedule: str = "1f1b", m: int = 3, frozen: str = "nothing", kept: tuple[str, str] = KEPT[0], head: str = "inline",
    units: int | None = None, in_flight: int | None = None, spmd: Callable[..., list[Any]] = lf.sim.spmd, steps: int = 2,
) -> parity.Report:  # fmt: skip
    places = {c: attrs.evolve(p, frozen=named(FROZEN[frozen].get(c, ()), c)) for c, p in MESHES[mesh][0].items()}
    made, pp = SCHEDULES[schedule], places["decoder"].mesh.pp
    places["decoder"] = attrs.evolve(places["decoder"], placement=made.place(pp, made.chunks))
    if pp > 1 and head == "inline":  # beside the stage that gives to it, which is another one in a V
        decoder = chain_layouts(MODEL, places).chains["decoder"]
        stage = next(s for s, segments in enumerate(decoder.stages) if any("hidden" in segment.outputs for segment in segments))
        n = decoder.mesh.size // pp
        mine = [*(places["decoder"].ranks or range(decoder.mesh.size))][decoder.placement[stage] * n :][:n]
        places["head"] = attrs.evolve(places["head"], ranks=mine)
    recomputed: dict[str, Recompute] = {c: parse_recompute(kept[0]) for c in ("vision", "decoder")}
    offloaded: dict[str, Offload] = {c: parse_offload(kept[1]) for c in ("decoder", "head")}

    def program(layouts: Layouts, count: int) -> Program:
        chosen: dict[str, Beside | str] = {"vision": Beside(kind, units, in_flight), "head": head}
        return build_chains(layouts, count, chosen, made.generate, recomputed, offloaded)

    def single(layouts: Layouts, count: int) -> Program:
        return build_chains(layouts, count, {"vision": "inline", "head": "inline"})

    report = parity.compare_chains(MODEL, places, data, program, single, microbatches=m, steps=steps, spmd=spmd)
    assert report.ok, f"{mesh}, {kind}, {schedule}, frozen {frozen}, kept {kept}, LF_TEST_SEED={SEED}\n{report}"
    gradients = {q.name.removeprefix("gradient ") for q in report.rows if q.name.startswith("gradient ")}
    assert gradients == set(MODEL.params()) - chain_layouts(MODEL, places).frozen
    return report


@pytest.mark.parametrize("mesh", MESHES)
def test_law_1(mesh: str) -> None:
    """Every mesh; the placement, of those that go with it, and all else is drawn."""
    draw = random.Random(f"{SEED} {mesh}")
    kind, schedule = draw.choice(MESHES[mesh][1]), draw.choice([*SCHEDULES])
    compared(mesh, kind, schedule, draw.choice((1, 2, 3, 5)), draw.choice([*FROZEN]), draw.choice(KEPT), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_law_1_of_each_placement(mesh: str) -> None:
    draw = random.Random(f"{SEED} {mesh} each")
    for kind in MESHES[mesh][1]:
        for schedule in SCHEDULES:
            compared(mesh, kind, schedule, draw.choice((1, 2, 3, 5)), draw.choice([*FROZEN]), draw.choice(KEPT), steps=2)


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen(frozen: str) -> None:
    draw = random.Random(f"{SEED} {frozen}")
    mesh = draw.choice(("encoder dp = world", "encoder dp = world of 4"))
    report = compared(mesh, draw.choice(SAME), draw.choice([*SCHEDULES]), 3, frozen, draw.choice(KEPT))
    assert all(q.size > 0 for q in report.rows if q.name != "skipped"), "a quantity that is 0 compares nothing"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_law_1_in_full(mesh: str, schedule: str) -> None:
    for kind in MESHES[mesh][1]:
        for frozen in FROZEN:
            for kept in KEPT:
                for m in (1, 2, 5):
                    compared(mesh, kind, schedule, m, frozen, kept, steps=1)


@pytest.mark.parametrize(("kind", "units", "in_flight"), [("decoupled", 2, None), ("nested", None, 3), ("nested", 2, None), ("dedicated", None, 4)])
def test_units_of_several_microbatches_and_a_limit(kind: str, units: int | None, in_flight: int | None) -> None:
    mesh = "ranks of its own" if kind == "dedicated" else "encoder dp = world"
    compared(mesh, kind, m=5, units=units, in_flight=in_flight)


@pytest.mark.parametrize(
    ("mesh", "kind", "schedule", "m"),
    [
        ("encoder on one of two rows", "decoupled", "gpipe", 3),
        ("encoder on one of two rows", "decoupled", "zb-h1", 3),
        ("encoder dp = world", "nested", "1f1b", 5),
        ("head on one of two rows", "inline", "gpipe", 2),
    ],
)
def test_sums_over_rows_wait_for_who_waits_for_them(mesh: str, kind: str, schedule: str, m: int) -> None:
    """One row has backwards after all of its own part in a sum, and another row's part waits for what they give: neither may be at the sum before."""
    compared(mesh, kind, schedule, m)


def test_a_head_of_its_own_ranks() -> None:
    MESHES["three"] = ({"vision": at("dp=2"), "decoder": at("pp=2"), "head": at("dp=2", 2, 3)}, ())
    try:
        places = {"vision": at("dp=2", 0, 1), "decoder": at("pp=2", 0, 1), "head": at("dp=2", 2, 3)}
        MESHES["three"] = (places, ())
        compared("three", "nested", head="dedicated", m=4)
    finally:
        del MESHES["three"]


@pytest.mark.parametrize("kind", ["inline", "decoupled", "nested", "dedicated"])
def test_over_processes(kind: str) -> None:
    def spmd(mesh: lf.Mesh, fn: Callable[..., Any], *args: Any) -> list[Any]:
        return processes(mesh, fn, *args)

    compared("ranks of its own" if kind == "dedicated" else "encoder tp over the rows", kind, "zb-h1", 3, spmd=spmd)
    if kind == "decoupled":  # torch numbers the ranks of a group in ascending order, whatever the mesh says
        compared("in another order", kind, "1f1b", 3, spmd=spmd)


@pytest.mark.parametrize("kind", SAME)
def test_gradients_are_those_of_one_ordinary_graph(kind: str) -> None:
    """The oracle knows no program and no bridge: one graph of the whole model, one backward."""
    places = {"vision": at("dp=2"), "decoder": at("pp=2"), "head": at("dp=1", 1)}
    layouts = chain_layouts(MODEL, places)
    batches = sample_batches(MODEL, SEED, 3, multiple=2)
    program = build_chains(layouts, 3, {"vision": kind, "head": "inline"})

    def fn(axes: Any) -> Any:
        ctx = chain_context(layouts, axes, lf.devices.get("cpu"), "fp64")
        grads, metrics = lf.train.gradients(layouts, program, ctx)(parity.randomised(layouts, ctx, SEED), batches)
        return dict(tree.items(grads)), metrics

    def whole(axes: Any) -> Any:
        one = chain_layouts(MODEL, {c: Place(ONE) for c in places})
        return parity.randomised(one, chain_context(one, axes, lf.devices.get("cpu"), "fp64"), SEED)

    (params,) = lf.sim.spmd(ONE, whole)
    want, results = reference(MODEL, params, batches), lf.sim.spmd(lf.Mesh(dp=2), fn)
    largest = max(g.abs().max() for g in want.gradients.values())
    for grads, metrics in results:
        torch.testing.assert_close(metrics["loss"], torch.as_tensor(want.loss, dtype=torch.float64), rtol=1e-10, atol=0)
        torch.testing.assert_close(metrics["grad_norm"], torch.as_tensor(want.grad_norm, dtype=torch.float64), rtol=1e-10, atol=0)
        for path, g in grads.items():
            assert (g - want.gradients[path]).abs().max() <= 1e-10 * max(want.gradients[path].abs().max(), 1e-6 * largest), path



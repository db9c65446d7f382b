"""Law 1 of several chains at places that nobody chose: any mesh of each chain over any of the ranks, in any order, with any placement and policy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from chain_steps import DECODER, MODEL
from helpers import SEED

import lf
from lf import parity
from lf.chain_layouts import Layouts, Place
from lf.models.trio_data import Amounts, sample
from lf.schedule import SCHEDULES, Beside, Program, ProgramError, build_chains
from lf.schedule.recompute import parse_offload, parse_recompute

VISION_BELOW = ("vision.embed*", "vision.layers.?.attn", "vision.layers.?.mlp")
FROZEN: tuple[dict[str, tuple[str, ...]], ...] = (
    {},
    {"vision": ("vision.*",)},
    {"decoder": ("decoder.*",)},
    {"head": ("head.*",)},
    {"vision": ("vision.*",), "decoder": ("decoder.*",)},
    {"vision": ("vision.*",), "head": ("head.*",)},
    {"vision": VISION_BELOW},
    {"vision": VISION_BELOW, "decoder": ("decoder.*",), "head": ("head.*",)},
    {"vision": ("vision.layers.1.deep",)},
    {"vision": ("vision.layers.1.deep", "vision.merger")},
    {"decoder": ("decoder.embed*", "decoder.layers.0.*", "decoder.layers.1.*")},
)
AMOUNTS = (None, None, Amounts(images=0), Amounts(actions=0), Amounts(tokens=12, documents=1), Amounts(images=4))


@attrs.frozen
class Case:
    places: dict[str, Place]
    vision: Beside
    head: str
    schedule: str
    microbatches: int
    recomputed: dict[str, str]
    offloaded: dict[str, str]
    amounts: Amounts | None


def meshes(n: int, stages: bool) -> list[lf.Mesh]:
    """All of n ranks."""
    return [
        lf.Mesh(pp=pp, dp=dp, tp=n // pp // dp)
        for pp in range(1, (n if stages else 1) + 1) for dp in range(1, n + 1) if n % (pp * dp) == 0
    ]  # fmt: skip


def drawn(draw: random.Random) -> Case:
    schedule, kind = draw.choice([*SCHEDULES]), draw.choice(("inline", "decoupled", "nested", "dedicated"))
    made, head = SCHEDULES[schedule], draw.choice(("inline", "dedicated"))
    main = draw.choice([mesh for n in range(1, 7) for mesh in meshes(n, True) if mesh.pp <= 3 and mesh.tp <= 2])
    placement = made.place(main.pp, made.chunks)
    n = world = main.size
    if kind == "dedicated":
        seen: Sequence[int] = range(n, n + draw.randint(1, 2))
        world += len(seen)
    else:
        seen = sorted(draw.sample(range(n), n if kind == "inline" else draw.randint(1, n)))
    if head == "dedicated":
        acting: Sequence[int] = range(world, world + draw.randint(1, 2))
        world += len(acting)
    else:  # on some of the ranks of the stage that gives to it
        stages = lf.layout(DECODER.model, main, placement=placement, whole=False).stages
        stage = next(i for i, segments in enumerate(stages) if any("hidden" in s.outputs for s in segments))
        there = n // main.pp
        acting = sorted(draw.sample(range(placement[stage] * there, (placement[stage] + 1) * there), draw.randint(1, there)))
    order, frozen = draw.sample(range(world), world), draw.choice(FROZEN)

    def at(name: str, mesh: lf.Mesh, ranks: Sequence[int], **more: Any) -> Place:
        return Place(mesh, tuple(order[r] for r in ranks), frozen=frozen.get(name, ()), **more)

    m = draw.randint(1, 5)
    return Case(
        {
            "vision": at("vision", draw.choice(meshes(len(seen), kind != "nested")), seen),
            "decoder": at("decoder", main, range(n), placement=placement),
            "head": at("head", draw.choice(meshes(len(acting), head == "dedicated")), acting),
        },
        Beside(kind, None if kind == "inline" else draw.choice((None, 1, m))),
        head,
        schedule,
        m,
        {name: draw.choice(("none", "full", "ops=swiglu")) for name in MODEL.chains},
        {name: draw.choice(("none", "none", "full")) for name in MODEL.chains},
        draw.choice(AMOUNTS),
    )


def agrees(key: str) -> None:
    case = drawn(random.Random(key))

    def data(step: int, i: int, multiple: int) -> lf.Batch:
        return sample(MODEL.config, SEED * 1000 + step, i, 0, multiple, case.amounts)

    def program(layouts: Layouts, m: int) -> Program:
        recomputed = {c: parse_recompute(words) for c, words in case.recomputed.items()}
        offloaded = {c: parse_offload(words) for c, words in case.offloaded.items()}
        placements: dict[str, Beside | str] = {"vision": case.vision, "head": case.head}
        return build_chains(layouts, m, placements, SCHEDULES[case.schedule].generate, recomputed, offloaded)

    def single(layouts: Layouts, m: int) -> Program:
        return build_chains(layouts, m, {"vision": "inline", "head": "inline"})

    report = parity.compare_chains(MODEL, case.places, data, program, single, microbatches=case.microbatches, steps=2)
    assert report.ok, f"{key!r}, LF_TEST_SEED={SEED}: {case}\n{report}"


@pytest.mark.parametrize("i", range(3))
def test_law_1_anywhere(i: int) -> None:
    agrees(f"{SEED} {i}")


@pytest.mark.slow
@pytest.mark.parametrize("i", range(3, 150))
def test_law_1_anywhere_in_full(i: int) -> None:
    agrees(f"{SEED} {i}")


def test_a_row_without_the_encoder_cannot_have_it_inline() -> None:
    places = {"vision": Place(lf.Mesh(dp=1), (1,)), "decoder": Place(lf.Mesh(pp=2)), "head": Place(lf.Mesh(dp=1), (1,))}
    layouts = lf.chain_layouts.chain_layouts(MODEL, places)
    with pytest.raises(ProgramError, match="chain 'vision': inline would stand on row 0, where none of its blocks is"):
        build_chains(layouts, 2, {"vision": "inline", "head": "inline"})

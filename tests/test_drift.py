"""Replicas that drift apart: one flipped bit, wherever several ranks hold it, is found and named; and nothing else is."""

from __future__ import annotations

from functools import partial
from typing import Any

import chained
import pytest
import torch
from chained import at, laid_out
from helpers import context, draw

import lf
from lf import drift, parity, tree
from lf.models.small import tiny
from lf.runs import RunError
from lf.schedule.build import build
from lf.schedule.generate import breadth_first


def checked(axes: Any, leaf: str, rank: int, at: int, **asked: Any) -> str:
    """What is said after one bit of a leaf has changed on one rank. tiny has 6 query and 3 kv heads of 4, 15 columns."""
    ctx = context(axes, "fp32")
    layout = lf.layout(tiny(), axes.mesh, **asked)
    init, _ = lf.train.make(layout, lf.optim.adamw(1e-3), build(layout, 1, breadth_first), ctx)
    state = init(parity.randomised(layout, ctx, 0))
    drift.check(layout, state, ctx)
    if axes.rank == rank:
        x = state.step if leaf == "step" else tree.get(state.optimizer, leaf)
        x.reshape(-1).view(torch.int32)[at] ^= 1
    try:
        drift.check(layout, state, ctx)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("mesh", "leaf", "rank", "at", "words"),
    [
        ("tp=3,dp=2", "master/layers.0.attn/norm", 4, 3, "master/layers.0.attn/norm [(0, 15)] of [15]: rank 4 against ranks 0, 1, 2, 3, 5"),
        ("tp=2,dp=3", "v/layers.1.mlp/down", 3, 7, "v/layers.1.mlp/down [(0, 15), (5, 10)] of [15, 10]: rank 3 against ranks 1, 5"),
        ("tp=3,dp=2", "m/embed/weight", 0, 0, "m/embed/weight [(0, 12), (0, 15)] of [37, 15]: rank 0 and rank 3 differ"),
        # of tp=4, rank 1 has query heads 1 and 2, so kv heads 0 and 1; rank 0 has head 0 alone, rank 2 head 1 alone
        ("tp=4", "master/layers.1.attn/qkv", 1, 15 * 4 * 2, "master/layers.1.attn/qkv/k [(0, 4), (0, 15)] of [12, 15]: rank 0 and rank 1 differ"),
        ("tp=4,dp=2", "m/layers.1.attn/qkv", 5, -1, "m/layers.1.attn/qkv/v [(4, 8), (0, 15)] of [12, 15]: rank 5 against ranks 1, 2, 6"),
        ("dp=3", "t/t", 2, 0, "t/t: rank 2 against ranks 0, 1"),
        ("dp=3", "step", 1, 0, "step: rank 1 against ranks 0, 2"),
    ],
)
def test_one_bit_is_found_and_named(mesh: str, leaf: str, rank: int, at: int, words: str) -> None:
    said = lf.sim.spmd(lf.Mesh.parse(mesh), checked, leaf, rank, at)
    assert len(set(said)) == 1
    assert said[0].splitlines()[1:] == [f"  {words}"]


@pytest.mark.parametrize(
    ("mesh", "asked", "leaf", "rank", "at", "words"),
    [
        # the tied table lies on the first and on the last stage
        ("pp=2", {}, "master/embed/weight", 1, 0, "master/embed/weight [(0, 37), (0, 15)] of [37, 15]: rank 0 and rank 1 differ"),
        ("pp=3,tp=2", {}, "v/embed/weight", 5, 3, "v/embed/weight [(18, 37), (0, 15)] of [37, 15]: rank 1 and rank 5 differ"),
        ("pp=2,dp=2", {}, "m/embed/weight", 1, 0, "m/embed/weight [(0, 37), (0, 15)] of [37, 15]: rank 1 against ranks 0, 2, 3"),
        ("pp=2,dp=2", {"placement": (1, 0)}, "m/layers.0.mlp/norm", 2, 0, "m/layers.0.mlp/norm [(0, 15)] of [15]: rank 2 and rank 3 differ"),
        ("pp=2,tp=2", {}, "m/layers.1.attn/qkv", 3, 15 * 12, "m/layers.1.attn/qkv/k [(4, 8), (0, 15)] of [12, 15]: rank 2 and rank 3 differ"),
        # ranks 0, 1, 4 and 5 hold no parameter, and count
        ("pp=3,dp=2", {"split": (0, 4, 0)}, "v/head/norm", 3, 0, "v/head/norm [(0, 15)] of [15]: rank 2 and rank 3 differ"),
        ("pp=3", {"split": (0, 4, 0)}, "t/t", 2, 0, "t/t: rank 2 against ranks 0, 1"),
        # what is frozen has a master alone, so leaves are other ones on each rank
        ("pp=2,dp=2", {"frozen": ("embed", "layers.0")}, "v/head/norm", 3, 2, "v/head/norm [(0, 15)] of [15]: rank 2 and rank 3 differ"),
        ("pp=2", {"frozen": ("head",)}, "master/embed/weight", 0, 9, "master/embed/weight [(0, 37), (0, 15)] of [37, 15]: rank 0 and rank 1 differ"),
    ],
)
def test_one_bit_is_found_over_stages(mesh: str, asked: dict[str, Any], leaf: str, rank: int, at: int, words: str) -> None:
    said = lf.sim.spmd(lf.Mesh.parse(mesh), partial(checked, **asked), leaf, rank, at)
    assert len(set(said)) == 1
    assert said[0].splitlines()[1:] == [f"  {words}"]


@pytest.mark.parametrize(
    ("mesh", "sharding", "leaf", "rank", "at", "words"),
    [
        # of two groups of two shards each; ranks 1 and 3 have the second
        ("dp=4", "3,ranks=2", "master/layers.0.attn/norm", 3, 0, "master/layers.0.attn/norm [(7, 15)] of [15]: rank 1 and rank 3 differ"),
        ("dp=2,tp=2", "1", "v/layers.0.attn/norm", 2, 1, "v/layers.0.attn/norm [(7, 15)] of [15]: rank 2 and rank 3 differ"),
        ("pp=2,dp=2", "2", "m/embed/weight", 3, 0, "m/embed/weight [(18, 37), (0, 15)] of [37, 15]: rank 1 and rank 3 differ"),
        # kv heads 0 and 1 are those of tp coordinate 1: rank 1 keeps the first, of which coordinate 0 keeps the lower half on rank 4
        ("dp=2,tp=4", "3", "m/layers.1.attn/qkv", 1, 15 * 6, "m/layers.1.attn/qkv/k [(2, 4), (0, 15)] of [12, 15]: rank 1 and rank 4 differ"),
        ("dp=2", "3", "master/embed/weight", 1, 0, ""),
        ("dp=16", "1", "master/layers.0.attn/norm", 0, None, ""),
        ("dp=2", "3", "t/t", 1, 0, "t/t: rank 0 and rank 1 differ"),
    ],
)
def test_one_bit_of_a_shard_is_found(mesh: str, sharding: str, leaf: str, rank: int, at: int | None, words: str) -> None:
    said = lf.sim.spmd(lf.Mesh.parse(mesh), partial(checked, sharding=sharding), leaf, rank if at is not None else -1, at or 0)
    assert len(set(said)) == 1
    assert said[0].splitlines()[1:] == ([f"  {words}"] if words else [])


ALONE = [("pp=2", "master/head/norm", 1), ("tp=3", "master/layers.0.mlp/down", 1), ("dp=1", "master/embed/weight", 0)]


@pytest.mark.parametrize(("mesh", "leaf", "rank"), ALONE)
def test_what_one_rank_holds_alone_is_its_own(mesh: str, leaf: str, rank: int) -> None:
    assert set(lf.sim.spmd(lf.Mesh.parse(mesh), checked, leaf, rank, 0)) == {""}


PLACES = {  # eyes over the pipeline of words, whose two stages share a table; hand has ranks of its own
    "joined": laid_out(at("tp=4", "pp=2,dp=2", "dp=2", {"eyes": (3, 1, 0, 2), "words": range(4), "hand": (4, 5)})),
    "frozen": laid_out(at("dp=2", "tp=3", "pp=2", {"eyes": (4, 1), "words": (0, 2, 3), "hand": (2, 1)}, eyes_frozen=("*",)), 5),
}  # fmt: skip


@pytest.mark.parametrize(
    ("places", "leaf", "rank", "place", "words"),
    [
        ("joined", "v/eyes.0/norm", 2, 4, "v/eyes.0/norm [(0, 5)] of [5]: rank 2 against ranks 0, 1, 3"),
        # eyes' tp coordinates 0 and 1 lie on ranks 3 and 1, and both hold kv head 0
        ("joined", "m/eyes.1/qkv", 3, 5 * 2, "m/eyes.1/qkv/k [(0, 2), (0, 5)] of [6, 5]: rank 1 and rank 3 differ"),
        ("joined", "master/embed/table", 3, 0, "master/embed/table [(0, 37), (0, 6)] of [37, 6]: rank 3 against ranks 0, 1, 2"),
        ("joined", "m/hand.1/up", 5, 0, "m/hand.1/up [(0, 3), (0, 6)] of [3, 6]: rank 4 and rank 5 differ"),
        ("joined", "t/t", 4, 0, "t/t: rank 4 against ranks 0, 1, 2, 3, 5"),
        ("frozen", "master/eyes.out/scale", 4, 0, "master/eyes.out/scale: rank 1 and rank 4 differ"),
        ("frozen", "master/words.1/norm", 3, 1, "master/words.1/norm [(0, 6)] of [6]: rank 3 against ranks 0, 2"),
        ("frozen", "master/hand.0/up", 2, 1, ""),  # a rank's own
        ("joined", "m/eyes.1/down", 0, 1, ""),
    ],
)
def test_one_bit_is_found_over_chains(places: str, leaf: str, rank: int, place: int, words: str) -> None:
    layouts = PLACES[places]

    def look(axes: Any) -> str:
        ctx = chained.context(axes, layouts, {"eyes": "fp32"})
        state = chained.some_state(layouts, ctx)
        drift.check(layouts, state, ctx)
        if axes.rank == rank:
            x = tree.get(state.optimizer, leaf)
            x.reshape(-1).view(torch.int32)[place] ^= 1
        try:
            drift.check(layouts, state, ctx)
        except RunError as error:
            return str(error)
        return ""

    said = chained.world(layouts, look)
    assert len(set(said)) == 1
    assert said[0].splitlines()[1:] == ([f"  {words}"] if words else [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_a_hash_sees_every_bit_and_every_place(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (draw("hash", str(dtype), shape=(5, 7)) * 100).to(dtype)
    want = drift.digest(x)
    assert want >= 0
    assert drift.digest(x.T) != want
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    for place in (0, 17, 34):
        for bit in range(8 * x.element_size()):
            y = x.clone()
            y.view(-1).view(bits)[place] ^= (1 << bit) - (1 << 8 * x.element_size()) * (bit == 8 * x.element_size() - 1)
            assert drift.digest(y) != want, (place, bit)
    monkeypatch.setattr(drift, "CHUNK", 8)  # the pieces that a large tensor is taken in
    assert drift.digest(x) == want

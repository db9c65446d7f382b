"""Checkpoints of several chains: wherever each lies, any other places load them exact to the bit; what is wrong is told with the chain."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from chained import CHAINS, at, context, laid_out, some_state, three, world
from helpers import processes

import lf
from lf import box, tree
from lf.chain_layouts import Layouts, Place, chain_layouts
from lf.chains import Chain, Chains
from lf.checkpoint import CheckpointError, manifests
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.models.small import tiny

LAYOUTS = {
    "one rank": laid_out(at()),
    "eyes tp=4 over a pipeline": laid_out(at("tp=4", "pp=2,tp=2", "dp=4")),
    "three ranks, backwards": laid_out(at("tp=3", "pp=3", "tp=2", {"hand": (2, 0)}, words_placement=(2, 0, 1))),
    "each alone": laid_out(at("pp=2", "pp=2,dp=2,tp=2", "dp=2", {"eyes": (9, 0), "words": range(1, 9), "hand": (10, 11)}), 12),
    "words over ranks of eyes": laid_out(at("dp=2,tp=2", "tp=3", "", {"eyes": (0, 1, 2, 4), "words": (3, 1, 4), "hand": (0,)})),
}


def save(axes: Any, layouts: Layouts, folder: Path) -> None:
    ctx = context(axes, layouts)
    lf.checkpoint.save(folder, layouts, some_state(layouts, ctx), ctx, {"rows": 3})


def load(axes: Any, layouts: Layouts, folder: Path, compute: dict[str, str] | None = None) -> None:
    ctx = context(axes, layouts, compute)
    state, extra = lf.checkpoint.load(folder, layouts, ctx)
    assert extra == {"rows": 3}
    want = some_state(layouts, ctx)
    assert list(state.optimizer) == list(want.optimizer)  # also the trees that are empty here
    for mine, other in ((state.optimizer, want.optimizer), (state.params, want.params), ({"step": state.step}, {"step": want.step})):
        one, two = dict(tree.items(mine)), dict(tree.items(other))
        assert list(one) == list(two)
        for path, x in one.items():
            assert x.dtype == two[path].dtype, path
            assert torch.equal(x, two[path]), path


@pytest.mark.parametrize("source", LAYOUTS)
def test_any_places_load_what_any_others_saved_to_the_bit(tmp_path: Path, source: str) -> None:
    world(LAYOUTS[source], save, LAYOUTS[source], tmp_path / "c")
    about = lf.checkpoint.manifest(tmp_path / "c")
    assert (about.mesh, about.step) == (str(LAYOUTS[source]), 50)
    for stored in about.tensors.values():  # every element once, whatever chains and stages hold it
        count = torch.zeros(stored.shape, dtype=torch.int64)
        for held in stored.boxes:
            count[box.slices(held.box, box.whole(stored.shape))] += 1
        assert (count == 1).all()
    for target in LAYOUTS.values():
        world(target, load, target, tmp_path / "c", {"eyes": "fp32"})


def test_over_real_processes(tmp_path: Path) -> None:
    there, back = LAYOUTS["three ranks, backwards"], LAYOUTS["eyes tp=4 over a pipeline"]
    processes(3, save, there, tmp_path / "c")
    world(back, load, back, tmp_path / "c")
    world(back, save, back, tmp_path / "d")
    processes(3, load, there, tmp_path / "d")


FROZEN = {"eyes_frozen": ("*",), "words_frozen": ("embed", "words.0")}


def test_what_is_frozen_has_a_master_and_no_moments(tmp_path: Path) -> None:
    there = laid_out(at("tp=2", "pp=2,dp=2", "", {"eyes": (0, 3), "hand": (2,)}, **FROZEN))
    world(there, save, there, tmp_path / "c")
    about = lf.checkpoint.manifest(tmp_path / "c")
    assert set(about.frozen) == {*CHAINS["eyes"].model.params(), "embed/table", "words.0/qkv"}
    assert {leaf.partition("/")[0] for leaf in about.leaves if leaf.partition("/")[2] in about.frozen} == {"master"}
    assert {"m/words.1/qkv", "v/hand.0/up"} <= set(about.leaves)
    back = laid_out(at("dp=3", "tp=3", "pp=2", {"hand": (2, 1)}, **FROZEN))
    world(back, load, back, tmp_path / "c")
    thawed = laid_out(at(eyes_frozen=("eyes.1",), words_frozen=("embed",)))
    with pytest.raises(CheckpointError, match=r"(?s)eyes\.0/qkv was frozen and has no m, v; freeze it again.*words\.0/qkv was frozen"):
        world(thawed, load, thawed, tmp_path / "c")


def test_a_chain_that_is_frozen_later_leaves_its_moments(tmp_path: Path) -> None:
    world(LAYOUTS["one rank"], save, LAYOUTS["one rank"], tmp_path / "c")
    back = laid_out(at("dp=3", "tp=3", "tp=3", **FROZEN))
    world(back, load, back, tmp_path / "c")


def test_masters_are_read_one_by_one(tmp_path: Path) -> None:
    world(LAYOUTS["three ranks, backwards"], save, LAYOUTS["three ranks, backwards"], tmp_path / "c")
    layouts = LAYOUTS["words over ranks of eyes"]

    def rank(axes: Any) -> int:
        ctx = context(axes, layouts)
        want = some_state(layouts, ctx).optimizer["master"]
        with lf.checkpoint.masters(tmp_path / "c", layouts, ctx) as read:
            for path in layouts.held(axes.rank):
                assert torch.equal(read(path), tree.get(want, path))
        return len(layouts.held(axes.rank))

    assert world(layouts, rank) == [7, 10, 5, 5, 10]


def test_a_state_of_other_ranks_is_refused_with_its_chain(tmp_path: Path) -> None:
    layouts = LAYOUTS["each alone"]

    def rank(axes: Any) -> str:
        ctx = context(axes, layouts)
        state = some_state(layouts, ctx)
        extra = {10: "eyes.0/qkv", 1: "words.1/norm"}.get(axes.rank)
        if extra:
            segment, name = extra.split("/")
            state.optimizer["m"].setdefault(segment, {})[name] = torch.zeros(3)
        try:
            lf.checkpoint.save(tmp_path / "c", layouts, state, ctx, {})
        except CheckpointError as error:
            return str(error)
        return ""

    said = world(layouts, rank)
    assert "m/eyes.0/qkv is of chain 'eyes', which lies on ranks 9, 0, not on 10" in said[10]
    assert "m/words.1/norm is of a stage of chain 'words' on pipeline rank 1, not on 0" in said[1]
    assert all(said)
    assert not (tmp_path / "c").exists()


@attrs.frozen
class Sizes:
    depth: int


def test_another_model_is_refused(tmp_path: Path) -> None:
    """Chains with a config are told apart by it, others by the configs of each; what the model is not is no model of `lf.checkpoint.model`."""
    layouts = LAYOUTS["one rank"]
    world(layouts, save, layouts, tmp_path / "c")
    with pytest.raises(CheckpointError, match="is of a model of kind 'Chains'; known: DecoderConfig"):
        lf.checkpoint.model(tmp_path / "c")
    deeper = attrs.evolve(CHAINS["eyes"], model=attrs.evolve(CHAINS["eyes"].model, config={"depth": 3}))
    other = chain_layouts(three(chains={**CHAINS, "eyes": deeper}), at())
    with pytest.raises(CheckpointError, match=r"the model differs: config\.eyes\.config\.depth was 2, is 3"):
        world(other, load, other, tmp_path / "c")

    mine, others = (chain_layouts(three(config=Sizes(n)), at()) for n in (4, 5))
    world(mine, save, mine, tmp_path / "d")
    about = lf.checkpoint.manifest(tmp_path / "d")
    assert (about.kind, about.config) == ("Sizes", {"depth": 4})
    world(mine, load, mine, tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"(?s)1 problem.*the model differs: config\.depth was 4, is 5"):
        world(others, load, others, tmp_path / "d")


def test_a_checkpoint_of_one_chain_is_what_it_was(tmp_path: Path) -> None:
    """What the manifest of a model alone says has not changed with chains, so that older ones are read."""
    where = lf.layout(tiny(), lf.Mesh(pp=2, tp=2))

    def rank(axes: Any) -> None:
        ctx = lf.Context(axes, lf.devices.get("cpu"), "bf16")
        params = lf.init(where, ctx, 0)
        lf.checkpoint.save(tmp_path / "c", where, lf.State(params, {"master": params}, torch.tensor(1)), ctx, {})

    lf.sim.spmd(where.mesh, rank)
    about = json.loads((tmp_path / "c" / manifests.MANIFEST).read_text())
    assert (about["mesh"], about["kind"], about["config"]["dim"]) == ("pp=2,tp=2", "DecoderConfig", 15)
    assert list(about) == ["format", "version", "mesh", "step", "kind", "config", "extra", "leaves", "frozen", "files", "tensors"]
    assert lf.checkpoint.model(tmp_path / "c").config == tiny().config


def test_a_folder_of_hugging_face_is_of_one_chain(tmp_path: Path) -> None:
    layer = Layer(Attention(heads=2, kv_heads=1, head_dim=4), GatedMLP(6))
    config = DecoderConfig(vocab=9, dim=8, layers=(layer,), tied=True)
    model = Chains(None, {"lm": Chain(decoder(config))}, (), "lm")
    layouts = chain_layouts(model, {"lm": Place(lf.Mesh(tp=2))})
    ctx = context(lf.solo(), layouts)
    with pytest.raises(CheckpointError, match=re.escape("a Hugging Face folder is of one chain, and there are lm: take one of them")):
        lf.hf.save(tmp_path / "hf", layouts, {}, ctx)  # type: ignore[arg-type]
    for enter in (lf.hf.load, lf.hf.check):
        with pytest.raises(CheckpointError, match="take one of them, as layouts"):
            enter(tmp_path / "hf", layouts, ctx)  # type: ignore[arg-type]
    assert not (tmp_path / "hf").exists()

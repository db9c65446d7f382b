"""Runs of mixtures of experts: native checkpoints and the check of replicas, over the expert mesh, with state that is not learned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED, context, processes
from moe_models import mixture
from safetensors.torch import load_file, save_file

import lf
from lf import box, drift, parity, tree
from lf.models.decoder import decoder
from lf.models.presets import PRESETS
from lf.models.small import shrunk
from lf.runs import RunError

MODEL = mixture(heads=1, skew=0.2)
STATE = {path for path, param in MODEL.params().items() if not param.learned}
MESHES = ["", "tp=2,dp=2,ep=4", "dp=4,ep=2,etp=2", "pp=2,tp=2,dp=2,ep=2,etp=2", "dp=2,tp=4,ep=8", "dp=3,ep=3", "tp=3,dp=2,ep=3,etp=2"]


def some_state(layout: Any, ctx: Any) -> lf.State:
    """A state of which every tensor is random and the same logical one under any layout."""
    init, _ = lf.train.make(layout, lf.optim.adamw(1e-3), lf.schedule.build(layout, 1, lf.schedule.one_f_one_b), ctx)
    state = init(parity.randomised(layout, ctx, 1))
    for i, name in enumerate(("m", "v")):
        other = parity.randomised(layout, ctx, 2 + i)
        for path, x in tree.items(state.optimizer[name]):
            x.copy_(tree.get(other, path))
    state.optimizer["t"]["t"].fill_(41)
    return attrs.evolve(state, step=state.step + 50)


def save(axes: Any, folder: Path) -> None:
    ctx, layout = context(axes, "bf16"), lf.layout(MODEL, axes.mesh)
    lf.checkpoint.save(folder, layout, some_state(layout, ctx), ctx, {})


def load(axes: Any, folder: Path) -> None:
    ctx, layout = context(axes, "bf16"), lf.layout(MODEL, axes.mesh)
    state, _ = lf.checkpoint.load(folder, layout, ctx)
    want = some_state(layout, ctx)
    for mine, other in ((state.optimizer, want.optimizer), (state.params, want.params)):
        one, two = dict(tree.items(mine)), dict(tree.items(other))
        assert list(one) == list(two)
        assert all(x.dtype == two[path].dtype and torch.equal(x, two[path]) for path, x in one.items())
    assert state.step == want.step


@pytest.mark.parametrize("source", MESHES)
def test_any_folding_loads_any_checkpoint_to_the_bit(tmp_path: Path, source: str) -> None:
    lf.sim.spmd(lf.Mesh.parse(source), save, tmp_path / "c")
    others = [m for m in MESHES if m != source]
    lf.sim.spmd(lf.Mesh.parse(others[SEED % len(others)]), load, tmp_path / "c")
    about = lf.checkpoint.manifest(tmp_path / "c")
    for stored in about.tensors.values():  # every element once
        count = torch.zeros(stored.shape, dtype=torch.int64)
        for held in stored.boxes:
            count[box.slices(held.box, box.whole(stored.shape))] += 1
        assert (count == 1).all()
    assert {leaf.partition("/")[2] for leaf in about.leaves if leaf.startswith("master/")} >= STATE
    assert set(about.frozen) == STATE
    assert not [leaf for leaf in about.leaves if leaf.partition("/")[2] in STATE and not leaf.startswith("master/")]  # no moments


@pytest.mark.slow
@pytest.mark.parametrize("source", MESHES)
def test_all_pairs(tmp_path: Path, source: str) -> None:
    lf.sim.spmd(lf.Mesh.parse(source), save, tmp_path / "c")
    for target in MESHES:
        lf.sim.spmd(lf.Mesh.parse(target), load, tmp_path / "c")


def test_real_processes_exchange_them(tmp_path: Path) -> None:
    processes(lf.Mesh(dp=4, ep=2, etp=2), save, tmp_path / "c")
    lf.sim.spmd(lf.Mesh(pp=2, dp=2, ep=2), load, tmp_path / "c")


@pytest.mark.parametrize(("first", "then"), [("dp=4,ep=2", "tp=2,dp=2,ep=4"), ("", "pp=2,dp=2,ep=2")])
def test_a_run_goes_on_under_another_folding(tmp_path: Path, first: str, then: str) -> None:
    """The biases move and the loads of the step before count, so both must come along; float64 and SGD, so the end is the same."""

    def steps(axes: Any, start: Path | None, end: Path, numbers: range) -> None:
        ctx, layout = context(axes, "fp64"), lf.layout(MODEL, axes.mesh)
        n, dp, d = 4, axes.mesh["dp"], axes.coords["dp"]
        init, step = lf.train.make(layout, lf.optim.sgd(0.1), lf.schedule.build(layout, n // dp, lf.schedule.one_f_one_b), ctx)
        state = lf.checkpoint.load(start, layout, ctx)[0] if start else init(parity.randomised(layout, ctx, 0))
        for i in numbers:
            state, _ = step(state, parity.random_batches(MODEL, 0, i, n, 12)[d::dp])
        lf.checkpoint.save(end, layout, state, ctx, {})

    def read(axes: Any, folder: Path) -> Any:
        return lf.checkpoint.load(folder, lf.layout(MODEL, axes.mesh), context(axes, "fp64"))[0].optimizer["master"]

    one, other = lf.Mesh.parse(first), lf.Mesh.parse(then)
    lf.sim.spmd(one, steps, None, tmp_path / "half", range(2))
    lf.sim.spmd(one, steps, tmp_path / "half", tmp_path / "same", range(2, 3))
    lf.sim.spmd(other, steps, tmp_path / "half", tmp_path / "other", range(2, 3))
    half, same, end = (lf.sim.spmd(lf.Mesh(dp=1), read, tmp_path / name)[0] for name in ("half", "same", "other"))
    for path, x in tree.items(end):
        torch.testing.assert_close(x, tree.get(same, path), rtol=1e-9, atol=1e-12, msg=path)
        assert path not in STATE or not torch.equal(x, tree.get(half, path)), path


# Replicas of experts are the ranks along edp.


@pytest.mark.parametrize(
    ("mesh", "leaf", "rank", "words"),
    [
        # edp=2, ep=4: ranks r and r + 4 hold the same experts; ep 1 of 4 has expert 1 of 5
        ("tp=2,dp=4,ep=4", "master/layers.1.experts/down", 5, "experts/down [(1, 2), (0, 15), (0, 6)] of [5, 15, 6]: rank 1 and rank 5 differ"),
        ("dp=6,ep=2", "v/layers.1.experts/gate_up", 3, "experts/gate_up/gate [(2, 5), (0, 6), (0, 15)] of [5, 6, 15]: rank 3 against ranks 1, 5"),
        ("dp=4,etp=2", "m/layers.1.experts/down", 2, "experts/down [(0, 5), (0, 15), (0, 3)] of [5, 15, 6]: rank 0 and rank 2 differ"),
        ("pp=2,dp=4,ep=2", "m/layers.1.experts/down_bias", 6, "experts/down_bias [(0, 2), (0, 15)] of [5, 15]: rank 4 and rank 6 differ"),
        ("tp=2,dp=2,ep=4", "master/layers.1.route/bias", 3, "layers.1.route/bias [(0, 5)] of [5]: rank 3 against ranks 0, 1, 2"),
        ("dp=2,ep=2", "master/layers.1.route/fraction", 1, "layers.1.route/fraction [(0, 5)] of [5]: rank 0 and rank 1 differ"),
    ],
)
def test_a_bit_of_an_expert_that_differs_is_found(mesh: str, leaf: str, rank: int, words: str) -> None:
    said = lf.sim.spmd(lf.Mesh.parse(mesh), checked, leaf, rank)
    assert len(set(said)) == 1
    [line] = said[0].splitlines()[1:]
    assert line.endswith(words)
    assert line.strip().startswith(leaf.partition("/")[0] + "/layers.1.")


def test_an_expert_that_one_rank_holds_is_its_own() -> None:
    assert set(lf.sim.spmd(lf.Mesh(dp=4, ep=4), checked, "master/layers.1.experts/down", 1)) == {""}


def checked(axes: Any, leaf: str, rank: int) -> str:
    """What is said after one bit of a leaf has changed on one rank."""
    ctx, layout = context(axes, "fp32"), lf.layout(MODEL, axes.mesh)
    state = some_state(layout, ctx)
    drift.check(layout, state, ctx)
    if axes.rank == rank:
        tree.get(state.optimizer, leaf).reshape(-1).view(torch.int32)[0] ^= 1
    try:
        drift.check(layout, state, ctx)
    except RunError as error:
        return str(error)
    return ""


def folder_of(name: str, folder: Path, **changes: Any) -> Any:
    """The config of a preset shrunk, changed; and a folder with its weights."""
    config = attrs.evolve(shrunk(PRESETS[name]), **changes)
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp32")
    layout = lf.layout(decoder(config), ctx.axes.mesh)
    lf.hf.save(folder, layout, lf.init(layout, ctx, 0), ctx)
    return config


def load_into(config: Any, folder: Path) -> lf.tree.Tree:
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp32")
    return lf.hf.load(folder, lf.layout(decoder(config), ctx.axes.mesh), ctx)


@pytest.mark.parametrize(("there", "here"), [("qwen3-0.6b", "qwen3-30b-a3b"), ("mixtral-8x7b", "gpt-oss-20b"), ("gpt-oss-20b", "glm-4.5-air")])
def test_the_files_of_another_family_are_one_clear_error(tmp_path: Path, there: str, here: str) -> None:
    """Whose names have no place for some parameters of the model."""
    folder_of(there, tmp_path)
    with pytest.raises(lf.hf.CheckpointError, match=r"problems\n  config\.json has .*; build it with lf\.hf\.model"):
        load_into(shrunk(PRESETS[here]), tmp_path)


@pytest.mark.parametrize("name", ["deepseek-v3", "glm-4.5-air"])
def test_files_without_the_heads_that_their_config_speaks_of(tmp_path: Path, name: str) -> None:
    """As transformers saves these models. The error's way out works, and one missing tensor of a head is told as such."""
    trunk = folder_of(name, tmp_path, mtp=None)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 1}))
    with pytest.raises(lf.hf.CheckpointError, match=r"all \d\d tensors model\.layers\.\d\.\* are missing: num_nextn_.*=1 .*; say 0") as caught:
        load_into(shrunk(PRESETS[name]), tmp_path)
    assert len(str(caught.value).splitlines()) == 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    load_into(lf.hf.model(tmp_path).config, tmp_path)
    load_into(trunk, tmp_path)

    whole = folder_of(name, tmp_path / "whole")
    held = load_file(tmp_path / "whole" / "model.safetensors")
    gone = f"model.layers.{len(whole.layers)}.enorm.weight"
    save_file({k: x for k, x in held.items() if k != gone}, tmp_path / "whole" / "model.safetensors", {"lf": "each"})
    with pytest.raises(lf.hf.CheckpointError, match=rf"{re.escape(gone)} \[\d+\] is missing"):
        load_into(whole, tmp_path / "whole")


def test_a_copy_in_8_bits_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config = folder_of("qwen3-0.6b", tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(lf.hf.CheckpointError, match=r"lm_head\.weight has dtype F8_E4M3.* remove it and its scales to use model\.embed"):
        load_into(config, tmp_path)

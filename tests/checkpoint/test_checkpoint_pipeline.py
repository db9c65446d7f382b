"""Checkpoints and Hugging Face folders of a pipeline: each rank reads and writes what its stages hold, and any layout loads what any other saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED, context, processes

import lf
from lf import box, rng, tree
from lf.checkpoint import CheckpointError
from lf.models.small import tiny
from lf.parity import randomised
from lf.schedule.build import build
from lf.schedule.generate import breadth_first

TIED, UNTIED = tiny(), tiny(tied=False)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {"mesh": ""},
    "pp=2,tp=2": {"mesh": "pp=2,tp=2"},
    "e,2,h": {"mesh": "pp=3", "split": "e,2,h"},
    "vee": {"mesh": "pp=2", "placement": (0, 1, 1, 0)},
    "backwards": {"mesh": "pp=2,dp=2", "placement": (1, 0)},
    "ranks without a parameter": {"mesh": "pp=3,tp=2", "split": (0, 4, 0)},
    "two loops": {"mesh": "pp=2", "stages": 4},
}


def laid_out(model: Any, axes: Any, asked: dict[str, Any]) -> Any:
    return lf.layout(model, axes.mesh, **{k: v for k, v in asked.items() if k != "mesh"})


def some_state(layout: Any, ctx: Any) -> lf.State:
    """A state of which every tensor is random and the same logical one under any layout."""
    init, _ = lf.train.make(layout, lf.optim.adamw(1e-3), build(layout, 1, breadth_first), ctx)
    state = init(randomised(layout, ctx, 1))
    for i, name in enumerate(("m", "v")):
        numbers = randomised(layout, ctx, 2 + i)
        for path, x in tree.items(state.optimizer[name]):
            x.copy_(tree.get(numbers, path))
    state.optimizer["t"]["t"].fill_(41)
    return attrs.evolve(state, step=state.step + 50)


def save(axes: Any, model: Any, asked: dict[str, Any], folder: Path) -> None:
    ctx, layout = context(axes, "bf16"), laid_out(model, axes, asked)
    lf.checkpoint.save(folder, layout, some_state(layout, ctx), ctx, {"rows": 3})


def load(axes: Any, model: Any, asked: dict[str, Any], folder: Path) -> None:
    ctx, layout = context(axes, "bf16"), laid_out(model, axes, asked)
    state, extra = lf.checkpoint.load(folder, layout, ctx)
    assert extra == {"rows": 3}
    want = some_state(layout, ctx)
    assert list(state.optimizer) == list(want.optimizer)  # also the trees that are empty here
    for mine, other in ((state.optimizer, want.optimizer), (state.params, want.params), ({"step": state.step}, {"step": want.step})):
        one, two = dict(tree.items(mine)), dict(tree.items(other))
        assert list(one) == list(two)
        for path, x in one.items():
            assert x.dtype == two[path].dtype, path
            assert torch.equal(x, two[path]), path


def there_and_back(source: str, targets: list[str], model: Any, folder: Path, spmd: Any = lf.sim.spmd) -> None:
    spmd(lf.Mesh.parse(LAYOUTS[source]["mesh"]), save, model, LAYOUTS[source], folder)
    for stored in lf.checkpoint.manifest(folder).tensors.values():  # every element once, of what several stages hold as well
        count = torch.zeros(stored.shape, dtype=torch.int64)
        for held in stored.boxes:
            count[box.slices(held.box, box.whole(stored.shape))] += 1
        assert (count == 1).all()
    for target in targets:
        spmd(lf.Mesh.parse(LAYOUTS[target]["mesh"]), load, model, LAYOUTS[target], folder)


@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_loads_any_checkpoint_to_the_bit(tmp_path: Path, source: str) -> None:
    others = rng.generator(SEED, source).permutation([k for k in LAYOUTS if k not in (source, "one rank")])[:2]
    there_and_back(source, [source, "one rank", *map(str, others)], TIED, tmp_path / "c")
    assert lf.checkpoint.manifest(tmp_path / "c").leaves == lf.checkpoint.manifest(one_rank(tmp_path)).leaves


def one_rank(folder: Path) -> Path:
    lf.sim.spmd(lf.Mesh(dp=1), save, TIED, LAYOUTS["one rank"], folder / "one")
    return folder / "one"


@pytest.mark.slow
@pytest.mark.parametrize("model", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("source", LAYOUTS)
def test_all_pairs(tmp_path: Path, source: str, model: Any) -> None:
    there_and_back(source, [*LAYOUTS], model, tmp_path / "c")


def test_over_real_processes(tmp_path: Path) -> None:
    there_and_back("pp=2,tp=2", ["e,2,h"], TIED, tmp_path / "c", spmd=processes)
    lf.sim.spmd(lf.Mesh(dp=1), load, TIED, LAYOUTS["one rank"], tmp_path / "c")


def test_a_frozen_parameter_has_a_master_and_no_moments(tmp_path: Path) -> None:
    frozen = ("embed", "layers.0.mlp")
    lf.sim.spmd(lf.Mesh(pp=2), save, TIED, {"frozen": frozen}, tmp_path / "c")
    about = lf.checkpoint.manifest(tmp_path / "c")
    assert set(about.frozen) == {"embed/weight", "layers.0.mlp/norm", "layers.0.mlp/gate_up", "layers.0.mlp/down"}
    assert {leaf.partition("/")[0] for leaf in about.leaves if leaf.endswith(about.frozen)} == {"master"}
    assert "m/layers.0.attn/norm" in about.leaves
    lf.sim.spmd(lf.Mesh(pp=3), load, TIED, {"frozen": frozen, "split": "e,2,h"}, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp/down was frozen and has no m, v; freeze it again, or begin a run from an export"):
        lf.sim.spmd(lf.Mesh(dp=1), load, TIED, {"frozen": ("embed",)}, tmp_path / "c")


def test_what_is_frozen_later_leaves_its_moments(tmp_path: Path) -> None:
    lf.sim.spmd(lf.Mesh(pp=2), save, TIED, {}, tmp_path / "c")
    lf.sim.spmd(lf.Mesh(dp=1), load, TIED, {"frozen": ("layers.1",)}, tmp_path / "c")


def test_a_leaf_of_another_stage_is_refused(tmp_path: Path) -> None:
    def rank(axes: Any) -> None:
        ctx = context(axes, "fp32")
        layout = lf.layout(TIED, axes.mesh)
        state = some_state(lf.layout(TIED, axes.mesh, placement=(1, 0)), ctx)
        lf.checkpoint.save(tmp_path / "c", layout, state, ctx, {})

    with pytest.raises(CheckpointError, match=r"master/head/norm is of a stage on pipeline rank 1, not on 0"):
        lf.sim.spmd(lf.Mesh(pp=2), rank)


def test_masters_are_read_where_they_are_held(tmp_path: Path) -> None:
    lf.sim.spmd(lf.Mesh(dp=1), save, TIED, {}, tmp_path / "c")

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(TIED, axes.mesh, split="0,e+1,1+h")
        want = randomised(layout, ctx, 1)
        with lf.checkpoint.masters(tmp_path / "c", layout, ctx) as read:
            for path, x in tree.items(want):
                assert torch.equal(read(path), x), path

    lf.sim.spmd(lf.Mesh(pp=3), rank)


def export(axes: Any, model: Any, asked: dict[str, Any], folder: Path, limit: int) -> None:
    """Saves, and loads again what this rank holds."""
    ctx, layout = context(axes, "fp32"), laid_out(model, axes, asked)
    params = randomised(layout, ctx, 1)
    lf.hf.save(folder, layout, params, ctx, max_shard_bytes=limit)
    back = dict(tree.items(lf.hf.load(folder, layout, ctx)))
    assert list(back) == list(layout.held(axes.coords))
    for path, x in tree.items(params):
        assert torch.equal(back[path], x), path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(("model", "limit"), [(TIED, 10**9), (UNTIED, 3000)], ids=["tied", "untied in shards"])
def test_a_folder_is_the_same_whatever_pipeline_saves_it(tmp_path: Path, model: Any, limit: int) -> None:
    for i, asked in enumerate(LAYOUTS.values()):
        lf.sim.spmd(lf.Mesh.parse(asked["mesh"]), export, model, asked, tmp_path / str(i), limit)
        assert contents(tmp_path / str(i)) == contents(tmp_path / "0"), asked
    assert len(contents(tmp_path / "0")) > (2 if limit < 10**9 else 1)


def test_real_processes_save_the_same_folder(tmp_path: Path) -> None:
    lf.sim.spmd(lf.Mesh(dp=1), export, TIED, {}, tmp_path / "one", 3000)
    processes(lf.Mesh(pp=2, tp=2), export, TIED, {}, tmp_path / "many", 3000)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    config = json.loads((tmp_path / "many" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_a_parameter_that_cannot_be_read_on_one_stage_raises_on_all(tmp_path: Path) -> None:
    def rank(axes: Any) -> str:
        ctx, layout = context(axes, "fp32"), lf.layout(TIED, axes.mesh)
        params = randomised(layout, ctx, 1)

        def read(path: str) -> torch.Tensor:
            if path == "layers.1.mlp/down":
                raise OSError("a broken disk")
            return tree.get(params, path)

        try:
            lf.hf.save(tmp_path / "out", layout, read, ctx)
        except CheckpointError as error:
            return str(error)
        return ""

    said = lf.sim.spmd(lf.Mesh(pp=2, tp=2), rank)
    assert all("failed on rank 2: a broken disk" in words or "failed on rank 3: a broken disk" in words for words in said)
    assert not (tmp_path / "out").exists()

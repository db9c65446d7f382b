"""Checkpoints and Hugging Face folders of sharded state: any stage, over any ranks, loads what any other saved, exact to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chained
import pytest
import torch
from chained import at, laid_out
from helpers import SEED, context, processes
from moe_models import mixture
from qwen3_oracle import files

import lf
from lf import box, parity, rng, tree
from lf.checkpoint import CheckpointError
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.models.small import tiny
from lf.schedule.build import build
from lf.state import compute_copy

DENSE, MIXTURE = tiny(), mixture(heads=1, skew=0.2)
NARROW = decoder(DecoderConfig(5, 3, (Layer(Attention(2, 1, 2, qk_norm=True), GatedMLP(2)),) * 2, tied=True))  # fewer rows than ranks
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one rank": ("", {}),
    "dp=2": ("dp=2", {}),
    "stage 1": ("dp=4", {"sharding": "1"}),
    "stage 2, tp": ("dp=2,tp=2", {"sharding": "2"}),
    "stage 3, dp=3": ("dp=3", {"sharding": "3"}),
    "stage 3 of 8": ("dp=8", {"sharding": "3,keep"}),
    "hybrid": ("dp=4", {"sharding": "3,ranks=2"}),
    "hybrid, tp=4": ("dp=4,tp=4", {"sharding": "1,ranks=2"}),
    "hybrid of 1": ("dp=3", {"sharding": "1,ranks=1"}),
    "pipeline": ("pp=2,dp=3", {"sharding": "2", "placement": (0, 1, 1, 0)}),
    "pipeline, tp": ("pp=2,dp=2,tp=2", {"sharding": "3", "stages": 4}),
}
FOLDED = {
    "experts": ("dp=4,ep=2", {"sharding": "3"}),
    "experts, stage 1": ("dp=4,tp=2,ep=2,etp=2", {"sharding": "1"}),
    "experts, hybrid": ("dp=8,ep=2", {"sharding": "2,ranks=4"}),
    "experts alone": ("dp=2,ep=2", {"sharding": "3"}),
}
MODELS = {"dense": (DENSE, LAYOUTS), "narrow": (NARROW, LAYOUTS), "mixture": (MIXTURE, {**LAYOUTS, **FOLDED})}


def some_state(layout: Any, ctx: Any) -> lf.State:
    """A state of which every tensor is random and the same logical one under any layout."""
    trained = layout.trained(ctx.axes.coords)
    trees = {kind: [*tree.items(parity.randomised(layout, ctx, seed))] for seed, kind in enumerate(("master", "m", "v"))}
    optimizer = {kind: tree.build([(path, x) for path, x in leaves if kind == "master" or path in trained]) for kind, leaves in trees.items()}
    optimizer["t"] = {"t": torch.tensor(41)}
    return lf.State(compute_copy(layout, optimizer["master"], ctx), optimizer, torch.tensor(50))


def save(axes: Any, model: Any, asked: dict[str, Any], folder: Path) -> None:
    ctx, layout = context(axes, "bf16"), lf.layout(model, axes.mesh, **asked)
    lf.checkpoint.save(folder, layout, some_state(layout, ctx), ctx, {"rows": 3})


def load(axes: Any, model: Any, asked: dict[str, Any], folder: Path) -> None:
    ctx, layout = context(axes, "bf16"), lf.layout(model, axes.mesh, **asked)
    state, extra = lf.checkpoint.load(folder, layout, ctx)
    assert extra == {"rows": 3}
    want = some_state(layout, ctx)
    assert list(state.optimizer) == list(want.optimizer)
    for mine, other in ((state.optimizer, want.optimizer), (state.params, want.params), ({"step": state.step}, {"step": want.step})):
        one, two = dict(tree.items(mine)), dict(tree.items(other))
        assert list(one) == list(two)
        for path, x in one.items():
            assert x.dtype == two[path].dtype, path
            assert torch.equal(x, two[path]), path


def there_and_back(source: str, targets: list[str], model: str, folder: Path, spmd: Any = lf.sim.spmd) -> None:
    made, layouts = MODELS[model]
    mesh, asked = layouts[source]
    spmd(lf.Mesh.parse(mesh), save, made, asked, folder)
    for stored in lf.checkpoint.manifest(folder).tensors.values():
        count = torch.zeros(stored.shape, dtype=torch.int64)
        for held in stored.boxes:
            assert box.volume(held.box), "an empty shard stands in a file"
            count[box.slices(held.box, box.whole(stored.shape))] += 1
        assert (count == 1).all(), "an element stands in no file, or in two"
    for target in targets:
        mesh, asked = layouts[target]
        spmd(lf.Mesh.parse(mesh), load, made, asked, folder)


@pytest.mark.parametrize("source", LAYOUTS)
def test_any_sharding_loads_any_checkpoint_to_the_bit(tmp_path: Path, source: str) -> None:
    model = ["dense", "narrow"][(SEED + [*LAYOUTS].index(source)) % 2]
    others = rng.generator(SEED, source, "sharded").permutation([k for k in LAYOUTS if k != source])[:2]
    there_and_back(source, list(map(str, others)), model, tmp_path / "c")


@pytest.mark.parametrize("source", FOLDED)
def test_any_sharding_of_experts_does(tmp_path: Path, source: str) -> None:
    others = rng.generator(SEED, source, "sharded").permutation([*LAYOUTS, *(k for k in FOLDED if k != source)])[:1]
    there_and_back(source, list(map(str, others)), "mixture", tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "source"), [(m, source) for m, (_, layouts) in MODELS.items() for source in layouts])
def test_all_pairs(tmp_path: Path, source: str, model: str) -> None:
    there_and_back(source, [*MODELS[model][1]], model, tmp_path / "c")


def test_over_real_processes(tmp_path: Path) -> None:
    there_and_back("hybrid", ["stage 3, dp=3"], "dense", tmp_path / "c", spmd=processes)
    lf.sim.spmd(lf.Mesh(dp=1), load, DENSE, {}, tmp_path / "c")


@pytest.mark.parametrize("kind", ["1", "3"])
def test_each_rank_writes_its_share(tmp_path: Path, kind: str) -> None:
    """Of four ranks none writes much more than a quarter, and none nothing; without shards the first writes all."""
    lf.sim.spmd(lf.Mesh(dp=4), save, MIXTURE, {"sharding": kind}, tmp_path / "c")
    lf.sim.spmd(lf.Mesh(dp=4), save, MIXTURE, {}, tmp_path / "whole")
    shards, whole = ([p.stat().st_size for p in sorted(path.glob("rank-*"))] for path in (tmp_path / "c", tmp_path / "whole"))
    assert len(shards) == 4
    assert max(shards) < 0.4 * max(whole)


def test_what_is_frozen_has_a_master_in_shards_and_no_moments(tmp_path: Path) -> None:
    frozen = ("embed", "layers.0.mlp")
    lf.sim.spmd(lf.Mesh(dp=4), save, DENSE, {"frozen": frozen, "sharding": "3"}, tmp_path / "c")
    about = lf.checkpoint.manifest(tmp_path / "c")
    assert {leaf.partition("/")[0] for leaf in about.leaves if leaf.endswith(about.frozen)} == {"master"}
    lf.sim.spmd(lf.Mesh(dp=3), load, DENSE, {"frozen": frozen, "sharding": "1"}, tmp_path / "c")


CHAINS = {
    "one rank": laid_out(at()),
    "a stage each": laid_out(at("dp=4", "pp=2,dp=2", "dp=4", eyes_sharding="1", words_sharding="3", hand_sharding="2,ranks=2,reduce=step")),
    "some of them": laid_out(at("dp=2,tp=2", "dp=3", "dp=2", {"eyes": (4, 1, 0, 2), "words": (0, 2, 3), "hand": (4, 3)}, words_sharding="1"), 5),
}


@pytest.mark.parametrize("source", CHAINS)
def test_chains_with_a_stage_each_go_to_any_places(tmp_path: Path, source: str) -> None:
    def write(axes: Any, layouts: Any) -> None:
        ctx = chained.context(axes, layouts)
        lf.checkpoint.save(tmp_path / "c", layouts, chained.some_state(layouts, ctx), ctx, {})

    def read(axes: Any, layouts: Any) -> None:
        ctx = chained.context(axes, layouts)
        state, _ = lf.checkpoint.load(tmp_path / "c", layouts, ctx)
        want = dict(tree.items(chained.some_state(layouts, ctx).optimizer))
        got = dict(tree.items(state.optimizer))
        assert list(got) == list(want)
        assert all(torch.equal(x, want[path]) for path, x in got.items())

    chained.world(CHAINS[source], write, CHAINS[source])
    for target in CHAINS.values():
        chained.world(target, read, target)


def test_a_leaf_of_another_shape_is_refused(tmp_path: Path) -> None:
    def rank(axes: Any) -> str:
        ctx, layout = context(axes, "bf16"), lf.layout(DENSE, axes.mesh, sharding="1")
        whole = some_state(lf.layout(DENSE, axes.mesh), ctx)
        try:
            lf.checkpoint.save(tmp_path / "c", layout, whole, ctx, {})
        except CheckpointError as error:
            return str(error)
        return ""

    for said in lf.sim.spmd(lf.Mesh(dp=2), rank):
        assert "embed/weight has shape [37, 15] and should have [1" in said
    assert not (tmp_path / "c").exists()


def export(axes: Any, model: Any, asked: dict[str, Any], folder: Path, limit: int) -> None:
    """Saves, and loads again what this rank keeps."""
    ctx, layout = context(axes, "fp32"), lf.layout(model, axes.mesh, **asked)
    params = parity.randomised(layout, ctx, 1)
    lf.hf.save(folder, layout, params, ctx, max_shard_bytes=limit)
    back = dict(tree.items(lf.hf.load(folder, layout, ctx)))
    assert list(back) == list(layout.held(axes.coords))
    for path, x in tree.items(params):
        assert torch.equal(back[path], x), path


@pytest.mark.parametrize(("model", "limit"), [("dense", 3000), ("narrow", 10**9)])
def test_a_folder_is_the_same_whatever_sharding_saves_it(tmp_path: Path, model: str, limit: int) -> None:
    made, layouts = MODELS[model]
    for i, (mesh, asked) in enumerate(layouts.values()):
        lf.sim.spmd(lf.Mesh.parse(mesh), export, made, asked, tmp_path / str(i), limit)
        assert files(tmp_path / str(i)) == files(tmp_path / "0"), asked


def test_real_processes_save_the_same_folder(tmp_path: Path) -> None:
    lf.sim.spmd(lf.Mesh(dp=1), export, DENSE, {}, tmp_path / "one", 3000)
    processes(lf.Mesh(dp=2, tp=2), export, DENSE, {"sharding": "3"}, tmp_path / "many", 3000)
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_a_checkpoint_of_shards_is_exported_without_a_state(tmp_path: Path) -> None:
    """As scripts/export does: masters are read one by one, under whatever layout."""
    lf.sim.spmd(lf.Mesh(dp=4), save, DENSE, {"sharding": "3"}, tmp_path / "c")

    def write(axes: Any, kind: str, folder: Path) -> None:
        ctx, layout = context(axes, "bf16"), lf.layout(DENSE, axes.mesh, sharding=kind)
        with lf.checkpoint.masters(tmp_path / "c", layout, ctx) as read:
            lf.hf.save(folder, layout, read, ctx)

    lf.sim.spmd(lf.Mesh(dp=1), write, "0", tmp_path / "one")
    lf.sim.spmd(lf.Mesh(dp=3, tp=2), write, "2", tmp_path / "many")
    assert files(tmp_path / "many") == files(tmp_path / "one")


# A run that goes on.

STEPS = [("dp=2", "0", "dp=2", "3"), ("dp=4", "3,ranks=2", "pp=2,dp=2", "1"), ("tp=2,dp=2", "2", "dp=4", "3,keep,ahead=2")]


@pytest.mark.parametrize(("first", "kind", "then", "other"), STEPS)
def test_a_run_goes_on_under_another_sharding(tmp_path: Path, first: str, kind: str, then: str, other: str) -> None:
    """float64 and AdamW with moments: the end is the same as without the change."""

    def steps(axes: Any, sharding: str, start: Path | None, end: Path, numbers: range) -> None:
        ctx, layout = context(axes, "fp64"), lf.layout(DENSE, axes.mesh, sharding=sharding)
        n, dp, d = 4, axes.mesh["dp"], axes.coords["dp"]
        init, step = lf.train.make(layout, lf.optim.adamw(1e-2), build(layout, n // dp), ctx)
        state = lf.checkpoint.load(start, layout, ctx)[0] if start else init(parity.randomised(layout, ctx, 0))
        for i in numbers:
            state, _ = step(state, parity.random_batches(DENSE, 0, i, n, 12)[d::dp])
        lf.checkpoint.save(end, layout, state, ctx, {})

    def read(axes: Any, folder: Path) -> Any:
        return lf.checkpoint.load(folder, lf.layout(DENSE, axes.mesh), context(axes, "fp64"))[0].optimizer

    one = lf.Mesh(dp=1)
    lf.sim.spmd(one, steps, "0", None, tmp_path / "whole", range(3))
    lf.sim.spmd(lf.Mesh.parse(first), steps, kind, None, tmp_path / "half", range(2))
    lf.sim.spmd(lf.Mesh.parse(then), steps, other, tmp_path / "half", tmp_path / "end", range(2, 3))
    end, want = (dict(tree.items(lf.sim.spmd(one, read, tmp_path / name)[0])) for name in ("end", "whole"))
    assert end.keys() == want.keys()
    for path, x in end.items():
        torch.testing.assert_close(x, want[path], rtol=1e-6, atol=1e-9, msg=lambda words, path=path: f"{path}: {words}")

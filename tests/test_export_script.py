"""scripts/export.py: from a run's checkpoint alone, on one rank, to the very files that the run's own mesh would have written."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers import ROOT, context
from qwen3_oracle import files
from safetensors.torch import load_file, save_file

import lf
from lf.checkpoint import CheckpointError
from lf.config import ConfigError
from lf.models.small import tiny
from lf.parity import randomised

SCRIPT = runpy.run_path(str(ROOT / "scripts/export.py"))
MODEL = tiny(vocab=270)


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    """A run folder with two checkpoints, trained as it were on tp=2, dp=2, and beside each the export that its own ranks have written."""
    root = tmp_path_factory.mktemp("runs")
    folder = root / "run"
    lf.data.train_bpe(["to be or not to be"] * 3, 260, folder / "tokenizer" / "0123")
    (folder / "config.json").write_text(json.dumps({"model": "gone/away", "tokenizer": None}))

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "bf16"), lf.layout(MODEL, axes.mesh)
        init, _ = lf.train.make(layout, lf.optim.adamw(1e-3), lf.schedule.one_f_one_b(1, 1), ctx)
        for step in (5, 10):
            state = init(randomised(layout, ctx, step))
            state = attrs.evolve(state, step=state.step + step)
            lf.checkpoint.save(folder / "checkpoints" / f"step-{step:08d}", layout, state, ctx, {})
            for dtype in ("bf16", "fp32"):
                lf.hf.save(root / f"{step}-{dtype}", layout, state, ctx, folder / "tokenizer" / "0123", dtype)
            lf.hf.save(root / f"{step}-fp8", layout, state, ctx, folder / "tokenizer" / "0123", "bf16", fp8=True)

    lf.sim.spmd(lf.Mesh(tp=2, dp=2), rank)
    return folder


def exported(run: Path, out: Path, **options: Any) -> Path:
    SCRIPT["main"](SCRIPT["Config"](str(run), str(out), device="cpu", **options))
    return out


def test_the_files_are_those_of_the_runs_own_mesh(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert files(exported(run, tmp_path / "newest")) == files(run.parent / "10-fp32")
    assert files(exported(run, tmp_path / "older", step=5, dtype="bf16")) == files(run.parent / "5-bf16")
    assert files(exported(run, tmp_path / "8 bits", dtype="bf16", fp8=True)) == files(run.parent / "10-fp8")
    said = capsys.readouterr().out
    assert "model.safetensors" in said
    assert f"{(tmp_path / 'older' / 'model.safetensors').stat().st_size:,}" in said
    assert "step 5 of " in said
    assert "trained on dp=2,tp=2, is in " in said
    assert str(len(load_file(tmp_path / "older" / "model.safetensors"))) in said


def test_the_optimizer_is_not_needed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoints/*/*.safetensors"):
        save_file({k: v for k, v in load_file(path).items() if k.startswith("master/")}, path, metadata={"format": "pt"})
    path = tmp_path / "run" / "checkpoints" / "step-00000005"
    with pytest.raises(CheckpointError):
        lf.sim.spmd(lf.Mesh(), lambda axes: lf.checkpoint.load(path, lf.layout(MODEL, axes.mesh), context(axes, "bf16")))
    assert files(exported(tmp_path / "run", tmp_path / "out", step=5)) == files(run.parent / "5-fp32")


def test_the_tokenizer_is_the_runs(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "tokenizer" / "0123", tmp_path / "run" / "tokenizer" / "4567")
    with pytest.raises(ConfigError, match=r"there are 2: .*0123, .*4567; say --tokenizer FOLDER, or none"):
        exported(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"tokenizer": str(run / "tokenizer" / "0123")}))
    assert files(exported(tmp_path / "run", tmp_path / "out")) == files(run.parent / "10-fp32")
    assert sorted(files(exported(tmp_path / "run", tmp_path / "out", tokenizer="none"))) == ["config.json", "model.safetensors"]
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="there are none; say --tokenizer"):
        exported(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": 7}, "has no checkpoint of step 7; it has 5, 10"),
        ({"dtype": "bf61"}, "unknown --dtype 'bf61'; did you mean 'bf16'"),
        ({"tokenizer": "qwen3-demo"}, "is a preset: a shape, without weights or tokenizer"),
        ({"max_shard_gb": 0.0}, "max_shard_bytes=0 must be at least 1"),
    ],
)
def test_odd_requests_are_refused(run: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        exported(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_run_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no checkpoints; --run is the folder that training had as --out"):
        exported(tmp_path, tmp_path / "out")
    shutil.copytree(run, tmp_path / "run")
    about = tmp_path / "run" / "checkpoints" / "step-00000010" / "manifest.json"
    values = json.loads(about.read_text())
    for change, words in (({"kind": "Diffusion"}, "of kind 'Diffusion'"), ({"config": {"depth": 3}}, "unknown field in .*'depth'")):
        about.write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=words):
            exported(tmp_path / "run", tmp_path / "out")


def test_a_rank_that_cannot_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    def rank(axes: Any) -> str:
        ctx, layout = context(axes, "fp32"), lf.layout(MODEL, axes.mesh)
        params = lf.init(layout, ctx, 0)

        def read(path: str) -> torch.Tensor:
            if axes.rank == 1 and path.endswith("down"):
                raise OSError(5, "Input/output error")
            return lf.tree.get(params, path)

        with pytest.raises(CheckpointError, match=r"failed on rank 1: .*Input/output error") as caught:
            lf.hf.save(tmp_path / "out", layout, read, ctx)
        return str(caught.value)

    assert len(lf.sim.spmd(lf.Mesh(tp=2, dp=2), rank)) == 4
    assert not list(tmp_path.iterdir())

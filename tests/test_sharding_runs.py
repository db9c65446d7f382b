"""Runs over sharded state by the scripts: stopped, and gone on with another stage, other groups, other meshes, to the same curve; evaluated, checked,
exported; and what is refused at the start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import attrs
import datasets  # noqa: F401 — loaded once here, not in every process that is forked
import pytest
import tokenizers  # noqa: F401
import torch.fx.experimental.symbolic_shapes  # noqa: F401 — the first backward of a process wants it
from helpers import MEASURED, QWEN3, ROOT, processes
from qwen3_oracle import files
from small_runs import texts, train

import lf
from lf.config import ConfigError

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate
import export
import pretrain


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pretrain.Config:
    monkeypatch.setattr(lf.pictures, "loss_curve", lambda *_: None)  # tests/test_demo.py looks at it
    texts(tmp_path / "texts")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3))
    return pretrain.Config(
        data=(str(tmp_path / "texts"),), model=str(tmp_path / "model"), mesh="dp=2", device="cpu", precision="fp32", seq_len=15, micro_batch=1,
        global_batch=4, steps=6, warmup=2, lr=1e-2, save_every=4, validation=0.2, eval_every=3, drift_every=2, out=str(tmp_path / "run"),
    )  # fmt: skip


def curve(folder: str | Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in lf.runs.read_metrics(Path(folder) / "metrics.jsonl")]


def test_a_run_goes_on_under_other_shards(config: pretrain.Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whole state, then stage 3, then stage 1 in groups over a pipeline: one curve, that of the run without any."""
    whole = attrs.evolve(config, out=str(tmp_path / "whole"))
    processes(2, train, whole)
    want = curve(whole.out)
    processes(2, train, config, 2)
    assert len(curve(config.out)) == 3
    capfd.readouterr()
    processes(2, train, attrs.evolve(config, shard="3,ahead=2"), 1)
    assert "sharding 3,ahead=2" in capfd.readouterr().out
    assert len(curve(config.out)) == 4
    processes(lf.Mesh(pp=2, dp=2), train, attrs.evolve(config, mesh="pp=2,dp=2", shard="1,ranks=2"))
    got = curve(config.out)
    assert [r["step"] for r in got] == [*range(1, 7)]
    for name in ("loss", "grad_norm", "eval/validation/loss"):
        assert [r[name] for r in got if name in r] == pytest.approx([r[name] for r in want if name in r], rel=1e-4), name
    assert want[-1]["loss"] < want[0]["loss"]

    settings = {"data": (f"held={tmp_path / 'texts'}",), "mesh": "dp=2", "device": "cpu", "precision": "fp32", "out": str(tmp_path / "held")}
    said = [
        processes(2, evaluated, evaluate.Config(**settings, **source))[0]
        for source in ({"run": config.out}, {"model": str(tmp_path / "run" / "hf"), "seq_len": 15})
    ]
    assert said[0] == pytest.approx(said[1], rel=1e-5), "the checkpoint and the folder are the same model"


def evaluated(axes: Any, config: evaluate.Config) -> float:
    return evaluate.main(config)["eval/held/perplexity"]


def test_a_run_over_shards_that_is_stopped_goes_on_bit_for_bit(config: pretrain.Config, tmp_path: Path) -> None:
    config = attrs.evolve(config, shard="2", precision="bf16", validation=None, drift_every=None)
    whole = attrs.evolve(config, out=str(tmp_path / "whole"))
    processes(2, train, whole)
    processes(2, train, config, 3)
    assert len(curve(config.out)) == 4
    processes(2, train, config)
    assert curve(config.out) == curve(whole.out)
    assert files(tmp_path / "run" / "hf") == files(tmp_path / "whole" / "hf")
    export.main(export.Config(run=config.out, out=str(tmp_path / "again"), device="cpu"))
    assert {k: v for k, v in files(tmp_path / "again").items() if k.endswith(".safetensors")} == {
        k: v for k, v in files(tmp_path / "run" / "hf").items() if k.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shard": "4"}, "sharding stage 4: there are 0"),
        ({"shard": "3,rank=8"}, "did you mean 'ranks'"),
        ({"shard": "3,ranks=3"}, r"sharding over ranks=3: it must divide the dp·cp = 1 ranks"),
        ({"shard": "1,keep"}, "keep is of stage 3"),
    ],
)
def test_what_cannot_be_is_refused_before_work_starts(config: pretrain.Config, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pretrain.main(attrs.evolve(config, mesh="", **change))
    assert not Path(config.out).exists()

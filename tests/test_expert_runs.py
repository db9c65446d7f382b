"""Runs of models with experts by the scripts: one that goes on over another folding, its evaluation, its files; and what is refused at the start."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers import ROOT, processes
from small_runs import texts, train

import lf
from lf.models import families
from lf.models.presets import PRESETS
from lf.models.small import shrunk

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate
import parity as parity_script
import pretrain


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pretrain.Config:
    """GLM-4.5 in small: a dense layer, mixtures with a selection bias and a shared expert, one more of them in a head that predicts further ahead."""
    monkeypatch.setattr(lf.pictures, "loss_curve", lambda *_: None)  # tests/test_demo.py looks at it
    texts(tmp_path / "texts")
    model = attrs.evolve(shrunk(PRESETS["glm-4.5-air"]), vocab=290, init_std=0.1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(families.of(model).write(model)))
    return pretrain.Config(
        data=(str(tmp_path / "texts"),), model=str(tmp_path / "model"), mesh="dp=2,ep=2", device="cpu", precision="fp32", seq_len=15,
        micro_batch=2, global_batch=4, steps=6, warmup=2, lr=1e-2, save_every=4, validation=0.2, eval_every=3, out=str(tmp_path / "run"),
    )  # fmt: skip


def test_a_run_goes_on_over_another_folding(config: pretrain.Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = attrs.evolve(config, out=str(tmp_path / "whole"))
    processes(lf.Mesh(dp=2, ep=2), train, whole)
    want = lf.runs.read_metrics(tmp_path / "whole" / "metrics.jsonl")
    processes(lf.Mesh(dp=2, ep=2), train, config, 2)
    assert len(lf.runs.read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    first = f"\nfirst loss {want[0]['cross_entropy']:.2f}; ln(vocabulary) = 5.67\n"
    assert first in capfd.readouterr().out, "without what the routers and the head add"
    other = attrs.evolve(config, mesh="tp=2,ep=2", dispatch="gather", micro_batch=1)
    processes(lf.Mesh(tp=2, ep=2), train, other)
    got = lf.runs.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in got] == [*range(1, 7)]
    assert [r["counted"] for r in got] == [r["counted"] for r in want], "the same experts, whatever carries the rows"
    assert got[0]["counted"].keys() == {"layers.1.route/load", "layers.2.route/load", "mtp.0.route/load"}
    for name in ("loss", "grad_norm", "expert_load_max", "expert_entropy", "eval/validation/loss"):
        assert [r[name] for r in got if name in r] == pytest.approx([r[name] for r in want if name in r], rel=1e-4), name
    assert want[-1]["loss"] < want[0]["loss"] - 0.5
    assert (tmp_path / "run" / "experts.png").stat().st_size > 10_000

    # what is not learned came back: a bias goes on from where it was, up or down by its rate at each step
    where = lf.checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert where is not None
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp32")
    state, _ = lf.checkpoint.load(where, lf.layout(lf.checkpoint.model(where), ctx.axes.mesh), ctx)
    rate = PRESETS["glm-4.5-air"].layers[-1].ffn.router.bias_rate
    loads = torch.tensor([r["counted"]["layers.1.route/load"] for r in want], dtype=torch.float64)
    bias = rate * (loads.mean(1, keepdim=True) - loads).sign().sum(0)
    assert bias.abs().max() > 0
    torch.testing.assert_close(state.params["layers.1.route"]["bias"].double(), bias, rtol=0, atol=1e-7)

    settings = {"data": (f"held={tmp_path / 'texts'}",), "mesh": "dp=2,ep=2", "device": "cpu", "precision": "fp32", "out": str(tmp_path / "held")}
    perplexities = [
        processes(lf.Mesh(dp=2, ep=2), evaluated, evaluate.Config(**settings, **source))[0]
        for source in ({"run": str(tmp_path / "run")}, {"model": str(tmp_path / "run" / "hf"), "seq_len": 15, "dispatch": "gather"})
    ]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5), "the checkpoint and the folder are the same model"
    assert math.log(perplexities[0]) < want[0]["cross_entropy"] - 0.5


def evaluated(axes: Any, config: evaluate.Config) -> float:
    return evaluate.main(config)["eval/held/perplexity"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dispatch": "gathered"}, "dispatch 'gathered'.*'gather'"),
        ({"mesh": "ep=2,dp=1"}, r"ep\*etp = 2\*1 = 2 must divide dp\*cp\*tp = 1\*1\*1"),
        ({"compile": True}, "counts on the host how many rows each expert gets.*without compilation"),
    ],
)
def test_what_cannot_be_is_refused_before_work_starts(config: pretrain.Config, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pretrain.main(attrs.evolve(config, **({"mesh": ""} | change)))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "tiny-moe", "mesh": ("dp=2,ep=2",), "dispatch": "gathered"}, "dispatch 'gathered'.*'gather'"),
        ({"model": "tiny-moe", "mesh": ("dp=3,ep=2",)}, r"ep\*etp = 2\*1 = 2 must divide dp\*cp\*tp = 3\*1\*1 = 3"),
        ({"model": "tiny", "mesh": ("dp=2,ep=2",)}, "ep and etp split experts, and the model has none"),
        ({"model": "tiny-moe", "mesh": ("dp=2",), "compile": True}, "counts on the host"),
    ],
)
def test_parity_refuses_the_same(change: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=words):
        parity_script.main(parity_script.Config(device="cpu", **change))
    assert "error against one rank" not in capsys.readouterr().out

"""A pipeline by its flags: what they make of a model, what they refuse, and runs of the scripts that go on under others."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import attrs
import datasets  # noqa: F401 — loaded once here, not in every process that is forked
import pytest
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401 — the first operation on meta tensors wants it
from helpers import MEASURED, QWEN3, ROOT, context, processes

import lf
from lf.config import ConfigError
from lf.models.small import tiny
from lf.pipeline import Pipeline, micro_batch
from lf.schedule import ProgramError
from lf.spec import LayoutError

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate
import export
import pretrain

WIDE = attrs.evolve(tiny().config, layers=tiny().config.layers[:1] * 6, vocab=4000)
MODEL = lf.models.decoder.decoder(WIDE)  # embed, six layers and a head that costs as much as several


def sizes(pipeline: Pipeline, pp: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    layout = pipeline.layout(MODEL, lf.Mesh(pp=pp), 64)
    return tuple(len(layout.layers(s)) for s in range(len(layout.stages))), layout.placement


def test_what_the_words_make_of_a_model() -> None:
    assert sizes(Pipeline(), 2) == ((4, 4), (0, 1))
    assert sizes(Pipeline("interleaved"), 2) == ((2, 2, 2, 2), (0, 1, 0, 1))
    assert sizes(Pipeline("interleaved", chunks=3), 2)[1] == (0, 1, 0, 1, 0, 1)
    assert sizes(Pipeline("zb-v", split="e,3,3,h"), 2) == ((1, 3, 3, 1), (0, 1, 1, 0))
    assert sizes(Pipeline("interleaved", split="e+1,2,1,2,h"), 2) == ((2, 2, 1, 2, 1), (0, 1, 0, 1, 0))  # rank 0 has a stage more
    (first, last), _ = sizes(Pipeline(split="cost"), 2)
    assert first > last + 2, "the head has cost nothing"


def test_a_line_says_what_a_step_is() -> None:
    pipeline = Pipeline("gpipe", recompute="full:1", offload="full")
    layout = pipeline.layout(MODEL, lf.Mesh(pp=2), 64)
    said = Pipeline("gpipe").told(Pipeline("gpipe").program(layout, 4), 2)
    assert said == "gpipe, 2 stages, bubble 20.0% in unit times, recompute none"  # (p-1)/(m+p-1)
    assert pipeline.told(pipeline.program(layout, 4), 2).endswith("recompute full:1, offload full;distance=1")


def test_a_program_for_each_number_of_microbatches(tmp_path: Path) -> None:
    layout = Pipeline().layout(MODEL, lf.Mesh(pp=2))
    assert [lf.schedule.ir.microbatches(p) for p in Pipeline().programs(layout, (1, 2, 5))] == [1, 2, 5]
    file = tmp_path / "two.txt"
    file.write_text("rank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 1B0 1F1 1B1\n")
    fixed = Pipeline(str(file))
    assert len(fixed.programs(layout, (2,))) == 1
    words = r"steps of this run have 2, 4 microbatches; --schedule .*two\.txt with 4: .*is for placement \(0, 1\) and 2"
    with pytest.raises(ProgramError, match=words):
        fixed.programs(layout, (2, 4))


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ({"schedule": "cosine"}, ConfigError, "--schedule cosine is of the learning rate, whose flag is --lr-schedule now"),
        ({"schedule": "zb"}, ConfigError, "unknown schedule 'zb'; did you mean 'zb-"),
        ({"chunks": 0}, ConfigError, "--chunks 0: must be at least 1"),
        ({"chunks": 2}, ProgramError, "one_f_one_b has one stage on each rank.*interleaved is for several"),
        ({"schedule": "zb-v", "chunks": 3}, ProgramError, "3 stages a rank: a V has 2"),
        ({"split": "e,9,h"}, LayoutError, "9 for the 6 layers between"),
        ({"split": "e+6+h"}, ConfigError, r"--split e\+6\+h is of 1 stages; --schedule 1f1b on pp=2 has 2"),
        ({"split": "costs"}, ConfigError, "unknown --split, which may also be in words, as e,4,h: 'costs'; did you mean 'cost'"),
        ({"split": "e;h"}, LayoutError, "'e;h' should be e, h or a number"),
        ({"recompute": "all"}, ConfigError, "unknown part of --recompute 'all'"),
        ({"offload": "full=2"}, ConfigError, "--offload full=2: .*should be full or full:K"),
        ({"freeze": ("layer.0",)}, LayoutError, "frozen 'layer.0' names no segment, layer or parameter of the model; near: layers.0"),
    ],
)
def test_words_that_cannot_be(flags: dict[str, Any], error: type[ValueError], words: str) -> None:
    with pytest.raises(error, match=words):
        (pipeline := Pipeline(**flags)).program(pipeline.layout(MODEL, lf.Mesh(pp=2)), 4)


def test_rows_of_a_microbatch() -> None:
    assert [micro_batch(*given) for given in ((None, None, 8, 2), (4, None, 8, 2), (None, 4, 8, 2), (1, 4, 8, 2))] == [1, 4, 1, 1]
    for given, words in (
        ((None, 3, 8, 2), r"--global-batch 8 is no multiple of dp·microbatches = 2·3 = 6; the nearest that are: 6 and 12"),
        ((2, 4, 8, 2), r"--micro-batch 2 and --microbatches 4 do not agree: 2·4·dp = 16 rows a step, and --global-batch is 8"),
        ((None, 9, 8, 1), "the nearest that are: 9"),
        ((0, None, 8, 1), "--micro-batch 0: must be at least 1"),
        ((None, 0, 8, 1), "--microbatches 0: must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            micro_batch(*given)


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    layout, ctx = lf.layout(tiny(), lf.Mesh(dp=1)), context(lf.solo())
    program = lf.schedule.one_f_one_b(1, 1)
    with pytest.raises(ConfigError, match=r"compiled layers on device 'cpu': .*needs a C.. compiler, and there is no /no/such/compiler; install it"):
        lf.train.gradients(layout, program, ctx, compile=True)
    lf.train.gradients(layout, program, ctx, compile="eager")  # a backend that needs none


# runs


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pretrain.Config:
    monkeypatch.setattr(lf.pictures, "loss_curve", lambda *_: None)  # tests/test_demo.py looks at it
    dice = random.Random(0)
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(dice.choices(["def", "return", "self", "yield", "x", "(", ")", "\n"], k=120)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**QWEN3, "num_hidden_layers": 3}))
    return pretrain.Config(
        data=(str(tmp_path / "texts"),), model=str(tmp_path / "model"), device="cpu", precision="fp64", seq_len=15, global_batch=4,
        steps=6, warmup=2, lr=1e-2, lr_schedule="constant", save_every=3, eval=(f"held={tmp_path / 'texts'}",), eval_every=3,
        out=str(tmp_path / "run"),
    )  # fmt: skip


def _train(axes: Any, config: pretrain.Config) -> None:
    pretrain.main(config)


def _evaluate(axes: Any, config: evaluate.Config) -> dict[str, float]:
    return evaluate.main(config)


def curve(config: pretrain.Config) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in lf.runs.read_metrics(Path(config.out) / "metrics.jsonl")]


def test_a_run_goes_on_under_another_schedule_and_mesh(config: pretrain.Config, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The losses and the evaluation of one rank: begun as an interleaved pipeline, ended as another one of uneven stages."""
    whole = attrs.evolve(config, out=str(tmp_path / "whole"))
    pretrain.main(whole)
    begun = attrs.evolve(config, steps=3, mesh="pp=2", schedule="interleaved", microbatches=4, recompute="full", draw_step=2)
    processes(lf.Mesh(pp=2), _train, begun)
    said = capfd.readouterr().out
    assert "a step is 4 rows of 15 = 1 × 4 microbatches × dp=1; interleaved, 4 stages, bubble" in said
    assert "recompute full" in said
    run = Path(config.out)
    assert f"step 2 is drawn: {run}/step-00000002.svg" in said
    assert (run / "step-00000002.png").read_bytes()[:4] == b"\x89PNG"
    events = json.loads((run / "step-00000002.json").read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1}
    names = {e["name"] for e in events}
    assert any("REMAT" in name for name in names), names

    ended = attrs.evolve(config, mesh="pp=2", schedule="zb-h1", split="e+2,1+h", offload="full:1", micro_batch=2)
    processes(lf.Mesh(pp=2), _train, ended)
    for one, alone in zip(curve(config), curve(whole), strict=True):
        assert one == pytest.approx(alone, rel=1e-9), one["step"]
    settings = json.loads((run / "config.json").read_text())
    assert (settings["schedule"], settings["microbatches"]) == ("zb-h1", None)

    held = evaluate.Config(
        data=config.eval, run=config.out, mesh="pp=2", device="cpu", precision="fp64", out=str(tmp_path / "evaluated"),
    )  # fmt: skip
    assert processes(lf.Mesh(pp=2), _evaluate, held)[1]["eval/held/loss"] == pytest.approx(curve(whole)[-1]["eval/held/loss"], rel=1e-9)
    export.main(export.Config(run=config.out, out=str(tmp_path / "exported"), device="cpu"))
    assert (tmp_path / "exported" / "model.safetensors").stat().st_size == (run / "hf" / "model.safetensors").stat().st_size


def test_what_is_not_trained_is_bound(config: pretrain.Config) -> None:
    config = attrs.evolve(config, steps=2, freeze=("layers.0",), save_every=2, eval=())
    pretrain.main(config)
    with pytest.raises(ConfigError, match=r"freeze: the run has \['layers.0'\], this command \[\]"):
        pretrain.main(attrs.evolve(config, freeze=()))
    with pytest.raises(ConfigError, match="draw_step=3: the run has 2 steps"):
        pretrain.main(attrs.evolve(config, draw_step=3))


def test_a_run_of_an_older_version_says_what_is_called_otherwise_now(config: pretrain.Config) -> None:
    old = lf.config.to_dict(config)
    old["schedule"] = old.pop("lr_schedule")
    Path(config.out).mkdir()
    (Path(config.out) / "config.json").write_text(json.dumps(old))
    with pytest.raises(ConfigError, match=r"holds a run with other settings(.|\n)*what was schedule is lr_schedule now"):
        pretrain.main(config)

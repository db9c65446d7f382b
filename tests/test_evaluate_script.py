"""scripts/evaluate.py: a run's checkpoint and its export give the very numbers of lf.evaluate, on any mesh, and odd requests are refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import QWEN3, ROOT, processes

import lf
from lf.config import ConfigError

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate as script
import pretrain

TEXTS = ["to be or not to be, that is the question", "whether tis nobler in the mind", "to suffer the slings and arrows"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """A run of three steps with checkpoints of the second and the third, its export, and held-out text and tokens."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text(" ".join(TEXTS * 4))
    (folder / "held.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (folder / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(QWEN3))
    config = pretrain.Config(
        data=(str(folder / "texts"),), model=str(folder / "model"), device="cpu", precision="fp32", seq_len=16, global_batch=2, steps=3,
        warmup=1, lr=3e-2, save_every=2, eval=(f"held={folder / 'held.jsonl'}",), eval_every=2, out=str(folder / "run"),
    )  # fmt: skip
    pretrain.main(config)
    return folder


def config(root: Path, **options: Any) -> script.Config:
    given = {"data": (f"held={root / 'held.jsonl'}",), "device": "cpu", "precision": "fp32", "seq_len": 16, "out": str(root / "cache")}
    return script.Config(**{**given, **options})


def evaluated(axes: Any, config: script.Config) -> dict[str, float]:
    return script.main(config)


def test_the_numbers_are_those_of_training_and_of_any_layout(root: Path, capsys: Any) -> None:
    logged = {r["step"]: {k: v for k, v in r.items() if k.startswith("eval/")} for r in lf.runs.read_metrics(root / "run" / "metrics.jsonl")}
    assert logged[2] != logged[3]
    assert script.main(config(root, run=str(root / "run"), step=2, seq_len=None)) == pytest.approx(logged[2], rel=1e-5)
    capsys.readouterr()
    assert script.main(config(root, run=str(root / "run"), seq_len=None, json=str(root / "report.json"))) == pytest.approx(logged[3], rel=1e-5)
    cells = [cell.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│") for cell in line.strip("│").split("│")]
    loss = logged[3]["eval/held/loss"]
    assert cells[:2] == ["held", "3"]
    assert cells[-2:] == [f"{loss:.4f}", f"{math.exp(loss):.4f}"]
    report = json.loads((root / "report.json").read_text())
    assert report["eval/held/loss"] == pytest.approx(loss, rel=1e-5)
    assert report["model"].endswith("step-00000003")
    for values in processes(2, evaluated, config(root, model=str(root / "run" / "hf"), mesh="tp=2", micro_batch=3)):
        assert values == pytest.approx(logged[3], rel=1e-4)


def test_several_sets_and_tokens_without_a_tokenizer(root: Path) -> None:
    sets = (f"ids={root / 'ids.jsonl'}", f"again={root / 'ids.jsonl'}")
    values = script.main(config(root, data=sets, model=str(root / "run" / "hf"), tokenizer="none"))
    assert values["eval/ids/loss"] == values["eval/again/loss"] > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give --model, .* or --run"),
        ({"model": "a", "run": "b"}, "give --model, .* or --run"),
        ({"model": "HF", "step": 3}, "give --model, .* or --run"),
        ({"model": "qwen3-demo"}, "is a preset: a shape, without weights"),
        ({"model": "nowhere"}, "there is no folder nowhere; --model is a folder with weights"),
        ({"run": "RUN", "step": 1}, "has no checkpoint of step 1; it has 2, 3"),
        ({"run": "nowhere"}, "has no checkpoints"),
        ({"model": "HF", "data": ("held.jsonl",)}, r"--data 'held.jsonl' should read NAME=path"),
        ({"model": "HF", "data": ("a=0.5:HELD",)}, "a set has no weight"),
        ({"model": "HF", "data": ("a=nowhere",)}, "nowhere does not exist"),
        ({"model": "HF", "tokenizer": "none"}, "is text, and --tokenizer is none"),
        ({"model": "HF", "json": "nowhere/report.json"}, "--json nowhere/report.json: No such file"),
        ({"model": "HF", "seq_len": 0}, "--seq-len 0: must be at least 1"),
        ({"model": "MODEL"}, "has no tokenizer.json|there is no model.safetensors"),
    ],
)
def test_odd_requests_are_refused(root: Path, options: dict[str, Any], words: str) -> None:
    places = {"HF": str(root / "run" / "hf"), "RUN": str(root / "run"), "MODEL": str(root / "model")}
    options = {k: places.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    if "data" in options:
        options["data"] = tuple(word.replace("HELD", str(root / "held.jsonl")) for word in options["data"])
    with pytest.raises(ValueError, match=words) as caught:
        script.main(config(root, **options))
    assert type(caught.value).__module__.startswith("lf.")  # a message made for the user


def test_a_run_that_began_from_weights_has_their_tokenizer(root: Path) -> None:
    made = str(root / "run" / "hf")
    again = pretrain.Config(
        data=(str(root / "texts"),), model=made, weights=made, device="cpu", precision="fp32", seq_len=16, global_batch=2, steps=1, warmup=0,
        out=str(root / "continued"),
    )  # fmt: skip
    pretrain.main(again)
    values = script.main(config(root, run=str(root / "continued")))
    assert 0 < values["eval/held/loss"] < math.log(QWEN3["vocab_size"]) + 1
    (root / "continued" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="there are none; say --tokenizer"):
        script.main(config(root, run=str(root / "continued")))

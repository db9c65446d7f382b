"""Killed at a random step and started again, a run writes the very lines that it would have written: real processes, SIGKILL, tp=2."""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import attrs
import pytest
from helpers import ROOT, SEED, processes

import lf

sys.path.insert(0, str(ROOT / "scripts"))
import pretrain

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 290, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> pretrain.Config:
    dice = random.Random(0)
    words = ["def", "return", "self", "import", "yield", "lambda", "x", "y", "(", ")", ":", "\n"]
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(dice.choices(words, k=120)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return pretrain.Config(
        data=(str(tmp_path / "texts"),), model=str(tmp_path / "model"), mesh="tp=2", device="cpu", precision="bf16", seq_len=15,
        micro_batch=2, global_batch=4, steps=8, warmup=2, lr=1e-2, save_every=3, out=str(tmp_path / "run"),
    )  # fmt: skip


def _train(axes, config, die_after: int | None) -> None:
    if die_after is not None:
        threading.Thread(target=_die, args=(Path(config.out) / "metrics.jsonl", die_after), daemon=True).start()
    pretrain.main(config)


def _die(metrics: Path, lines: int) -> None:
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def _curve(config) -> list[dict]:
    records = lf.runs.read_metrics(Path(config.out) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records]


def test_a_killed_run_goes_on_bit_for_bit(config, tmp_path):
    whole = attrs.evolve(config, out=str(tmp_path / "whole"))
    processes(lf.Mesh(tp=2), _train, whole, None)
    want = _curve(whole)
    assert [r["step"] for r in want] == list(range(1, 9))
    assert want[-1]["loss"] < want[0]["loss"]

    step = random.Random(SEED).randrange(1, 8)
    with pytest.raises(RuntimeError, match="exit code -9"):
        processes(lf.Mesh(tp=2), _train, config, step)
    assert not (Path(config.out) / "hf").exists()
    processes(lf.Mesh(tp=2), _train, config, None)
    assert _curve(config) == want, f"killed after step {step}"
    assert _files(Path(config.out) / "hf") == _files(tmp_path / "whole" / "hf")


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_a_finished_run_is_not_trained_again_and_another_learning_rate_is_refused(config):
    processes(lf.Mesh(tp=2), _train, config, None)
    before = (Path(config.out) / "metrics.jsonl").read_text()
    processes(lf.Mesh(tp=2), _train, config, None)
    assert (Path(config.out) / "metrics.jsonl").read_text() == before
    with pytest.raises(lf.config.ConfigError, match=r"lr: the run has 0.01, this command 0.5"):
        processes(lf.Mesh(tp=2), _train, attrs.evolve(config, lr=0.5), None)


def test_changed_texts_are_refused(config):
    processes(lf.Mesh(tp=2), _train, attrs.evolve(config, steps=3), None)
    text = Path(config.data[0]) / "3.txt"
    text.write_text(text.read_text() + " more")
    with pytest.raises(lf.config.ConfigError, match="the data is not what this run began with: documents was"):
        processes(lf.Mesh(tp=2), _train, attrs.evolve(config, steps=3), None)

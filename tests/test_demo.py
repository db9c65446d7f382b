"""The demo, as its users see it: what it leaves behind, what it says, and that killing it changes nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MEASURED, QWEN3, ROOT, SEED, processes
from small_runs import texts

import lf

sys.path.insert(0, str(ROOT / "scripts"))
import demo


def curve(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in lf.runs.read_metrics(out / "metrics.jsonl")]


def opens_in_transformers(folder: Path) -> None:
    """The folder gives transformers the logits that it gives lf, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(demo.PROMPT)["input_ids"]
    assert ids == lf.data.load_tokenizer(folder).encode([demo.PROMPT])[0]
    n = len(ids)
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp32")
    model = lf.hf.model(folder)
    plan = {"tokens": torch.tensor(ids), "positions": torch.arange(n), "cu_seqlens": torch.tensor([0] + [n] * n, dtype=torch.int32)}
    ours = lf.forward(model, lf.hf.load(folder, lf.layout(model, ctx.axes.mesh), ctx), lf.Batch(plan), ctx)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder).float()(torch.tensor([ids])).logits[0]
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def said(axes: Any, config: demo.Config) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        demo.main(config)
    return out.getvalue()


def test_a_small_one_leaves_and_says_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    texts(tmp_path / "texts", ".py")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3))
    out = tmp_path / "out"
    config = demo.Config(
        data=(str(tmp_path / "texts"),), model=str(tmp_path / "model"), seq_len=15, micro_batch=2, global_batch=8, steps=6, warmup=2,
        lr=2e-2, save_every=4, sample=20, out=str(out),
    )  # fmt: skip
    assert config.mesh == "tp=2,dp=2"
    first, *others = processes(lf.Mesh.parse(config.mesh), said, config)

    assert others == [""] * 3  # rank 0 speaks
    records = curve(out)
    assert [r["step"] for r in records] == list(range(1, 7))
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    assert f"loss {records[0]['loss']:.2f} → {records[-1]['loss']:.2f} nats per token over {records[-1]['tokens']:,} tokens" in first
    _, prompt, rest = first.partition(demo.PROMPT)
    assert prompt
    assert len(rest.partition("┏")[0].strip()) > 5, "no continuation"
    assert f"{out}/loss.png" in rest
    assert "--device cpu" in rest
    assert rest.count("scripts/launch") == rest.count("--device cpu"), "without a device a command would not run"
    for picture in ("loss.png", "layout.png"):
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (out / picture).stat().st_size > 10_000
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    opens_in_transformers(out / "hf")


# as a user starts it


def launched(out: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "LF_PYTHON": sys.executable}
    return subprocess.Popen(["scripts/launch", "demo", "--out", str(out)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


def ranks(out: Path) -> list[str]:
    """The processes that have this folder in their command line: the launcher, torchrun and all ranks."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(out) in line]


def until(what: Any, limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while not (done := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(done)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_demo_that_is_killed_and_started_again_writes_the_same_curve(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launched(whole).wait(1500) == 0

    dice = random.Random(SEED)
    lines, metrics = dice.randrange(5, 480), killed / "metrics.jsonl"
    launcher = launched(killed)
    assert until(lambda: metrics.exists() and metrics.read_text().count("\n") >= lines, 1500)
    time.sleep(dice.random())  # anywhere within a step, or within a save
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert until(lambda: not ranks(killed), 60), f"still there: {ranks(killed)}"
    assert not (killed / "hf").exists()
    assert launched(killed).wait(1500) == 0

    assert curve(killed) == curve(whole), f"killed after step {lines}, LF_TEST_SEED={SEED}"
    assert curve(whole)[-1]["loss"] < curve(whole)[0]["loss"] - 3
    opens_in_transformers(killed / "hf")

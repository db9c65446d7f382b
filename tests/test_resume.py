"""Killed at a random moment and started again, a run writes the very lines that it would have written: real processes, SIGKILL."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import datasets  # noqa: F401 — loaded once here, not in every process that is forked
import pytest
import tokenizers  # noqa: F401
import torch.fx.experimental.symbolic_shapes  # noqa: F401 — the first backward of a process wants it
from helpers import MEASURED, QWEN3, ROOT, SEED, processes
from small_runs import texts

import lf
from lf.checkpoint import atomic

sys.path.insert(0, str(ROOT / "scripts"))
import pretrain


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pretrain.Config:
    monkeypatch.setattr(lf.pictures, "loss_curve", lambda *_: None)  # tests/test_demo.py looks at it
    texts(tmp_path / "texts")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3))
    return pretrain.Config(
        data=(str(tmp_path / "texts"),), model=str(tmp_path / "model"), mesh="tp=2", device="cpu", precision="bf16", seq_len=15,
        micro_batch=2, global_batch=4, steps=12, warmup=2, lr=1e-2, save_every=3, out=str(tmp_path / "run"),
    )  # fmt: skip


def _train(axes: Any, config: pretrain.Config, die: Callable[[Any, pretrain.Config], None] | None = None) -> None:
    if die:
        die(axes, config)
    pretrain.main(config)


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_a_line(axes: Any, config: pretrain.Config, lines: int, delay: float) -> None:
    """Dead `delay` seconds after metrics.jsonl has so many lines: in the middle of a step, of a save, or between them."""
    metrics = Path(config.out) / "metrics.jsonl"

    def watch() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < lines:
            time.sleep(0.001)
        time.sleep(delay)
        _kill()

    threading.Thread(target=watch, daemon=True).start()


def at_a_rename(axes: Any, config: pretrain.Config, save: int) -> None:
    """Dead when a checkpoint is written, but not yet renamed into its place."""
    swap, calls = atomic._swap, []

    def dying(*args: Any) -> None:
        calls.append(args)
        (_kill if len(calls) == save else swap)(*args)

    atomic._swap = dying  # in this process alone


def asked_at_a_step(axes: Any, config: pretrain.Config, rank: int, number: int) -> None:
    """One rank alone is sent a signal while it makes the batches of step 5."""
    batches, calls = lf.data.step_batches, []

    def signalled(*args: Any) -> list[lf.Batch]:
        calls.append(args)
        if axes.rank == rank and len(calls) == 5:
            os.kill(os.getpid(), number)
        return batches(*args)

    lf.data.step_batches = signalled  # in this process alone


def _curve(config: pretrain.Config) -> list[dict]:
    records = lf.runs.read_metrics(Path(config.out) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records]


DICE = random.Random(SEED)


@pytest.mark.parametrize(("mesh", "kills"), [("tp=2", 2), ("tp=2,dp=2", 1)])
def test_a_killed_run_goes_on_bit_for_bit(config: pretrain.Config, tmp_path: Path, mesh: str, kills: int) -> None:
    ranks, config = lf.Mesh.parse(mesh), attrs.evolve(config, mesh=mesh)
    whole = attrs.evolve(config, out=str(tmp_path / "whole"))
    processes(ranks, _train, whole)
    want = _curve(whole)
    assert [r["step"] for r in want] == list(range(1, 13))
    assert want[-1]["loss"] < want[0]["loss"]

    # killed anywhere, and then, while it goes on, in one of its saves
    deaths = [partial(at_a_line, lines=DICE.randrange(1, 5), delay=DICE.uniform(0, 0.03)), partial(at_a_rename, save=DICE.randrange(1, 3))]
    for die in deaths[:kills]:
        with pytest.raises(RuntimeError):  # a rank that died, or one whose peer did
            processes(ranks, _train, config, die)
        assert not (Path(config.out) / "hf").exists()
    if kills == 2:
        assert len([*(Path(config.out) / "checkpoints").glob(".step-*.partial")]) == 1
    processes(ranks, _train, config)
    assert _curve(config) == want, f"killed at {deaths}"
    assert _files(Path(config.out) / "hf") == _files(tmp_path / "whole" / "hf")


def recording(axes: Any, config: pretrain.Config, then: Callable[[Any, pretrain.Config], None] | None = None) -> None:
    """Which rows this rank takes, a line a step: (the rows before the step, its own rows)."""
    made, out = lf.data.step_batches, Path(config.out).with_name(f"rows-{Path(config.out).name}-{config.mesh}-{axes.rank}")

    def step_batches(rows: lf.data.Rows, consumed: int, *more: Any) -> list[lf.Batch]:
        taken: list[int] = []
        batches = made(lambda k: (taken.append(k), rows(k))[1], consumed, *more)
        with open(out, "a") as file:
            file.write(json.dumps([consumed, taken]) + "\n")
        return batches

    lf.data.step_batches = step_batches  # in this process alone
    if then:
        then(axes, config)


@pytest.mark.parametrize("mesh", ["dp=2", DICE.choice(["tp=2", "tp=3"])])
def test_a_killed_run_goes_on_with_another_mesh(config: pretrain.Config, tmp_path: Path, mesh: str) -> None:
    config = attrs.evolve(config, mesh="", precision="fp64")
    whole, other = attrs.evolve(config, out=str(tmp_path / "whole")), attrs.evolve(config, mesh=mesh)
    processes(1, _train, whole, recording)
    with pytest.raises(RuntimeError):
        processes(1, _train, config, partial(recording, then=partial(at_a_line, lines=DICE.randrange(4, 9), delay=DICE.uniform(0, 0.02))))
    saved = int(str(lf.checkpoint.latest(Path(config.out) / "checkpoints")).rpartition("-")[2])
    assert 0 < saved < 12
    if mesh == "dp=2":  # other microbatches, too
        other = attrs.evolve(other, micro_batch=1)
    processes(lf.Mesh.parse(mesh), _train, other, recording)

    want = [json.loads(line) for line in (tmp_path / "rows-whole--0").read_text().splitlines()]
    assert want == [[4 * i, list(range(4 * i, 4 * i + 4))] for i in range(12)]
    taken = [[json.loads(line) for line in p.read_text().splitlines()] for p in sorted(tmp_path.glob(f"rows-run-{mesh}-*"))]
    assert len(taken) == lf.Mesh.parse(mesh).fill().size
    if mesh == "dp=2":  # each row on one rank, none twice
        assert [[i, sorted(a + b)] for (i, a), (_, b) in zip(*taken)] == want[saved:]
    else:
        assert all(rows == want[saved:] for rows in taken)
    got, curve = _curve(config), _curve(whole)
    assert [r["step"] for r in got] == list(range(1, 13))
    for one, alone in zip(got, curve):
        assert one == pytest.approx(alone, rel=1e-9), one["step"]
    assert _settings(config)["mesh"] == mesh


def _settings(config: pretrain.Config) -> dict[str, Any]:
    return json.loads((Path(config.out) / "config.json").read_text())


def _richer(config: pretrain.Config) -> pretrain.Config:
    """13 steps of growing size, with an evaluation, checks of the replicas and TensorBoard."""
    held = Path(config.data[0]).parent / "held"
    held.mkdir()
    (held / "a.txt").write_text("return x ( y ) : yield self")
    return attrs.evolve(
        config, mesh="tp=2", micro_batch=1, batch_ramp="1:1:9", eval=(f"held={held}",), eval_every=4, drift_every=2, lr_schedule="wsd",
        save_every=100, log="tensorboard", steps=None, tokens=15 * 38,
    )  # fmt: skip


def test_a_run_that_is_asked_to_end_goes_on_bit_for_bit(config: pretrain.Config, capfd: pytest.CaptureFixture) -> None:
    config = _richer(config)
    whole = attrs.evolve(config, out=config.out + "-whole")
    ranks = lf.Mesh.parse("tp=2")
    processes(ranks, _train, whole)
    want = _curve(whole)
    assert [r["tokens"] // 15 for r in want] == [1, 2, 3, 5, 7, 10, 14, 18, 22, 26, 30, 34, 38]
    assert [r["step"] for r in want if "eval/held/perplexity" in r] == [4, 8, 12, 13]

    processes(ranks, _train, config, partial(asked_at_a_step, rank=1, number=signal.SIGTERM))
    assert not (Path(config.out) / "hf").exists()
    assert [p.name for p in (Path(config.out) / "checkpoints").iterdir()] == ["step-00000006"]
    assert _curve(config) == want[:6]
    assert "SIGTERM: ended after step 6 of 13, which is saved; the same command goes on" in capfd.readouterr().out
    processes(ranks, _train, config)
    assert _curve(config) == want
    assert _files(Path(config.out) / "hf") == _files(Path(whole.out) / "hf")


@pytest.mark.slow
def test_a_launched_run_that_is_asked_to_end_goes_on_bit_for_bit(config: pretrain.Config) -> None:
    config = attrs.evolve(_richer(config), tokens=15 * 160)
    whole = attrs.evolve(config, out=config.out + "-whole")

    def launched(config: pretrain.Config) -> subprocess.Popen[str]:
        file = Path(config.out).with_suffix(".json")
        file.write_text(json.dumps(lf.config.to_dict(config)))
        env = {**os.environ, "LF_PYTHON": sys.executable}
        return subprocess.Popen(["scripts/launch", "pretrain", "--config", str(file)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)

    assert launched(whole).wait(200) == 0
    job, metrics = launched(config), Path(config.out) / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR2)
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 0
    assert "SIGUSR2: ended after step" in out
    assert _curve(config) == _curve(whole)[: len(_curve(config))]
    assert len(_curve(config)) < len(_curve(whole))
    assert launched(config).wait(200) == 0
    assert _curve(config) == _curve(whole)
    assert _files(Path(config.out) / "hf") == _files(Path(whole.out) / "hf")


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def _alone(config: pretrain.Config) -> None:
    """One rank, in this process."""
    gc.collect()  # the lock of the run before, if a traceback still holds it
    pretrain.main(config)


def test_what_a_finished_run_refuses(config: pretrain.Config) -> None:
    config = attrs.evolve(config, mesh="", steps=3, micro_batch=4)
    _alone(config)
    out = Path(config.out)
    metrics, saved = (out / "metrics.jsonl").read_bytes(), _files(out / "checkpoints" / "step-00000003")
    _alone(config)  # is not trained again
    with pytest.raises(lf.config.ConfigError, match=r"lr: the run has 0.01, this command 0.5"):
        _alone(attrs.evolve(config, lr=0.5))
    text = Path(config.data[0]) / "3.txt"
    before = text.read_text()
    text.write_text(before + " more")
    with pytest.raises(lf.config.ConfigError, match="the data is not what this run began with: documents was"):
        _alone(config)
    text.write_text(before)
    (out / "checkpoints" / "step-00000003" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(lf.checkpoint.CheckpointError, match=r"cannot go on from .*step-00000003: rank-00000\.safetensors has 0 bytes"):
        _alone(config)
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000003"]
    (out / "checkpoints" / "step-00000003" / "rank-00000.safetensors").write_bytes(saved["rank-00000.safetensors"])
    _alone(config)


def test_a_run_whose_rate_does_not_depend_on_its_length_can_be_lengthened(config: pretrain.Config) -> None:
    short = attrs.evolve(config, mesh="", steps=2, micro_batch=4, lr_schedule="constant", out=config.out + "-short")
    _alone(short)
    _alone(attrs.evolve(short, steps=4))
    straight = attrs.evolve(short, steps=4, out=config.out)
    _alone(straight)
    assert _curve(short) == _curve(straight)
    fallen = attrs.evolve(short, lr_schedule="wsd", warmup=0, decay=0.5, out=config.out + "-fallen")
    _alone(fallen)
    with pytest.raises(lf.config.ConfigError, match=r"step 2 was made at a learning rate of 0\.001.*, this command has 0\.01"):
        _alone(attrs.evolve(fallen, steps=8))
    with pytest.raises(lf.config.ConfigError, match="steps: the run has 4, this command 6"):
        _alone(attrs.evolve(short, steps=6, lr_schedule="cosine"))


def test_a_start_that_never_trained_can_be_put_right(config: pretrain.Config) -> None:
    config = attrs.evolve(config, mesh="", steps=2, micro_batch=4)
    with pytest.raises(lf.data.DataError, match="typo does not exist"):
        _alone(attrs.evolve(config, data=("typo",)))
    with pytest.raises(ValueError, match="nowhere"):
        _alone(attrs.evolve(config, match="3.*", weights="nowhere"))
    bpe = lf.data.train_bpe(["abc"], 257, Path(config.out).parent / "bpe")
    with pytest.raises(lf.checkpoint.CheckpointError, match=r"there is no model\.safetensors"):
        _alone(attrs.evolve(config, match="3.*", weights=config.model, tokenizer=str(bpe)))
    assert not (Path(config.out) / "tokens").exists()  # no hours go into the data before
    _alone(config)
    clean = attrs.evolve(config, out=config.out + "-clean")
    _alone(clean)
    assert _curve(config) == _curve(clean)  # nothing of the earlier starts is in it
    assert _files(Path(config.out) / "hf") == _files(Path(clean.out) / "hf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"tokens": 100}, "--steps 12 and --tokens 100 both say how long the run is"),
        ({"steps": None, "tokens": 0}, "--tokens 0: must be at least 1"),
        ({"global_batch": 0, "seq_len": -1}, "--seq-len -1, --global-batch 0: must be at least 1"),
        ({"save_every": 0, "keep": 0}, "save_every=0, keep=0: must be at least 1"),
        ({"on_nonfinite": "skip"}, "on_nonfinite='skip' should read stop, or skip:N"),
        ({"log": "jsonl,wanddb"}, "unknown log 'wanddb'; did you mean 'wandb'"),
        ({"lr_schedule": "cosin"}, "unknown lr_schedule 'cosin'; did you mean 'cosine'"),
        ({"batch_ramp": "2:2"}, "batch_ramp '2:2' should read start:increment:rows"),
        ({"batch_ramp": "1:1:9"}, "batch_ramp 1:1:9: steps of 1, 3 rows; .* micro_batch.dp = 2.1 = 2. The nearest that work: 2:2:9"),
        ({"global_batch": 0}, "--global-batch 0: must be at least 1"),
        ({"micro_batch": 0}, "--micro-batch 0: must be at least 1"),
        ({"steps": 2, "warmup": 100}, "warmup=100 .* steps=2"),
        ({"warmup": -1}, "warmup=-1"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"clip": 0.0}, "clip=0.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(config: pretrain.Config, change: dict[str, Any], words: str) -> None:
    with pytest.raises(lf.config.ConfigError, match=words):
        _alone(attrs.evolve(config, mesh="", **change))
    assert not Path(config.out).exists()

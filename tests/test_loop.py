"""The loop: what a record says, what happens between steps and in which order, and how a run ends that goes wrong or is asked to."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from helpers import context

import lf
from lf import signals
from lf.config import ConfigError
from lf.loop import Feed, Policy
from lf.models.small import tiny
from lf.runs import Run, RunError, read_metrics

DEFAULT = {"loss": 1.0, "cross_entropy": 1.0, "grad_norm": 2.0, "tokens": 7, "lr": 0.5, "skipped": False}


def feed(consumed: Callable[[int], int] = lambda i: 4 * i) -> Feed:
    return Feed(lambda i: [lf.Batch({"tokens": torch.zeros(8, dtype=torch.int64)})] * 2, consumed, 5, {})


def ran(
    folder: Path, policy: Policy, axes: Any = None, *, at: int = 0, flops: Any = None, step: Any = None, device: Any = None, **rest: Any
) -> tuple[lf.State, list[dict[str, Any]]]:
    """A run of steps that only count, whose metrics are DEFAULT with what `step(number, axes)` says."""
    axes = axes or lf.solo()
    ctx = context(axes)
    if device:
        ctx = attrs.evolve(ctx, device=SimpleNamespace(**{**vars(ctx.device), **device}))
    model = tiny()
    segments = [attrs.evolve(s, flops=flops if s.name == "head" else flops and (lambda batch: 0.0)) for s in model.segments]
    layout = lf.layout(attrs.evolve(model, segments=tuple(segments)), axes.mesh)

    def counted(state: lf.State, batches: Any) -> Any:
        number = int(state.step) + 1
        said = {**DEFAULT, "finite": [True, True], **((step and step(number, axes)) or {})}
        return attrs.evolve(state, step=state.step + 1), {k: torch.tensor(v) for k, v in said.items()}

    master = {"a": {"w": torch.zeros(2)}}
    state = lf.State(master, {"master": {}}, torch.tensor(at))
    state = lf.loop.run(Run(folder, None), layout, counted, state, feed(), ctx, policy, **rest)
    return state, read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only the test moves, for each thread its own."""
    now: dict[str, float] = defaultdict(float)
    monkeypatch.setattr(lf.loop.time, "perf_counter", lambda: now[threading.current_thread().name])
    return lambda seconds: now.__setitem__(threading.current_thread().name, now[threading.current_thread().name] + seconds)


def test_a_record_has_the_keys_in_this_order_and_speed_is_that_of_the_step(
    tmp_path: Path, passes: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A step takes 2 s, a checkpoint 100 s, an evaluation 50 s: every line says 4 rows of 5 tokens in 2 s, and 2 microbatches of 3e12 operations."""
    monkeypatch.setattr(lf.checkpoint, "save", lambda *args: passes(100))

    def step(number: int, axes: Any) -> None:
        passes(2)

    def evaluate(params: Any) -> dict[str, float]:
        passes(50)
        return {"eval/held/loss": 0.25}

    policy = Policy(7, save_every=3, eval_every=2)
    peak = {"peak_flops": lambda dtype: 12e12, "memory_peak": lambda: 3 << 29}
    _, records = ran(tmp_path, policy, step=step, flops=lambda batch: 3e12, device=peak, evaluate=evaluate)
    keys = "step tokens loss cross_entropy grad_norm lr tokens_per_s_per_device tflops_per_device mfu memory_gib skipped"
    assert [*records[0]] == keys.split()
    assert [r["tokens"] for r in records] == list(range(20, 160, 20))
    assert {tuple(r[k] for k in keys.split()[-5:]) for r in records} == {(10, 3, 0.25, 1.5, 0)}
    assert [r["step"] for r in records if "eval/held/loss" in r] == [2, 4, 6, 7]
    assert "step 7/7   loss 1.000   tokens/s/device 10   mfu 25.0%   left" in capsys.readouterr().out


def test_speed_and_memory_are_those_of_all_ranks(tmp_path: Path, passes: Callable[[float], None]) -> None:
    def step(number: int, axes: Any) -> None:
        passes(1 + axes.rank)

    def body(axes: Any) -> list[dict[str, Any]]:
        peak = {"memory_peak": lambda: (axes.rank + 1) << 30, "peak_flops": lambda dtype: None}
        return ran(tmp_path, Policy(2), axes, step=step, device=peak, flops=lambda batch: 1e12 * (1 + axes["dp"].index))[1]

    lf.sim.spmd(lf.Mesh(dp=2, tp=2), body)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["memory_gib"] for r in records] == [4, 4]
    assert [r["tflops_per_device"] for r in records] == [(2 * 1 + 2 * 2) / 4] * 2  # two microbatches on each of two dp coordinates, over four ranks
    assert "mfu" not in records[0]
    assert [r["tokens_per_s_per_device"] for r in records] == [5.0] * 2


def test_metrics_are_read_when_the_next_step_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    read = lf.loop.record_of
    monkeypatch.setattr(lf.loop, "record_of", lambda done, *rest: happened.append(f"read {done.step}") or read(done, *rest))
    ran(tmp_path, Policy(5, save_every=3), step=lambda number, axes: happened.append(f"step {number}"))
    assert happened == ["step 1", "step 2", "read 1", "step 3", "read 2", "read 3", "step 4", "step 5", "read 4", "read 5"]


def test_where_nothing_is_known_nothing_is_said(tmp_path: Path) -> None:
    _, records = ran(tmp_path, Policy(1))
    assert not {"mfu", "tflops_per_device"} & records[0].keys()
    assert records[0]["memory_gib"] > 0.05  # this process has torch in it


def test_checkpoints_come_when_due_and_the_last_are_kept(tmp_path: Path) -> None:
    ran(tmp_path, Policy(11, save_every=3, keep=3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000009", "step-00000011"]
    assert lf.checkpoint.manifest(tmp_path / "checkpoints" / "step-00000009").step == 9


# steps that are not finite


def bad_at(*steps: int) -> Callable[[int, Any], dict[str, Any]]:
    """On dp coordinate 1 the second microbatch of these steps is not finite."""

    def step(number: int, axes: Any) -> dict[str, Any]:
        bad = number in steps
        values = {"loss": math.nan, "cross_entropy": math.nan, "grad_norm": math.inf, "skipped": True} if bad else {}
        return {**values, "finite": [True, not (bad and axes.coords["dp"] == 1)]}

    return step


def test_stop_names_step_rank_and_microbatch_on_every_rank(tmp_path: Path) -> None:
    def body(axes: Any) -> str:
        with pytest.raises(RunError) as caught:
            ran(tmp_path, Policy(9, save_every=2), axes, step=bad_at(3))
        return str(caught.value)

    said = lf.sim.spmd(lf.Mesh(dp=2, tp=2), body)
    where = "not finite on rank 2 microbatch 1, rank 3 microbatch 1; nothing was updated; --on-nonfinite skip:N goes on past such a step"
    assert set(said) == {f"step 3: loss nan, gradient norm inf: {where}"}
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_sum_that_alone_is_not_finite_blames_nobody(tmp_path: Path) -> None:
    def step(number: int, axes: Any) -> dict[str, Any]:
        return {"grad_norm": math.inf, "skipped": True}

    with pytest.raises(RunError, match=r"step 1: .*not finite on no rank by itself, only in the sum over microbatches and ranks"):
        ran(tmp_path, Policy(1), step=step)


def test_skip_goes_on_and_counts_steps_in_a_row_also_over_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def body(axes: Any) -> None:
        ran(tmp_path, Policy(6, save_every=6, on_nonfinite="skip:2"), axes, step=bad_at(2, 3, 5, 6))

    lf.sim.spmd(lf.Mesh(dp=2), body)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["skipped"] for r in records] == [0, 1, 1, 0, 1, 1]
    assert [r["loss"] for r in records] == [1.0, None, None, 1.0, None, None]
    assert capsys.readouterr().out.count("rank 1 microbatch 1; nothing was updated; skipped") == 4

    def goes_on(axes: Any) -> str:
        with pytest.raises(RunError) as caught:
            ran(tmp_path, Policy(9, on_nonfinite="skip:2"), axes, at=6, step=bad_at(7))
        return str(caught.value)

    assert all(words.endswith("; 3 such steps in a row") for words in lf.sim.spmd(lf.Mesh(dp=2), goes_on))


# between two steps


def test_replicas_that_differ_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    def check(layout: Any, state: lf.State, ctx: Any) -> None:
        checked.append(int(state.step))
        if state.step == 8:
            raise RunError("drifted")

    monkeypatch.setattr(lf.drift, "check", check)
    with pytest.raises(RunError, match="drifted"):
        ran(tmp_path, Policy(20, save_every=4, drift_every=3))
    assert checked == [3, 4, 6, 8]  # every third step, and before a checkpoint
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (3.7, "first loss 3.70; ln(vocabulary) = 3.61"),
        (5.0, "warning: first loss 5.00; ln(vocabulary) = 3.61. .* likely causes: initial weights that are too large"),
        (1.0, "warning: first loss 1.00; .* likely causes: tokens that see their own labels"),
    ],
)
def test_the_first_loss_is_compared_once(tmp_path: Path, capsys: pytest.CaptureFixture, loss: float, words: str) -> None:
    policy = Policy(3, first_loss=math.log(37))
    ran(tmp_path, policy, step=lambda number, axes: {"cross_entropy": loss, "loss": loss + 9})  # with what other objectives add
    said = [line for line in capsys.readouterr().out.splitlines() if "first loss" in line]
    assert len(said) == 1
    assert re.fullmatch(words.replace("(v", r"\(v").replace("y)", r"y\)") + ".*", said[0])
    ran(tmp_path, policy, at=1, step=lambda number, axes: {"cross_entropy": loss})  # no fresh model
    assert "first loss" not in capsys.readouterr().out


def test_a_step_that_is_behind_is_not_drawn_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    program = lf.schedule.one_f_one_b(1, 2)
    ran(tmp_path, Policy(4, draw_step=2), at=3, programs=[program])
    assert "draw_step=2 is not drawn: the run goes on after step 3; name a later one" in capsys.readouterr().out
    (tmp_path / "step-00000002.svg").touch()  # it was, by the run that this one goes on with
    ran(tmp_path, Policy(4, draw_step=2), at=3, programs=[program])
    assert "not drawn" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="draw_step=2: a step is drawn by its program; give `programs`"):
        ran(tmp_path, Policy(4, draw_step=2))


def test_an_evaluation_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = {"eval/a/loss": 1.5, "eval/a/cross_entropy": 1.5, "eval/a/perplexity": 4.4817, "eval/b/loss": 2.0}
    ran(tmp_path, Policy(1, eval_every=9), evaluate=lambda params: values)
    assert "step 1: a loss 1.5, perplexity 4.482; b loss 2" in capsys.readouterr().out


# signals


def signalled(number: int, *steps: int) -> Callable[[int, Any], None]:
    """A signal that arrives in these steps."""
    return lambda step, axes: os.kill(os.getpid(), number) if step in steps else None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize(("save_every", "at", "last"), [(100, 3, 4), (1, 3, 3), (3, 3, 3), (2, 1, 2), (100, 9, 10)])
def test_a_signal_ends_a_run_early_and_saved(tmp_path: Path, capsys, number: signal.Signals, save_every: int, at: int, last: int) -> None:
    before = signal.getsignal(number)
    state, records = ran(tmp_path, Policy(10, save_every=save_every), step=signalled(number, at))
    assert state.step == last
    assert [r["step"] for r in records] == list(range(1, last + 1))
    assert max(p.name for p in (tmp_path / "checkpoints").iterdir()) == f"step-{last:08d}"
    words = f"{number.name}: ended after step {last} of 10, which is saved; the same command goes on"
    assert (words in capsys.readouterr().out) == (last < 10)
    assert signal.getsignal(number) == before
    state, records = ran(tmp_path, Policy(10), at=last)
    assert [r["step"] for r in records] == list(range(1, 11))


def test_an_evaluation_every_step_does_not_hide_a_signal(tmp_path: Path) -> None:
    state, _ = ran(tmp_path, Policy(10, eval_every=1), step=signalled(signal.SIGUSR2, 2), evaluate=lambda params: {})
    assert state.step == 3


def test_ranks_agree_on_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads hear no signals: here one of them says that it has."""
    heard: list[int] = []

    def step(number: int, axes: Any) -> None:
        if number == 3 and axes.rank == 2:
            heard.append(signal.SIGTERM)

    @contextmanager
    def asked() -> Iterator[Callable[[], int]]:
        yield lambda: heard[0] if heard and threading.current_thread().name == "rank 2" else 0

    monkeypatch.setattr(signals, "asked", asked)
    assert lf.sim.spmd(lf.Mesh(dp=3), lambda axes: int(ran(tmp_path, Policy(10), axes, step=step)[0].step)) == [4, 4, 4]


def test_the_second_signal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with signals.asked() as asked:
        os.kill(os.getpid(), signal.SIGUSR2)
        now[0] = signals.SAME / 2  # the same request, passed on by another
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGUSR2
        now[0] = signals.SAME
        monkeypatch.setattr(signals.os, "kill", lambda *args: killed.append(args))
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert killed == [(os.getpid(), signal.SIGTERM)]


# what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"save_every": 0, "keep": -1}, "save_every=0, keep=-1: must be at least 1"),
        ({"eval_every": 0, "drift_every": 0}, "eval_every=0, drift_every=0: must be at least 1"),
        ({"on_nonfinite": "skip:0"}, "on_nonfinite='skip:0' should read stop, or skip:N"),
        ({"on_nonfinite": "go"}, "on_nonfinite='go' should read stop"),
        ({"log": "json"}, "unknown log 'json'; did you mean 'jsonl'"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Policy(**{"steps": 5, **settings})

"""Where records go: the same keys everywhere, no step twice when a run goes on, and a package that is missing is refused at the start."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import lf
from lf import log
from lf.config import ConfigError
from lf.runs import Run, RunError, cut_metrics

RECORD = {"tokens": 10, "loss": 0.5, "eval/held/loss": 0.25, "skipped": 0}


def logged(axes: Any, folder: Path, names: tuple[str, ...], first: int, last: int) -> None:
    """Steps first + 1 … last, as a run does that goes on after step `first`."""
    if axes.rank == 0:
        cut_metrics(folder / "metrics.jsonl", first)
    with log.opened(names, Run(folder, None), first, axes) as write:
        for step in range(first + 1, last + 1):
            write({"step": step, **RECORD, "loss": float(100 * first + step)})


def test_jsonl_has_null_where_a_number_is_none(tmp_path: Path) -> None:
    with log.opened(("jsonl",), Run(tmp_path, None), 0, lf.solo()) as write:
        write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}
    assert lf.runs.read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] is None
    lf.pictures.loss_curve([{"tokens": i, "loss": x, "grad_norm": 1.0} for i, x in enumerate((1.0, None, 3.0))], tmp_path / "loss.png")


def test_tensorboard_goes_on_without_a_step_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(lf.solo(), tmp_path, ("jsonl", "tensorboard"), 0, 2)  # killed before there was a checkpoint
    logged(lf.solo(), tmp_path, ("jsonl", "tensorboard"), 0, 5)
    logged(lf.solo(), tmp_path, ("jsonl", "tensorboard"), 3, 6)  # killed after step 5, with a checkpoint after step 3
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert {*seen.Tags()["scalars"]} == {*RECORD}
    assert [(e.step, e.value) for e in seen.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 304), (5, 305), (6, 306)]
    assert [r["step"] for r in lf.runs.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_wandb_keeps_its_id_and_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    init, asked, last = wandb.init, [], []

    def spied(**kwargs: Any) -> Any:
        run = init(**kwargs)
        finish = run.finish
        run.finish = lambda **how: last.append((dict(run.summary), run.id, dict(run.config), how)) or finish(**how)
        asked.append(kwargs)
        return run

    monkeypatch.setattr(wandb, "init", spied)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.json").write_text('{"lr": 0.5}')
    lf.sim.spmd(lf.Mesh(dp=2), logged, tmp_path, ("jsonl", "wandb"), 0, 3)
    ((summary, name, config, how),) = last
    assert {k: summary[k] for k in (*RECORD, "_step")} == {**RECORD, "loss": 3.0, "_step": 3}
    assert (name, config, how) == ((tmp_path / "wandb-id").read_text(), {"lr": 0.5}, {"exit_code": 0})
    assert [f.stem for f in tmp_path.glob("wandb/offline-run-*/*.wandb")] == [f"run-{name}"]

    monkeypatch.setattr(wandb, "init", lambda **kwargs: asked.append(kwargs) or 1 / 0)
    with pytest.raises(RunError, match=r"cannot start Weights & Biases \(ZeroDivisionError.*WANDB_MODE=offline"):
        logged(lf.solo(), tmp_path, ("jsonl", "wandb"), 3, 4)
    assert [(a["id"], a["resume"]) for a in asked] == [(name, "allow")] * 2


def test_what_cannot_be_logged_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert log.chosen("tensorboard, wandb") == ("jsonl", "tensorboard", "wandb")
    assert log.chosen("") == ("jsonl",)
    with pytest.raises(ConfigError, match="unknown log 'tensorbord'; did you mean 'tensorboard'"):
        log.chosen("tensorbord")
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--log wandb needs the package wandb, which is not installed: pip install wandb; or leave"):
        lf.loop.Policy(5, log="jsonl,wandb")


def _blocked(axes: Any, folder: Path) -> str:
    with pytest.raises((OSError, RunError)) as caught, log.opened(("jsonl",), Run(folder / "nowhere", None), 0, axes):
        pass
    return str(caught.value)


def test_every_rank_hears_that_a_log_cannot_be_opened(tmp_path: Path) -> None:
    said = lf.sim.spmd(lf.Mesh(dp=2), _blocked, tmp_path)
    assert all("nowhere" in words for words in said)

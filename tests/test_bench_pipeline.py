"""scripts/bench_pipeline.py: torch's schedules give lf's gradients, a difference is seen, and what cannot be compared is said."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from helpers import ROOT, context, processes

import lf
from lf.config import ConfigError

sys.path.insert(0, str(ROOT / "scripts"))
import bench_pipeline as script

TINY = script.Config(model="tiny", device="cpu", seq_len=12, microbatches=4, rounds=1, steps=1, loops=1)


def ran(axes: Any, config: script.Config) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        script.main(config)
    return out.getvalue()


def measured(axes: Any, name: str, config: script.Config, factor: float) -> dict[str, Any]:
    """One schedule, torch's loss being `factor` times what it should be."""
    loss = script.vocab_cross_entropy
    script.vocab_cross_entropy = lambda *args: loss(*args) * factor
    return script.compared(name, config, context(axes, "fp32"))


def test_every_schedule_agrees_with_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    said, silent = processes(lf.Mesh(pp=2), ran, attrs.evolve(TINY, json=str(tmp_path / "found.json")))
    assert said.count("equal: ") == len(script.PEERS)
    assert not silent
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["schedules"]) == set(script.PEERS)
    for x in found["schedules"].values():
        assert x["equal"]
        assert x["ratio"] == pytest.approx(x["lf"] / x["torch"])
    assert found["overhead"]["actions"] > 0


def test_a_gradient_that_differs_is_seen() -> None:
    for x in processes(lf.Mesh(pp=2), measured, "1f1b", TINY, 1 + 1e-4):
        assert not x["equal"]
        assert x["error_of_gradients"] == pytest.approx(1e-4, rel=0.1)


def test_what_torch_cannot_run_is_said() -> None:
    """Its interleaved schedule takes whole rounds alone: five microbatches are none for two ranks."""
    for x in processes(lf.Mesh(pp=2), measured, "interleaved", attrs.evolve(TINY, microbatches=5), 1.0):
        assert x["error"].startswith("torch: ValueError: Interleaved 1F1B requires")
        assert script.shown("interleaved", x)[-1] == x["error"]


def test_other_axes_and_schedules_without_a_peer_are_refused() -> None:
    with pytest.raises(ConfigError, match="this compares pipelines alone"):
        script.main(attrs.evolve(TINY, mesh="pp=2,dp=2"))
    with pytest.raises(ConfigError, match="breadth-first"):
        script.main(attrs.evolve(TINY, schedules=("breadth-first",)))

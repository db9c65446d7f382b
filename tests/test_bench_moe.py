"""scripts/bench_moe.py: its peers agree with lf, one that differs is seen and not timed, and what does not run is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
from helpers import ROOT, processes
from torch import Tensor

from lf.config import ConfigError

sys.path.insert(0, str(ROOT / "scripts"))
import bench_moe as script

TINY = script.Config(device="cpu", mixtures=("6/2",), tokens=24, dim=16, inner=8, rounds=1, steps=1)


def test_it_is_compared_and_timed_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    script.main(attrs.evolve(TINY, peers=(), json=str(tmp_path / "found.json")))
    said = capsys.readouterr().out
    assert "6 experts, 2 a token: 24 tokens, 16 → 8, fp32, cpu" in said
    found = json.loads((tmp_path / "found.json").read_text())["mixtures"]["6/2"]
    assert [*found] == ["lf"]
    x = found["lf"]
    assert x["seconds"] > 0
    assert x["bytes"] > 0
    assert x["ratio"] == 1
    assert any(" lf " in line and f"{x['seconds'] * 1e3:.1f}" in line for line in said.splitlines())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("peer", ["lf", "transformers", "transformers-grouped"])
def test_every_peer_computes_the_same(peer: str, precision: str) -> None:
    errors = script.compared(attrs.evolve(TINY, precision=precision), 6, 2, peer)
    assert errors.keys() == {"fp32", precision}
    for each in errors.values():
        assert each.keys() == {"output", *(f"gradient of {name}" for name in ("x", "norm", "router", "gate_up", "down"))}
    assert max(errors["fp32"].values()) < 1e-5
    assert max(errors[precision].values()) < script.TOLERANCE[precision]


@pytest.mark.slow
def test_megatron_core_computes_the_same() -> None:
    """In a process of its own: it sets up groups and changes torch.cuda."""
    pytest.importorskip("megatron.core")
    (errors,) = processes(1, lambda axes: script.compared(attrs.evolve(TINY, precision="bf16"), 6, 2, "megatron-core"))
    assert max(errors["fp32"].values()) < 1e-5
    assert max(errors["bf16"].values()) < script.TOLERANCE["bf16"]


def swapped(config: script.Config, experts: int, top: int, given: Mapping[str, Tensor]) -> script.Layer:
    """A mixture whose gate and up are each other's."""
    return script.lf_layer(config, experts, top, {**given, "gate_up": given["gate_up"].roll(config.inner, 1)})


def broken(config: script.Config, experts: int, top: int, given: Mapping[str, Tensor]) -> script.Layer:
    raise RuntimeError("no such thing here")


class Now:
    """In place of processes: what is asked for happens here."""

    def __init__(self, *_: Any):
        pass

    def __enter__(self) -> Now:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, f: Any, *args: Any) -> Any:
        return type("Answer", (), {"result": staticmethod(partial(f, *args))})


def test_what_differs_or_fails_is_told_and_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setitem(script.PEERS, "swapped", swapped)
    monkeypatch.setitem(script.PEERS, "broken", broken)
    monkeypatch.setattr(script, "ProcessPoolExecutor", Now)
    asked = []

    def turns(builds: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        asked.append([*builds])
        return {name: {"times": [1.0], "bytes": 2**20} for name in builds}

    monkeypatch.setattr(script, "take_turns", turns)
    with pytest.raises(SystemExit, match="1"):
        script.main(attrs.evolve(TINY, peers=("swapped", "broken")))
    assert asked == [["lf"]]
    said = capsys.readouterr().out
    assert "differs: fp32 output: " in said
    assert "RuntimeError: no such thing here" in said


def test_what_is_no_mixture_is_refused() -> None:
    for text in ("128", "8/9", "8/0", "a/b"):
        with pytest.raises(ConfigError, match=f"--mixtures '{text}': give experts/experts of a token, as 128/8"):
            script.main(attrs.evolve(TINY, mixtures=(text,)))
    with pytest.raises(ConfigError, match="unknown peer 'transformer'; did you mean 'transformers'"):
        script.main(attrs.evolve(TINY, peers=("transformer",)))

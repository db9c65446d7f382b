"""scripts/bench_zero.py: torch's ways to shard agree with lf's, a difference is seen and not timed, and memory is what is taken."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers import QWEN3, ROOT, context, processes

from lf.config import ConfigError
from lf.sharding import Sharding

sys.path.insert(0, str(ROOT / "scripts"))
import bench_zero as script
import transformers.models.qwen3.modeling_qwen3  # noqa: F401  # here, so that no forked rank has to
from peak import live, peak


@pytest.fixture
def tiny(tmp_path: Path) -> script.Config:
    gc.freeze()  # or the ranks, which collect, would each copy and walk through all that this process has
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    return script.Config(model=str(tmp_path), device="cpu", seq_len=12, microbatches=2, rounds=1, steps=1)


def ran(axes: Any, config: script.Config) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        script.main(config)
    return out.getvalue()


NAMES = {"0": "DDP", "1": "DDP + ZeRO-1", "2": "FSDP2, kept", "3": "FSDP2"}


@pytest.mark.parametrize("stages", ["3", pytest.param("012", marks=pytest.mark.slow)])
def test_every_stage_agrees_with_its_peer(stages: str, tiny: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "170")
    said, silent = processes(2, ran, attrs.evolve(tiny, shard=tuple(stages), json=str(tmp_path / "found.json")))
    assert not silent
    found = json.loads((tmp_path / "found.json").read_text())["shard"]
    assert {text: x["peer"] for text, x in found.items()} == {text: NAMES[text] for text in stages}
    for text, x in found.items():
        assert x["errors"].keys() == {"loss", "norm", "weight", "gradient"}
        assert max(x["errors"].values()) < 1e-5
        assert x["ratio"] == pytest.approx(x["lf"] / x["peer_seconds"])
        assert min(x["lf_bytes"], x["peer_bytes"]) > 0
        assert any(line.split("│")[1].strip() == text for line in said.splitlines() if "│" in line)


@pytest.mark.slow
def test_in_bfloat16_they_agree_as_well_as_that_can(tiny: script.Config, tmp_path: Path) -> None:
    processes(2, ran, attrs.evolve(tiny, precision="bf16", shard=("1", "3,ahead=2"), json=str(tmp_path / "found.json")))
    for x in json.loads((tmp_path / "found.json").read_text())["shard"].values():
        assert 1e-6 < max(x["errors"].values()) < script.TOLERANCE["bf16"]


def spoiled(axes: Any, config: script.Config, sharding: str) -> dict[str, Any]:
    """One pair, whose peer learns from losses of one per cent more."""
    ctx, task = context(axes, "fp32"), script.task

    def less(*args: Any) -> Any:
        made = task(*args)
        return made._replace(labels=made.labels / 1.01)

    script.task = less
    return script.compared(Sharding.parse(sharding), script.first_weights(config, ctx), config, ctx)


@pytest.mark.parametrize("sharding", ["1", pytest.param("3", marks=pytest.mark.slow)])
def test_what_differs_is_told_and_not_timed(tiny: script.Config, sharding: str) -> None:
    for x in processes(2, spoiled, tiny, sharding):
        assert x["differs"]
        assert "loss: 1.0e-02" in x["error"]
        assert "norm: 1.0e-02" in x["error"]
        assert "ratio" not in x


def test_other_meshes_are_refused(tiny: script.Config) -> None:
    for mesh in ("dp=1", "tp=2,dp=2", "pp=2,dp=2"):
        with pytest.raises(ConfigError, match="over data ranks alone; give dp=N"):
            script.main(attrs.evolve(tiny, mesh=mesh))


def test_memory_is_what_is_taken_at_a_time() -> None:
    """Also in backwards, and where a tensor's memory goes without the tensor."""
    n = 2**22

    def work() -> None:
        x = torch.ones(n, requires_grad=True)  # 4 bytes an element
        x.exp().sum().backward()  # beside it what exp has made, and the gradient
        x.untyped_storage().resize_(0)
        torch.ones(n)  # of three again, with the gradient

    peak(work, "cpu")  # whatever is loaded when it is first used
    before = live("cpu")
    most = peak(work, "cpu") - before
    assert 3 * 4 * n <= most < 3.1 * 4 * n
    assert live("cpu") - before < 0.1 * n

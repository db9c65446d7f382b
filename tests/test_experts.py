"""What a run says of its experts: records, their file, the picture; and what compilation says to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lf
from lf import parity
from lf.config import ConfigError
from lf.expert_picture import expert_loads, loads
from lf.models.small import tiny, tiny_moe
from lf.record import measure, record_of
from lf.schedule.build import build
from lf.schedule.compiled import refuse_compile


def records(model: lf.segment.Model, steps: int = 3) -> list[dict[str, Any]]:
    def body(axes: Any) -> list[dict[str, Any]]:
        ctx = lf.Context(axes, lf.devices.get("cpu"), "fp32")
        layout = lf.layout(model, axes.mesh)
        init, step = lf.train.make(layout, lf.optim.sgd(0.1), build(layout, 1), ctx)
        state, out = init(lf.init(layout, ctx, 0)), []
        for i in range(steps):
            batches = parity.random_batches(model, 0, i, 2, 21)[axes["dp"].index :: 2]
            state, metrics = step(state, batches)
            done = measure(i + 1, metrics, batches, 0.0, 0, layout, ctx)
            out.append(record_of(done, None, lambda n: 42 * n, layout, ctx, whole=i != 1)[0])
        return out

    first, second = lf.sim.spmd(lf.Mesh(dp=2, ep=2) if model.sums else lf.Mesh(dp=2), body)
    assert [r.get("counted") for r in first] == [r.get("counted") for r in second]
    return first


def test_a_record_has_the_loads_of_all_ranks() -> None:
    made = records(tiny_moe())
    for r, whole in zip(made, (True, False, True)):
        assert r["expert_load_max"] >= 1
        assert 0 < r["expert_entropy"] <= 1
        assert "dropped" not in r
        assert ("counted" in r) == whole
        assert {"balance", "sequence_balance", "global_balance", "z"} <= r.keys()
    load = torch.tensor(made[0]["counted"]["layers.1.route/load"], dtype=torch.float64)
    live = sum(int(tiny_moe().objectives["balance"].count(b)) for b in parity.random_batches(tiny_moe(), 0, 0, 2, 21))
    assert load.sum() == 2 * live
    assert made[0]["expert_load_max"] == pytest.approx(float(load.max() / load.mean()))
    assert not any(name.startswith("expert") for r in records(tiny()) for name in r)


def test_the_picture_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    made = records(tiny_moe())
    expert_loads(made, tmp_path / "experts.png", "tiny")
    assert (tmp_path / "experts.png").stat().st_size > 10_000
    assert loads(made[0]).keys() == {"layers.1"}
    assert loads(made[0])["layers.1"].mean() == pytest.approx(1)
    assert loads(made[1]) == {}
    expert_loads(made[1:2], tmp_path / "none.png")
    expert_loads(records(tiny(), 1), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_picture_of_many_layers_and_experts(tmp_path: Path) -> None:
    counted = {f"layers.{i}.route/load": [(i * e) % 7 for e in range(256)] for i in range(58)}
    rows = [{"step": s, "tokens": s, "expert_load_max": 2.0, "expert_entropy": 0.9, "counted": counted} for s in (1, 2)]
    expert_loads(rows, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").stat().st_size > 10_000


def test_mixtures_are_not_compiled() -> None:
    model = tiny_moe()
    with pytest.raises(ConfigError, match=r"layers\.1\.dispatch counts on the host.*run a model with experts without compilation"):
        refuse_compile(lf.Mesh(dp=1), lf.devices.get("cpu"), "eager", model.segments)

    def body(axes: Any) -> None:
        ctx = lf.Context(axes, lf.devices.get("cpu"), "fp32")
        layout = lf.layout(model, axes.mesh)
        lf.train.make(layout, lf.optim.sgd(0.1), build(layout, 1), ctx, compile="eager")

    with pytest.raises(ConfigError, match="counts on the host"):
        lf.sim.spmd(lf.Mesh(dp=1), body)

"""The search finds layouts that fit, fastest first, and says why others do not; its script prints and draws them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import attrs
import pytest
from helpers import ROOT
from matplotlib.image import imread

import lf
from lf.config import ConfigError
from lf.devices.described import described
from lf.mesh import Mesh
from lf.models.small import tiny, tiny_moe
from lf.plan_layers import Layers
from lf.plan_search import Choice, choices, formulas, nearest, search
from lf.plan_show import against
from lf.plan_time import Achieved

SEQ, ROWS, MODEL = 32, 16, tiny(False)
CARD = described("h100").with_(node=4)


def test_choices_divide_the_ranks_and_the_batch() -> None:
    found = [*choices(tiny_moe(), 8, 4, 16)]
    assert len(found) == len(set(found)) > 50
    for c in found:
        assert c.mesh.size == 8
        assert c.mesh.tp in (1, 2, 4)
        assert 6 % c.mesh.ep == 0
        assert 16 % (c.mesh["dp"] * c.micro_batch) == 0
    assert {c.mesh.ep for c in found} == {1, 2}
    assert {c.mesh.pp for c in found} == {1, 2, 4}
    assert {c.schedule for c in found} == {"1f1b", "interleaved", "zb-v"}


@pytest.fixture(scope="module")
def found() -> Any:
    return search(MODEL, 4, CARD, lf.optim.adamw(1e-3), seq_len=SEQ, global_batch=ROWS, top=3)


def test_the_best_come_first_one_of_each_mesh(found: Any) -> None:
    assert len(found.best) == 3
    assert len({c.mesh for c, _ in found.best}) == 3
    seconds = [p.seconds for _, p in found.best]
    assert seconds == sorted(seconds)
    assert all(p.fits and p.tokens == ROWS * SEQ for _, p in found.best)
    every, fitting, made = found.tried
    assert every == fitting >= made >= 3
    best, other = found.best[0][1], found.best[-1][1]
    assert against(best, best) == "as fast"
    assert against(attrs.evolve(best, spent={**best.spent, "tp": 1.0}), best).startswith("+1.00 tp")
    assert "+" in against(other, best)


def test_formulas_order_as_plans_do(found: Any) -> None:
    """Bytes within a quarter where nothing but the formulas' own layers counts."""
    rough = formulas(MODEL, CARD, lf.optim.adamw(1e-3), SEQ, ROWS, "bf16", Achieved(), Layers(SEQ))
    for c, plan in found.best:
        guess = next(g for g, other in rough.of(attrs.evolve(c, recompute="none", shard="0")) if other == c)
        assert guess.peak == pytest.approx(plan.peak, rel=0.25), str(c)


def test_what_fits_nowhere_is_refused_with_what_comes_nearest() -> None:
    small = CARD.with_(memory=30e3)
    with pytest.raises(ConfigError, match=r"nothing fits into 0\.0 GiB a device: the least is about .* with .*; take more ranks than 4"):
        search(MODEL, 4, small, lf.optim.adamw(1e-3), seq_len=SEQ, global_batch=ROWS)
    with pytest.raises(ConfigError, match=r"3 rows on 4 ranks: no mesh divides them"):
        search(tiny(False, layers=MODEL.config.layers[:0]), 4, CARD, lf.optim.adamw(1e-3), seq_len=SEQ, global_batch=3)


def test_the_nearest_that_fits_differs_in_the_fewest_settings() -> None:
    rough = formulas(MODEL, CARD, lf.optim.adamw(1e-3), SEQ, ROWS, "bf16", Achieved(), Layers(SEQ))
    now = Choice(Mesh(dp=4), 4, shard="1")
    peak = {c: g.peak for g, c in rough.of(attrs.evolve(now, shard="0"))}[now]
    near = nearest(rough, MODEL, now, 0.9 * peak)
    assert near is not None
    assert near.mesh.size == 4
    assert sum(getattr(near, name) != getattr(now, name) for name in ("micro_batch", "recompute", "shard")) == 1
    assert nearest(rough, MODEL, now, peak) == now
    assert nearest(rough, MODEL, now, 10.0) is None
    wide = nearest(rough, MODEL, now, min(g.peak for c in choices(MODEL, 4, 4, ROWS) for g, _ in rough.of(c)) * 0.9)
    assert wide is not None
    assert wide.mesh.size > 4


def said(capsys: Any, **options: Any) -> str:
    script = runpy.run_path(str(ROOT / "scripts/plan.py"))
    script["main"](script["Config"](**{"model": "moe-tiny", "ranks": 4, "seq_len": SEQ, "global_batch": ROWS, **options}))
    return capsys.readouterr().out


def test_the_script_prints_the_best_and_draws_the_first(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = said(capsys, device="h200", top=2, out=str(tmp_path / "a"))
    assert "moe-tiny on 4 × h200, 16 rows of 32 tokens, bf16: the best of" in out
    for words in ("fastest", "memory of the fullest row", "where the time goes", "experts are taken to be loaded evenly"):
        assert words in out
    for name in ("memory", "timeline"):
        assert (tmp_path / f"a/{name}.svg").stat().st_size > 1000
        assert imread(tmp_path / f"a/{name}.png").std() > 0.05


def test_the_script_plans_one_layout(capsys: Any) -> None:
    out = said(capsys, device="h100", mesh="pp=2,ep=2", shard="1", recompute="half", micro_batch=2)
    assert "pp=2,dp=2,ep=2 1f1b, micro-batch 2, shard 1, recompute half" in out
    assert "it does not fit" not in out
    for device, words in ((None, "no device named; there are h100"), ("p800", "device p800: bandwidth is not known"), ("x", "unknown device")):
        with pytest.raises(ConfigError, match=words):
            said(capsys, device=device)
    with pytest.raises(ConfigError, match=r"--products 0 .* above 0"):
        said(capsys, device="h100", products=0)


def test_the_script_plans_for_this_machine_by_what_it_measures(capsys: Any) -> None:
    asked = {"device": "cpu", "precision": "fp32", "seq_len": 16, "global_batch": 4, "model": "qwen3-demo", "mesh": ""}
    out = said(capsys, ranks=1, **asked)
    assert "qwen3-demo on 1 × cpu, 4 rows of 16 tokens, fp32: one rank" in out
    with pytest.raises(ConfigError, match=r"device cpu: .* is not known; .*measured\(device, axes\)"):  # alone it has no links
        said(capsys, **asked)

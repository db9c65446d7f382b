"""Pictures are files: they need no window, and no backend for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chained import at, laid_out
from helpers import ROOT
from matplotlib.image import imread

import lf
from lf.models.small import tiny, tiny_moe

DRAW = """
import sys
import lf
from lf.models.small import tiny
records = [{"step": i, "tokens": 10 * i, "loss": 5.0 - i, "grad_norm": 2.0 / i} for i in (1, 2, 3)]
lf.pictures.loss_curve(records, sys.argv[1] + "/loss.png", "a run")
lf.show(lf.layout(tiny(), lf.Mesh(tp=2, dp=2)), png=sys.argv[1] + "/layout.png")
assert "matplotlib.pyplot" not in sys.modules
"""


def test_an_inherited_backend_does_not_matter(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "module://no.such.backend"}  # a notebook's shell inherits one like this
    subprocess.run([sys.executable, "-c", DRAW, str(tmp_path)], env=env, check=True, capture_output=True, timeout=100)
    for name in ("loss.png", "layout.png"):
        pixels = imread(tmp_path / name)[..., :3]
        assert pixels.shape[0] > 200
        assert 0.01 < (pixels.min(-1) < 0.9).mean() < 0.9, "an empty picture, or a full one"


@pytest.mark.parametrize("ranks", [1, 2, 11])
def test_each_rank_has_a_colour_and_each_row_its_holders(ranks: int) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layout = lf.layout(tiny(), lf.Mesh(tp=ranks, dp=1))
    ax = Figure().subplots()
    lf.pictures.draw_layout(ax, layout, list(layout.specs))
    bars = [p for p in ax.patches if isinstance(p, Rectangle)]
    assert len({bar.get_facecolor() for bar in bars}) == ranks
    # every row of every parameter is drawn once: however many hold it, their bars share its height
    assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(0.8 * len(layout.specs))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [f"tp={r}" for r in range(ranks)]


def test_experts_have_the_colours_of_their_own_mesh() -> None:
    from matplotlib.figure import Figure

    layout = lf.layout(tiny_moe(), lf.Mesh(tp=2, dp=4, ep=2, etp=2))
    ax = Figure().subplots()
    lf.pictures.draw_layout(ax, layout, [path := "layers.1.experts/down", "layers.1.experts/down_bias", "layers.1.experts/gate_up", "head/norm"])
    labels = [f"ep={r}, etp={e}" for r in range(2) for e in range(2)] + ["tp=0", "tp=1"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == labels
    assert ax.get_title("left") == "who holds which slice: dp=4,tp=2,ep=2,etp=2, each on 4 data ranks, experts on 2 data ranks"
    colours = [patch.get_facecolor() for patch in ax.get_legend().get_patches()]
    bars = [(colours.index(p.get_facecolor()), p.get_x(), p.get_width(), p.get_height()) for p in ax.patches]
    down, bias, gate_up, norm = bars[:4], bars[4:8], bars[8:16], bars[16:]
    assert layout.specs[path].local_shape(layout.mesh.coords(0)) == (3, 15, 3)
    assert down == [(r, r / 4, 1 / 4, pytest.approx(0.8)) for r in range(4)], "a quarter for each: half of the experts, half of their columns"
    assert bias == [(r, r // 2 / 2, 1 / 2, pytest.approx(0.4)) for r in range(4)], "both ranks of etp hold it"
    assert [(r, x, width) for r, x, width, _ in gate_up] == [(r, part / 2 + r / 8, 1 / 8) for part in range(2) for r in range(4)]
    assert [r for r, *_ in norm] == [4, 5]


def test_a_legend_names_some_of_many_ranks() -> None:
    from matplotlib.figure import Figure

    layout = lf.layout(tiny_moe(), lf.Mesh(dp=40, ep=40))
    ax = Figure().subplots()
    lf.pictures.draw_layout(ax, layout, ["head/norm", "layers.1.experts/down"])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["tp=0", *(f"ep={r}" for r in range(13)), "…", "ep=39"]
    assert len(ax.patches) == 1 + 6, "of 40 ranks six have an expert"


def test_a_pipeline_is_shown_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    monkeypatch.setenv("COLUMNS", "200")
    layout = lf.layout(tiny(), lf.Mesh(pp=3, tp=2), split="e,2,h", frozen=("layers.0.mlp",))
    lf.show(layout, png=tmp_path / "a.png", rank=4)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert rows[:3] == [["0", "0", "embed", "555"], ["1", "1", "layers.0, layers.1", "3,136"], ["2", "2", "head", "570"]]
    table = [row for row in rows if row[1] == "embed/weight"]  # the tied table stands in both stages, and rank 4 holds it
    assert table == [[s, "embed/weight", "37×15", "vocab→tp, embed", "18×15", "pp=0 and 2", "pp=0, each tp its own"] for s in ("0", "2")]
    assert [row[4:] for row in rows if row[1] == "layers.0.mlp/down"] == [["—", "—", "not trained"]]
    assert [row[4:] for row in rows if row[1] == "layers.1.mlp/down"] == [["—", "—", "pp=1, each tp its own"]]

    ax = Figure().subplots()
    lf.pictures.draw_layout(ax, layout, ["embed/weight", "layers.0.mlp/down", "head/norm"], stages=[0, 1, 2])
    assert [t.get_text() for t in ax.texts if "stage" in t.get_text()] == [f"stage {s}\non pp={s}" for s in range(3)]
    assert imread(tmp_path / "a.png").shape[0] > 200


def test_layers_of_a_stage_that_are_alike_share_a_line() -> None:
    layout = lf.layout(tiny(), lf.Mesh(pp=2), split="e+1,1+h")
    assert "layers.0.mlp/down" in lf.pictures.alike(layout, 0, 0)
    both = lf.layout(tiny(), lf.Mesh(pp=2), split="e,2+h")
    assert lf.pictures.alike(both, 0, 1)["layers.*.mlp/down ×2"] == ["layers.0.mlp/down", "layers.1.mlp/down"]


def test_what_a_rank_keeps_of_shards_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "170")
    lf.show(lf.layout(tiny(), lf.Mesh(dp=4, tp=2), sharding="3,ranks=2"), rank=3)
    out = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│"))}
    assert "18 parameters on mesh dp=4,tp=2, sharding 3,ranks=2" in out
    assert rows["embed/weight"] == ["37×15", "vocab→tp, embed", "19×15, kept 10×15", "dp", "each tp its own, each shard its own, the first group"]
    assert rows["head/norm"] == ["15", "embed", "15, kept 8", "dp, tp", "tp=0, each shard its own, the first group"]
    lf.show(lf.layout(tiny(), lf.Mesh(dp=16), sharding="1"))
    assert "15, kept 15" in capsys.readouterr().out, "the first rank has a norm whole"


def test_several_chains_are_shown_with_what_joins_them(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    layouts = laid_out(at("tp=4", "pp=2,dp=2", "dp=2", {"eyes": range(4), "words": range(4), "hand": (4, 5)}, eyes_frozen=("eyes.0",)))
    lf.show(layouts, png=tmp_path / "chains.png", rank=2)
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows[:9] == [
        ["eyes", "tp=4", "0–3", "1", "281", "125", "items"],
        ["words", "pp=2,dp=2", "0–3", "2", "426", "0", "the data"],
        ["hand", "dp=2", "4, 5", "1", "36", "0", "items"],
        ["eyes.late", "0", "0, 1", "words", "0", "0", "embed"],
        ["eyes.early", "0", "0, 1", "words", "1", "1", "words.1"],
        ["words.said.0", "0", "0", "hand", "0", "2", "hand.0, hand.1"],
        ["0", "0, 1", "0", "0", "—"],
        ["1", "2, 3", "0", "1", "—"],
        ["2", "4, 5", "—", "—", "0"],
    ]
    fused = ["eyes.1/qkv", "24×5", "heads→tp, embed", "6×5", "tp for k, v", "each tp its own (k, v: first holder)"]
    assert fused in rows
    assert ["eyes.out/scale", "scalar", "—", "scalar", "tp", "tp=0"] in rows
    assert [row[4] for row in rows if row[1:2] == ["words.0/qkv"]] == ["—"], "rank 2 is on the second stage of words"
    assert "eyes: 5 parameters on mesh tp=4" in out
    assert "on rank 4" in out, "of hand rank 2 has nothing, so its first rank is shown"
    lf.show(layouts.chains["eyes"], png=tmp_path / "eyes.png")
    assert imread(tmp_path / "chains.png").shape[0] > 2 * imread(tmp_path / "eyes.png").shape[0], "each chain is drawn"


def test_one_chain_as_several_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from lf.chain_layouts import joined

    layout = lf.layout(tiny(), lf.Mesh(pp=2, tp=2))
    lf.show(layout, rank=3)
    alone = capsys.readouterr().out
    lf.show(joined(layout), rank=3)
    assert capsys.readouterr().out == alone


def test_a_bar_names_its_chain() -> None:
    from matplotlib.figure import Figure

    layout = laid_out(at("tp=2", "tp=2", "tp=2")).chains["eyes"]
    ax = Figure().subplots()
    lf.pictures.draw_layout(ax, layout, list(layout.specs), chain="eyes")
    assert ax.get_title("left") == "eyes: who holds which slice: tp=2"
    assert sum(p.get_width() * p.get_height() for p in ax.patches) == pytest.approx(0.8 * len(layout.specs))  # a scalar's bar as well

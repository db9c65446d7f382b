"""Pictures are files: they need no window, and no backend for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from matplotlib.image import imread

import lf
from lf.models.small import tiny

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

"""Draws docs/first.png: who holds what, the program of a step, and the loss of one rank and of four on top of each other.

    python docs/picture.py [--steps 60] [--out docs/first.png]

The text that is learned is the licence of this repository, byte by byte: it is the same on every machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

import lf
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.schedule.zero_bubble import zb_h1

ROOT = Path(__file__).resolve().parents[1]
MESH = "tp=2,dp=2"
MICROBATCHES, SEQ_LEN = 4, 64  # in one step, over all ranks
PATHS = ("embed/weight", "layers.0.attn/norm", "layers.0.attn/qkv", "layers.0.attn/out", "layers.0.mlp/gate_up", "layers.0.mlp/down")
WIDE, NARROW, EXACT = "#BBBBBB", "#D55E00", "#0072B2"  # a colour-blind person tells these apart


@attrs.frozen
class Config:
    steps: int = 60
    out: str = str(ROOT / "docs/first.png")


def model() -> lf.segment.Model:
    layer = Layer(Attention(heads=4, kv_heads=2, head_dim=8, qk_norm=True), GatedMLP(96))
    return decoder(DecoderConfig(vocab=128, dim=32, layers=(layer, layer)))


def licence(k: int) -> lf.data.Row:
    """Row k: any function from a number to a row of tokens is a source of data. This one jumps about in the text."""
    text = np.frombuffer((ROOT / "LICENSE").read_bytes(), np.uint8).astype(np.int64)
    at = k * 2311 % (len(text) - SEQ_LEN)
    return lf.data.Row(text[at : at + SEQ_LEN], text[at + 1 : at + SEQ_LEN + 1], np.array([0]))


def losses(axes: Any, precision: str, steps: int) -> list[float]:
    """The loss of each step on this rank's mesh, which may be one rank."""
    ctx = lf.Context(axes, lf.devices.get("cpu"), precision)
    layout, dp = lf.layout(model(), axes.mesh), axes["dp"]
    init, step = lf.train.make(layout, lf.optim.adamw(1e-3), lf.schedule.one_f_one_b(1, MICROBATCHES // dp.size), ctx)
    state, out = init(lf.init(layout, ctx, seed=0)), []
    for i in range(steps):
        state, metrics = step(state, lf.data.step_batches(licence, i * MICROBATCHES, MICROBATCHES, 1, dp.size, dp.index))
        out.append(metrics["loss"].item())
    return out


def main(config: Config) -> dict[str, dict[str, list[float]]]:
    """The losses that are drawn: {"one" or "many": {precision: of each step}}."""
    mesh = lf.Mesh.parse(MESH)
    layout = lf.layout(model(), mesh)
    one, many = ({p: lf.sim.spmd(m, losses, p, config.steps)[0] for p in ("fp32", "fp64")} for m in (lf.Mesh(dp=1), mesh))

    figure = Figure(figsize=(9.4, 6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1))
    left, right = upper.subfigures(1, 2, width_ratios=(1.1, 1))
    lf.pictures.draw_layout(left.subplots(), layout, PATHS)
    draw_losses(*right.subplots(2, 1, height_ratios=(1.7, 1), sharex=True), one, many)
    title = "a step is a program: here zb-h1, four stages and six microbatches; where nothing is drawn, a rank waits"
    lf.pictures.draw_program(lower.subplots(), zb_h1(4, 6), title)
    figure.savefig(config.out, dpi=120)
    return {"one": one, "many": many}


def draw_losses(top: Any, low: Any, one: dict[str, list[float]], many: dict[str, list[float]]) -> None:
    steps = np.arange(1, len(one["fp32"]) + 1)
    top.plot(steps, one["fp32"], color=WIDE, linewidth=6, label="one rank")
    top.plot(steps, many["fp32"], color=NARROW, linewidth=1.2, label=f"{MESH}: four ranks")
    top.set(ylabel="loss (nats per byte)")
    top.set_title("a layout does not change the numbers", fontsize=9, loc="left")
    top.legend(fontsize=8, frameon=False)
    for precision, colour, marker in (("fp32", NARROW, "o"), ("fp64", EXACT, "^")):
        gap = np.abs(np.subtract(one[precision], many[precision])) / np.array(one[precision])
        low.plot(steps[gap > 0], gap[gap > 0], marker, color=colour, markersize=3, label={"fp32": "float32", "fp64": "float64"}[precision])
    low.set(yscale="log", ylim=(1e-17, 1), yticks=(1e-16, 1e-12, 1e-8, 1e-4, 1), ylabel="relative\ndifference", xlabel="step")
    low.legend(fontsize=8, ncols=2, frameon=False, loc="upper left", title="no mark: not even the last bit differs", title_fontsize=8,
               alignment="left")  # fmt: skip
    for ax in (top, low):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    lf.cli.run(main, Config)

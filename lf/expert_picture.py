"""How evenly the experts of a run were loaded, from its metrics.jsonl.

matplotlib is loaded when the picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def loads(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """{layer: tokens of each expert by the mean, so that 1 is even}, of a record that has them; {} of any other."""
    counted = {name.removesuffix(".route/load"): np.array(n) for name, n in record.get("counted", {}).items() if name.endswith(".route/load")}
    return {layer: n * len(n) / max(n.sum(), 1) for layer, n in counted.items()}


def expert_loads(records: Sequence[dict[str, Any]], png: str | Path, title: str = "") -> None:
    """Above the load of each expert of each layer when it was last written down, below the busiest expert and the entropy over tokens. Draws nothing
    where no record has loads: of a model without experts."""
    told = [r for r in records if loads(r)]
    if not told:
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    last = loads(told[-1])
    widest = max(map(len, last.values()))
    grid = np.full((len(last), widest), np.nan)
    for row, load in zip(grid, last.values()):
        row[: len(load)] = load
    figure = Figure(figsize=(9, 3.6 + min(0.3 * len(last), 5)), layout="constrained")
    top, low = figure.subplots(2, 1, height_ratios=(0.6 + min(0.3 * len(last), 5), 2))
    image = top.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    step = -(-len(last) // 20)  # of so many the names can be read
    top.set_yticks(range(0, len(last), step), [*last][::step], fontsize=8)
    top.set(xlabel="expert", title=f"{title}: load of each expert at step {told[-1]['step']}".removeprefix(": "))
    if widest <= 16 and len(last) <= 16:
        for y, load in enumerate(last.values()):
            for x, value in enumerate(load):
                top.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if abs(value - 1) > 0.6 else "black")
        top.set_xticks(range(widest))
    bar = figure.colorbar(image, cax=top.inset_axes((1.02, 0, 0.02, 1)), extend="max", extendfrac=0.1, ticks=[0, 1, 2])
    bar.set_label("tokens / mean,\n1 = even", fontsize=8)

    tokens = [r["tokens"] for r in records]
    low.plot(tokens, [r["expert_load_max"] for r in records], linewidth=1.0, color="tab:red", label="busiest expert, tokens / mean")
    low.set(xlabel="tokens", ylabel="busiest / mean", ylim=(0.9, None))
    low.grid(alpha=0.3)
    right = low.twinx()
    right.plot(tokens, [r["expert_entropy"] for r in records], linewidth=1.0, color="tab:blue", label="entropy of the loads, 1 = even")
    right.set(ylabel="entropy")
    low.xaxis.set_major_formatter(EngFormatter(sep=""))
    lines = [*low.get_lines(), *right.get_lines()]
    low.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2, frameon=False)
    figure.savefig(png, dpi=110)

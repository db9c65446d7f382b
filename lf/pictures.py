"""Pictures and tables of a layout and of a run.

matplotlib is loaded when the first picture is drawn, and without pyplot: a backend for windows is no matter of a training run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lf.console import console, table
from lf.layouts import Layout
from lf.schedule import Program, cost
from lf.schedule.draw import COLOURS, MEANING, OTHER
from lf.segment import path_of


def show(layout: Layout, png: str | Path | None = None, rank: int = 0) -> None:
    """Prints who holds what, a line a parameter, and draws it to `png` if one is named. `rank`: whose local shapes are shown.

    Parameters of several layers that are laid out alike share a line: layers.*.attn/qkv ×28. Of several stages each has its own lines, and a
    parameter that several of them use stands in each.
    """
    staged = len(layout.stages) > 1
    rows = [(s, name, paths[0]) for s in range(len(layout.stages)) for name, paths in alike(layout, rank, s).items()]
    if staged:
        title = f"{len(layout.stages)} stages on mesh {layout.mesh}"
        console().print(table(title, ("stage", "pipeline rank", "layers", "parameters"), [_stage_row(layout, s) for s in range(len(layout.stages))]))
    columns = (*["stage"] * staged, "parameter", "logical shape", "axes", f"on rank {rank}", "summed over", "counted by")
    title = f"{len(layout.specs)} parameters on mesh {layout.mesh}"
    console().print(table(title, columns, [(*[str(s)] * staged, name, *_row(layout, path, rank)) for s, name, path in rows]))
    if png is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
        draw_layout(figure.subplots(), layout, [path for *_, path in rows], [name for _, name, _ in rows], [s for s, *_ in rows] if staged else None)
        figure.savefig(png, dpi=110)


def alike(layout: Layout, rank: int = 0, stage: int = 0) -> dict[str, list[str]]:
    """{what to call them: paths}: the parameters of a stage whose paths differ in numbers only and whose rows are the same, in the order of the
    model."""
    groups: dict[tuple[str, ...], list[str]] = {}
    used = {path_of(segment, name) for segment in layout.stages[stage] for name in segment.params}
    for path in (path for path in layout.specs if path in used):
        groups.setdefault((re.sub(r"\d+", "*", path), *_row(layout, path, rank)), []).append(path)
    return {(f"{key[0]} ×{len(paths)}" if len(paths) > 1 else paths[0]): paths for key, paths in groups.items()}


def _stage_row(layout: Layout, stage: int) -> tuple[str, ...]:
    """(number, pp coordinate, its layers, how many parameters)."""
    layers = [*layout.layers(stage)]
    words = ", ".join(layers) if len(layers) < 4 else f"{layers[0]} … {layers[-1]} ({len(layers)} layers)"
    paths = {path_of(segment, name) for segment in layout.stages[stage] for name in segment.params}
    size = sum(math.prod(layout.specs[path].param.shape) for path in paths)
    return str(stage), str(layout.placement[stage]), words or "none", f"{size:,}"


def _row(layout: Layout, path: str, rank: int) -> tuple[str, ...]:
    """(logical shape, axes → mesh axis, local shape, axes its gradient is summed over, who counts it)."""
    spec, holders, mesh, coords = layout.specs[path], layout.holders(path), layout.mesh, layout.mesh.coords(rank)
    axes = ", ".join((name or "·") + (f"→{axis}" if axis and mesh[axis] > 1 else "") for name, axis in zip(spec.param.axes, spec.names))
    first = [f"pp={holders[0]}"] * (mesh.pp > 1)
    summed = [a for a in spec.sum_axes if mesh[a] > 1]
    split = [a for a in spec.names if a and mesh[a] > 1]
    shared = [spec.parts()[i].name for i in spec.shared()]
    counted = ", ".join(first + [f"{a}=0" for a in summed] + [f"each {a} its own" for a in split]) or "the one rank"
    if shared:
        counted += f" ({', '.join(shared)}: first holder)"
    summed += [f"{spec.names[spec.param.part_dim]} for {', '.join(shared)}"] * bool(shared)
    summed += [f"pp={' and '.join(map(str, holders))}"] * (len(holders) > 1)
    frozen = path in layout.frozen
    return (
        "×".join(map(str, spec.param.shape)),
        axes,
        "×".join(map(str, spec.local_shape(coords))) if coords["pp"] in holders else "—",
        "—" if frozen else ", ".join(summed) or "—",
        "not trained" if frozen else counted,
    )


def draw_layout(
    ax: Any, layout: Layout, paths: Sequence[str], names: Sequence[str] | None = None, stages: Sequence[int] | None = None
) -> None:
    """Each parameter as a bar, laid out along the dim that is split; each rank of tp has a colour, several where several hold a row.

    `names`: what to write beside the bars instead of the paths · `stages`: the stage of each bar, ascending, to draw them apart.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Patch, Rectangle

    ranks = layout.mesh["tp"]
    colours = colormaps["tab10"] if ranks <= 10 else colormaps["turbo"].resampled(ranks)
    for y, path in enumerate(paths):
        spec = layout.specs[path]
        at, total = 0.0, spec.param.shape[spec.param.part_dim]
        for i, part in enumerate(spec.parts()):
            held = [spec.pieces(layout.mesh.coords(layout.mesh.rank(tp=r)))[i].box[spec.param.part_dim] for r in range(ranks)]
            edges = sorted({edge for bounds in held for edge in bounds})
            for lo, hi in pairwise(edges):  # a row that several ranks hold is divided in height among them
                holders = [r for r, (first, last) in enumerate(held) if first <= lo and hi <= last]
                for k, r in enumerate(holders):
                    height = 0.8 / len(holders)
                    place = ((at + lo) / total, y - 0.4 + k * height)
                    ax.add_patch(Rectangle(place, (hi - lo) / total, height, facecolor=colours(r), edgecolor="white", linewidth=0.6))
            if part.name:
                ax.text(at / total + 0.01, y, part.name, ha="left", va="center", fontsize=8, color="white", weight="bold")
            at += part.rows
    ax.set(xlim=(0, 1), ylim=(len(paths) - 0.4, -0.6), xticks=[], yticks=range(len(paths)))
    shapes = ["×".join(map(str, layout.specs[p].param.shape)) for p in paths]
    ax.set_yticklabels([f"{name}  {shape}" for name, shape in zip(names or paths, shapes)], fontsize=8)
    ax.spines[:].set_visible(False)
    for stage in dict.fromkeys(stages or ()):
        assert stages is not None
        lo, hi = stages.index(stage), len(stages) - [*reversed(stages)].index(stage)
        if lo:
            ax.axhline(lo - 0.5, color="0.6", linewidth=0.8)
        words = f"stage {stage}" + (f"\non pp={layout.placement[stage]}" if layout.mesh.pp > 1 else "")
        ax.text(1.01, (lo + hi - 1) / 2, words, ha="left", va="center", fontsize=8, transform=ax.get_yaxis_transform())
    copies = f", each on {layout.mesh['dp']} data ranks" if layout.mesh["dp"] > 1 else ""
    ax.set_title(f"who holds which slice: {layout.mesh}{copies}", fontsize=9, loc="left")
    ax.tick_params(length=0)
    ax.legend(handles=[Patch(color=colours(r), label=f"tp={r}") for r in range(ranks)], fontsize=8, ncols=min(ranks, 8), loc="upper right",
              bbox_to_anchor=(1, 0), frameon=False)  # fmt: skip


def draw_program(ax: Any, program: Program, title: str) -> None:
    """One row a pipeline rank, one box an action, as wide as it takes where F, I and W of a stage take the same time; in it its
    microbatch."""
    from matplotlib.patches import Patch, Rectangle

    timeline = cost(program)
    spans = [(rank, s) for rank, row in enumerate(timeline.rows) for s in row if s.end > s.start]
    for rank, s in spans:
        colour = COLOURS.get(s.action.op, OTHER)
        ax.add_patch(Rectangle((s.start, rank - 0.42), s.end - s.start, 0.84, facecolor=colour, edgecolor="white", linewidth=1))
        words = "" if s.action.microbatch is None else str(s.action.microbatch)
        ax.text((s.start + s.end) / 2, rank, words, ha="center", va="center", fontsize=8)
    ranks = range(len(program))
    ax.set(xlim=(0, timeline.makespan), ylim=(len(program) - 0.5, -0.5), xticks=[], yticks=ranks)
    ax.set_yticklabels([f"rank {r}" for r in ranks], fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    seen = dict.fromkeys(s.action.op for _, s in spans)
    ax.legend(handles=[Patch(color=COLOURS.get(op, OTHER), label=f"{op}: {MEANING[op]}" if op in MEANING else op) for op in seen],
              fontsize=8, ncols=len(seen), loc="upper right", bbox_to_anchor=(1, 0), frameon=False)  # fmt: skip
    ax.set_title(title, fontsize=9, loc="left")


def loss_curve(records: Sequence[dict[str, Any]], png: str | Path, title: str = "") -> None:
    """Loss over tokens from the lines of a metrics.jsonl, and the gradient norm below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    tokens = [r["tokens"] for r in records]
    top.plot(tokens, [r["loss"] for r in records], linewidth=1.2)
    top.set(ylabel="loss (nats per token)", title=title)
    low.plot(tokens, [r["grad_norm"] for r in records], linewidth=0.8, color="tab:grey")
    low.set(xlabel="tokens", ylabel="gradient norm", yscale="log")
    for ax in (top, low):
        ax.grid(alpha=0.3)
    figure.savefig(png, dpi=110)

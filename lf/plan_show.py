"""A plan and a search for people: tables, and pictures of memory and of the step. matplotlib is loaded when the first is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from lf.console import table
from lf.plan import Plan
from lf.plan_search import Choice, Found
from lf.schedule import picture

GIB = 2**30
KINDS = ("parameter", "optimizer", "gradient", "activation", "buffer", "batch")
LESS = 0.01  # of a step: differences below it are not told
COLOURS = ("#4c78a8", "#9ecae9", "#f58518", "#54a24b", "#b79a20", "#bab0ac")


def ranking(found: Found, title: str) -> Any:
    """The best layouts as a table: time, and what each loses to the first by."""
    columns = ("no", "layout", "s", "tokens/s", "MFU %", "bubble %", "GiB", "against the first, s")
    best, rows = found.best[0][1], []
    for i, (c, p) in enumerate(found.best):
        numbers = (f"{p.seconds:.2f}", f"{p.tokens_per_second:.0f}", f"{100 * p.mfu:.1f}", f"{100 * p.bubble:.1f}", f"{p.peak / GIB:.1f}")
        rows.append((str(i + 1), str(c), *numbers, against(p, best) if i else "fastest"))
    return table(title, columns, rows)


def memory(found: Found, title: str) -> Any:
    """What the fullest row of each holds at its most, by kind."""
    rows = [
        (str(i + 1), str(p.worst.row), *(f"{p.worst.memory.get(kind, 0) / GIB:.1f}" for kind in KINDS), f"{p.peak / GIB:.1f}")
        for i, (_, p) in enumerate(found.best)
    ]
    return table(title, ("no", "row", *KINDS, "GiB"), rows)


def against(plan: Plan, best: Plan) -> str:
    """What makes a plan slower than another, in seconds of a step: what it takes more of, the most first, and what it saves."""
    change = {what: plan.spent.get(what, 0.0) - best.spent.get(what, 0.0) for what in (*best.spent, *plan.spent)}
    told = sorted(((d, what) for what, d in change.items() if abs(d) > LESS * best.seconds), key=lambda pair: -pair[0])
    return ", ".join(f"{d:+.2f} {what}" for d, what in told) or "as fast"


def spent(plan: Plan, title: str) -> Any:
    """Where the seconds of the busiest row go, and what a rank sends."""
    rows = [(what, f"{s:.3f}", f"{100 * s / plan.seconds:.1f}") for what, s in plan.spent.items() if s > 0]
    return table(title, ("seconds of a step", "s", "%"), rows)


def rows_of(plan: Plan, title: str) -> Any:
    """Of each row that was run its memory when it holds the most, and what leaves it in a step."""
    axes = sorted({axis for row in plan.rows for axis, n in row.sent_over.items() if n > GIB / 1000})
    columns = ("row", "GiB", *KINDS, *(f"GiB over {axis}" for axis in axes))
    cells = []
    for r in plan.rows:
        kinds, over = (r.memory.get(kind, 0) for kind in KINDS), r.sent_over
        cells.append((str(r.row), *(f"{n / GIB:.2f}" for n in (r.peak, *kinds, *(over.get(axis, 0) for axis in axes)))))
    return table(title, columns, cells)


def drawn(choice: Choice, plan: Plan, folder: str | Path) -> list[Path]:
    """memory.svg, memory.png: each row's memory by kind when it holds the most, and in the course of the step; timeline.svg, timeline.png."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return _memory(plan, folder, str(choice)) + [
        picture(attrs.evolve(plan.timeline, memory=()), folder / f"timeline{end}", f"{choice}: {plan.timeline.makespan:.2f} s of {plan.seconds:.2f}")
        for end in (".svg", ".png")
    ]


def _memory(plan: Plan, folder: Path, title: str) -> list[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.7 + 0.28 * len(plan.rows)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    bars, lines = figure.subplots(1, 2, width_ratios=[3, 2])
    names = [f"row {r.row}" for r in plan.rows]
    left = [0.0] * len(names)
    for kind, colour in zip(KINDS, COLOURS):
        sizes = [r.memory.get(kind, 0) / GIB for r in plan.rows]
        bars.barh(names, sizes, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, sizes)]
    bars.axvline(plan.limit / GIB, color="black", linewidth=1, linestyle=":")
    bars.invert_yaxis()
    bars.set(xlabel="GiB at most (dotted: what there is)")
    figure.legend(*bars.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=len(KINDS), frameon=False)
    for row in _shown(plan):
        levels = _levels(plan, row)
        lines.plot(*zip(*levels), linewidth=0.8, label=f"row {plan.rows[row].row}")
    lines.set(xlabel="s", ylabel="GiB after each action")
    lines.legend(fontsize=7)
    out = [folder / f"memory{end}" for end in (".svg", ".png")]
    for path in out:
        figure.savefig(path, dpi=110)
    return out


def _shown(plan: Plan) -> Sequence[int]:
    """The first, the fullest and the last row, by their places among those that were run."""
    fullest = max(range(len(plan.rows)), key=lambda i: plan.rows[i].peak)
    return sorted({0, fullest, len(plan.rows) - 1})


def _levels(plan: Plan, place: int) -> list[tuple[float, float]]:
    row = plan.rows[place]
    ends = sorted(span.end for span in plan.timeline.rows[row.row])
    return [(end, held / GIB) for end, held in zip(ends, row.held)]

"""A timeline as a picture: who computes what when, and what each rank holds meanwhile. matplotlib is loaded when the first is drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lf.config import ConfigError
from lf.schedule.ir import BRIDGES, COMPUTE, MOVES, Action, flat
from lf.schedule.looks import BRIDGE, COLOURS, MEANING, OTHER, Looks, amount, ink, looks, ops, shade
from lf.schedule.timeline import Span, Timeline

FORMATS = (".svg", ".png")
HATCH = "////"
ROW, STRIP = 0.84, 0.17  # height of a row; of what moves, or is summed, at its lower edge


def picture(timeline: Timeline, path: str | Path, title: str = "", links: bool = False, main: str = "") -> Path:
    """Draws to `path`, .svg or .png: a row a rank, with the microbatch in each box where it fits and the share of bubbles beside it; below, what
    each rank holds over time where the timeline knows. links: a line from each SEND to its RECV; of a timeline without them, from each forward
    and backward to the one that follows on another rank, and from who gives to who takes in a BRIDGE. main: the main chain of several, where it has
    a name; each other one has colours of its own, and what several ranks do a part of each is hatched. Raises ConfigError for another kind of file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"picture {path}: it is drawn as {' or '.join(FORMATS)}, by the end of its name")
    p, look = len(timeline.rows), looks(timeline, main)
    least = min((s.end - s.start for row in timeline.rows for s in row if s.action.op in COMPUTE and s.end > s.start), default=1.0)
    width = min(max(6.5, 0.17 * timeline.makespan / least), 22) + 1.6
    above, below = 0.3 * p + 0.2, 1.5 if timeline.memory else 0.0
    figure = Figure(figsize=(width, above + below + 1.3), layout="constrained")
    top, *low = figure.subplots(1 + bool(timeline.memory), 1, sharex=True, squeeze=False, height_ratios=[above, below][: 1 + bool(below)])[:, 0]
    _rows(top, timeline, look, width - 1.8)
    if links:
        _lines(top, timeline)
    top.set_title(title, loc="left", fontsize=11, weight="bold")
    if low:
        _memory(low[0], timeline)
    (low or [top])[-1].set_xlabel(f"time{' (s)' * (timeline.unit == 's')}", fontsize=9)
    _legend(figure, timeline, look)
    with rc_context({"svg.hashsalt": "lf", "svg.fonttype": "none", "hatch.linewidth": 0.6}):  # the same bytes each time, and text that stays text
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _rows(ax: Any, timeline: Timeline, look: Looks, inches: float) -> None:
    from matplotlib.collections import PolyCollection

    end = timeline.makespan or 1.0
    numbers = [str(a.microbatch) for row in timeline.rows for s in row for a in flat([s.action]) if a.microbatch is not None]
    digits = max(map(len, numbers), default=1)  # one size for all
    boxes: dict[tuple[str, bool], list[list[tuple[float, float]]]] = defaultdict(list)
    strip = STRIP if any(s.action.op not in (*COMPUTE, "OVERLAP") and s.end > s.start for row in timeline.rows for s in row) else 0.0
    ax.barh(range(len(timeline.rows)), end, ROW, color="#f1f1f1", linewidth=0)
    for rank, row in enumerate(timeline.rows):
        for s in row:
            if s.end == s.start:
                continue
            for action, y, height in _places(s.action, rank, strip):
                back = look.colour(action, rank)
                boxes[back, look.is_shared(action)].append([(s.start, y), (s.end, y), (s.end, y + height), (s.start, y + height)])
                number = "" if action.microbatch is None or action.op not in COMPUTE else str(action.microbatch)
                room = 72 * inches * (s.end - s.start) / end  # points
                size = min(8.0, (room - 1) / (0.62 * digits))
                if number and size >= 4:
                    middle = ((s.start + s.end) / 2, y + height / 2)
                    behind = {"facecolor": back, "edgecolor": "none", "pad": 0.4} if look.is_shared(action) else None  # or it is lost in the hatching
                    ax.text(*middle, number, ha="center", va="center_baseline", fontsize=size if height > 0.5 else min(size, 6), color=ink(back),
                            bbox=behind)  # fmt: skip
    thin = len(timeline.rows) * max(map(len, timeline.rows), default=0) > 3000  # edges would hide what they part
    for (back, shared), corners in boxes.items():
        hatch = HATCH if shared else None
        ax.add_collection(PolyCollection(corners, facecolors=back, edgecolors="white", linewidths=0 if thin else 0.7, hatch=hatch))
    ax.text(1.008, 1.0, "bubble", transform=ax.transAxes, fontsize=8, color="#666666", va="bottom")
    for rank in range(len(timeline.rows)):
        ax.text(1.008, rank, f"{timeline.bubble(rank) / end:.1%}", transform=ax.get_yaxis_transform(), fontsize=8, va="center", color="#666666")
    ax.set(xlim=(0, end), ylim=(len(timeline.rows) - 0.45, -0.55), yticks=range(len(timeline.rows)))
    ax.set_yticklabels([look.label(rank) for rank in range(len(timeline.rows))], fontsize=9)
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)


def _places(action: Action, rank: int, strip: float) -> list[tuple[Action, float, float]]:
    """(action, upper edge, height) of its boxes: the two of an OVERLAP share the height, and what is no computation has a strip below."""
    top, height = rank - ROW / 2, ROW - strip
    if action.op == "OVERLAP":
        return [(part, top + i * height / 2, height / 2) for i, part in enumerate(action.pair)]
    return [(action, top, height)] if action.op in COMPUTE else [(action, top + height, strip)]


def _memory(ax: Any, timeline: Timeline) -> None:
    from matplotlib import colormaps

    many = len(timeline.rows)
    for rank, steps in enumerate(timeline.memory):
        after = {**dict(steps), timeline.makespan: steps[-1][1] if steps else 0.0}  # of several at one time the last: what is held from then on
        times, held = list(after), list(after.values())
        if timeline.unit == "s":
            held = [x / 2**30 for x in held]
        label = f"rank {rank}: at most {amount(timeline.peak(rank), timeline.unit)}"
        ax.step(times, held, where="post", color=colormaps["viridis"](0.92 * rank / max(many - 1, 1)), linewidth=1.4, label=label)
    ax.set(ylim=(0, None))
    ax.set_ylabel("held (GiB)" if timeline.unit == "s" else "held", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False, ncols=1 + (many - 1) // 8, loc="upper left", bbox_to_anchor=(1.0, 1.06), borderaxespad=0.2, labelspacing=0.2)


def _legend(figure: Any, timeline: Timeline, look: Looks) -> None:
    from matplotlib.patches import Patch

    seen, each = ops(timeline), [s.action for row in timeline.rows for s in row]
    handles = [Patch(color=COLOURS[op], label=f"{op}: {MEANING[op]}") for op in seen if op not in ("OFFLOAD", "FETCH")]
    if "OFFLOAD" in seen or "FETCH" in seen:
        handles.append(Patch(color=COLOURS["FETCH"], label="OFFLOAD, FETCH: to the host and back"))
    if any(a.op in MOVES for a in each):
        handles.append(Patch(color=OTHER, label="SEND, RECV"))
    if any(a.op in BRIDGES for a in each):
        handles.append(Patch(color=BRIDGE, label="BRIDGE: between chains"))
    for chain in look.beside:
        handles += [Patch(color=back, label=f"{chain}: {MEANING[op]}") for op, back in look.used(timeline, chain).items()]
    if look.shared:
        handles.append(Patch(facecolor=OTHER, edgecolor="white", hatch=HATCH, linewidth=0, label="several ranks do a part each"))
    if len(several := look.most) > 1:
        shades = [shade(COLOURS["F"], Action("F", s), several) for s in (several[0], several[-1])]
        handles += [Patch(color=c, label=f"{word} of a rank's stages") for c, word in zip(shades, ("first", "last"))]
    columns = min(len(handles), int(figure.get_figwidth() / 1.7))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8, frameon=False, handlelength=1.2, columnspacing=1.6)


def _lines(ax: Any, timeline: Timeline) -> None:
    from matplotlib.collections import LineCollection

    moves = (*MOVES, *BRIDGES)
    ends = [[(a.start if a.action.op in moves else a.end, i), (max(a.end, b.end) if a.action.op in moves else b.start, j)]
            for i, a, j, b in pairs(timeline)]  # fmt: skip
    ax.add_collection(LineCollection(ends, colors="#333333", linewidths=0.6, alpha=0.6, zorder=3))


def pairs(timeline: Timeline) -> Iterator[tuple[int, Span, int, Span]]:
    """(rank, span, other rank, span) of each SEND and its RECV; where there is none, of each compute whose result another rank waits for; and of
    each BRIDGE on a rank that gives and on one that takes."""
    where: dict[Action, list[tuple[int, Span]]] = defaultdict(list)  # a unit of a chain may stand on several
    for rank, row in enumerate(timeline.rows):
        for s in row:
            for part in (s.action, *s.action.pair):
                where[part].append((rank, s))
    moves = any(a.op in MOVES for a in where)
    last = max((a.stage for a in where), default=0)
    for a, here in where.items():
        if a.op in ("SEND_F", "SEND_B") if moves else a.op in ("F", "B", "I"):
            step = 1 if a.op in ("F", "SEND_F") else -1
            if not 0 <= a.stage + step <= last:
                continue
            follows = [a.op.replace("SEND", "RECV")] if moves else ["F"] if a.op == "F" else ["B", "I"]
            for op in follows:
                there = where.get(Action(op, a.stage + step, a.microbatch, chain=a.chain), [])
                together = zip(here, there) if len(here) == len(there) else ((x, y) for x in here for y in there)
                yield from ((rank, span, other, its) for (rank, span), (other, its) in together if other != rank)
        elif a.op in BRIDGES:
            takes = {rank for op in ("F", "B", "I") for rank, _ in where.get(Action(op, a.stage, a.microbatch, chain=a.chain), ())}
            mine, others = [x for x in here if x[0] in takes], [x for x in here if x[0] not in takes]
            gives, takers = (others, mine) if a.op == "BRIDGE_F" else (mine, others)
            yield from ((rank, span, other, its) for rank, span in gives for other, its in takers)

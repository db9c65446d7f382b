"""Pictures and tables of a layout and of a run.

matplotlib is loaded when the first picture is drawn, and without pyplot: a backend for windows is no matter of a training run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lf.chain_layouts import Joint, Layouts, runs
from lf.console import console, table
from lf.layouts import Layout
from lf.mesh import Mesh
from lf.schedule import Program, cost
from lf.schedule.looks import COLOURS, MEANING, OTHER
from lf.segment import path_of
from lf.spec import Piece, Spec

LEGEND = 16  # ranks that a legend names


def show(layout: Layout | Layouts, png: str | Path | None = None, rank: int = 0) -> None:
    """Prints who holds what, a line a parameter, and draws it to `png` if one is named. `rank`: whose local shapes are shown.

    Parameters of several layers that are laid out alike share a line: layers.*.attn/qkv ×28. Of several stages each has its own lines, and a
    parameter that several of them use stands in each. Of several chains the chains, what joins them and the rows of a program come first, then
    each chain by itself; where `rank` is not on one, the first rank that is speaks for it.
    """
    if isinstance(layout, Layouts) and layout.model is not None:
        _show_chains(layout)
    chains = layout.chains if isinstance(layout, Layouts) else {"": layout}
    drawn = []
    for name, where in chains.items():
        ranks = layout.ranks[name] if isinstance(layout, Layouts) else (*range(where.mesh.size),)
        local = ranks.index(rank) if rank in ranks or not name else 0
        drawn.append((name, where, _show_chain(name, where, local, ranks[local])))
    if png is not None:
        from matplotlib.figure import Figure

        heights = [0.2 + len(rows) for *_, rows in drawn]  # so that all bars are of one height
        figure = Figure(figsize=(9, sum(1.2 + 0.28 * len(rows) for *_, rows in drawn)), layout="constrained")
        for ax, (name, where, rows) in zip(figure.subplots(len(drawn), squeeze=False, height_ratios=heights)[:, 0], drawn):
            stages = [s for s, *_ in rows] if len(where.stages) > 1 else None
            draw_layout(ax, where, [path for *_, path in rows], [label for _, label, _ in rows], stages, name)
        figure.savefig(png, dpi=110)


def _show_chain(name: str, layout: Layout, local: int, rank: int) -> list[tuple[int, str, str]]:
    """Prints a chain as rank `local` of its mesh has it, which is `rank` of all; (stage, what to call it, path) of each line."""
    staged, of = len(layout.stages) > 1, f"{name}: " if name else ""
    rows = [(s, label, paths[0]) for s in range(len(layout.stages)) for label, paths in alike(layout, local, s).items()]
    if staged:
        title = f"{of}{len(layout.stages)} stages on mesh {layout.mesh}"
        console().print(table(title, ("stage", "pipeline rank", "layers", "parameters"), [_stage_row(layout, s) for s in range(len(layout.stages))]))
    columns = (*["stage"] * staged, "parameter", "logical shape", "axes", f"on rank {rank}", "summed over", "counted by")
    title = f"{of}{len(layout.specs)} parameters on mesh {layout.mesh}" + f", sharding {layout.sharding}" * bool(layout.sharding.stage)
    console().print(table(title, columns, [(*[str(s)] * staged, label, *_row(layout, path, local)) for s, label, path in rows]))
    return rows


def _show_chains(layouts: Layouts) -> None:
    """Prints the chains, what joins them, and who does what in a program."""
    columns = ("chain", "mesh", "ranks", "stages", "parameters", "not trained", "runs")
    console().print(table(f"{len(layouts.chains)} chains on {layouts.world} ranks", columns, [_chain_row(layouts, c) for c in layouts.chains]))
    if layouts.joints:
        columns = ("from", "stage", "in rows", "into", "stage", "in rows", "of segments")
        console().print(table(f"{len(layouts.joints)} joints", columns, [_joint_row(layouts, j) for j in layouts.joints]))
    rows = [(str(r), runs(ranks), *_stages_of(layouts, r)) for r, ranks in enumerate(layouts.rows)]
    console().print(table(f"{len(rows)} rows of a program", ("row", "ranks", *(f"{c} stages" for c in layouts.chains)), rows))


def _chain_row(layouts: Layouts, chain: str) -> tuple[str, ...]:
    where = layouts.chains[chain]
    sizes = {path: math.prod(spec.param.shape) for path, spec in where.specs.items()}
    frozen = sum(sizes[path] for path in where.frozen)
    how = "the data" if chain == layouts.main else "items"
    return chain, str(where.mesh), runs(layouts.ranks[chain]), str(len(where.stages)), f"{sum(sizes.values()):,}", f"{frozen:,}", how


def _joint_row(layouts: Layouts, joint: Joint) -> tuple[str, ...]:
    ends = (joint.source, joint.source_stage), (joint.target, joint.target_stage)
    given, taken = (runs(layouts.homes(*end)) for end in ends)
    into = ", ".join(dict.fromkeys(edge.segment for edge in joint.edges))
    return joint.name, str(joint.source_stage), given, joint.target, str(joint.target_stage), taken, into


def _stages_of(layouts: Layouts, row: int) -> list[str]:
    """Of each chain the stages of a row."""
    at = {chain: layouts.coords(chain, layouts.rows[row][0]) for chain in layouts.chains}
    return [", ".join(map(str, layouts.chains[chain].on(c["pp"]))) if c else "—" for chain, c in at.items()]


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
    cut, local = spec.cut, _shape(spec.local_shape(coords))
    groups = math.prod(mesh[a] for a in cut.axes) // cut.n if cut else 1
    shards = ["each shard its own" if cut.dim is not None else f"shard {cut.owner}"] if cut else []
    shards += ["the first group"] * (groups > 1)
    alike = [f"{a}=0" for a in summed if not (cut and a in cut.axes)]
    counted = ", ".join(first + alike + [f"each {a} its own" for a in split] + shards) or "the one rank"
    if shared:
        counted += f" ({', '.join(shared)}: first holder)"
        summed.append(f"{spec.names[spec.param.part_dim]} for {', '.join(shared)}")
    summed += [f"pp={' and '.join(map(str, holders))}"] * (len(holders) > 1)
    frozen = path in layout.frozen
    return (
        _shape(spec.param.shape),
        axes or "—",
        (f"{local}, kept {_shape(spec.state_shape(coords))}" if cut else local) if coords["pp"] in holders else "—",
        "—" if frozen else ", ".join(summed) or "—",
        "not trained" if frozen else counted,
    )


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def draw_layout(
    ax: Any, layout: Layout, paths: Sequence[str], names: Sequence[str] | None = None, stages: Sequence[int] | None = None, chain: str = ""
) -> None:
    """Each parameter as a bar, laid out along the dim that is split; each rank of tp has a colour, several where several hold a row. Of
    experts, which lie side by side, each rank of ep has one, and each of etp a shade of it.

    `names`: what to write beside the bars instead of the paths · `stages`: the stage of each bar, ascending, to draw them apart · `chain`: its
    name, where there are several.
    """
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.patheffects import withStroke

    edged = [withStroke(linewidth=2, foreground="0.25")]  # read on any colour, and across several
    drawn: dict[str, Any] = {}  # what stands in the legend → its colour
    for y, path in enumerate(paths):
        spec, at = layout.specs[path], 0.0
        holders = _holders(layout.mesh, "ep" in spec.grid)
        drawn |= {name: colour for name, colour, _ in holders}
        total = spec.param.shape[spec.param.part_dim] if spec.param.shape else 1
        for i, part in enumerate(spec.parts()):
            pieces = [spec.pieces(coords)[i] for *_, coords in holders]
            for left, right, ranks in _spans(spec, pieces):  # a row that several ranks hold is divided in height among them
                for k, r in enumerate(ranks):
                    height = 0.8 / len(ranks)
                    place = ((at + left * part.rows) / total, y - 0.4 + k * height)
                    size = (right - left) * part.rows / total, height
                    ax.add_patch(Rectangle(place, *size, facecolor=holders[r][1], edgecolor="white", linewidth=0.6))
            if part.name:
                ax.text(at / total + 0.01, y, part.name, ha="left", va="center", fontsize=8, color="white", weight="bold", path_effects=edged)
            at += part.rows
    ax.set(xlim=(0, 1), ylim=(len(paths) - 0.4, -0.6), xticks=[], yticks=range(len(paths)))
    shapes = [_shape(layout.specs[p].param.shape) for p in paths]
    ax.set_yticklabels([f"{name}  {shape}" for name, shape in zip(names or paths, shapes)], fontsize=8)
    ax.spines[:].set_visible(False)
    for stage in dict.fromkeys(stages or ()):
        assert stages is not None
        lo, hi = stages.index(stage), len(stages) - [*reversed(stages)].index(stage)
        if lo:
            ax.axhline(lo - 0.5, color="0.6", linewidth=0.8)
        words = f"stage {stage}" + (f"\non pp={layout.placement[stage]}" if layout.mesh.pp > 1 else "")
        ax.text(1.01, (lo + hi - 1) / 2, words, ha="left", va="center", fontsize=8, transform=ax.get_yaxis_transform())
    of = {name: layout.mesh[axis] for name, axis in (("each", "dp"), ("experts", "edp")) if name == "each" or layout.mesh.ep * layout.mesh.etp > 1}
    copies = ", ".join(f"{name} on {n} data ranks" for name, n in of.items() if n > 1)
    ax.set_title(f"{chain}{': ' * bool(chain)}who holds which slice: {layout.mesh}{', ' * bool(copies)}{copies}", fontsize=9, loc="left")
    ax.tick_params(length=0)
    told = [*drawn.items()]
    if len(told) > LEGEND:
        told = [*told[: LEGEND - 2], ("…", "none"), told[-1]]
    columns = min(len(told), 6 if layout.mesh.etp > 1 else 8)
    ax.legend(handles=[Patch(color=colour, label=name) for name, colour in told], fontsize=8, ncols=columns, loc="upper right",
              bbox_to_anchor=(1, 0), frameon=False)  # fmt: skip


def _holders(mesh: Mesh, experts: bool) -> list[tuple[str, Any, dict[str, int]]]:
    """(name, colour, coordinates) of those that a parameter may be split among: the ranks of tp, or those of ep and etp, for which paler is a
    higher etp."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    ranks = mesh.ep if experts else mesh.tp
    few = [colormaps["Dark2"](i) for i in (0, 2, 3, 5, 4, 6, 7, 1)] if experts else [colormaps["tab10"](i) for i in range(10)]  # its orange last
    colours = few if ranks <= len(few) else [colormaps["viridis" if experts else "turbo"].resampled(ranks)(r) for r in range(ranks)]
    if not experts:
        return [(f"tp={r}", colours[r], mesh.coords(mesh.rank(tp=r))) for r in range(ranks)]
    return [
        (", ".join([f"ep={r}"] + [f"etp={e}"] * (mesh.etp > 1)), tuple(c + (1 - c) * 0.6 * e / mesh.etp for c in to_rgb(colours[r])),
         mesh.coords(mesh.rank(ep=r, etp=e)))
        for r in range(ranks) for e in range(mesh.etp)
    ]  # fmt: skip


def _spans(spec: Spec, pieces: Sequence[Piece]) -> Iterator[tuple[float, float, list[int]]]:
    """(left, right, its holders), from 0 to 1, of one part, of which each holder has a piece: along the rows that are split; of experts along these,
    and of those that a rank of ep has along their columns."""
    boxes = [piece.box or ((0, 1),) for piece in pieces]  # a scalar is drawn as one row
    shape = pieces[0].shape or (1,)
    along = spec.names.index("ep") if "ep" in spec.names else pieces[0].dim
    within = next((d for d, axis in enumerate(spec.names) if axis and d != along), None)
    wide, deep = shape[along], 1 if within is None else shape[within]
    held = [(box[along], (0, 1) if within is None else box[within]) for box in boxes]
    for left, right in pairwise(sorted({edge for rows, _ in held for edge in rows})):
        for low, high in pairwise(sorted({edge for _, columns in held for edge in columns})):
            ranks = [r for r, (x, y) in enumerate(held) if x[0] <= left and right <= x[1] and y[0] <= low and high <= y[1]]
            start, each = left / wide, (right - left) / wide / deep
            yield start + low * each, start + high * each, ranks


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

"""An encoder beside a pipeline, placed in each way: what scripts/schedule.py draws of models of several chains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from rich.markup import escape

import lf
from lf.chain_layouts import Joint
from lf.chains import NAME
from lf.config import ConfigError, one_of
from lf.schedule import Beside, Program, beside
from lf.schedule.beside import KINDS
from lf.schedule.cost import held
from lf.schedule.named import resolve
from lf.schedule.placements import Placed, comparison

SHARES, RANKS, STEPS = (0.1, 0.5, 1.5), (4, 8, 16), (1, 2, 4, 8)


def parsed(words: str) -> tuple[str, float]:
    """'vision=0.5' → its name and time. Raises ConfigError."""
    name, _, value = words.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not NAME.fullmatch(name) or not 0 < share < 1000:
        raise ConfigError(f"--chains {words}: give a name and a time, as vision=0.5: its forward, where that of a rank's share of a microbatch is 1")
    return name, share


def made(config: Any, kind: str, times: Mapping[str, float]) -> tuple[Program, Any]:
    """The program with the encoder placed so, and its timeline."""
    name, share = parsed(config.chains)
    schedule, ranks, m = resolve(config.schedule), config.ranks or 4, config.microbatches or 8
    where = schedule.place(ranks, config.chunks or schedule.chunks)
    main, joints = schedule.generate(where, m), (Joint(f"{name}.output", name, 0, "", 0),)
    one = {op.upper(): t * ranks / len(where) for op, t in times.items() if op != "link"}
    units = 1 if kind == "decoupled" else m
    took = {**one, f"{name}:F": share * times["f"] * m / units, f"{name}:B": share * times["b"] * m / units}
    limit = config.in_flight if kind in ("nested", "dedicated") else None
    program = beside(main, joints, {name: Beside(kind, in_flight=limit)}, times=took, link=times["link"])
    lf.schedule.check(program, joints=joints)
    shown = lf.schedule.lower(program, joints=joints) if config.show == "all" else program
    return program, lf.schedule.cost(shown, took, times["link"], joints=joints)


def drawn(config: Any, times: Mapping[str, float]) -> None:
    """The program of each placement, and how they compare."""
    name, share = parsed(config.chains)
    if config.compare is not None or config.placement is not None or config.stages is not None:
        raise ConfigError("--chains goes with --schedule, --ranks, --chunks and --microbatches; leave out --compare, --placement and --stages")
    kinds = KINDS if config.beside == "all" else (one_of("value for --beside:", config.beside, KINDS),)
    screen, rows, units = lf.console.console(), [], config.microbatches or 8
    for kind in kinds:
        program, timeline = made(config, kind, times)
        title = f"{name} {kind}: {share:.0%} of a rank's share, {config.schedule}, {len(program)} ranks, {units} microbatches"
        screen.print(title, soft_wrap=True, style="bold")
        screen.print(lf.schedule.grid(timeline))
        if config.text:
            screen.print(lf.schedule.draw(program), soft_wrap=True, markup=False)
        each, together = held(timeline, name)
        scale = units if kind == "decoupled" else 1  # a unit of everything
        bubble = sum(timeline.bubble(r) for r in range(len(program))) / len(program) / (timeline.makespan or 1)
        rows.append((kind, len(program), f"{timeline.makespan:.4g}", f"{100 * bubble:.1f}", f"{max(each) * scale:.3g}", f"{together * scale:.3g}"))
        if config.out:
            for end in (".svg", ".png"):
                lf.schedule.picture(timeline, Path(config.out) / f"{name}-{kind}{end}", title, config.links)
            (Path(config.out) / f"{name}-{kind}.txt").write_text(lf.schedule.dumps(program), encoding="utf-8")
    screen.print(lf.console.table(f"{name} beside {config.schedule}", ("placement", "ranks", "time", "bubble %", "held on a rank", "in all"), rows))
    screen.print(f"bubble: the mean · held: microbatches of {escape(name)}, from its forward to its backward, at most", style="dim", soft_wrap=True)
    if config.out:
        screen.print(f"written: {config.out}", soft_wrap=True)


def table(config: Any, times: Mapping[str, float]) -> None:
    """The comparison of `lf.schedule.placements` over shares of a stage, ranks and numbers of microbatches."""
    screen, found = lf.console.console(), list[Placed]()
    total = len(SHARES) * len(RANKS) * len(STEPS) * 3
    with lf.console.Bar(screen, "placements", total) as bar:
        for placed in comparison(SHARES, RANKS, STEPS, config.schedule):
            found.append(placed)
            bar.at(len(found))
    rows = []
    for key in dict.fromkeys((x.ranks, x.microbatches, x.share) for x in found):
        mine = {x.kind: x for x in found if (x.ranks, x.microbatches, x.share) == key}
        nested = mine["nested"]
        over = [f"{100 * mine[kind].over:.1f}" for kind in ("nested", "decoupled", "inline")]
        rows.append((*key[:2], f"{key[2]:.0%}", "yes" if nested.room else "no", *over, *(f"{mine[k].held[0]:.3g}" for k in mine)))
    columns = ("ranks", "microbatches", "encoder", "room", "nested %", "decoupled %", "inline %", *(f"held {kind}" for kind in mine))
    screen.print(lf.console.table(f"over the bound, beside {config.schedule}", columns, rows))
    words = "room: of the bubbles, for the encoder · %: of a step over the longer of the pipeline alone and all work spread evenly"
    screen.print(f"{words} · held: microbatches of the encoder on one rank, at most", style="dim", soft_wrap=True)
    if config.out:
        (Path(config.out) / "chains.json").write_text(json.dumps([{**attrs.asdict(x), "over": x.over} for x in found], indent=1) + "\n")
        for end in (".svg", ".png"):
            picture(found, Path(config.out) / f"chains{end}", config.schedule)
        screen.print(f"written: {config.out}", soft_wrap=True)


def picture(found: list[Placed], path: Path, schedule: str) -> None:
    """Above, how far each placement is over the bound; below, what of the encoder a rank holds; by the number of microbatches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots(2, len(RANKS), sharex="col", sharey="row")
    colours = {"nested": "#0072B2", "decoupled": "#E69F00", "inline": "#CC6677"}
    styles = dict(zip(SHARES, ("dotted", "dashed", "solid")))
    for column, ranks in enumerate(RANKS):
        for kind, colour in colours.items():
            for share, style in styles.items():
                mine = [x for x in found if (x.ranks, x.kind, x.share) == (ranks, kind, share)]
                m = [x.microbatches for x in mine]
                label = f"{kind}, {share:.0%}" if not column else None
                axes[0][column].plot(m, [max(100 * x.over, 0.05) for x in mine], color=colour, linestyle=style, marker="o", markersize=3, label=label)
                axes[1][column].plot(m, [x.held[0] for x in mine], color=colour, linestyle=style, marker="o", markersize=3)
        axes[0][column].axhline(5, color="#888888", linewidth=0.8)
        axes[0][column].set_title(f"{schedule}, {ranks} ranks", fontsize=9, loc="left")
        axes[1][column].set_xlabel("microbatches of a step", fontsize=8)
        for ax in axes[:, column]:
            ax.set_xscale("log", base=2)
            ax.tick_params(labelsize=7)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.25)
    axes[0][0].set_yscale("log")
    axes[1][0].set_yscale("log", base=2)
    axes[0][0].set_ylabel("% over the bound (line: 5)", fontsize=8)
    axes[1][0].set_ylabel("encoder held on a rank, microbatches", fontsize=8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    with rc_context({"svg.hashsalt": "lf", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)

"""Chains beside a pipeline, placed in each way: what scripts/schedule.py draws of models of several chains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

import lf
from lf.chain_layouts import Joint
from lf.chains import NAME
from lf.config import ConfigError, one_of
from lf.schedule import SCHEDULES, Beside, Program, Timeline, beside
from lf.schedule.beside import KINDS
from lf.schedule.cost import held
from lf.schedule.ir import microbatches, placement
from lf.schedule.placements import Placed, comparison

SHARES, RANKS, STEPS = (0.1, 0.5, 1.5), (4, 8, 16), (1, 2, 4, 8)


@attrs.frozen
class Chain:
    """`time`: its forward of a microbatch, where that of a rank's share of the pipeline is 1 · `feeds`: stages of the pipeline; none: the last stage
    feeds it."""

    name: str
    time: float
    feeds: tuple[int, ...]


@attrs.frozen
class Drawn:
    """`bound`: the longer of the pipeline alone and of all work spread evenly over the rows · `units`: of each chain."""

    program: Program
    timeline: Timeline
    bound: float
    units: dict[str, int]


def refused(config: Any, default: Any) -> None:
    """Raises ConfigError for what would be asked for in vain."""

    def given(*names: str) -> str:
        return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(config, name) != getattr(default, name))

    sizes = ("ranks", "microbatches", "chunks", "stages", "placement", "times")
    if config.chains_table:
        if wrong := given("chains", "beside", "in_flight", "units", "compare", *sizes, "show", "text", "links"):
            raise ConfigError(f"--chains-table has chains, sizes and times of its own; leave out {wrong}")
        one_of("schedule for --chains-table:", config.schedule, SCHEDULES)
    elif config.chains:
        if config.compare is not None:
            raise ConfigError("--chains compares placements beside one schedule: name it with --schedule, and leave out --compare")
    elif wrong := given("beside", "in_flight", "units"):
        raise ConfigError(f"{wrong}: of chains beside the pipeline; name some with --chains, as vision=0.5")


def parsed(words: str, stages: int) -> tuple[Chain, ...]:
    """'vision=0.5:0+2,head=0.1:after' → the chains. Raises ConfigError with the chain and what is wrong."""
    chains: dict[str, Chain] = {}
    for word in words.split(","):
        start, _, where = word.partition(":")
        name, _, value = start.partition("=")
        try:
            time = float(value)
        except ValueError:
            time = -1.0
        if not NAME.fullmatch(name) or not 0 < time < 1000:
            raise ConfigError(f"--chains {word}: give a name and a time, as vision=0.5: its forward, of that of a rank's share of a microbatch")
        if name in chains:
            raise ConfigError(f"--chains {word}: {name} is there already; stages that it feeds are joined by +, as {name}={value}:0+2")
        feeds = () if where == "after" else tuple(where.split("+")) if ":" in word else ("0",)
        for stage in feeds:
            if not stage.isdecimal() or int(stage) >= stages or feeds.count(stage) > 1:
                raise ConfigError(f"--chains {word}: {stage!r} of {name} should be a stage that it feeds, 0 to {stages - 1}, each once; or 'after'")
        chains[name] = Chain(name, time, tuple(map(int, feeds)))
    return tuple(chains.values())


def asked(words: str, chains: Sequence[Chain]) -> list[dict[str, str]]:
    """--beside: of each program to be drawn, {chain: kind}. Raises ConfigError."""
    kinds, own = list[str](), dict[str, str]()
    for word in words.split(","):
        name, equals, kind = word.rpartition("=")
        if equals:
            own[one_of("chain for --beside:", name, [c.name for c in chains])] = one_of(f"value for --beside {name}:", kind, KINDS)
        else:
            kinds.append(one_of("value for --beside:", kind, (*KINDS, "all")))
    turns = KINDS if not kinds or "all" in kinds else tuple(kinds)
    found = [{c.name: own.get(c.name, kind if c.feeds else "inline") for c in chains} for kind in turns]
    return [each for i, each in enumerate(found) if each not in found[:i]]


def made(config: Any, main: Program, chains: Sequence[Chain], kinds: Mapping[str, str], times: Mapping[str, float]) -> Drawn:
    """The program with the chains placed so. Raises ConfigError and ProgramError."""
    m, stages = microbatches(main), len(placement(main))
    joints = [Joint(f"{c.name}.output", c.name, 0, "", stage) for c in chains for stage in c.feeds]
    joints += [Joint("output", "", stages - 1, c.name, 0) for c in chains if not c.feeds]
    took = {op.upper(): t * len(main) / stages for op, t in times.items() if op != "link"}
    alone = lf.schedule.cost(main, took, times["link"])
    work, where, parts = sum(map(alone.busy, range(len(main)))), dict[str, Beside](), dict[str, int]()
    for c in chains:
        kind = kinds[c.name]
        units = config.units if c.feeds and kind != "inline" else None
        where[c.name] = Beside(kind, units, config.in_flight if c.feeds and kind in ("nested", "dedicated") else None)
        parts[c.name] = units or (1 if kind == "decoupled" else m)
        took |= {f"{c.name}:{op}": c.time * times[op.lower()] * m / parts[c.name] for op in "FBIW"}
        work += c.time * (times["f"] + times["b"]) * m
    program = beside(main, joints, where, times=took, link=times["link"])
    lf.schedule.check(program, joints=joints)
    shown = lf.schedule.lower(program, joints=joints) if config.show == "all" else program
    return Drawn(shown, lf.schedule.cost(shown, took, times["link"], joints=joints), max(alone.makespan, work / len(program)), parts)


def drawn(config: Any, times: Mapping[str, float], main: Program) -> None:
    """The program of each placement, and how they compare."""
    m, stages = microbatches(main), len(placement(main))
    chains = parsed(config.chains, stages)
    turns = asked(config.beside, chains)
    feeding = {kinds[c.name] for kinds in turns for c in chains if c.feeds}
    for flag, some in (("in_flight", {"nested", "dedicated"}), ("units", {*KINDS} - {"inline"})):
        if (value := getattr(config, flag)) is not None and not feeding & some:
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: for chains that feed the pipeline and are {' or '.join(sorted(some))}: none is")
    screen, found = lf.console.console(), []
    with lf.console.Bar(screen, "placements", len(turns)) as bar:
        for kinds in turns:
            each = made(config, main, chains, kinds, times)
            title = ", ".join(f"{c.name} {kinds[c.name]} ({c.time:.0%})" for c in chains)
            title += f" beside {config.schedule}, {len(main)} ranks, {m} microbatches"
            found.append((kinds, title, each))
            if config.out:
                written(config, "-".join(f"{c.name}-{kinds[c.name]}" for c in chains), title, each)
            bar.at(len(found))
    rows = []
    for kinds, title, each in found:
        t, ranks = each.timeline, range(len(each.program))
        screen.print(title, soft_wrap=True, style="bold", markup=False)
        screen.print(lf.schedule.grid(t))
        if config.text:
            screen.print(lf.schedule.draw(each.program), soft_wrap=True, markup=False)
        bubble = sum(map(t.bubble, ranks)) / len(ranks) / (t.makespan or 1)
        over = f"{100 * (t.makespan / each.bound - 1):.1f}" if each.bound else ""
        row = [", ".join(kinds.values()), len(ranks), f"{t.makespan:.4g}", f"{each.bound:.4g}", over, f"{100 * bubble:.1f}"]
        for c in chains:
            most, together = held(t, c.name)
            scale = m / each.units[c.name]
            row.append(f"{max(most) * scale:.3g} / {together * scale:.3g}")
        rows.append(row)
    names = ", ".join(c.name for c in chains)
    screen.print(lf.console.table(f"{names} beside {config.schedule}", ("placement", "ranks", "time", "bound", "over %", "bubble %",
                                  *(f"{c.name} held" for c in chains)), rows))  # fmt: skip
    screen.print("bound: the longer of the pipeline alone and of all work spread evenly · bubble: the mean · held: microbatches, from forward to "
                 "backward, at most, on a rank / on all", style="dim", soft_wrap=True)  # fmt: skip
    if config.out:
        screen.print(f"written: {config.out}", soft_wrap=True, markup=False)


def written(config: Any, called: str, title: str, each: Drawn) -> None:
    folder = Path(config.out)
    for end in (".svg", ".png"):
        lf.schedule.picture(each.timeline, folder / f"{called}{end}", title, config.links)
    lf.schedule.chrome(each.timeline, folder / f"{called}.json")
    (folder / f"{called}.txt").write_text(lf.schedule.dumps(each.program), encoding="utf-8")


def table(config: Any) -> None:
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
    from matplotlib.ticker import ScalarFormatter

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
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.tick_params(labelsize=7)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.25)
    axes[0][0].set_yscale("log")
    axes[1][0].set_yscale("log", base=2)
    axes[1][0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0][0].set_ylabel("% over the bound (line: 5; 0.05: or less)", fontsize=8)
    axes[1][0].set_ylabel("encoder held on a rank, microbatches", fontsize=8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    with rc_context({"svg.hashsalt": "lf", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)

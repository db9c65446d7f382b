"""Pipeline schedules before anything runs: printed, checked, timed, drawn, compared. No accelerator, no processes.

    scripts/launch schedule --schedule zb-v --ranks 4 --microbatches 8 --out runs/zb-v
    scripts/launch schedule --compare --ranks 8 --microbatches 32 --times f=1,b=2,link=0.1
    scripts/launch schedule --schedule mine.py:snake --placement 0,1,2,2,1,0 --text
    scripts/launch schedule --chains vision=0.5 --ranks 4 --microbatches 8 --out runs/chains
    scripts/launch schedule --chains vision=0.5:0+2,head=0.1:after --beside nested,head=dedicated --show all
    scripts/launch schedule --chains-table --out runs/chains

Times and what is held are those of a rank's whole share of a microbatch; a stage that is one of v on its rank has a v-th of it. So schedules with
different numbers of stages can be compared. Held: activations, from a forward to the backward or W of the same microbatch.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import attrs

import lf
from lf.config import ConfigError, one_of

sys.path.insert(0, str(Path(__file__).parent / "lib"))
import placing

from lf.schedule import Program, ProgramError, Timeline, text
from lf.schedule.ir import OPS, microbatches, placement
from lf.schedule.named import SCHEDULES, read, resolve
from lf.schedule.place import loop

RANKS = 1
LOGS = "runs/schedule"
TIMES = {"f": 1.0, "b": 2.0, "i": 1.0, "w": 1.0, "link": 0.0}


@attrs.frozen
class Config:
    schedule: str = "1f1b"  # a name, a function as my.py:fn, or a file with a program: .txt, or .csv as torch pipelining writes it
    compare: tuple[str, ...] | None = None  # a table instead: of these schedules, or of all that there are
    ranks: int | None = None  # of the pipeline; 4 without
    microbatches: int | None = None  # of a step; 8 without
    chunks: int | None = None  # stages on each rank; as the schedule has it without, 1 or 2
    stages: int | None = None  # or stages in all, on a loop, where the last ranks have one less
    placement: str | None = None  # or the rank of each stage, as 0,1,2,2,1,0; as the schedule has it without, a loop or a V
    times: str = ""  # of a rank's share of a microbatch and of a message, as f=1,b=2,i=1,w=1,link=0.1; without, these and link=0
    show: str = "compute"  # all: with the messages between ranks as well
    text: bool = False  # print the program, too, a line a rank
    chains: str = ""  # beside the pipeline, as vision=0.5,depth=0.2:1+2,head=0.1:after: forward, of a rank's share; the stages fed, or after the last
    beside: str = "all"  # where they go: inline, decoupled, nested, dedicated; one as head=dedicated; without, each in turn, and what is after inline
    in_flight: int | None = None  # of nested and dedicated: units between forward and backward
    units: int | None = None  # of all but inline: in how many a step is; without, one of decoupled, of others as many as microbatches
    chains_table: bool = False  # encoders of 10, 50 and 150 % on pipelines of 4, 8 and 16 ranks, as a table and a picture
    links: bool = False  # lines in the pictures from what is sent to where it arrives
    out: str | None = None  # a folder for NAME.svg, NAME.png, NAME.json (a trace for ui.perfetto.dev), NAME.txt and NAME.csv


COUNTS = ("ranks", "microbatches", "chunks", "stages", "in_flight", "units")


def main(config: Config) -> None:
    one_of("value for --show:", config.show, ("compute", "all"))
    given = {name: value for name in COUNTS if (value := getattr(config, name)) is not None}
    lf.config.at_least(1, SimpleNamespace(**given), *given)
    if config.chunks is not None and config.stages is not None:
        raise ConfigError(f"--chunks {config.chunks} and --stages {config.stages} both say how many stages there are: give one")
    placing.refused(config, Config())
    times = parsed(config.times)
    names = (config.schedule,) if config.compare is None else config.compare or tuple(SCHEDULES)
    for name in names:
        resolve(name)  # a name that nothing has is a mistake; one that does not go with these numbers is left out of a comparison
    if config.out is not None:
        writable(config.out, names)
    if config.chains_table:
        placing.table(config)
    elif config.chains:
        placing.drawn(config, times, made(config, config.schedule))
    elif config.compare is not None:
        compare(config, times)
    else:
        one(config, times)


def one(config: Config, times: Mapping[str, float]) -> None:
    screen = lf.console.console()
    program = made(config, config.schedule)
    peaks = lf.schedule.check(program)
    shown = lf.schedule.lower(program) if config.show == "all" else program
    timeline = timed(shown, times)
    title = told(config.schedule, program)
    screen.print(title, soft_wrap=True, style="bold")
    screen.print(lf.schedule.grid(timeline))
    bubbles, held = shares(timeline), f"held at most {max(peaks) * len(program) / len(placement(program)):.4g} microbatches of a rank"
    screen.print(f"checked · bubble {max(bubbles):.1%} at most, {fmean(bubbles):.1%} in the mean · {held} · {sent(program)} messages a rank at most",
                 soft_wrap=True)  # fmt: skip
    if config.text:
        screen.print(lf.schedule.draw(shown), soft_wrap=True, markup=False)
    if config.out:
        screen.print("written: " + ", ".join(map(str, written(config, config.schedule, shown, timeline, title))), soft_wrap=True)


def compare(config: Config, times: Mapping[str, float]) -> None:
    config = attrs.evolve(config, ranks=config.ranks or 4, microbatches=config.microbatches or 8)  # the same for all, files included
    screen, rows, out, left = lf.console.console(), [], [], []
    for name in config.compare or SCHEDULES:
        try:
            program = made(config, name)
            peaks = lf.schedule.check(program)
            timeline = timed(program, times)
        except ValueError as error:
            if not type(error).__module__.startswith("lf."):
                raise
            left.append((name, str(error).splitlines()[0]))
            continue
        stages, bubbles = len(placement(program)), shares(timeline)
        held = max(peaks) * len(program) / stages
        numbers = {"time": timeline.makespan, "bubble": max(bubbles), "mean bubble": fmean(bubbles), "held": held, "messages": sent(program)}
        out.append({"schedule": name, "stages": stages, "placement": placement(program), **numbers})
        rows.append((name, stages, f"{timeline.makespan:.4g}", *(f"{100 * f(bubbles):.1f}" for f in (max, fmean)), f"{held:.4g}", sent(program)))
        if config.out:
            written(config, name, program, timeline, told(name, program))
    if not rows:
        raise ConfigError("no schedule is left to compare:\n" + "\n".join(f"  {name}: {why}" for name, why in left))
    title = f"{config.ranks} ranks, {config.microbatches} microbatches, {', '.join(f'{k}={v:g}' for k, v in times.items())}"
    columns = ("schedule", "stages", "time", "bubble %", "mean", "held", "messages")
    screen.print(lf.console.table(title, columns, rows))
    screen.print("bubble: of the rank that waits most, and the mean; held: microbatches of a rank at most; messages: sent by a rank at most",
                 style="dim", soft_wrap=True)  # fmt: skip
    for name, why in left:
        screen.print(f"left out: {name}: {why}", soft_wrap=True, markup=False)
    if config.out:
        (Path(config.out) / "compare.json").write_text(json.dumps({"times": times, "schedules": out, "left out": dict(left)}, indent=1) + "\n")
        screen.print(f"written: {config.out}", soft_wrap=True)


def made(config: Config, name: str) -> Program:
    """The program of compute. Raises ConfigError or ProgramError for what cannot be made."""
    if name.endswith((".txt", ".csv")):  # all numbers are in the file
        program = read(name)
        for what, has in (("ranks", len(program)), ("microbatches", microbatches(program)), ("stages", len(placement(program)))):
            if (asked := getattr(config, what)) not in (None, has):
                raise ConfigError(f"--{what} {asked}: the program in {name} has {has}; leave it out")
        return program
    schedule, ranks = resolve(name), config.ranks or 4
    if config.placement is not None:
        where = listed(config.placement)
        ranks, stages = max(where) + 1, len(where)
        if config.chunks or config.ranks not in (None, ranks) or config.stages not in (None, stages):
            raise ConfigError(f"--placement {config.placement} is {stages} stages on {ranks} ranks; leave out --ranks, --chunks and --stages")
    elif config.stages is not None:
        where = loop(config.stages, ranks)
    else:
        where = schedule.place(ranks, config.chunks or schedule.chunks)
    program = schedule.generate(where, config.microbatches or 8)
    if not isinstance(program, tuple) or not all(isinstance(row, tuple) for row in program):
        raise ProgramError(f"{name} gives {program!r:.60}; a program is a tuple for each rank, of actions")
    if (found := placement(program)) != where:
        raise ProgramError(f"{name} was asked for stages on ranks {where}, and its program has them on {found}: it takes no such placement")
    return program


def listed(words: str) -> tuple[int, ...]:
    try:
        where = tuple(int(word) for word in words.split(","))
    except ValueError:
        raise ConfigError(f"--placement {words}: should be the rank of each stage, as 0,1,2,2,1,0") from None
    return where


def parsed(words: str) -> dict[str, float]:
    """{op in small letters, or link: time}"""
    given: dict[str, float] = {}
    for word in filter(None, words.split(",")):
        name, _, value = word.partition("=")
        one_of("time", name, [op.lower() for op in OPS if not op.startswith(("SEND", "RECV"))] + ["link"])
        try:
            given[name] = float(value)
        except ValueError:
            raise ConfigError(f"--times {words}: {word!r} should be a name and a number, as f=1") from None
        if not 0 <= given[name] < float("inf"):
            raise ConfigError(f"--times {words}: {word} must be a number of at least 0")
    times = {**TIMES, **given}
    if "b" not in given:
        times["b"] = times["i"] + times["w"]
    elif not {"i", "w"} & given.keys():
        times |= {"i": given["b"] / 2, "w": given["b"] / 2}
    return times


def timed(program: Program, times: Mapping[str, float]) -> Timeline:
    """With the times of a rank's share, and what is held in microbatches of a rank."""
    share = len(program) / len(placement(program))
    timeline = lf.schedule.cost(program, {op.upper(): t * share for op, t in times.items() if op != "link"}, times["link"])
    return attrs.evolve(timeline, memory=tuple(tuple((t, held * share) for t, held in row) for row in timeline.memory))


def shares(timeline: Timeline) -> list[float]:
    """The bubble of each rank as a share of the whole."""
    return [timeline.bubble(rank) / (timeline.makespan or 1.0) for rank in range(len(timeline.rows))]


def sent(program: Program) -> int:
    return max(sum(a.op in ("SEND_F", "SEND_B") for a in row) for row in lf.schedule.lower(program))


def told(name: str, program: Program) -> str:
    stages = len(placement(program))
    several = "" if stages == len(program) else f", {stages} stages"
    return f"{name}: {len(program)} ranks{several}, {microbatches(program)} microbatches"


def stem(name: str) -> str:
    """What the files of a schedule are called."""
    return Path(name.replace(":", "-")).name.removesuffix(".txt").removesuffix(".csv")


def writable(out: str, names: Sequence[str]) -> None:
    """Makes the folder. Raises ConfigError where it cannot be written, where a program would be written over the one that is read, or two over
    each other."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; name a folder that can be written") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {out}: it cannot be written; name another folder")
    for name in names:
        if name.endswith((".txt", ".csv")) and Path(name).resolve().parent == folder.resolve():
            raise ConfigError(f"--out {out}: {name} lies there, and would be written over; name another folder")
        if len(same := [n for n in names if stem(n) == stem(name)]) > 1:
            raise ConfigError(f"--out {out}: {' and '.join(same)} would both be written as {stem(name)}.*; give one of them another name")


def written(config: Config, name: str, program: Program, timeline: Timeline, title: str) -> list[Path]:
    folder, called = Path(str(config.out)), stem(name)
    out = [lf.schedule.picture(timeline, folder / f"{called}{end}", title, config.links) for end in (".svg", ".png")]
    out.append(lf.schedule.chrome(timeline, folder / f"{called}.json"))
    kind = "compute_comms" if config.show == "all" else "compute_only"
    for end, content in ((".txt", text.dumps(program)), (".csv", text.to_csv(program, kind))):
        out.append(folder / f"{called}{end}")
        out[-1].write_text(content, encoding="utf-8")
    return out


if __name__ == "__main__":
    lf.cli.run(main, Config)

"""Where a rank is in its program, and the drawing that puts all ranks under each other. No torch.

The interpreter tells a `Position` which action comes next. Under the launcher it is a small mapped file, rankN.at, so that another process reads
it whatever state the rank is in: stuck in native code, stopped, or dead. What the actions are stands in rankN.program, a line of JSON for each
program. Elsewhere it is the rank's own memory, and lf/dump.py says it on SIGUSR1.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from time import time_ns

import attrs

# rankN.at: eight signed 64-bit integers, in the order of the machine
MAGIC, PID, PROGRAM, COUNT, INDEX, SINCE = range(6)
MARK = int.from_bytes(b"lf at 1\n", "little")
SIZE = 64
NONE = -1  # PROGRAM: none has begun · INDEX: between two programs
LOST = -2  # PROGRAM: it could not be written down
AROUND = 3  # actions that are drawn on either side


@attrs.frozen
class Place:
    """Where a rank is. `problem`: why it is not known; then the rest says nothing. `index`: of the action in `words`, -1 after the program's end ·
    `count`: how many programs of this name the rank has begun · `since`: seconds since the epoch · `where`: the rank in its mesh."""

    rank: int
    problem: str = ""
    where: str = ""
    name: str = ""
    count: int = 0
    words: tuple[str, ...] = ()
    index: int = NONE
    since: float = 0.0


class Position:
    """What one rank tells of itself: `program` once for each program, then at each step `start`, `at` before each action, `done`.

    where: the rank in its mesh, as 'pp=1,dp=0', for the drawing. logs: a folder for rankN.at and rankN.program; without it nothing is written.
    counts: how many programs of each name have begun; a run that goes on may begin with another number.
    """

    def __init__(self, rank: int, where: str = "", logs: str | Path | None = None):
        self.rank, self.where, self.counts = rank, where, dict[str, int]()
        self._programs: list[tuple[str, tuple[str, ...], int]] = []  # name, words, where the line begins in the file
        self._current = NONE
        self._file: Path | None = None
        self._cells = memoryview(bytearray(SIZE)).cast("q")
        self._cells[MAGIC], self._cells[PID], self._cells[PROGRAM], self._cells[INDEX] = MARK, os.getpid(), NONE, NONE
        if logs is not None:
            try:
                self._cells = _mapped(Path(logs, f"rank{rank}.at"), bytes(self._cells))
                self._file = Path(logs, f"rank{rank}.program")
            except OSError as error:  # a folder that cannot be mapped is no reason not to train
                print(f"lf: the launcher will not see where rank {rank} is: {error}", file=sys.stderr)

    def program(self, words: Sequence[str], name: str = "step") -> int:
        """Makes a program known, this rank's actions as text; returns its number. `name`: what one run of it is called."""
        line = json.dumps({"where": self.where, "name": name, "words": list(words)}) + "\n"
        begin = len(self._programs)
        if self._file is not None:
            try:
                with open(self._file, "ab") as file:
                    begin = file.tell()
                    file.write(line.encode())
            except OSError:  # the disk is full: the drawing says that it has no text
                begin = LOST
        self._programs.append((name, tuple(words), begin))
        return len(self._programs) - 1

    def start(self, number: int) -> None:
        """The program of this number begins."""
        name, _, begin = self._programs[number]
        self.counts[name] = count = self.counts.get(name, 0) + 1
        self._current = number
        cells = self._cells
        cells[INDEX], cells[COUNT], cells[PROGRAM], cells[SINCE] = 0, count, begin, time_ns()

    def at(self, i: int) -> None:
        """Action i comes now. Called for each action, so it does no more than this."""
        cells = self._cells
        cells[INDEX], cells[SINCE] = i, time_ns()

    def done(self) -> None:
        """The program has come to its end."""
        self.at(NONE)

    def place(self) -> Place | None:
        """What has been told, or None while no program has begun or another Position of this process was told last."""
        cells = self._cells
        if self._current == NONE or cells[PROGRAM] != self._programs[self._current][2]:
            return None
        name, words, _ = self._programs[self._current]
        return Place(self.rank, "", self.where, name, cells[COUNT], words, cells[INDEX], cells[SINCE] / 1e9)

    def line(self) -> str:
        """The rank's line of the drawing, or ''."""
        return draw([at]).strip() if (at := self.place()) else ""

    def action(self) -> str:
        """' in 1RECV_B0 (action 7 of 24)', or '' outside of a program: what an error message adds behind 'rank 3'."""
        at = self.place()
        return f" in {at.words[at.index]} (action {at.index + 1} of {len(at.words)})" if at and 0 <= at.index < len(at.words) else ""


def _mapped(path: Path, fresh: bytes) -> memoryview:
    """The file as integers. One that this process has made is shared; one of an older process is left to it, and replaced."""
    try:
        old = memoryview(path.read_bytes()).cast("q")
        keep = len(old) * 8 == SIZE and (old[MAGIC], old[PID]) == (MARK, os.getpid())
    except (OSError, ValueError, TypeError):
        keep = False
    if not keep:
        path.with_suffix(".program").unlink(missing_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(fresh)  # written, not only made that long: a full disk is an error here, and a crash on access later
        part.replace(path)
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), SIZE)).cast("q")


def read(logs: Path, rank: int) -> Place:
    """Where the rank is, from what it has left in the folder. Whatever stands there, this raises nothing: `problem` says what is wrong."""
    path = logs / f"rank{rank}.at"
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return Place(rank, "has not said where it is: it has not connected")
    except OSError as error:
        return Place(rank, f"cannot be read: {error}")
    cells = memoryview(raw).cast("q") if len(raw) == SIZE else None
    if cells is None or cells[MAGIC] != MARK:
        return Place(rank, f"{path.name} is no position: {len(raw)} bytes, of another version or damaged")
    if cells[PROGRAM] == NONE:
        return Place(rank, "has begun no program")
    at = Place(rank, "", "", "step", cells[COUNT], (), cells[INDEX], cells[SINCE] / 1e9)
    try:
        with open(path.with_suffix(".program"), "rb") as file:
            file.seek(cells[PROGRAM])  # LOST is an error here, as it should be
            line = json.loads(file.readline())
        return attrs.evolve(at, where=str(line["where"]), name=str(line["name"]), words=tuple(str(word) for word in line["words"]))
    except (OSError, ValueError, KeyError, TypeError):
        return at  # the number of the action is known, its text is not


def draw(places: Sequence[Place], now: float | None = None) -> str:
    """One line a rank: rank, place in the mesh, step, for how long, and the action >>marked<< between its neighbours.

    now: the time that 'for how long' is counted to, seconds since the epoch; without it this moment."""
    now = time.time() if now is None else now
    ahead: dict[str, int] = {}
    for at in places:
        if not at.problem:
            ahead[at.name] = max(_finished(at), ahead.get(at.name, 0))
    rows: list[tuple[list[str], str]] = []  # columns, and what stands behind them
    for at in places:
        if at.problem:
            rows.append(([f"rank {at.rank}", ""], at.problem))
            continue
        behind = ahead[at.name] - _finished(at)
        step = f"{'after ' if at.index < 0 else ''}{at.name} {at.count}{f' ({behind} behind)' if behind else ''}"
        rows.append(([f"rank {at.rank}", at.where, step, _duration(now - at.since)], _window(at)))
    widths = [max((len(columns[i]) for columns, _ in rows if i < len(columns)), default=0) for i in range(4)]
    return "\n".join("  ".join(["", *(cell.ljust(width) for cell, width in zip(columns, widths)), text]) for columns, text in rows)


def _finished(at: Place) -> int:
    return at.count if at.index < 0 else at.count - 1


def _window(at: Place) -> str:
    n, i = len(at.words), at.index
    if i < 0:
        return "between two programs"
    if i >= n:
        return f"action {i + 1}, whose text cannot be read"
    shown = [f">>{word}<<" if k == i else word for k, word in enumerate(at.words)][max(0, i - AROUND) : i + AROUND + 1]
    before, behind = ["…"] * (i > AROUND), ["…"] * (i + AROUND + 1 < n)
    return f"{i + 1} of {n}: {' '.join([*before, *shown, *behind])}"


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

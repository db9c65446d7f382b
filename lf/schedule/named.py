"""Schedules by name, and a user's own from a file."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import attrs

from lf.config import one_of
from lf.schedule.generate import Stages, breadth_first, gpipe, interleaved, one_f_one_b
from lf.schedule.greedy import greedy, greedy_zb
from lf.schedule.ir import Placement, Program, ProgramError, as_program, placement
from lf.schedule.ir import microbatches as microbatches_of
from lf.schedule.place import loop, placed, vee
from lf.schedule.text import from_csv, loads
from lf.schedule.zero_bubble import interleaved_zb, zb_h1, zb_v


def on_loop(ranks: int, chunks: int) -> Placement:
    """`chunks` stages on each rank, stage s on rank s mod ranks."""
    return loop(ranks * chunks, ranks)


def on_vee(ranks: int, chunks: int) -> Placement:
    if chunks != 2:
        raise ProgramError(f"{chunks} stages a rank: a V has 2, there and back")
    return vee(ranks)


@attrs.frozen
class Schedule:
    """`generate`: (number of stages or placement, microbatches) → program, compute only · `place`: (ranks, stages a rank) → placement ·
    `chunks`: stages a rank where nothing is said."""

    generate: Callable[[Stages, int], Program]
    place: Callable[[int, int], Placement] = on_loop
    chunks: int = 1


SCHEDULES = {
    "gpipe": Schedule(gpipe),
    "1f1b": Schedule(one_f_one_b),
    "interleaved": Schedule(interleaved, chunks=2),
    "breadth-first": Schedule(breadth_first, chunks=2),
    "zb-h1": Schedule(zb_h1),
    "interleaved-zb": Schedule(interleaved_zb, chunks=2),
    "zb-v": Schedule(zb_v, on_vee, chunks=2),
    "greedy": Schedule(greedy, chunks=2),
    "greedy-zb": Schedule(greedy_zb, chunks=2),
}


def resolve(name: str) -> Schedule:
    """One of SCHEDULES; or `path/to/file.py:function`, a generator, whose file may have a `place(ranks, chunks)` as well; or `path/to/file.txt` or
    `.csv`, a program as `text` reads it, for the ranks and microbatches that it is for.

    Raises ConfigError for an unknown name, with the near one, and ProgramError for a file that cannot be read or lacks the function.
    """
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        module = _load(path)
        generate = getattr(module, function, None)
        if not callable(generate):
            known = [n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
            one_of(f"function in {path}:", function, known)
            raise ProgramError(f"{name}: {function} is no function")
        return Schedule(lambda stages, count: as_program(generate(stages, count), name), getattr(module, "place", on_loop))
    if name.endswith((".txt", ".csv")):
        return _fixed(name)
    if name.endswith(".py"):
        raise ProgramError(f"{name}: say which function of it, as {name}:my_schedule")
    return SCHEDULES[one_of("schedule", name, SCHEDULES)]


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f", line {lines[-1]}" if lines else ""
        raise ProgramError(f"cannot load {path}{where}: {type(error).__name__}: {error}") from error
    return module


def read(name: str) -> Program:
    """The program in a file, as `lf.schedule.text` reads it: .csv as torch pipelining writes it, anything else as lf does. Raises ProgramError."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ProgramError(f"cannot read {name}: {error}") from None
    try:
        program = (from_csv if name.endswith(".csv") else loads)(text)
        placement(program)
    except ProgramError as error:
        raise ProgramError(f"{name}: {error}") from None
    return program


def _fixed(name: str) -> Schedule:
    program = read(name)
    where, count = placement(program), microbatches_of(program)

    def generate(stages: Stages, microbatches: int) -> Program:
        if (placed(stages, microbatches), microbatches) != (where, count):
            found = f"placement {placed(stages, microbatches)} and {microbatches} microbatches"
            raise ProgramError(f"{name} is for placement {where} and {count} microbatches, not for {found}; give --microbatches {count}")
        return program

    def place(ranks: int, chunks: int) -> Placement:
        if ranks != len(program):
            raise ProgramError(f"{name} is for {len(program)} pipeline ranks, not for {ranks}")
        return where

    return Schedule(generate, place, max(map(where.count, where)))

"""What each pipeline rank measured in a step, as a Timeline: to be drawn, and to be compared with what `cost` predicts.

    clock = Clock(ctx.axes, ctx.device)        before the step
    run(…)                                     which calls start = clock.moment(); …; clock(i, start, clock.moment()) round its i-th action
    timeline = clock.timeline(program)         after the step, on every rank
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from lf.schedule.ir import Program, ProgramError
from lf.schedule.timeline import Span, Timeline


class Clock:
    """Takes down when each action begins and ends on this rank, on the device's own clock (of CUDA: events in its stream), which is read after
    the step: taking down makes nobody wait.

    Each rank counts from the time of day at which its clock was made: ranks of one machine agree to microseconds, machines as well as their
    system clocks do. `offset`: seconds that this machine's is behind.
    """

    def __init__(self, axes: Any, device: ModuleType, offset: float = 0.0):
        self.axes, self.device = axes, device
        self.moment = device.moment
        self.taken: dict[int, tuple[Any, Any, int | None]] = {}
        before = self.moment()
        device.seconds(before, before)  # what was started before is through, so that the next moment is now
        self.zero, self.offset = self.moment(), time.time() + offset

    def __call__(self, i: int, start: Any, end: Any) -> None:
        """Action i of this rank's program ran from `start` to `end`, two moments. An action that waits begins when its wait is over."""
        self.taken[i] = (start, end, self.device.memory_now())

    def timeline(self, program: Program, rows: Sequence[Sequence[int]] | None = None) -> Timeline:
        """Of the ranks of this rank's pipeline (those of its own tp, cp and dp coordinates), on each of them; collective. Where the device knows it,
        with the bytes that each held after each action. `rows`: of several chains, `Layouts.rows`; the first rank of each is shown."""
        between = self.device.seconds
        taken = {i: (between(self.zero, start), between(self.zero, end), held) for i, (start, end, held) in self.taken.items()}
        return gathered(program, taken, self.axes, self.offset, rows)


def gathered(
    program: Program,
    taken: Mapping[int, tuple[float, float, float | None]],
    axes: Any,
    offset: float = 0.0,
    rows: Sequence[Sequence[int]] | None = None,
) -> Timeline:
    """A Timeline in seconds from the first start on, of {index of an action of this rank: (start, end, bytes held after it or None)} on each rank.

    One collective over axes["pp"], or over all ranks where `rows` says which ranks do the same: then the first of each is shown. Every rank knows the
    program, so nothing but numbers travels. An action without an entry is not shown.
    offset: seconds to add to this rank's times, so that those of all ranks are on one clock. Raises ProgramError for an index that is not
    in the program, or a program for another number of ranks.
    """
    axis = axes["pp"] if rows is None else axes.world
    row_of = {r: r for r in range(axis.size)} if rows is None else {rank: row for row, ranks in enumerate(rows) for rank in ranks}
    speakers = {row: place for place, row in reversed(row_of.items())}  # the first of each
    if len(program) != len(speakers):
        raise ProgramError(f"the program is for {len(program)} pipeline ranks; mesh {axes.mesh} has pp={len(speakers)}")
    row = row_of[axis.index]
    mine = program[row]
    if unknown := [i for i in taken if not 0 <= i < len(mine)]:
        raise ProgramError(f"pipeline rank {row} has {len(mine)} actions; what was measured names {unknown}")
    nan = math.nan
    numbers = [taken.get(i, (nan, nan, None)) for i in range(len(mine))] if speakers[row] == axis.index else []
    table = torch.tensor([[start + offset, end + offset, nan if held is None else held] for start, end, held in numbers], dtype=torch.float64)
    sizes = [len(program[row_of[place]]) if speakers[row_of[place]] == place else 0 for place in range(axis.size)]
    parts = axis.all_gather(table.reshape(-1, 3), sizes).split(sizes)
    each = [parts[speakers[r]] for r in range(len(program))]
    zero = min((t for part in each for t in part[:, 0].tolist() if not math.isnan(t)), default=0.0)
    spans, memory = [], []
    for actions, part in zip(program, each):
        known = [(a, start - zero, end - zero, held) for a, (start, end, held) in zip(actions, part.tolist()) if not math.isnan(start)]
        spans.append(tuple(sorted((Span(a, start, end) for a, start, end, _ in known), key=lambda s: (s.start, s.end))))
        memory.append(tuple(sorted((end, held) for _, _, end, held in known if not math.isnan(held))))
    return Timeline(tuple(spans), tuple(memory) if any(memory) else (), "s")

"""What the ranks have measured comes together on each of them as one timeline."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import context, processes

import lf
from lf.models.small import tiny
from lf.schedule import Action, ProgramError, Timeline, lower, one_f_one_b, picture
from lf.schedule.bind import bind
from lf.schedule.measured import Clock, gathered
from lf.schedule.run import run

PROGRAM = (one_f_one_b(2, 2)[0], (*one_f_one_b(2, 2)[1], Action("REDUCE", 1, segment="head")))


def one_rank(axes: Any) -> Any:
    """Its clock stands 100 s before or after that of the other; its first dp coordinate is faster. Rank 1 leaves its third action out."""
    at, slow = axes["pp"].index, 1 + axes["dp"].index
    taken = {i: (slow * (i + at) - 100.0 * at, slow * (i + at + 1) - 100.0 * at, 1e9 * i if at else None) for i in range(4 + at)}
    if at:
        del taken[2]
    return gathered(PROGRAM, taken, axes, offset=100.0 * at + 7)


def test_each_rank_gets_the_timeline_of_its_own_pipeline() -> None:
    mesh = lf.Mesh(pp=2, dp=2)
    for rank, timeline in enumerate(lf.sim.spmd(mesh, one_rank)):
        slow = 1 + mesh.coords(rank)["dp"]
        assert [(str(s.action), s.start, s.end) for s in timeline.rows[0]] == [
            (str(a), pytest.approx(slow * i), pytest.approx(slow * (i + 1))) for i, a in enumerate(PROGRAM[0])
        ]
        assert [str(s.action) for s in timeline.rows[1]] == ["1F0", "1B0", "1B1", "1REDUCE[head]"]
        assert timeline.unit == "s"
        assert timeline.makespan == pytest.approx(6 * slow)
        assert timeline.memory[0] == ()
        assert [held for _, held in timeline.memory[1]] == [0, 1e9, 3e9, 4e9]
        assert timeline.peak(1) == 4e9
        assert timeline.busy(1) == pytest.approx(3 * slow)


def of_rows(axes: Any, program: Any, rows: Any) -> Any:
    """Every rank has measured each action of its row for a tenth of a second, times its rank plus one."""
    row = next(r for r, ranks in enumerate(rows) if axes.rank in ranks)
    taken = {i: (float(i), i + (axes.rank + 1) / 10, None) for i in range(len(program[row]))}
    return gathered(program, taken, axes, rows=rows)


def test_of_several_chains_the_first_rank_of_each_row_is_shown() -> None:
    """The rows are of two ranks that do not lie next to each other, and of one that runs nothing of the main chain."""
    vision = tuple(Action(op, 0, m, chain="vision") for op in "FB" for m in range(2))
    program = (*one_f_one_b(2, 2), vision)
    shown = lf.sim.spmd(lf.Mesh(dp=5), of_rows, program, ((0, 3), (1, 4), (2,)))
    assert all(timeline == shown[0] for timeline in shown)
    assert [[s.action for s in row] for row in shown[0].rows] == [list(row) for row in program]
    assert [row[0].end for row in shown[0].rows] == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(ProgramError, match="for 2 pipeline ranks"):
        lf.sim.spmd(lf.Mesh(dp=5), of_rows, program[:2], ((0, 3), (1, 4), (2,)))


def test_what_does_not_fit_the_program_is_refused() -> None:
    with pytest.raises(ProgramError, match=r"for 2 pipeline ranks; mesh .* has pp=1"):
        gathered(PROGRAM, {}, lf.solo())
    with pytest.raises(ProgramError, match=r"rank 0 has 2 actions; what was measured names \[2\]"):
        gathered(one_f_one_b(1, 1), {2: (0.0, 1.0, None)}, lf.solo())


def clocked(axes: Any) -> Any:
    clock = Clock(axes, lf.devices.get("cpu"))
    for i in range(len(PROGRAM[axes["pp"].index])):
        start = clock.moment()
        clock(i, start, clock.moment())
    return clock.timeline(PROGRAM)


def test_a_clock_on_real_processes() -> None:
    a, b = processes(lf.Mesh(pp=2), clocked)
    assert a == b
    assert [[s.action for s in row] for row in a.rows] == [list(row) for row in PROGRAM]
    assert a.memory == ()
    assert all(0 <= s.start <= s.end for row in a.rows for s in row)
    assert min(row[0].start for row in a.rows) == 0


def interpreted(axes: Any) -> Timeline:
    ctx, layout = context(axes), lf.layout(tiny(), axes.mesh)
    program = lower(one_f_one_b(2, 3), layout)
    batches = [lf.shard_batch(b, layout.model, ctx) for b in lf.parity.random_batches(layout.model, 0, 0, 3, 12)]
    seeds = {name: torch.ones((), dtype=ctx.precision.master) for name in layout.model.objectives}
    clock = Clock(axes, ctx.device)
    run(bind(program, layout, ctx), lf.init(layout, ctx, seed=0), batches, seeds, ctx, clock)
    return clock.timeline(program)


def test_a_step_of_the_interpreter_is_drawn_as_it_ran(tmp_path: Path) -> None:
    """What a rank waits for is no part of an action: what another one has sent was there when it began."""
    timeline, same = lf.sim.spmd(lf.Mesh(pp=2), interpreted)
    assert timeline == same
    spans = {str(s.action): s for row in timeline.rows for s in row}
    assert {f"{s}{op}{m}" for s in (0, 1) for op in "FB" for m in range(2)} <= spans.keys()
    assert all(spans[f"0F{m}"].end <= spans[f"1F{m}"].start for m in range(3))
    assert all(spans[f"1B{m}"].end <= spans[f"0B{m}"].start for m in range(2))
    assert all(a.end <= b.start for row in timeline.rows for a, b in pairwise(row))
    assert picture(timeline, tmp_path / "a.svg").stat().st_size > 1000

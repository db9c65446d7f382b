"""When each action of a program runs, and what is idle between: what is laid beside a program is laid out by it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property

import attrs

from lf.chain_layouts import Joint
from lf.schedule.cost import Times, cost, durations
from lf.schedule.ir import Action, Program, flat
from lf.schedule.joined import Key, Link, data_of, made, units_of

Gap = tuple[float, float]
TINY = 1e-12  # of the whole: times that differ by less are one moment
LEAST = 1e-6  # of the longest action: what one that takes no time takes here, so that what begins later in the plan is never before


@attrs.frozen(slots=False)
class Plan:
    """`starts`, `ends`: of each action of each row, in the order of the program · `at`: of each (op, chain,
    stage, microbatch) the rows and places of its actions · `joints`: of all chains, placed or not · `units`: how many of each chain."""

    program: Program
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    at: Mapping[Key, list[tuple[int, int]]]
    joints: tuple[Joint, ...]
    units: Mapping[str, int]

    @cached_property
    def end(self) -> float:
        return max((end for row in self.ends for end in row), default=0.0)

    @cached_property
    def tiny(self) -> float:
        return TINY * self.end

    @cached_property
    def placed(self) -> set[str]:
        return {chain for _, chain, _, _ in self.at}

    def gaps(self, row: int) -> list[Gap]:
        """Where a row is idle; the last gap has no end."""
        edges = (0.0, *self.ends[row])
        return [(a, b) for a, b in (*zip(edges, self.starts[row]), (edges[-1], float("inf"))) if b - a > self.tiny]

    def idle(self, row: int, low: float, high: float) -> float:
        """For how long a row is idle between two times."""
        return sum(max(0.0, min(b, high) - max(a, low)) for a, b in self.gaps(row))

    def data(self, chain: str, unit: int) -> range:
        """The microbatches of the data that a unit has."""
        return data_of(unit, self.units[chain], max(self.units.values()))

    def standing(self, op: str, chain: str, stage: int, data: range) -> list[tuple[int, int]]:
        """The rows and places of an op of the units of a chain that have any of these microbatches; none where it is not placed."""
        units = units_of(data, self.units[chain], max(self.units.values()))
        return [place for u in units for place in self.at.get((op, chain, stage, u), ())]

    def wanted(self, chain: str, unit: int) -> tuple[float, float]:
        """When the first forward starts that takes what a unit gives, and when the last backward ends that brings its gradient; where none
        does, when the last of those forwards ends."""
        firsts, lasts = [], []
        for joint in self.joints:
            if joint.source == chain and joint.target in self.placed:
                for other in units_of(self.data(chain, unit), self.units[joint.target], max(self.units.values())):
                    forward = self.spans("F", joint.target, joint.target_stage, other)
                    firsts += [start for start, _ in forward]
                    lasts += [end for _, end in self.spans("B", joint.target, joint.target_stage, other) or forward]
        return min(firsts), max(lasts)

    def given(self, chain: str, unit: int) -> float:
        """When all is there that a unit takes from chains that are placed."""
        return max(
            end
            for joint in self.joints
            if joint.target == chain and joint.source in self.placed
            for other in units_of(self.data(chain, unit), self.units[joint.source], max(self.units.values()))
            for _, end in self.spans("F", joint.source, joint.source_stage, other)
        )

    def spans(self, move: str, chain: str, stage: int, unit: int) -> list[Gap]:
        places = [place for key in made(move, chain, stage, unit, self.at) for place in self.at.get(key, ())]
        return [(self.starts[r][i], self.ends[r][i]) for r, i in places]

    def with_(self, added: Sequence[tuple[int, float, Action]]) -> Program:
        """The program with actions (row, time, action) before what starts at that time or later; those of one time in their order."""
        rows: list[list[tuple[int, float, int, Action]]] = [[(2 * i + 1, 0.0, 0, a) for i, a in enumerate(row)] for row in self.program]
        for k, (row, time, action) in enumerate(added):
            rows[row].append((2 * bisect_left(self.starts[row], time - self.tiny), time, k, action))
        return tuple(tuple(a for *_, a in sorted(row, key=lambda entry: entry[:3])) for row in rows)


def plan(program: Program, times: Times, link: Link, joints: Sequence[Joint], units: Mapping[str, int]) -> Plan:
    """Each action as early as can be. `joints`: of all chains; those to chains that are not in the program yet bind nothing."""
    present = {a.chain for row in program for a in flat(row)}
    exact = times if callable(times) else durations(times)
    least = LEAST * max((exact(a) for row in program for a in row), default=0.0) or 1.0
    timeline = cost(program, lambda a: max(exact(a), least), link, joints=[j for j in joints if {j.source, j.target} <= present])
    at: dict[Key, list[tuple[int, int]]] = {}
    for r, row in enumerate(program):
        for i, a in enumerate(row):
            for part in flat((a,)):
                at.setdefault((part.op, part.chain, part.stage, part.microbatch), []).append((r, i))
    spans = [tuple((span.start, span.end) for span in row) for row in timeline.rows]
    return Plan(program, tuple(tuple(s for s, _ in row) for row in spans), tuple(tuple(e for _, e in row) for row in spans), at, tuple(joints), units)

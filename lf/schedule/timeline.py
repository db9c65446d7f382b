"""What each rank did and when: what `cost` predicts, what a run measures, what `draw` shows."""

from __future__ import annotations

import attrs

from lf.schedule.ir import COMPUTE, Action


@attrs.frozen
class Span:
    """One action of one rank, from `start` to `end`."""

    action: Action
    start: float
    end: float


@attrs.frozen
class Timeline:
    """`rows`: the spans of each rank, by start · `memory`: of each rank, (time, what it holds from then on), in the unit that whoever made it
    says · `unit`: of the times: "s", or "" for those that were given to `cost`."""

    rows: tuple[tuple[Span, ...], ...]
    memory: tuple[tuple[tuple[float, float], ...], ...] = ()
    unit: str = ""

    @property
    def makespan(self) -> float:
        return max((s.end for row in self.rows for s in row), default=0.0)

    def busy(self, rank: int) -> float:
        """How long the rank computes."""
        return sum(s.end - s.start for s in self.rows[rank] if s.action.op in (*COMPUTE, "OVERLAP"))

    def bubble(self, rank: int) -> float:
        """How long it does not."""
        return self.makespan - self.busy(rank)

    def peak(self, rank: int) -> float:
        """The most that it holds at a time."""
        return max((amount for _, amount in self.memory[rank]), default=0.0)

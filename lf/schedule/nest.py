"""Lays the units of a chain into the bubbles of a program.

A unit's forward lies before the first action that takes what it gives, its backward after the last one that brings its gradient, on the same rows.
It is put into a gap of one row, or where none is long enough in time, in equal parts into gaps of several. What no gap has room for stops the
program: all rows do some of it at once, a whole unit each or all the same one, which delays all that comes by as much and nothing else waits. So the
program is late by what did not fit, spread over all rows, and by the first unit's forward and the last one's backward, before and behind which
there is no gap.

Rows of one block may have to do a unit together (tp of the chain goes over them). Their gaps are not at one time, so such units always stop the
program, their forwards when they are wanted and their backwards when they are given back: all rows then have them in one order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import attrs

from lf.schedule.cost import share
from lf.schedule.ir import Action, ProgramError
from lf.schedule.plan import Plan

Block = tuple[int, ...]


@attrs.frozen
class Nested:
    """What is to be laid: a chain of one stage · `forward`, `backward`: what they take of a unit, on one row · `in_flight`: the most units that may
    be between the two · `blocks`: the sets of rows that a unit may stand on · `whole`: whether a unit may stand on some of them; if not, all are on
    all, each row does them in one order, and at no moment are there more than `in_flight` · `fixed`: the part of its times that each row takes whole
    where several share a unit · `shared`: whether several rows share a unit also where each could do one of its own."""

    chain: str
    blocks: tuple[Block, ...]
    forward: float
    backward: float
    in_flight: int
    whole: bool = True
    fixed: float = 0.0
    shared: bool = True


def least_in_flight(plan: Plan, chain: str) -> int:
    """Fewer units of a chain between forward and backward, and the program could not go on: the most that are wanted and not yet given back."""
    wanted = [plan.wanted(chain, u) for u in range(plan.units[chain])]
    starts, ends = sorted(s for s, _ in wanted), sorted(e for _, e in wanted)
    return max(bisect_left(starts, s + plan.tiny) - bisect_left(ends, s + plan.tiny) for s in starts)


def refuse_few(chain: str, in_flight: int, least: int) -> None:
    if in_flight < least:
        raise ProgramError(
            f"chain {chain!r}: with in_flight={in_flight} the program cannot go on: {least} of its units are wanted before the first is given back; "
            f"use in_flight={least} or more"
        )


def nest(plan: Plan, what: Nested) -> list[tuple[int, float, Action]]:
    """(row, time, action) of each F and B, for `Plan.with_`. Raises ProgramError where in_flight is too small."""
    refuse_few(what.chain, what.in_flight, least_in_flight(plan, what.chain))
    return _Nest(plan, what).run()


@attrs.define
class _Part:
    """Of a unit on a block: since when it can go back, and how much of the unit it is."""

    release: float
    unit: int
    share: float


class _Nest:
    def __init__(self, plan: Plan, what: Nested):
        self.plan, self.what, self.tiny = plan, what, plan.tiny
        wanted = [plan.wanted(what.chain, u) for u in range(plan.units[what.chain])]
        self.order = sorted(range(len(wanted)), key=lambda u: wanted[u])
        self.due, self.release = [s for s, _ in wanted], [e for _, e in wanted]
        self.gaps = {r: plan.gaps(r) for block in what.blocks for r in block}
        self.held: list[list[_Part]] = [[] for _ in what.blocks]  # those that can be asked to go back, by release
        self.load = [0.0] * len(what.blocks)
        self.total = 0.0
        self.most = what.in_flight / len(what.blocks)  # on a block, where that can be had
        self.since = 0.0  # since when there is room for what is held
        n = len(what.blocks)
        self.counts = (n,) if not what.whole else range(1, n + 1) if what.shared else (1,)  # on how many blocks a unit may stand
        self.added: list[tuple[int, float, Action]] = []

    def run(self) -> list[tuple[int, float, Action]]:
        i = 0
        while i < len(self.order):
            i += 1 if self.fits(i, lay=True) else self.stop(i)
        return self.added

    def stays(self, i: int) -> bool:
        """Whether the i-th unit is one of the last ones, for which no other has to make room."""
        return i >= len(self.order) - self.what.in_flight

    def fits(self, i: int, lay: bool) -> bool:
        """Lays the i-th unit into gaps, if there are; as few rows as can be."""
        u, blocks = self.order[i], self.what.blocks
        if self.total + 1 > self.what.in_flight + 1e-9 or any(len(block) > 1 for block in self.what.blocks):
            return False
        for back in (True, False) if self.stays(i) else (False,):
            for n in self.counts:
                if not back and self.stays(i) and self.release[u] + self.length(blocks[0], n, self.what.backward) > self.plan.end and n < len(blocks):
                    continue  # it would end late
                found = []
                for b, block in enumerate(blocks):
                    if self.load[b] + 1 / n > self.most + 1e-9:
                        continue
                    spots = [self.gap(r, self.length(block, n, self.what.forward), self.since, self.due[u]) for r in block]
                    if None in spots:
                        continue
                    if back and None in [self.gap(r, self.length(block, n, self.what.backward), self.release[u], self.plan.end) for r in block]:
                        continue
                    found.append((max(s for s in spots if s is not None), b))
                if len(found) >= n:
                    if lay:
                        self.lay(i, sorted(found)[:n])
                    return True
        return False

    def lay(self, i: int, chosen: Sequence[tuple[float, int]], time: float | None = None) -> None:
        """The i-th unit on these blocks: its F into gaps, or at a time at which all stop; its B into gaps, if it is one of the last ones."""
        u, n = self.order[i], len(chosen)
        for _, b in chosen:
            block = self.what.blocks[b]
            for r in block:
                start = self.take(r, self.length(block, n, self.what.forward), self.since, self.due[u]) if time is None else time
                assert start is not None  # `fits` has seen it
                self.added.append((r, start, Action("F", 0, u, chain=self.what.chain)))
            self.load[b] += 1 / n
            if self.stays(i):
                self.back(b, _Part(self.release[u], u, 1 / n), float("inf"))
            else:
                insort(self.held[b], _Part(self.release[u], u, 1 / n), key=lambda part: part.release)
        self.total += 1

    def back(self, b: int, part: _Part, until: float) -> float:
        """Lays a B, and says when it is done at the latest."""
        done = part.release
        block = self.what.blocks[b]
        for r in block:
            if len(block) > 1:  # at one time
                time = part.release if until == float("inf") else max(part.release, min(until, self.plan.end))
                self.added.append((r, time, Action("B", 0, part.unit, chain=self.what.chain)))
                continue
            length = self.length(block, round(1 / part.share), self.what.backward)
            start = self.take(r, length, part.release, until)
            time = max(part.release, min(until, self.plan.end)) if start is None else start
            self.added.append((r, time, Action("B", 0, part.unit, chain=self.what.chain)))
            done = max(done, time if start is None else time + length)
        return done

    def length(self, block: Block, n: int, whole: float) -> float:
        return whole * share(n * len(block), self.what.fixed)

    def gap(self, row: int, length: float, low: float, high: float) -> float | None:
        """The first time in a gap of a row at which so much can start at `low` or later and end at `high` or earlier."""
        found = self.find(row, length, low, high)
        return None if found is None else found[1]

    def find(self, row: int, length: float, low: float, high: float) -> tuple[int, float] | None:
        """Which gap, and the time."""
        gaps = self.gaps[row]
        for k in range(max(0, bisect_left(gaps, (low, low)) - 1), len(gaps)):
            a, b = gaps[k]
            start = max(a, low)
            if start + length > high + self.tiny:
                return None
            if start + length <= b + self.tiny:
                return k, start
        return None

    def take(self, row: int, length: float, low: float, high: float) -> float | None:
        found = self.find(row, length, low, high)
        if found is None:
            return None
        k, start = found
        a, b = self.gaps[row][k]
        self.gaps[row][k : k + 1] = [(x, y) for x, y in ((a, start), (start + length, b)) if y - x > self.tiny]
        return start

    def stop(self, i: int) -> int:
        """All rows do units i and following at once, and others go back before to make room. How many."""
        time = self.quiet(self.due[self.order[i]])
        ahead = min(len(self.what.blocks), len(self.order) - i) if self.what.whole else 1
        if self.what.shared and self.total + 1 <= self.what.in_flight + 1e-9:  # only those that have no gap of their own
            ahead = next((k for k in range(1, ahead) if self.fits(i + k, lay=False)), ahead)
        for count in (k for k in range(ahead, 1, -1) if len(self.what.blocks) % k == 0):
            if self.room(count, time):
                return self.together(i, count, time)
        while not self.room(1, time):
            time = min(part.release for held in self.held for part in held if part.release > time + self.tiny)
        return self.together(i, 1, time)

    def together(self, i: int, count: int, time: float) -> int:
        """Those that go back last stand where the program ends first."""
        each = len(self.what.blocks) // count
        order = sorted(
            range(len(self.what.blocks)), key=lambda b: -max(self.plan.ends[r][-1] if self.plan.ends[r] else 0.0 for r in self.what.blocks[b])
        )
        time = max(time, self.since)
        for k in range(count):
            self.lay(i + k, [(time, b) for b in order[k * each : (k + 1) * each]], time)
        return count

    def room(self, count: int, time: float) -> bool:
        """Makes room for so many units on all blocks at a time, with what can go back by then."""
        share = count / len(self.what.blocks)
        for b in range(len(self.what.blocks)):
            while self.load[b] + share > self.most + 1e-9 and self.free(b, time):
                pass
        while self.total + count > self.what.in_flight + 1e-9:
            if not any(self.free(b, time) for b in sorted(range(len(self.held)), key=lambda b: -self.load[b])):
                return False
        return True

    def free(self, b: int, time: float) -> bool:
        """Sends the oldest part of a block back, if it can go by a time."""
        if not self.held[b] or self.held[b][0].release > time + self.tiny:
            return False
        part = self.held[b].pop(0)
        self.since = max(self.since, self.back(b, part, time))
        self.load[b] -= part.share
        self.total -= part.share
        return True

    def quiet(self, time: float) -> float:
        """The last moment up to a time after which no row is still at what it does now when that time comes."""
        for r in self.gaps:
            k = bisect_left(self.plan.starts[r], time - self.tiny) - 1
            if k >= 0 and self.plan.ends[r][k] > time + self.tiny:
                time = min(time, self.plan.starts[r][k])
        return time

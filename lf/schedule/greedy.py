"""List schedules: a program for any placement and any times, made by running it."""

from __future__ import annotations

from heapq import heappop, heappush

import attrs

from lf.schedule.cost import Link, Times, cost, durations
from lf.schedule.generate import Stages
from lf.schedule.ir import Action, Placement, Program, ProgramError
from lf.schedule.place import placed, stages_of


def greedy(stages: Stages, microbatches: int, times: Times | None = None, link: Link = 0.0, limit: int | None = None) -> Program:
    """Whenever a rank is free it takes what is there: a forward after a backward and a backward after a forward, if it can; of forwards that of
    the latest stage, of backwards that of the oldest microbatch. Any placement.

    times, link: as of `cost`; where they are given, what would be best with unit times or with backwards first is tried too, and the quickest
    taken. limit: how many microbatches of a stage a rank holds at most, at least its number of stages; default (v+1)p - 1, what `interleaved`
    holds. Bubble, with unit times and a limit of v·p or more on a loop or a V: at most GPipe's 3(S-v), often much less.
    """
    placement = placed(stages, microbatches)
    program = _Scheduler(placement, microbatches, "B", True, times, link, limit).run()
    if times is None and link == 0.0:
        return program
    others = [(True, None, 0.0), (False, times, link)]
    programs = [program, *(_Scheduler(placement, microbatches, "B", turns, t, l, limit).run() for turns, t, l in others)]
    return min(programs, key=lambda p: cost(p, times, link).makespan)


def greedy_zb(stages: Stages, microbatches: int, times: Times | None = None, link: Link = 0.0, limit: int | None = None) -> Program:
    """`greedy` with I and W apart: an I first, then a forward, and a W where there is neither or no room for another forward.

    Bubble, with unit times and the default limit on a loop or a V: about p-1 for m ≥ p, at most GPipe's 3(S-v) always.
    """
    return _Scheduler(placed(stages, microbatches), microbatches, "I", False, times, link, limit).run()


@attrs.define
class _Rank:
    forwards: dict[int, list[int]]  # of each of its stages, the microbatches that are there: a heap
    left: list[list[int]]  # of each microbatch, how many forwards are still to come here, and how many backwards
    free: float = 0.0
    held: int = 0
    oldest: int = 0  # the first microbatch that has not left
    backwards: list[tuple[int, int]] = attrs.field(factory=list)  # (microbatch, -stage): a heap
    weights: list[tuple[int, int]] = attrs.field(factory=list)
    row: list[Action] = attrs.field(factory=list)


class _Scheduler:
    def __init__(self, placement: Placement, microbatches: int, back: str, turns: bool, times: Times | None, link: Link, limit: int | None):
        """turns: a forward goes before a backward right after a backward."""
        mine, self.placement, self.microbatches, self.back, self.turns = stages_of(placement), placement, microbatches, back, turns
        most = max(map(len, mine))
        self.limit = (most + 1) * len(mine) - 1 if limit is None else limit
        if self.limit < most:
            raise ProgramError(f"limit={limit}: a rank with {most} stages holds {most} of a microbatch; use limit={most} or more")
        self.ranks = [_Rank({s: [] for s in own}, [[len(own), len(own)] for _ in range(microbatches)]) for own in mine]
        self.time = times if callable(times) else durations(times or {})
        self.link = link
        self.events: list[tuple[float, int, str, int, int]] = []  # (time, rank, op that can start or "", stage, microbatch): a heap

    def run(self) -> Program:
        for m in range(self.microbatches):
            heappush(self.events, (0.0, self.placement[0], "F", 0, m))
        while self.events:
            now, awake = self.events[0][0], set()
            while self.events and self.events[0][0] == now:  # all that comes at this moment, before anyone chooses
                _, r, op, stage, m = heappop(self.events)
                awake.add(r)
                if op == "F":
                    heappush(self.ranks[r].forwards[stage], m)
                elif op:
                    heappush(self.ranks[r].backwards, (m, -stage))
            for r in sorted(awake):
                if self.ranks[r].free <= now and (a := self.choose(self.ranks[r])):
                    self.start(r, a, now)
        return tuple(tuple(rank.row) for rank in self.ranks)

    def choose(self, rank: _Rank) -> Action | None:
        turn = self.turns and bool(rank.row) and rank.row[-1].op != "F"
        return (turn and self.forward(rank)) or self.backward(rank) or self.forward(rank) or self.weight(rank)

    def forward(self, rank: _Rank) -> Action | None:
        for stage in reversed(rank.forwards):
            if (there := rank.forwards[stage]) and self.safe(rank, there[0]):
                return Action("F", stage, heappop(there))
        return None

    def safe(self, rank: _Rank, microbatch: int) -> bool:
        """Whether, with one more forward of this microbatch held, all can still leave one after another, the oldest first (Dijkstra's banker)."""
        free, stages = self.limit - rank.held - 1, len(rank.forwards)
        m = rank.oldest
        while free < stages and m < self.microbatches:
            forwards, backwards = rank.left[m]
            if forwards - (m == microbatch) > free:
                return False
            free += backwards - forwards + (m == microbatch)
            m += 1
        return free >= 0

    def backward(self, rank: _Rank) -> Action | None:
        if not rank.backwards:
            return None
        m, stage = heappop(rank.backwards)
        return Action(self.back, -stage, m)

    def weight(self, rank: _Rank) -> Action | None:
        return Action("W", *rank.weights.pop(0)) if rank.weights else None

    def start(self, r: int, a: Action, now: float) -> None:
        rank, m = self.ranks[r], a.microbatch
        assert m is not None
        rank.row.append(a)
        rank.free = end = now + self.time(a)
        heappush(self.events, (end, r, "", 0, 0))
        if a.op == "F":
            rank.held += 1
            rank.left[m][0] -= 1
            last = a.stage + 1 == len(self.placement)
            self.send(r, a, end, self.back if last else "F", a.stage if last else a.stage + 1)
        elif a.stage and a.op != "W":
            self.send(r, a, end, self.back, a.stage - 1)
        if a.op == "I":
            rank.weights.append((a.stage, m))
        elif a.op != "F":
            rank.held -= 1
            rank.left[m][1] -= 1
            while rank.oldest < self.microbatches and not rank.left[rank.oldest][1]:
                rank.oldest += 1

    def send(self, r: int, a: Action, end: float, op: str, stage: int) -> None:
        assert a.microbatch is not None
        target, delay = self.placement[stage], 0.0
        if target != r:
            move = Action("SEND_F" if op == "F" else "SEND_B", a.stage, a.microbatch)
            delay = self.link(move, r, target) if callable(self.link) else self.link
        heappush(self.events, (end + delay, target, op, stage, a.microbatch))

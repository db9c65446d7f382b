"""What a program would take: each rank does its actions in order, each as soon as what it needs is there. No device, no tensors.

    compute   F B I W REMAT OVERLAP   one at a time on the rank
    SEND      leaves when its stage is done and is there `link` later; the rank goes on. The F, B or I that has a RECV waits for it, one that has
              none waits for the stage itself, plus `link` where that is on another rank: so a program without movement is timed as well
    OFFLOAD, FETCH   one at a time beside the compute: a FETCH follows the OFFLOAD of the same, and what comes after it of that microbatch and
              stage waits for it
    REDUCE, FREE and others   one at a time beside the compute; nothing waits for them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import attrs

from lf.config import one_of
from lf.schedule.ir import OPS, Action, Program, ProgramError, flat
from lf.schedule.timeline import Span, Timeline

Times = Mapping[str, float] | Callable[[Action], float]
Link = float | Callable[[Action, int, int], float]
Key = tuple[str, str, int, int | None]

UNIT = {"F": 1.0, "I": 1.0, "W": 1.0}
_COPY = ("OFFLOAD", "FETCH")
_BACK = ("B", "I")


def cost(program: Program, times: Times | None = None, link: Link = 0.0, memory: Callable[[Action], float] | None = None) -> Timeline:
    """Simulates one step.

    times: op → duration of a stage and microbatch, which actions of its segments share equally; F, I and W take 1 where it is silent, B what I
    and W do, REMAT what F does, OVERLAP what its two do, others 0. Or a function of the action, called with all but SEND and RECV, and with an
    OVERLAP as it is. link: duration of a SEND, or a function (the SEND, rank that sends, rank that receives). memory: what an action adds to what
    its rank holds: from its start on if positive, from its end on if negative. Default: a microbatch of a stage counts as 1 from its F to its B or
    W (to its I if there is neither, not at all without a backward), but while it is offloaded.

    Raises ProgramError for a program that cannot go on, with the action that each rank is stuck at and what that waits for.
    """
    return _Simulation(program, times, link, memory).run()


@attrs.define
class _Rank:
    """Where a rank is: its next action, when it is free to compute, and when each lane beside the compute is."""

    at: int = 0
    now: float = 0.0
    lanes: dict[str, float] = attrs.field(factory=dict)
    spans: list[Span] = attrs.field(factory=list)
    changes: list[tuple[float, float]] = attrs.field(factory=list)
    fetched: dict[tuple[str, int, int | None], float] = attrs.field(factory=dict)
    stuck: Key | None = None


class _Simulation:
    def __init__(self, program: Program, times: Times | None, link: Link, memory: Callable[[Action], float] | None):
        self.program, self.ranks = program, [_Rank() for _ in program]
        self.parts: Counter[Key] = Counter()
        self.home: dict[tuple[str, int], int] = {}
        for rank, actions in enumerate(program):
            for a in flat(actions):
                self.parts[a.op, a.chain, a.stage, a.microbatch] += 1
                if a.op == "F":
                    self.home.setdefault((a.chain, a.stage), rank)
        self.last = {chain: max(s for c, s in self.home if c == chain) for chain, _ in self.home}
        self.left = dict(self.parts)
        self.ready: dict[Key, float] = {}  # when the last part of (op, chain, stage, microbatch) ends
        self.waiting: dict[Key, list[int]] = {}
        self.time = times if callable(times) else durations(times or {}, self.parts)
        self.link: Callable[[Action, int, int], float] = link if callable(link) else lambda action, source, target: link
        self.memory = memory or _activations(self.parts)

    def run(self) -> Timeline:
        todo = [*range(len(self.program))]
        while todo:
            r = todo.pop()
            rank, actions = self.ranks[r], self.program[r]
            rank.stuck = None
            while rank.at < len(actions):
                a = actions[rank.at]
                done = self.compute(r, rank, a) if a.op in ("F", "B", "I", "W", "REMAT", "OVERLAP") else self.move(r, rank, a)
                if not done:
                    assert rank.stuck is not None
                    self.waiting.setdefault(rank.stuck, []).append(r)
                    break
                rank.at += 1
                for part in a.pair or (a,):
                    key = (part.op, part.chain, part.stage, part.microbatch)
                    self.left[key] -= 1
                    if not self.left[key]:
                        todo += self.waiting.pop(key, ())
        self.refuse_stuck()
        return Timeline(tuple(tuple(rank.spans) for rank in self.ranks), tuple(_levels(rank.changes) for rank in self.ranks))

    def compute(self, r: int, rank: _Rank, a: Action) -> bool:
        start = rank.now
        for part in a.pair or (a,):
            for key, delay in self.needs(r, part):
                if self.left.get(key, 1) and not (a.pair and any(key == (p.op, p.chain, p.stage, p.microbatch) for p in a.pair)):
                    rank.stuck = key
                    return False
                start = max(start, self.ready.get(key, 0.0) + delay)
            if part.op != "F" and rank.fetched:
                start = max(start, rank.fetched.get((part.chain, part.stage, part.microbatch), 0.0))
        rank.now = end = start + self.time(a)
        self.note(rank, a, start, end)
        return True

    def needs(self, r: int, a: Action) -> list[tuple[Key, float]]:
        """What ends before an action can start, each with what is added to that end."""
        chain, s, m = a.chain, a.stage, a.microbatch
        if a.op == "W":
            return [(("I", chain, s, m), 0.0)]
        if a.op == "REMAT":
            return [(("F", chain, s, m), 0.0)]
        if a.op == "F":
            needs: list[tuple[Key, float]] = []
            source, move = s - 1, "F"
            if s == 0:
                return needs
        else:
            needs = [(("F", chain, s, m), 0.0)]
            source, move = s + 1, "B"
            if s == self.last.get(chain, s):
                return needs
        if (f"RECV_{move}", chain, s, m) in self.parts:
            return [*needs, ((f"RECV_{move}", chain, s, m), 0.0), ((f"SEND_{move}", chain, source, m), 0.0)]
        op = "F" if move == "F" else next((op for op in _BACK if (op, chain, source, m) in self.parts), "B")
        home = self.home.get((chain, source), r)
        delay = 0.0 if home == r else self.link(Action(f"SEND_{move}", source, m, chain=chain), home, r)
        return [*needs, ((op, chain, source, m), delay)]

    def move(self, r: int, rank: _Rank, a: Action) -> bool:
        """What stands beside the compute: it starts when the rank gets there, or when its lane is free, and the rank goes on."""
        start, lane = rank.now, "copy" if a.op in _COPY else a.op
        if a.op in ("SEND_F", "SEND_B"):
            ops = ("F",) if a.op == "SEND_F" else tuple(op for op in _BACK if (op, a.chain, a.stage, a.microbatch) in self.parts) or ("B",)
            for op in ops:
                if self.left.get(key := (op, a.chain, a.stage, a.microbatch), 1):
                    rank.stuck = key
                    return False
            target = self.home.get((a.chain, a.stage + (1 if a.op == "SEND_F" else -1)), r)
            end = start + self.link(a, r, target)
        elif a.op in ("RECV_F", "RECV_B"):
            end = start
        else:
            start = max(start, rank.lanes.get(lane, 0.0))
            rank.lanes[lane] = end = start + self.time(a)
            if a.op == "FETCH":
                rank.fetched[a.chain, a.stage, a.microbatch] = end
        self.note(rank, a, start, end)
        return True

    def note(self, rank: _Rank, a: Action, start: float, end: float) -> None:
        rank.spans.append(Span(a, start, end))
        for part in a.pair or (a,):
            key = (part.op, part.chain, part.stage, part.microbatch)
            self.ready[key] = max(end, self.ready.get(key, 0.0))
            if change := self.memory(part):
                rank.changes.append((start if change > 0 else end, change))

    def refuse_stuck(self) -> None:
        lines = []
        for r, (rank, actions) in enumerate(zip(self.ranks, self.program)):
            if rank.stuck is not None:
                op, chain, stage, microbatch = rank.stuck
                absent = "" if rank.stuck in self.parts else ", which is not in the program"
                lines.append(f"rank {r} is stuck at {actions[rank.at]}: it waits for {Action(op, stage, microbatch, chain=chain)}{absent}")
        if lines:
            raise ProgramError("the program cannot go on\n" + "\n".join(lines))


def durations(times: Mapping[str, float], parts: Mapping[Key, int] | None = None) -> Callable[[Action], float]:
    """`times` of `cost` as a function. parts: how many actions there are of each (op, chain, stage, microbatch)."""
    for op in times:
        if one_of("op in times", op, OPS) in ("SEND_F", "SEND_B", "RECV_F", "RECV_B"):
            raise ProgramError(f"times says how long {op} takes: give link for that")
    if negative := [f"{op}={t}" for op, t in times.items() if not t >= 0]:
        raise ProgramError(f"times {', '.join(negative)}: must be at least 0")
    whole = {**UNIT, **times}
    if "B" in times:
        whole |= {op: times["B"] / 2 for op in "IW" if op not in times}
    whole.setdefault("B", whole["I"] + whole["W"])
    whole.setdefault("REMAT", whole["F"])

    def time(a: Action) -> float:
        if a.op == "OVERLAP":
            return whole["OVERLAP"] if "OVERLAP" in whole else sum(map(time, a.pair))
        t = whole.get(a.op, 0.0)
        return t / _cuts(a, parts) if t and parts and a.segment is not None else t

    return time


def _cuts(a: Action, parts: Mapping[Key, int]) -> int:
    """Into how many the actions of a stage and microbatch are cut: a REMAT or OFFLOAD may be of a few segments, so others tell."""
    ops = (a.op, "F", "B", "I", "W") if a.op in ("REMAT", *_COPY) else (a.op,)
    return max(parts.get((op, a.chain, a.stage, a.microbatch), 0) for op in ops)


def _activations(parts: Mapping[Key, int]) -> Callable[[Action], float]:
    def change(a: Action) -> float:
        if a.op not in ("F", "B", "I", "W", *_COPY):
            return 0.0
        at = (a.chain, a.stage, a.microbatch)
        ends = [op for op in ("B", "W") if (op, *at) in parts] or [op for op in ("I",) if (op, *at) in parts]
        if a.op == "F":
            return 1.0 / parts[("F", *at)] if ends else 0.0
        if a.op in _COPY:
            return (1.0 if a.op == "FETCH" else -1.0) / _cuts(a, parts)
        return -1.0 / sum(parts[(op, *at)] for op in ends) if a.op in ends else 0.0

    return change


def _levels(changes: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Changes by time as levels; what goes at a moment goes before what comes then."""
    level, out = 0.0, [(0.0, 0.0)]
    for time, change in sorted(changes):
        level += change
        if out[-1][0] == time and change > 0:
            out[-1] = (time, level)
        else:
            out.append((time, level))
    return tuple(out)

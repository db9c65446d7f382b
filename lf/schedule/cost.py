"""What a program would take: each rank does its actions in order, each as soon as what it needs is there. No device, no tensors.

    compute   F B I W REMAT OVERLAP   one at a time on the rank
    SEND      leaves when its stage is done and is there `link` later; the rank goes on. The F, B or I that has a RECV waits for it, one that has
              none waits for the stage itself, plus `link` where that is on another rank: so a program without movement is timed as well
    OFFLOAD   one at a time beside the compute
    FETCH     likewise, after the OFFLOAD of the same; the B, I, W or REMAT of that microbatch and segment waits for it
    REDUCE, FREE and others   one at a time of each beside the compute; nothing waits for them

Times are in whatever unit they are given in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import attrs

from lf.config import one_of
from lf.schedule.ir import BACKWARD, COMPUTE, OPS, Action, Program, ProgramError, flat
from lf.schedule.timeline import Span, Timeline

Times = Mapping[str, float] | Callable[[Action], float]
Link = float | Callable[[Action, int, int], float]
Key = tuple[str, str, int, int | None]

UNIT = {"F": 1.0, "I": 1.0, "W": 1.0}
_COMPUTE = (*COMPUTE, "OVERLAP")
_COPY = ("OFFLOAD", "FETCH")


def cost(program: Program, times: Times | None = None, link: Link = 0.0, memory: Callable[[Action], float] | None = None) -> Timeline:
    """Simulates one step.

    times: op → duration of a stage and microbatch, which actions of its segments share equally; F, I and W take 1 where it is silent, B what I
    and W do, REMAT what F does, OVERLAP what its two do, others 0. Or a function of the action, called with all but SEND and RECV, and with an
    OVERLAP as it is. link: duration of a SEND, or a function (the SEND, rank that sends, rank that receives). memory: what an action adds to what
    its rank holds: from its start on if positive, from its end on if negative. Default: a microbatch of a stage counts as 1 from its F to its B or
    W (to its I if there is neither, not at all without a backward), but before a REMAT of all of it and while it is offloaded.

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
    copied: dict[tuple[str, str, int, int | None], dict[str | None, float]] = attrs.field(factory=dict)  # end by segment
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
        if not callable(link) and not link >= 0:
            raise ProgramError(f"link={link} must be at least 0")
        self.link: Callable[[Action, int, int], float] = link if callable(link) else lambda action, source, target: link
        self.memory = memory or _activations(program, self.parts)

    def run(self) -> Timeline:
        todo = [*range(len(self.program))]
        while todo:
            r = todo.pop()
            rank, actions = self.ranks[r], self.program[r]
            rank.stuck = None
            while rank.at < len(actions):
                a = actions[rank.at]
                done = self.compute(r, rank, a) if a.op in _COMPUTE else self.move(r, rank, a)
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
        rows = tuple(tuple(sorted(rank.spans, key=lambda span: span.start)) for rank in self.ranks)
        return Timeline(rows, tuple(_levels(rank.changes) for rank in self.ranks))

    def compute(self, r: int, rank: _Rank, a: Action) -> bool:
        start = rank.now
        for part in a.pair or (a,):
            for key, delay in self.needs(r, part):
                if not self.done(key, part):
                    rank.stuck = key
                    return False
                start = max(start, self.ready.get(key, 0.0) + delay)
            if part.op != "F" and rank.copied:
                ends = rank.copied.get(("FETCH", part.chain, part.stage, part.microbatch), {})
                start = max([start, *(end for segment, end in ends.items() if _same(segment, part.segment))])
        rank.now = end = start + self.time(a)
        self.note(rank, a, start, end)
        return True

    def done(self, key: Key, a: Action) -> bool:
        """Whether what `a` needs has run: all of it, but one W of several may follow when some I has."""
        left = self.left.get(key, 1)
        return not left or (a.op == "W" and a.segment is not None and left < self.parts[key])

    def needs(self, r: int, a: Action) -> list[tuple[Key, float]]:
        """What ends before an action can start, each with what is added to that end."""
        chain, s, m = a.chain, a.stage, a.microbatch
        if a.op in ("W", "REMAT"):
            return [(("I" if a.op == "W" else "F", chain, s, m), 0.0)]
        needs: list[tuple[Key, float]] = [] if a.op == "F" else [(("F", chain, s, m), 0.0)]
        move, source = ("F", s - 1) if a.op == "F" else ("B", s + 1)
        if not 0 <= source <= self.last.get(chain, s):
            return needs
        if (f"RECV_{move}", chain, s, m) in self.parts:
            return [*needs, ((f"RECV_{move}", chain, s, m), 0.0), ((f"SEND_{move}", chain, source, m), 0.0)]
        home = self.home.get((chain, source), r)
        delay = 0.0 if home == r else self.link(Action(f"SEND_{move}", source, m, chain=chain), home, r)
        return [*needs, *((key, delay) for key in self.made(move, chain, source, m))]

    def made(self, move: str, chain: str, stage: int, microbatch: int | None) -> list[Key]:
        """What makes what a stage gives on: its forward, or its backward, be it B, I or some of both."""
        if move == "F":
            return [("F", chain, stage, microbatch)]
        keys = [(op, chain, stage, microbatch) for op in BACKWARD]
        return [key for key in keys if key in self.parts] or keys[:1]

    def move(self, r: int, rank: _Rank, a: Action) -> bool:
        """What stands beside the compute: it starts when the rank gets there, or when its lane is free, and the rank goes on."""
        start, at = rank.now, (a.chain, a.stage, a.microbatch)
        if a.op in ("SEND_F", "SEND_B"):
            for key in self.made(a.op[-1], *at):
                if self.left.get(key, 1):
                    rank.stuck = key
                    return False
            target = self.home.get((a.chain, a.stage + (1 if a.op == "SEND_F" else -1)), r)
            end = start + self.link(a, r, target)
        elif a.op in ("RECV_F", "RECV_B"):
            end = start
        else:
            start = max(start, rank.lanes.get(a.op, 0.0))
            if a.op == "FETCH":
                start = max(start, rank.copied.get(("OFFLOAD", *at), {}).get(a.segment, 0.0))
            elif a.op == "FREE":  # of what was sent, once it has left
                start = max(start, self.ready.get((a.segment or "SEND_F", *at), 0.0))
            rank.lanes[a.op] = end = start + self.time(a)
            if a.op in _COPY:
                rank.copied.setdefault((a.op, *at), {})[a.segment] = end
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
        if not t or not parts or a.segment is None:
            return t
        return t / (_cuts(a, parts) if a.op in ("REMAT", *_COPY) else parts[a.op, a.chain, a.stage, a.microbatch])

    return time


def _cuts(a: Action, parts: Mapping[Key, int]) -> int:
    """Into how many the actions of a stage and microbatch are cut: a REMAT or OFFLOAD may be of a few segments, so others tell."""
    ops = ("F", "B", "I", "W", "REMAT", *_COPY)
    return max(parts.get((op, a.chain, a.stage, a.microbatch), 0) for op in ops)


def _activations(program: Program, parts: Mapping[Key, int]) -> Callable[[Action], float]:
    segments: dict[Key, list[str | None]] = {}  # of each F and each REMAT of everything, whose F then keeps nothing
    for a in (a for row in program for a in flat(row) if a.op == "F" or (a.op == "REMAT" and not a.ops)):
        segments.setdefault((a.op, a.chain, a.stage, a.microbatch), []).append(a.segment)

    def again(a: Action, op: str) -> float:
        """The share that passes from a forward to a REMAT, of those of `op` that `a` belongs to."""
        others = segments.get((op, a.chain, a.stage, a.microbatch), ())
        return sum(_same(a.segment, other) for other in others) / _cuts(a, parts) if others else 0.0

    def change(a: Action) -> float:
        at = (a.chain, a.stage, a.microbatch)
        ends = [op for op in ("B", "W") if (op, *at) in parts] or [op for op in ("I",) if (op, *at) in parts]
        if a.op in ends:
            return -1.0 / sum(parts[(op, *at)] for op in ends)
        if a.op == "F":
            return 1.0 / parts[("F", *at)] - again(a, "REMAT") if ends else 0.0
        if a.op in _COPY:
            return (1.0 if a.op == "FETCH" else -1.0) / _cuts(a, parts)
        return again(a, "F") if a.op == "REMAT" and not a.ops else 0.0

    return change


def _same(a: str | None, b: str | None) -> bool:
    """Whether two actions touch the same: equal segments, one of a layer and the layer, or the whole stage."""
    return a is None or b is None or f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _levels(changes: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Changes by time as levels: what goes at a moment makes room for what comes then."""
    level, out = 0.0, [(0.0, 0.0)]
    for time, change in sorted(changes, key=lambda pair: pair[0]):
        level += change
        if out[-1][0] == time:
            out[-1] = (time, level)
        else:
            out.append((time, level))
    return tuple(out)

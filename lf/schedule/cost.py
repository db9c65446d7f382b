"""What a program would take: each rank does its actions in order, each as soon as what it needs is there. No device, no tensors.

    compute   F B I W REMAT OVERLAP   one at a time on the rank
    SEND      leaves when its stage is done and is there `link` later; the rank goes on. The F, B or I that has a RECV waits for it, one that has
              none waits for the stage itself, plus `link` where that is on another rank: so a program without movement is timed as well
    OFFLOAD   one at a time beside the compute
    FETCH     likewise, after the OFFLOAD of the same; the B, I, W or REMAT of that microbatch and segment waits for it
    BRIDGE    leaves a row that gives like a SEND, and is through once the rows that take have got to it as well; what has one waits for it, what
              has none for the other chain's units themselves, plus `link` unless both are on one row
    GATHER, REDUCE            one at a time of both together beside the compute; what computes with a layer waits for its GATHER, nothing for a REDUCE
    FREE and others           one at a time of each beside the compute; nothing waits for them

A unit of a chain may stand on several rows: each does an equal share of it, and it is done when the last one is.

Times are in whatever unit they are given in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import attrs

from lf.chain_layouts import Joint
from lf.config import one_of
from lf.schedule.ir import BRIDGES, COMPUTE, MOVES, OPS, Action, Program, ProgramError, flat
from lf.schedule.joined import Joined, Key, Link, made
from lf.schedule.timeline import Span, Timeline

Times = Mapping[str, float] | Callable[[Action], float]

UNIT = {"F": 1.0, "I": 1.0, "W": 1.0}
_COMPUTE = (*COMPUTE, "OVERLAP")
_COPY = ("OFFLOAD", "FETCH")


def cost(
    program: Program,
    times: Times | None = None,
    link: Link = 0.0,
    memory: Callable[[Action], float] | None = None,
    joints: Sequence[Joint] = (),
    fixed: Mapping[str, float] | None = None,
) -> Timeline:
    """Simulates one step.

    times: op → duration of a stage and microbatch, which actions of its segments share equally; F, I and W take 1 where it is silent, B what I
    and W do, REMAT what F does, OVERLAP what its two do, others 0. 'vision:F' is of one chain; where it is silent of an op, the others' holds. Or a
    function of the action, called with all but SEND, RECV and BRIDGE, and with an OVERLAP as it is. Both are of a unit whole, as one row would do
    it: where it stands on n rows, each takes an n-th of that. link: duration of a SEND or BRIDGE, or a function (the action, rank that sends, rank
    that receives), of which a BRIDGE takes the longest. memory: what an action adds to what its rank holds: from its start on if positive, from its
    end on if negative. Default: a microbatch of a stage counts as 1 from its F to its B or W (to its I if there is neither, not at all without a
    backward), but before a REMAT of all of it and while it is offloaded; on each of n rows as 1/n. joints: how the chains wait for each other.
    fixed: of a chain the part of its times, 0 to 1, that does not shrink where rows share a unit, and each takes whole: launches, weights to be read.

    Raises ProgramError for a program that cannot go on, with the action that each rank is stuck at and what that waits for.
    """
    return _Simulation(program, times, link, memory, joints, fixed or {}).run()


def held(timeline: Timeline, chain: str) -> tuple[tuple[float, ...], float]:
    """The most units of one chain that each row holds at a time, counted as the default `memory` of `cost`, and the most that all hold together.
    Where the chain has several stages, each of them counts."""
    program = tuple(tuple(span.action for span in row) for row in timeline.rows)
    change = _activations(program, Counter((a.op, a.chain, a.stage, a.microbatch) for row in program for a in flat(row)))
    changes: list[list[tuple[float, float]]] = [
        [(span.start if by > 0 else span.end, by) for span in row for a in flat((span.action,)) if a.chain == chain and (by := change(a))]
        for row in timeline.rows
    ]
    together = [pair for row in changes for pair in row]
    *each, whole = (max(level for _, level in _levels(some)) for some in (*changes, together))
    return tuple(each), whole


def share(rows: int, fixed: float = 0.0) -> float:
    """What each of so many rows takes of a unit's time, of which a part is fixed."""
    return fixed + (1 - fixed) / rows


@attrs.define
class _Rank:
    """Where a rank is: its next action, when it is free to compute, and when each lane beside the compute is."""

    at: int = 0
    now: float = 0.0
    lanes: dict[str, float] = attrs.field(factory=dict)
    spans: list[Span] = attrs.field(factory=list)
    changes: list[tuple[float, float]] = attrs.field(factory=list)
    copied: dict[tuple[str, str, int, int | None], dict[str | None, float]] = attrs.field(factory=dict)  # end by segment
    whole: dict[tuple[str, int], dict[str | None, float]] = attrs.field(factory=dict)  # of a stage, when each layer has been gathered last
    stuck: Key | None = None


class _Simulation:
    def __init__(
        self,
        program: Program,
        times: Times | None,
        link: Link,
        memory: Callable[[Action], float] | None = None,
        joints: Sequence[Joint] = (),
        fixed: Mapping[str, float] | None = None,
    ):
        self.fixed = fixed or {}
        self.program, self.ranks = program, [_Rank() for _ in program]
        self.parts: Counter[Key] = Counter()
        self.home: dict[tuple[str, int, int | None], tuple[int, ...]] = {}
        for rank, actions in enumerate(program):
            for a in flat(actions):
                self.parts[a.op, a.chain, a.stage, a.microbatch] += 1
                if a.op == "F":
                    homes = self.home.get((a.chain, a.stage, a.microbatch), ())
                    if rank not in homes:
                        self.home[a.chain, a.stage, a.microbatch] = (*homes, rank)
        self.last: dict[str, int] = {}
        for chain, stage, _ in self.home:
            self.last[chain] = max(stage, self.last.get(chain, 0))
        self.joints = len(joints)
        self.joined = Joined(program, joints, self.parts, self.home)
        self.left = dict(self.parts)
        self.ready: dict[Key, float] = {}  # when the last part of (op, chain, stage, microbatch) ends
        self.waiting: dict[Key, list[int]] = {}
        self.shared = {at: len(rows) for at, rows in self.home.items() if len(rows) > 1}
        whole = times if callable(times) else durations(times or {}, self.on_a_row() if self.shared else self.parts)
        self.time = self.share_of(whole) if self.shared else whole
        if not callable(link) and not link >= 0:
            raise ProgramError(f"link={link} must be at least 0")
        self.given_link = link
        self.link: Callable[[Action, int, int], float] = link if callable(link) else lambda action, source, target: link
        self.memory = memory or _activations(program, self.parts)

    def share_of(self, whole: Callable[[Action], float]) -> Callable[[Action], float]:
        """What each row takes where several share a unit."""
        return lambda a: whole(a) * share(self.shared.get((a.chain, a.stage, a.microbatch), 1), self.fixed.get(a.chain, 0.0))

    def on_a_row(self) -> Counter[Key]:
        """How many actions there are of each key on a row that has some."""
        most: Counter[Key] = Counter()
        for actions in self.program:
            most |= Counter((a.op, a.chain, a.stage, a.microbatch) for a in flat(actions))
        return most

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
            if rank.whole:
                ends = rank.whole.get((part.chain, part.stage), {})
                start = max([start, *(end for layer, end in ends.items() if _same(layer, part.segment))])
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
        if self.joints:
            needs += self.joined.needs(a, self.given_link)
        move, source = ("F", s - 1) if a.op == "F" else ("B", s + 1)
        if not 0 <= source <= self.last.get(chain, s):
            return needs
        if (f"RECV_{move}", chain, s, m) in self.parts:
            return [*needs, ((f"RECV_{move}", chain, s, m), 0.0), ((f"SEND_{move}", chain, source, m), 0.0)]
        home = self.partner(r, chain, s, source, m)
        delay = 0.0 if home == r else self.link(Action(f"SEND_{move}", source, m, chain=chain), home, r)
        return needs + [(key, delay) for key in made(move, chain, source, m, self.parts)]

    def partner(self, r: int, chain: str, stage: int, other: int, unit: int | None) -> int:
        """The row of another stage of a unit that has what row r needs, or needs what it has: of several rows the one at the same place."""
        theirs = self.home.get((chain, other, unit), (r,))
        if len(theirs) == 1:
            return theirs[0]
        mine = self.home.get((chain, stage, unit), ())
        return theirs[mine.index(r)] if r in mine and len(mine) == len(theirs) else theirs[0]

    def move(self, r: int, rank: _Rank, a: Action) -> bool:
        """What stands beside the compute: it starts when the rank gets there, or when its lane is free, and the rank goes on."""
        start, at = rank.now, (a.chain, a.stage, a.microbatch)
        if a.op in ("SEND_F", "SEND_B"):
            for key in made(a.op[-1], *at, self.parts):
                if self.left.get(key, 1):
                    rank.stuck = key
                    return False
            end = start + self.link(a, r, self.partner(r, a.chain, a.stage, a.stage + (1 if a.op == "SEND_F" else -1), a.microbatch))
        elif a.op in BRIDGES:  # whoever waits for it waits until the last row is there
            end = start + self.joined.bridge(a, r, self.given_link)
        elif a.op in ("RECV_F", "RECV_B"):
            end = start
        else:
            lane = "state" if a.op in ("GATHER", "REDUCE") else a.op
            start = max(start, rank.lanes.get(lane, 0.0))
            if a.op == "FETCH":
                start = max(start, rank.copied.get(("OFFLOAD", *at), {}).get(a.segment, 0.0))
            elif a.op == "FREE":  # of what was sent, once it has left
                start = max(start, self.ready.get((a.segment or "SEND_F", *at), 0.0))
            rank.lanes[lane] = end = start + self.time(a)
            if a.op in _COPY:
                rank.copied.setdefault((a.op, *at), {})[a.segment] = end
            elif a.op == "GATHER":
                rank.whole.setdefault((a.chain, a.stage), {})[a.segment] = end
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
    """`times` of `cost` as a function, of units whole. parts: how many actions there are of each (op, chain, stage, microbatch)."""
    given: dict[str, dict[str, float]] = {"": {}}
    for name, t in times.items():
        chain, _, op = name.rpartition(":")
        if one_of("op in times", op, OPS) in (*MOVES, *BRIDGES):
            raise ProgramError(f"times says how long {op} takes: give link for that")
        if not t >= 0:
            raise ProgramError(f"times {name}={t}: must be at least 0")
        given.setdefault(chain, {})[op] = t
    whole = {chain: _completed(given[""], own if chain else {}) for chain, own in given.items()}

    def time(a: Action) -> float:
        of = whole.get(a.chain, whole[""])
        if a.op == "OVERLAP":
            return of["OVERLAP"] if "OVERLAP" in of else sum(map(time, a.pair))
        t = of.get(a.op, 0.0)
        if not t or not parts or a.segment is None:
            return t
        return t / (_cuts(a, parts) if a.op in ("REMAT", *_COPY) else parts[a.op, a.chain, a.stage, a.microbatch])

    return time


def _completed(*given: Mapping[str, float]) -> dict[str, float]:
    """Later ones go before: what follows from one goes before what an earlier one says."""
    whole = {**UNIT, "B": UNIT["I"] + UNIT["W"], "REMAT": UNIT["F"]}
    for own in given:
        if "B" in own:
            whole |= dict.fromkeys("IW", own["B"] / 2)
        whole |= {"REMAT": own.get("F", whole["REMAT"]), **own}
        if "B" not in own and own.keys() & {"I", "W"}:
            whole["B"] = whole["I"] + whole["W"]
    return whole


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

"""Movement: SEND and RECV within a chain, BRIDGE between chains, and FREE of what was sent, in one global order.

The program is walked on one clock (unit times). When a rank has computed what another one needs, SEND goes to its own list and RECV to the other's
in the same moment; a BRIDGE goes to the lists of all that meet in it. So there is one order of all meetings, which every rank keeps: it works even
where a send blocks until it is received. A receive is started about when the value is made, ahead of its use; but what goes from chain to chain
stays where it was made until the one that takes it is AHEAD actions from its use, so that nobody holds for long what others have made early.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from lf.chain_layouts import Joint
from lf.schedule.draw import draw
from lf.schedule.ground import Ground, Unit, Where, ground
from lf.schedule.ir import BACKWARD, COMPUTE, Action, Program, ProgramError, flat, parts
from lf.schedule.pieces import Stage

SLACK = 4  # a sent buffer is freed when as many more of its kind have been sent: by then it has left, and nobody waits for it
AHEAD = 1
SECONDS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "REMAT": 1.0}


def move(program: Program, where: Where = None, joints: Sequence[Joint] = ()) -> Program:
    """The program with its movements. `joints`: between the chains of a program without a layout."""
    return _Walk(ground(program, where, joints)).run()


class _Walk:
    def __init__(self, on: Ground):
        self.on, self.program = on, on.program
        self.rows: list[list[Action]] = [[] for _ in self.program]
        self.ends = _ends(self.program)
        self.at, self.free_at = [0] * len(self.program), [0.0] * len(self.program)
        self.made: dict[tuple[str, Unit], float] = {}  # ("F" or "B", unit) → when it is there on all rows that it stands on
        self.left = {unit: len(rows) for unit, rows in on.rows.items()}
        self.behind = dict(self.left)
        self.takes: dict[tuple[Unit, int], int] = {}  # (unit, row) → where its forward begins
        for r, row in enumerate(self.program if on.joints else ()):
            for i, a in enumerate(row):
                for part in parts(a):
                    if part.op == "F":
                        self.takes.setdefault(((part.chain, part.stage, part.microbatch), r), i)
        self.waiting: dict[int, list[tuple[int, int]]] = {}  # row → (joint, microbatch) that are made and not yet carried
        self.carried: dict[tuple[int, int], float] = {}

    def run(self) -> Program:
        rows = range(len(self.program))
        left = sum(map(len, self.program))
        starts = [self.ready(r) for r in rows]
        while left:
            times = [(t, r) for r, t in enumerate(starts) if t is not None]
            if not times:
                raise ProgramError(self.stuck())
            start, rank = min(times)
            action = self.program[rank][self.at[rank]]
            mates = self.mates(rank, action)
            for r in mates:
                self.rows[r].append(self.program[r][self.at[r]])
                self.at[r] += 1
                self.free_at[r] = start + sum(SECONDS.get(a.op, 0.0) for a in parts(action))
            left -= len(mates)
            for a in parts(action):
                for r in mates:
                    self.hand_on(r, a)
            for r in mates:
                self.carry(r)
            for r in rows:
                if r in mates or (starts[r] is None and self.at[r] < len(self.program[r])) or len(self.on.known) > 1:  # what can start stays so
                    starts[r] = self.ready(r)
        return tuple(map(tuple, self.rows))

    def mates(self, rank: int, a: Action) -> tuple[int, ...]:
        """The rows that do an action together."""
        if a.op in COMPUTE:
            return self.on.together.get((a.chain, a.stage, rank), (rank,))
        return self.on.summed(a, rank) if a.op in ("REDUCE", "GATHER") else (rank,)

    def ready(self, rank: int) -> float | None:
        """When the rank's next action can start; None: not yet known, or there is none."""
        if self.at[rank] >= len(self.program[rank]):
            return None
        start, action = self.free_at[rank], self.program[rank][self.at[rank]]
        for r in self.mates(rank, action):
            if self.at[r] >= len(self.program[r]) or not self.on.meets(self.program[r][self.at[r]], action):
                return None
            start = max(start, self.free_at[r])
        for a in parts(action):
            for need in self.needs(a):
                if need not in self.made:
                    return None
                start = max(start, self.made[need])
        return start

    def needs(self, a: Action) -> list[tuple[str, Unit]]:
        if a.op != "F" and a.op not in BACKWARD:
            return []
        on, unit = self.on, (a.chain, a.stage, a.microbatch)
        if not self.ends.get((a.op, *unit, a.segment), (False, False))[0]:
            return []
        needs: list[tuple[str, Unit]] = []
        assert a.microbatch is not None
        if a.op == "F":
            if a.stage:
                needs.append(("F", (a.chain, a.stage - 1, a.microbatch)))
            needs += [("F", on.ends(k, m)[0]) for k in on.into(a.chain, a.stage) for m in on.group(a.chain, a.microbatch)]
        else:
            needs.append(("F", unit))
            if a.stage + 1 < len(on.known[a.chain]) and on.known[a.chain][a.stage + 1].upstream:
                needs.append(("B", (a.chain, a.stage + 1, a.microbatch)))
            live = [k for k in on.out(a.chain, a.stage) if on.live[k]] if on.joints else ()
            needs += [("B", on.ends(k, m)[1]) for k in live for m in on.group(a.chain, a.microbatch)]
        return needs

    def hand_on(self, rank: int, a: Action) -> None:
        """What an action makes for others is there, when it is the last of its stage on the last of its rows."""
        on, unit = self.on, (a.chain, a.stage, a.microbatch)
        if not self.ends.get((a.op, *unit, a.segment), (False, False))[1]:
            return
        kind, to, count = ("F", a.stage + 1, self.left) if a.op == "F" else ("B", a.stage - 1, self.behind)
        count[unit] = count.get(unit, 1) - 1
        if count[unit] > 0:
            return
        self.made[kind, unit] = self.free_at[rank]
        known: Sequence[Stage] = on.known[a.chain]
        other = (a.chain, to, a.microbatch)
        mine, theirs = on.rows.get(unit, (rank,)), on.rows.get(other) or on.homes.get((a.chain, to), ())
        if 0 <= to < len(known) and theirs != mine and (kind == "F" or known[a.stage].upstream):
            for r in mine:
                self.rows[r].append(Action(f"SEND_{kind}", a.stage, a.microbatch, chain=a.chain))
            for r in theirs:
                self.rows[r].append(Action(f"RECV_{kind}", to, a.microbatch, chain=a.chain))
        assert a.microbatch is not None
        if kind == "F":
            for k in on.out(a.chain, a.stage):
                for m in on.group(a.chain, a.microbatch):
                    target = on.ends(k, m)[1]
                    for r in on.rows.get(target, ()):
                        self.waiting.setdefault(r, []).append((k, m))
                    for r in on.rows.get(target, ()):
                        self.carry(r)
        else:
            for k in (k for k in on.into(a.chain, a.stage) if on.live[k]):
                for m in on.group(a.chain, a.microbatch):
                    self.bridge("BRIDGE_B", k, m)

    def carry(self, rank: int) -> None:
        """BRIDGE_F of what the rank is about to take, in the order in which it takes it."""
        near = sorted((self.takes[self.on.ends(k, m)[1], rank], k, m) for k, m in self.waiting.get(rank, ()))
        for i, k, m in near:
            if i <= self.at[rank] + AHEAD:
                for r in self.on.rows[self.on.ends(k, m)[1]]:
                    self.waiting[r].remove((k, m))
                self.bridge("BRIDGE_F", k, m)

    def bridge(self, op: str, k: int, microbatch: int) -> None:
        joint = self.on.joints[k]
        for r in self.on.bridged(k, microbatch):
            self.rows[r].append(Action(op, joint.target_stage, microbatch, joint.name, chain=joint.target))

    def stuck(self) -> str:
        stuck = {r: i for r, i in enumerate(self.at) if i < len(self.program[r])}
        words = ", ".join(f"{self.program[r][i]} on rank {r}" for r, i in stuck.items())
        return f"no rank can go on: {words}; each needs what one of the others has not yet made\n{draw(self.program, stuck)}"


def _ends(program: Program) -> dict[tuple[str, str, int, int | None, str | None], tuple[bool, bool]]:
    """Of each forward and backward, whether it is the first and whether it is the last of its stage and unit on its row."""
    out: dict[tuple[str, str, int, int | None, str | None], tuple[bool, bool]] = {}
    for row in program:
        parts: dict[tuple[bool, str, int, int | None], list[Action]] = {}
        for a in flat(row):
            if a.op == "F" or a.op in BACKWARD:
                parts.setdefault((a.op == "F", a.chain, a.stage, a.microbatch), []).append(a)
        out.update({(a.op, a.chain, a.stage, a.microbatch, a.segment): (a is g[0], a is g[-1]) for g in parts.values() for a in g})
    return out


def free(program: Program) -> Program:
    """FREE of each sent buffer: when SLACK more of its kind have been sent, or before the backward of its microbatch, which shows that it has
    arrived, or at the end."""
    rows = []
    for actions in program:
        row: list[Action] = []
        sent: dict[str, list[Action]] = {"SEND_F": [], "SEND_B": []}
        for a in actions:
            for part in parts(a):
                if part.op in BACKWARD:
                    for s in [s for s in sent["SEND_F"] if (s.chain, s.stage, s.microbatch) == (part.chain, part.stage, part.microbatch)]:
                        sent["SEND_F"].remove(s)
                        row.append(_free(s))
            row.append(a)
            if a.op in sent:
                sent[a.op].append(a)
                if len(sent[a.op]) > SLACK:
                    row.append(_free(sent[a.op].pop(0)))
        rows.append((*row, *(_free(s) for waiting in sent.values() for s in waiting)))
    return tuple(rows)


def _free(sent: Action) -> Action:
    return attrs.evolve(sent, op="FREE", segment=sent.op)

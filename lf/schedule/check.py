"""A program is proven before it runs: no device, no tensors, only what each action needs and leaves.

The ranks are walked together with sends that block until they are received, as on the strictest device. Every value is written once and taken
once:

    F      takes what arrives at its stage, leaves what its backward needs (KEPT) and what the next stage gets
    B, I   take KEPT and the gradient that arrives, leave the gradient for the stage before; I leaves what its W needs (OWED)
    W      takes OWED                  SEND, RECV, FREE   what was made, and the buffer that it was sent from
    REMAT  makes again what a forward did not keep          OFFLOAD, FETCH   KEPT, to the host and back
"""

from __future__ import annotations

import attrs

from lf.layouts import Layout
from lf.schedule.draw import WIDTH, draw
from lf.schedule.ir import BACKWARD, MOVES, Action, Program, ProgramError, flat, placement, some
from lf.schedule.ir import microbatches as named
from lf.schedule.lower import is_lowered, lower, reduced_layers, tied_paths, users_of
from lf.schedule.names import check_names
from lf.schedule.pieces import WHOLE, Stage, stages

Key = tuple[int, int]  # stage, microbatch


@attrs.define
class _Piece:
    """What a forward keeps of atoms [lo, hi). `made`: it is there, and not only what it can be made again from; `partly`: some ops are to be run
    again; `away`: on the host."""

    name: str
    lo: int
    hi: int
    made: bool
    partly: bool = False
    away: bool = False


@attrs.define
class _Row:
    """What one rank has, and how far it has come: `ahead`, the atom with which the next forward begins; `behind`, the atom before which the last
    backward has ended."""

    kept: dict[Key, list[_Piece]] = attrs.field(factory=dict)
    owed: dict[Key, list[_Piece]] = attrs.field(factory=dict)
    values: set[tuple[str, int, int]] = attrs.field(factory=set)
    ahead: dict[Key, int] = attrs.field(factory=dict)
    behind: dict[Key, int] = attrs.field(factory=dict)
    weights: set[tuple[int, int, int]] = attrs.field(factory=set)  # (stage, microbatch, atom) that has its weight gradient
    reduced: set[tuple[int, str]] = attrs.field(factory=set)
    held: float = 0.0
    peak: float = 0.0


def check(program: Program, layout: Layout | None = None, microbatches: int | None = None) -> tuple[float, ...]:
    """The most that each rank keeps for its backwards at a time, in stages of a microbatch.

    A program of compute alone is lowered first. `microbatches`: how many there are (default: those that the program names).
    Raises ProgramError with the program drawn and the failing action marked when an action lacks what it needs, stands twice, names what is not
    there, ranks wait for each other, a gradient is missing or is reduced too early, twice or never, or something stays alive.
    """
    if layout is not None and len(program) != layout.mesh.pp:
        raise ProgramError(f"the program is for {len(program)} pipeline ranks; mesh {layout.mesh} has pp={layout.mesh.pp}")
    if not is_lowered(program):
        check_names(program, layout, microbatches)  # before passes that would stumble over it
        program = lower(program, layout)
    return _Proof(program, layout, microbatches).walk()


class _Proof:
    """One walk over a program."""

    def __init__(self, program: Program, layout: Layout | None, count: int | None):
        check_names(program, layout, count)
        self.program, self.layout = program, layout
        self.count = named(program) if count is None else count
        self.known = stages(program, layout)
        self.where = layout.placement if layout is not None else placement(program)
        self.flat = tuple(flat(row) for row in program)
        # an OVERLAP is two actions here and one in the drawing
        self.marks = tuple([i for i, a in enumerate(row) for _ in flat((a,))] for row in program)
        self.again = {(a.stage, a.microbatch, a.segment): bool(a.ops) for row in self.flat for a in row if a.op == "REMAT"}
        self.trains = any(a.op in BACKWARD for row in self.flat for a in row)
        self.at, self.rows = [0] * len(program), [_Row() for _ in program]
        self.seen: set[Action] = set()

    def walk(self) -> tuple[float, ...]:
        steps = {"F": self.forward, "B": self.backward, "I": self.backward, "W": self.weights, "REMAT": self.remat, "REDUCE": self.reduce}
        steps |= {"OFFLOAD": self.offload, "FETCH": self.fetch, "FREE": self.free}
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(self.flat):
                while self.at[rank] < len(row):
                    a = row[self.at[rank]]
                    if a in self.seen:
                        raise self.fail(rank, "it stands twice")
                    if a.op in MOVES:
                        if not self.message(rank, a):
                            break
                    elif a.op == "REDUCE" and self.layout and a.segment in self.layout.specs:
                        if not self.tie(rank, a):
                            break
                    else:
                        steps[a.op](rank, a)
                        self.done(rank)
                    moved = True
        if stuck := {r: i for r, i in enumerate(self.at) if i < len(self.flat[r])}:
            words = ", ".join(f"{self.flat[r][i]} on rank {r}" for r, i in stuck.items())
            marks = {r: self.marks[r][i] for r, i in stuck.items()}
            raise ProgramError(f"deadlock, these wait for each other or for what never comes: {words}\n{draw(self.program, marks)}")
        self.nothing_stays()
        self.nothing_is_missing()
        return tuple(round(row.peak, 9) for row in self.rows)

    def done(self, rank: int) -> None:
        self.seen.add(self.flat[rank][self.at[rank]])
        self.at[rank] += 1
        row = self.rows[rank]
        row.peak = max(row.peak, row.held)

    def fail(self, rank: int, why: str) -> ProgramError:
        i = self.at[rank]
        return ProgramError(f"{self.flat[rank][i]} on rank {rank}: {why}\n{draw(self.program, (rank, self.marks[rank][i]))}")

    def span(self, a: Action) -> tuple[Stage, int, int, Key]:
        stage = self.known[a.stage]
        span = stage.span(a.segment)
        assert span is not None  # check_names has seen to it
        assert a.microbatch is not None
        return stage, *span, (a.stage, a.microbatch)

    def hold(self, rank: int, piece: _Piece, stage: int, sign: int) -> None:
        """Counts a piece that is made and not away, in shares of its stage."""
        if piece.made and not piece.away:
            self.rows[rank].held += sign * (piece.hi - piece.lo) / len(self.known[stage].atoms)

    def forward(self, rank: int, a: Action) -> None:
        stage, lo, hi, key = self.span(a)
        row, (s, m) = self.rows[rank], key
        if (ahead := row.ahead.get(key, 0)) > lo:
            raise self.fail(rank, "it stands twice: the forward has passed here")
        if ahead < lo:
            raise self.fail(rank, f"the forward of {stage.atoms[ahead]} comes before it")
        if lo == 0 and s > 0:
            self.take(rank, "F", s, m, f"what stage {s - 1} gives has not arrived")
        for name in stage.pieces(a.segment) if self.trains else ():
            span = stage.span(name) or (lo, hi)
            if span[1] > stage.stop:  # else it has no backward, and nothing is kept
                names = (name, stage.layers[span[0]], None)
                partly = next((ops for n in names if (ops := self.again.get((s, m, n))) is not None), None)
                piece = _Piece(name, *span, made=partly is not False, partly=bool(partly))
                row.kept.setdefault(key, []).append(piece)
                self.hold(rank, piece, s, 1)
        row.ahead[key] = hi
        if hi == len(stage.atoms):
            self.give(rank, "F", s, s + 1, m)

    def backward(self, rank: int, a: Action) -> None:
        stage, lo, hi, key = self.span(a)
        row, (s, m) = self.rows[rank], key
        if row.ahead.get(key, 0) < len(stage.atoms):
            raise self.fail(rank, f"its forward {attrs.evolve(a, op='F')} has not run")
        if (behind := row.behind.get(key, len(stage.atoms))) < hi:
            raise self.fail(rank, "it stands twice: the backward has passed here")
        if behind > hi:
            raise self.fail(rank, f"the backward of {stage.atoms[behind - 1]} comes before it")
        if hi == len(stage.atoms) and s + 1 < len(self.known) and self.known[s + 1].upstream:
            self.take(rank, "B", s, m, f"the gradient that stage {s + 1} gives has not arrived")
        pieces = row.kept.get(key, [])
        while pieces and pieces[-1].hi > lo:
            piece = pieces.pop()
            if piece.lo < lo:
                raise self.fail(rank, f"its forward was cut at {piece.name!r}, of which it is a part: give the forward the same segment")
            if piece.away:
                raise self.fail(rank, f"{piece.name or 'what it needs'} is on the host: there is no FETCH before it")
            if not piece.made or piece.partly:
                raise self.fail(rank, f"{piece.name or 'what it needs'} was not kept and has not been made again: there is no REMAT before it")
            if a.op == "I" and any(stage.inside[piece.lo : piece.hi]):
                row.owed.setdefault(key, []).append(piece)
            else:
                self.hold(rank, piece, s, -1)
                row.weights.update((s, m, i) for i in range(piece.lo, piece.hi))
        row.behind[key] = max(lo, stage.stop)
        if row.behind[key] == stage.stop and stage.upstream:
            self.give(rank, "B", s, s - 1, m)

    def weights(self, rank: int, a: Action) -> None:
        _, lo, hi, key = self.span(a)
        row = self.rows[rank]
        owed = [p for p in row.owed.get(key, []) if lo <= p.lo and p.hi <= hi]
        if not owed:
            raise self.fail(rank, f"its {attrs.evolve(a, op='I')} has not run, or has left nothing that trains")
        for piece in owed:
            row.owed[key].remove(piece)
            self.hold(rank, piece, a.stage, -1)
            row.weights.update((*key, i) for i in range(piece.lo, piece.hi))

    def mine(self, rank: int, a: Action, why: str) -> list[_Piece]:
        """What the forward has kept of the action's segment."""
        _, lo, hi, key = self.span(a)
        found = [p for p in self.rows[rank].kept.get(key, []) if lo <= p.lo and p.hi <= hi]
        if not found:
            raise self.fail(rank, why)
        return found

    def remat(self, rank: int, a: Action) -> None:
        for piece in self.mine(rank, a, "there is nothing to make again: its forward has not run, or its backward has"):
            if piece.away:
                raise self.fail(rank, f"{piece.name or 'what it needs'} is on the host: there is no FETCH before it")
            if piece.made and not piece.partly:
                raise self.fail(rank, "it is there already")
            self.hold(rank, piece, a.stage, -1)
            piece.made, piece.partly = True, False
            self.hold(rank, piece, a.stage, 1)

    def offload(self, rank: int, a: Action) -> None:
        for piece in self.mine(rank, a, "there is nothing to take away: its forward has not run, or its backward has"):
            if piece.away:
                raise self.fail(rank, "it is on the host already")
            self.hold(rank, piece, a.stage, -1)
            piece.away = True

    def fetch(self, rank: int, a: Action) -> None:
        for piece in self.mine(rank, a, "there is nothing to fetch: its forward has not run, or its backward has"):
            if not piece.away:
                raise self.fail(rank, "it is not on the host: there is no OFFLOAD before it")
            piece.away = False
            self.hold(rank, piece, a.stage, 1)

    def free(self, rank: int, a: Action) -> None:
        assert a.microbatch is not None
        self.take(rank, f"sent {a.segment}", a.stage, a.microbatch, f"nothing was sent: there is no {a.segment} before it")

    def reduce(self, rank: int, a: Action) -> None:
        row = self.rows[rank]
        if self.layout is None:
            users = [(a.stage, a.segment)]
        else:
            mine = reduced_layers(self.layout, rank)
            if (a.stage, a.segment) not in mine:
                there = ", ".join(layer for s, layer in mine if s == a.stage) or "none"
                if a.segment is None:
                    raise self.fail(rank, f"a REDUCE is of one layer, of {there}; or give the compute alone, and all that is missing is added")
                raise self.fail(rank, f"stage {a.stage} has no layer {a.segment!r} to reduce; it has {there}")
            who = users_of(self.layout, rank)
            users = list(dict.fromkeys(user for path in mine[a.stage, a.segment] for user in who[path]))  # type: ignore[index]
        for s, layer in users:
            span = self.known[s].span(layer) or (0, len(self.known[s].atoms))
            trained = [i for i in range(*span) if self.known[s].inside[i]]
            if late := [m for m in range(self.count) if any((s, m, i) not in row.weights for i in trained)]:
                raise self.fail(rank, f"the gradients of microbatches [{some(late)}] would come after it")
        row.reduced.add((a.stage, a.segment or WHOLE))

    def tie(self, rank: int, a: Action) -> bool:
        """The sum over the stages that use a parameter: all ranks that hold it meet."""
        assert self.layout is not None
        assert a.segment is not None
        holders = self.layout.holders(a.segment)
        if a.segment not in tied_paths(self.layout, rank):
            raise self.fail(rank, f"{a.segment} is not trained here by several ranks; its ranks are {list(holders)}")
        for r in holders:
            now = self.flat[r][self.at[r]] if self.at[r] < len(self.flat[r]) else None
            if now is None or (now.op, now.segment) != (a.op, a.segment):
                return False
        for r in holders:
            early = [u for u, paths in reduced_layers(self.layout, r).items() if a.segment in paths and u not in self.rows[r].reduced]
            if early:
                raise self.fail(r, f"{early[0][0]}REDUCE[{early[0][1]}] comes before it")
            self.done(r)
        return True

    def message(self, rank: int, a: Action) -> bool:
        """A SEND and its RECV, when both ranks have come to them."""
        kind, (s, m), step = a.op[-1], (a.stage, a.microbatch), 1 if a.op.endswith("F") else -1
        assert m is not None
        sends = a.op.startswith("SEND")
        source, to = (s, s + step) if sends else (s - step, s)
        if not (0 <= source < len(self.known) and 0 <= to < len(self.known)):
            raise self.fail(rank, f"there is no stage {to if sends else source}")
        here, there = self.where[source], self.where[to]
        if here == there:
            raise self.fail(rank, f"stages {source} and {to} lie on one rank: nothing is sent")
        if not sends:  # the sender does both
            return False
        if (f"out {kind}", s, m) not in self.rows[rank].values:
            raise self.fail(rank, f"there is nothing to send: {s}{'F' if kind == 'F' else 'B'}{m} has not run, or its gradient is not wanted")
        now = self.flat[there][self.at[there]] if self.at[there] < len(self.flat[there]) else None
        if now is None or (now.op, now.stage, now.microbatch) != (f"RECV_{kind}", to, m):
            return False
        if now in self.seen:
            raise self.fail(there, "it stands twice")
        self.rows[rank].values.remove((f"out {kind}", s, m))
        self.rows[rank].values.add((f"sent {a.op}", s, m))
        self.rows[there].values.add((kind, to, m))
        self.done(rank)
        self.done(there)
        return True

    def take(self, rank: int, kind: str, s: int, m: int, why: str) -> None:
        if (kind, s, m) not in self.rows[rank].values:
            raise self.fail(rank, why)
        self.rows[rank].values.remove((kind, s, m))

    def give(self, rank: int, kind: str, s: int, to: int, m: int) -> None:
        """A value for another stage: it is there at once where that lies on the same rank."""
        if 0 <= to < len(self.known):
            self.rows[rank].values.add((kind, to, m) if self.where[to] == rank else (f"out {kind}", s, m))

    def nothing_stays(self) -> None:
        words = {"F": "{0}F{1} does not use what has arrived for it", "B": "no backward uses the gradient that has arrived for {0}F{1}"}
        words |= {"out F": "there is no {0}SEND_F{1}", "out B": "there is no {0}SEND_B{1}"}
        words |= {"sent SEND_F": "there is no {0}FREE{1}[SEND_F]", "sent SEND_B": "there is no {0}FREE{1}[SEND_B]"}
        for rank, row in enumerate(self.rows):
            why = ""
            if kept := [f"{s}F{m}" for (s, m), pieces in sorted(row.kept.items()) if pieces]:
                why = f"activations stay alive, there is no backward for {', '.join(kept)}"
            elif owed := [f"{s}I{m}" for (s, m), pieces in sorted(row.owed.items()) if pieces]:
                why = f"activations stay alive, there is no W for {', '.join(owed)}"
            elif row.values:
                why = f"values stay alive: {'; '.join(words[kind].format(s, m) for kind, s, m in sorted(row.values))}"
            if why:
                raise ProgramError(f"rank {rank}: {why}\n{draw(self.program, {rank: len(self.program[rank])}, WIDTH)}")

    def nothing_is_missing(self) -> None:
        missing = []
        for s, stage in enumerate(self.known):
            row = self.rows[self.where[s]]
            missing += [f"{s}F{m}" for m in range(self.count) if row.ahead.get((s, m), 0) < len(stage.atoms)]
            if self.trains:
                back = [m for m in range(self.count) if row.behind.get((s, m), len(stage.atoms)) > stage.stop]
                missing += [f"{s}B{m}" for m in back]
        if self.trains and self.layout is not None:
            for rank in range(len(self.program)):
                wanted = [Action("REDUCE", s, segment=layer) for s, layer in reduced_layers(self.layout, rank)]
                who = users_of(self.layout, rank)
                wanted += [Action("REDUCE", who[path][0][0], segment=path) for path in tied_paths(self.layout, rank)]
                missing += [str(a) for a in wanted if a not in self.seen]
        if missing:
            raise ProgramError(f"missing: {some(missing)}; without them gradients would be lost\n{draw(self.program, width=WIDTH)}")

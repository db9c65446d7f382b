"""A program is proven before it runs: no device, no tensors, only what each action needs and leaves.

The ranks are walked together with sends that block until they are received, as on the strictest device. Every value is written once and taken
once:

    F      takes what arrives at its stage, leaves what its backward needs (KEPT) and what the next stage and edges get
    B, I   take KEPT and the gradients that arrive, leave those for the stage before and for edges; I leaves what its W needs (OWED)
    W      takes OWED                  SEND, RECV, FREE   what was made, and the buffer that it was sent from
    BRIDGE takes what each unit has made for an edge, for one microbatch, and brings it to the unit that it is for
    REMAT  makes again what a forward did not keep          OFFLOAD, FETCH   KEPT, to the host and back
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from lf.chain_layouts import Joint
from lf.schedule.draw import WIDTH, draw
from lf.schedule.ground import Ground, Where, ground, joined
from lf.schedule.ir import BACKWARD, BRIDGES, COMPUTE, MOVES, Action, Program, ProgramError, flat, some
from lf.schedule.lower import is_lowered, lower, reduced_layers, tied_paths, users_of
from lf.schedule.names import check_names
from lf.schedule.pieces import WHOLE, Stage

Key = tuple[str, int, int]  # chain, stage, unit


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
    backward has ended. `values` are of a chain, stage and unit; those of edges ("edge F": has arrived, "made F": is to be carried) of a joint, by
    number, and a microbatch."""

    kept: dict[Key, list[_Piece]] = attrs.field(factory=dict)
    owed: dict[Key, list[_Piece]] = attrs.field(factory=dict)
    values: set[tuple[str, str, int, int]] = attrs.field(factory=set)
    ahead: dict[Key, int] = attrs.field(factory=dict)
    behind: dict[Key, int] = attrs.field(factory=dict)
    weights: set[tuple[str, int, int, int]] = attrs.field(factory=set)  # (chain, stage, unit, atom) that has its weight gradient
    reduced: set[tuple[str, int, str]] = attrs.field(factory=set)
    held: float = 0.0
    peak: float = 0.0


def check(program: Program, where: Where = None, microbatches: int | None = None, joints: Sequence[Joint] = ()) -> tuple[float, ...]:
    """The most that each rank keeps for its backwards at a time, in stages of a microbatch (of a unit that several rows share, its part).

    A program of compute alone is lowered first. `microbatches`: how many there are (default: those that the program names). `joints`: between the
    chains of a program without a layout.
    Raises ProgramError with the program drawn and the failing action marked when an action lacks what it needs, stands twice, names what is not
    there, ranks wait for each other, a gradient is missing or is reduced too early, twice or never, or something stays alive.
    """
    layouts = joined(where)
    if layouts is not None and len(program) != len(layouts.rows):
        mesh = layouts.chains[layouts.main].mesh
        words = f"mesh {mesh} has pp={mesh.pp}" if layouts.model is None else f"the chains lie in {len(layouts.rows)} rows of ranks"
        raise ProgramError(f"the program is for {len(program)} pipeline ranks; {words}")
    if not is_lowered(program):
        check_names(ground(program, layouts, joints, microbatches))  # before passes that would stumble over it
        program = lower(program, layouts, joints)
    on = ground(program, layouts, joints, microbatches)
    check_names(on)
    return _Proof(on).walk()


class _Proof:
    """One walk over a program."""

    def __init__(self, on: Ground):
        self.on, self.program, self.known, self.count = on, on.program, on.known, on.count
        self.flat = tuple(flat(row) for row in self.program)
        # an OVERLAP is two actions here and one in the drawing
        self.marks = tuple([i for i, a in enumerate(row) for _ in flat((a,))] for row in self.program)
        self.again = {(a.chain, a.stage, a.microbatch, a.segment): bool(a.ops) for row in self.flat for a in row if a.op == "REMAT"}
        self.trains = any(a.op in BACKWARD for row in self.flat for a in row)
        self.at, self.rows = [0] * len(self.program), [_Row() for _ in self.program]
        self.seen: set[tuple[int, Action]] = set()

    def walk(self) -> tuple[float, ...]:
        steps = {"F": self.forward, "B": self.backward, "I": self.backward, "W": self.weights, "REMAT": self.remat, "REDUCE": self.reduce}
        steps |= {"OFFLOAD": self.offload, "FETCH": self.fetch, "FREE": self.free, "BRIDGE_F": self.bridge, "BRIDGE_B": self.bridge}
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(self.flat):
                while self.at[rank] < len(row):
                    a = row[self.at[rank]]
                    if (rank, a) in self.seen:
                        raise self.fail(rank, "it stands twice")
                    if a.op in MOVES:
                        if not self.message(rank, a):
                            break
                    else:
                        mates = self.mates(rank, a)
                        if len(mates) > 1 and not all(self.on.meets(self.now(r), a) for r in mates):
                            break
                        for r in mates:
                            steps[a.op](r, self.flat[r][self.at[r]])
                        for r in mates:
                            self.done(r)
                    moved = True
        if stuck := {r: i for r, i in enumerate(self.at) if i < len(self.flat[r])}:
            words = ", ".join(f"{self.flat[r][i]} on rank {r}" for r, i in stuck.items())
            marks = {r: self.marks[r][i] for r, i in stuck.items()}
            raise ProgramError(f"deadlock, these wait for each other or for what never comes: {words}\n{draw(self.program, marks)}")
        self.nothing_stays()
        self.nothing_is_missing()
        return tuple(round(row.peak, 9) for row in self.rows)

    def now(self, rank: int) -> Action | None:
        """The action that a rank has come to."""
        return self.flat[rank][self.at[rank]] if self.at[rank] < len(self.flat[rank]) else None

    def mates(self, rank: int, a: Action) -> tuple[int, ...]:
        """The ranks that meet in an action."""
        if a.op in COMPUTE:
            return self.on.together.get((a.chain, a.stage, rank), (rank,))
        if a.op in BRIDGES:
            k = self.on.bridge(a)
            assert k is not None
            assert a.microbatch is not None
            return self.on.bridged(k, a.microbatch)
        return self.on.summed(a, rank) if a.op == "REDUCE" else (rank,)

    def done(self, rank: int) -> None:
        self.seen.add((rank, self.flat[rank][self.at[rank]]))
        self.at[rank] += 1
        row = self.rows[rank]
        row.peak = max(row.peak, row.held)

    def fail(self, rank: int, why: str) -> ProgramError:
        i = self.at[rank]
        return ProgramError(f"{self.flat[rank][i]} on rank {rank}: {why}\n{draw(self.program, (rank, self.marks[rank][i]))}")

    def span(self, a: Action) -> tuple[Stage, int, int, Key]:
        stage = self.known[a.chain][a.stage]
        span = stage.span(a.segment)
        assert span is not None  # check_names has seen to it
        assert a.microbatch is not None
        return stage, *span, (a.chain, a.stage, a.microbatch)

    def hold(self, rank: int, piece: _Piece, key: Key, sign: int) -> None:
        """Counts a piece that is made and not away, in shares of its stage."""
        if piece.made and not piece.away:
            share = len(self.known[key[0]][key[1]].atoms) * len(self.on.rows[key])
            self.rows[rank].held += sign * (piece.hi - piece.lo) / share

    def edges(self, key: Key, into: bool, live: bool = False) -> list[tuple[int, int]]:
        """(joint, microbatch) of what edges bring into a unit of a stage, or take out of it; `live`: of those whose gradient is wanted."""
        chain, s, u = key
        joints = (self.on.into if into else self.on.out)(chain, s)
        return [(k, m) for k in joints if self.on.live[k] or not live for m in self.on.group(chain, u)]

    def forward(self, rank: int, a: Action) -> None:
        stage, lo, hi, key = self.span(a)
        row, (c, s, u) = self.rows[rank], key
        if (ahead := row.ahead.get(key, 0)) > lo:
            raise self.fail(rank, "it stands twice: the forward has passed here")
        if ahead < lo:
            raise self.fail(rank, f"the forward of {stage.atoms[ahead]} comes before it")
        if lo == 0 and s > 0:
            self.take(rank, "F", c, s, u, f"what stage {s - 1} gives has not arrived")
        for k, m in self.edges(key, into=True) if lo == 0 else ():
            j = self.on.joints[k]
            self.take(rank, "edge F", "", k, m, f"what edge {j.name} brings of microbatch {m} has not arrived: there is no BRIDGE_F before it")
        for name in stage.pieces(a.segment) if self.trains else ():
            span = stage.span(name) or (lo, hi)
            if span[1] > stage.stop:  # else it has no backward, and nothing is kept
                names = (name, stage.layers[span[0]], None)
                partly = next((ops for n in names if (ops := self.again.get((*key, n))) is not None), None)
                piece = _Piece(name, *span, made=partly is not False, partly=bool(partly))
                row.kept.setdefault(key, []).append(piece)
                self.hold(rank, piece, key, 1)
        row.ahead[key] = hi
        if hi == len(stage.atoms):
            self.give(rank, "F", key, s + 1)
            row.values.update(("made F", "", k, m) for k, m in self.edges(key, into=False))

    def backward(self, rank: int, a: Action) -> None:
        stage, lo, hi, key = self.span(a)
        row, (c, s, u) = self.rows[rank], key
        if row.ahead.get(key, 0) < len(stage.atoms):
            raise self.fail(rank, f"its forward {attrs.evolve(a, op='F')} has not run")
        if (behind := row.behind.get(key, len(stage.atoms))) < hi:
            raise self.fail(rank, "it stands twice: the backward has passed here")
        if behind > hi:
            raise self.fail(rank, f"the backward of {stage.atoms[behind - 1]} comes before it")
        if hi == len(stage.atoms):
            if s + 1 < len(self.known[c]) and self.known[c][s + 1].upstream:
                self.take(rank, "B", c, s, u, f"the gradient that stage {s + 1} gives has not arrived")
            for k, m in self.edges(key, into=False, live=True):
                what = f"the gradient that comes back over edge {self.on.joints[k].name} of microbatch {m}"
                self.take(rank, "edge B", "", k, m, f"{what} has not arrived: there is no BRIDGE_B before it")
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
                self.hold(rank, piece, key, -1)
                row.weights.update((*key, i) for i in range(piece.lo, piece.hi))
        row.behind[key] = max(lo, stage.stop)
        if row.behind[key] == stage.stop:
            if stage.upstream:
                self.give(rank, "B", key, s - 1)
            row.values.update(("made B", "", k, m) for k, m in self.edges(key, into=True, live=True))

    def weights(self, rank: int, a: Action) -> None:
        _, lo, hi, key = self.span(a)
        row = self.rows[rank]
        owed = [p for p in row.owed.get(key, []) if lo <= p.lo and p.hi <= hi]
        if not owed:
            raise self.fail(rank, f"its {attrs.evolve(a, op='I')} has not run, or has left nothing that trains")
        for piece in owed:
            row.owed[key].remove(piece)
            self.hold(rank, piece, key, -1)
            row.weights.update((*key, i) for i in range(piece.lo, piece.hi))

    def bridge(self, rank: int, a: Action) -> None:
        """On a rank that gives, what was made goes; on one that takes, it is there. A rank may do both."""
        k, kind = self.on.bridge(a), a.op[-1]
        assert k is not None
        assert a.microbatch is not None
        source, target = self.on.ends(k, a.microbatch) if kind == "F" else self.on.ends(k, a.microbatch)[::-1]
        if kind == "B" and not self.on.live[k]:
            raise self.fail(rank, "nothing that trains is behind this edge: no gradient goes back over it")
        if rank in self.on.rows.get(source, ()):
            made = "its forward" if kind == "F" else "its backward"
            what = Action("F" if kind == "F" else "B", source[1], source[2], chain=source[0])
            self.take(rank, f"made {kind}", "", k, a.microbatch, f"there is nothing to carry: {made} {what} has not run here")
        if rank in self.on.rows.get(target, ()):
            self.rows[rank].values.add((f"edge {kind}", "", k, a.microbatch))

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
            self.hold(rank, piece, self.span(a)[3], -1)
            piece.made, piece.partly = True, False
            self.hold(rank, piece, self.span(a)[3], 1)

    def offload(self, rank: int, a: Action) -> None:
        for piece in self.mine(rank, a, "there is nothing to take away: its forward has not run, or its backward has"):
            if piece.away:
                raise self.fail(rank, "it is on the host already")
            self.hold(rank, piece, self.span(a)[3], -1)
            piece.away = True

    def fetch(self, rank: int, a: Action) -> None:
        for piece in self.mine(rank, a, "there is nothing to fetch: its forward has not run, or its backward has"):
            if not piece.away:
                raise self.fail(rank, "it is not on the host: there is no OFFLOAD before it")
            piece.away = False
            self.hold(rank, piece, self.span(a)[3], 1)

    def free(self, rank: int, a: Action) -> None:
        assert a.microbatch is not None
        self.take(rank, f"sent {a.segment}", a.chain, a.stage, a.microbatch, f"nothing was sent: there is no {a.segment} before it")

    def reduce(self, rank: int, a: Action) -> None:
        row, layouts, known = self.rows[rank], self.on.layouts, self.known[a.chain]
        if layouts is None:
            users = [(a.stage, a.segment)]
        elif a.segment in layouts.chains[a.chain].specs:
            self.tie(rank, a)
            return
        else:
            layout, pp = layouts.chains[a.chain], layouts.pp(a.chain, rank)
            assert pp is not None
            mine = reduced_layers(layout, pp)
            if (a.stage, a.segment) not in mine:
                there = ", ".join(layer for s, layer in mine if s == a.stage) or "none"
                if a.segment is None:
                    raise self.fail(rank, f"a REDUCE is of one layer, of {there}; or give the compute alone, and all that is missing is added")
                raise self.fail(rank, f"stage {a.stage} has no layer {a.segment!r} to reduce; it has {there}")
            who = users_of(layout, pp)
            users = list(dict.fromkeys(user for path in mine[a.stage, a.segment] for user in who[path]))  # type: ignore[index]
        for s, layer in users:
            span = known[s].span(layer) or (0, len(known[s].atoms))
            trained = [i for i in range(*span) if known[s].inside[i]]
            here = [u for u in range(self.on.units[a.chain]) if rank in self.on.rows.get((a.chain, s, u), ())]
            if late := [u for u in here if any((a.chain, s, u, i) not in row.weights for i in trained)]:
                raise self.fail(rank, f"the gradients of microbatches [{some(late)}] would come after it")
        row.reduced.add((a.chain, a.stage, a.segment or WHOLE))

    def tie(self, rank: int, a: Action) -> None:
        """The sum over the stages that use a parameter: all ranks that hold it meet."""
        layouts = self.on.layouts
        assert layouts is not None
        assert a.segment is not None
        layout, pp = layouts.chains[a.chain], layouts.pp(a.chain, rank)
        assert pp is not None
        if a.segment not in tied_paths(layout, pp):
            raise self.fail(rank, f"{a.segment} is not trained here by several ranks; its ranks are {list(layout.holders(a.segment))}")
        early = [u for u, paths in reduced_layers(layout, pp).items() if a.segment in paths and (a.chain, *u) not in self.rows[rank].reduced]
        if early:
            raise self.fail(rank, f"{early[0][0]}REDUCE[{early[0][1]}] comes before it")

    def message(self, rank: int, a: Action) -> bool:
        """A SEND and its RECV, when all ranks that send and receive have come to them."""
        kind, c, s, m, step = a.op[-1], a.chain, a.stage, a.microbatch, 1 if a.op.endswith("F") else -1
        assert m is not None
        sends = a.op.startswith("SEND")
        source, to = (s, s + step) if sends else (s - step, s)
        if not (0 <= source < len(self.known[c]) and 0 <= to < len(self.known[c])):
            raise self.fail(rank, f"there is no stage {to if sends else source}")
        here, there = (self.on.rows.get((c, at, m)) or self.on.homes[c, at] for at in (source, to))
        if here == there:
            raise self.fail(rank, f"stages {source} and {to} lie on one rank: nothing is sent")
        if not sends:  # the sender does both
            return False
        if (f"out {kind}", c, s, m) not in self.rows[rank].values:
            raise self.fail(rank, f"there is nothing to send: {s}{'F' if kind == 'F' else 'B'}{m} has not run, or its gradient is not wanted")
        arrives = Action(f"RECV_{kind}", to, m, chain=c)
        if any(self.now(r) != a for r in here) or any(self.now(r) != arrives for r in there):
            return False
        for r in here:
            if (f"out {kind}", c, s, m) not in self.rows[r].values:
                raise self.fail(r, "there is nothing to send")
            self.rows[r].values.remove((f"out {kind}", c, s, m))
            self.rows[r].values.add((f"sent {a.op}", c, s, m))
        for r in there:
            if (r, arrives) in self.seen:
                raise self.fail(r, "it stands twice")
            self.rows[r].values.add((kind, c, to, m))
        for r in (*here, *there):
            self.done(r)
        return True

    def take(self, rank: int, kind: str, chain: str, at: int, m: int, why: str) -> None:
        if (kind, chain, at, m) not in self.rows[rank].values:
            raise self.fail(rank, why)
        self.rows[rank].values.remove((kind, chain, at, m))

    def give(self, rank: int, kind: str, key: Key, to: int) -> None:
        """A value for another stage: it is there at once where that lies on the same rank."""
        c, s, m = key
        if 0 <= to < len(self.known[c]):
            stays = self.on.rows.get((c, to, m)) == self.on.rows.get(key)
            self.rows[rank].values.add((kind, c, to, m) if stays else (f"out {kind}", c, s, m))

    def nothing_stays(self) -> None:
        words = {"F": "{0}F{1} does not use what has arrived for it", "B": "no backward uses the gradient that has arrived for {0}F{1}"}
        words |= {"out F": "there is no {0}SEND_F{1}", "out B": "there is no {0}SEND_B{1}"}
        words |= {"sent SEND_F": "there is no {0}FREE{1}[SEND_F]", "sent SEND_B": "there is no {0}FREE{1}[SEND_B]"}
        for rank, row in enumerate(self.rows):
            why = ""
            if kept := [f"{_named(c, s)}F{m}" for (c, s, m), pieces in sorted(row.kept.items()) if pieces]:
                why = f"activations stay alive, there is no backward for {', '.join(kept)}"
            elif owed := [f"{_named(c, s)}I{m}" for (c, s, m), pieces in sorted(row.owed.items()) if pieces]:
                why = f"activations stay alive, there is no W for {', '.join(owed)}"
            elif row.values:
                left = [words[kind].format(_named(c, s), m) if kind in words else self.unused(kind, s, m) for kind, c, s, m in sorted(row.values)]
                why = f"values stay alive: {'; '.join(left)}"
            if why:
                raise ProgramError(f"rank {rank}: {why}\n{draw(self.program, {rank: len(self.program[rank])}, WIDTH)}")

    def unused(self, kind: str, k: int, microbatch: int) -> str:
        """In words, what is left of an edge."""
        joint = self.on.joints[k]
        action = Action(f"BRIDGE_{kind[-1]}", joint.target_stage, microbatch, joint.name, chain=joint.target)
        return f"there is no {action}" if kind.startswith("made") else f"nothing uses what {action} has brought"

    def nothing_is_missing(self) -> None:
        missing = []
        for c, known in self.known.items():
            for s, stage in enumerate(known):
                for u in range(self.on.units[c]):
                    key = c, s, u
                    rows = [self.rows[r] for r in self.on.rows.get(key, ())]
                    if not rows or any(row.ahead.get(key, 0) < len(stage.atoms) for row in rows):
                        missing.append(f"{_named(c, s)}F{u}")
                    if self.trains and stage.live and not (rows and all(row.behind.get(key, len(stage.atoms)) == stage.stop for row in rows)):
                        missing.append(f"{_named(c, s)}B{u}")
            if not self.on.units[c]:
                missing.append(f"every forward of chain {c!r}")
        if self.trains and self.on.layouts is not None:
            missing += self.sums_missing()
        if missing:
            raise ProgramError(f"missing: {some(missing)}; without them gradients would be lost\n{draw(self.program, width=WIDTH)}")

    def sums_missing(self) -> list[str]:
        layouts, out = self.on.layouts, []
        assert layouts is not None
        for rank in range(len(self.program)):
            for c, layout in layouts.chains.items():
                if (pp := layouts.pp(c, rank)) is None:
                    continue
                wanted = [Action("REDUCE", s, segment=layer, chain=c) for s, layer in reduced_layers(layout, pp)]
                who = users_of(layout, pp)
                wanted += [Action("REDUCE", who[path][0][0], segment=path, chain=c) for path in tied_paths(layout, pp)]
                out += [str(a) for a in wanted if (rank, a) not in self.seen]
        return out


def _named(chain: str, stage: int) -> str:
    return f"{chain}:{stage}" if chain else str(stage)

"""What one rank has while a program is proven: no tensors, only that they are there. Each action says what it needs and what it leaves.

Every value is written once and taken once:

    F      takes what arrives at its stage, leaves what its backward needs (`kept`) and what the next stage and edges get
    B, I   take what was kept and the gradients that arrive, leave those for the stage before and for edges; I leaves what its W needs (`owed`)
    W      takes what is owed                  SEND, FREE   take what was made, and the buffer that it was sent from
    BRIDGE takes what a unit has made for an edge, for one microbatch, and brings it to the unit that it is for
    REMAT  makes again what a forward did not keep          OFFLOAD, FETCH   what was kept, to the host and back
    GATHER makes a layer whole whose parameters lie in shards, for all that computes with it until its RELEASE
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from lf.schedule.ground import Ground
from lf.schedule.ir import Action
from lf.schedule.pieces import Stage
from lf.schedule.shard import gathered_layers

Key = tuple[str, int, int]  # chain, stage, unit
Layer = tuple[str, int, str]  # chain, stage, layer


class Lack(Exception):
    """Why an action cannot run on a rank."""


@attrs.define
class Piece:
    """What a forward keeps of atoms [lo, hi). `made`: it is there, and not only what it can be made again from; `partly`: some ops are to be run
    again; `away`: on the host."""

    name: str
    lo: int
    hi: int
    made: bool
    partly: bool = False
    away: bool = False


@attrs.define
class Holds:
    """Of one rank, and how far it has come: `ahead`, the atom with which the next forward begins; `behind`, the atom before which the last backward
    has ended. `values` are of a chain, stage and unit; those of edges ("edge F": has arrived, "made F": is to be carried) of a joint, by number, and
    a microbatch. `again`: of what this rank makes again, whether it is some ops alone; `trains`: whether there is any backward."""

    on: Ground
    row: int
    again: dict[tuple[str, int, int | None, str | None], bool]
    trains: bool
    kept: dict[Key, list[Piece]] = attrs.field(factory=dict)
    owed: dict[Key, list[Piece]] = attrs.field(factory=dict)
    values: set[tuple[str, str, int, int]] = attrs.field(factory=set)
    ahead: dict[Key, int] = attrs.field(factory=dict)
    behind: dict[Key, int] = attrs.field(factory=dict)
    ready: set[tuple[str, int, int, int]] = attrs.field(factory=set)  # (chain, stage, unit, atom) that has its weight gradient
    reduced: set[tuple[str, int, str]] = attrs.field(factory=set)
    part_reduced: dict[tuple[str, int, str], set[int]] = attrs.field(factory=dict)  # of a layer, the units that it was reduced after
    whole: set[Layer] = attrs.field(factory=set)
    shards: set[Layer] = attrs.field(init=False)  # layers that have to be made whole
    held: float = 0.0
    peak: float = 0.0
    steps: dict[str, Callable[[Action], None]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.steps = {"F": self.forward, "B": self.backward, "I": self.backward, "W": self.weights, "REMAT": self.remat}
        self.steps |= {"SEND_F": self.send, "SEND_B": self.send, "RECV_F": self.receive, "RECV_B": self.receive, "FREE": self.free}
        self.steps |= {"GATHER": self.gather, "RELEASE": self.release}
        self.shards = set()
        for chain, layout in self.on.layouts.chains.items() if self.on.layouts else ():
            pp = self.on.layouts.pp(chain, self.row) if self.on.layouts else None
            if pp is not None and layout.sharding.stage:
                self.shards |= {(chain, *at) for at in gathered_layers(layout, pp)}
        self.steps |= {"BRIDGE_F": self.bridge, "BRIDGE_B": self.bridge, "OFFLOAD": self.offload, "FETCH": self.fetch}

    def span(self, a: Action) -> tuple[Stage, int, int, Key]:
        stage = self.on.known[a.chain][a.stage]
        span = stage.span(a.segment)
        assert span is not None  # check_names has seen to it
        assert a.microbatch is not None
        return stage, *span, (a.chain, a.stage, a.microbatch)

    def gather(self, a: Action) -> None:
        layer = (a.chain, a.stage, a.segment or "")
        if self.on.layouts is not None and layer not in self.shards:
            raise Lack(f"no parameter of {a.segment} lies in shards here")
        if layer in self.whole:
            raise Lack(f"{a.segment} is whole already: there is no RELEASE before it")
        self.whole.add(layer)

    def release(self, a: Action) -> None:
        if (layer := (a.chain, a.stage, a.segment or "")) not in self.whole:
            raise Lack(f"{a.segment} is not whole: there is no GATHER before it")
        self.whole.remove(layer)

    def needs(self, stage: Stage, lo: int, hi: int, key: Key) -> None:
        """Atoms [lo, hi) are to be computed with."""
        for layer in stage.layers[lo:hi] if self.shards else ():
            if (key[0], key[1], layer) in self.shards - self.whole:
                raise Lack(f"the parameters of {layer} lie in shards: there is no GATHER before it")

    def hold(self, piece: Piece, key: Key, sign: int) -> None:
        """Counts a piece that is made and not away, in shares of its stage."""
        if piece.made and not piece.away:
            share = len(self.on.known[key[0]][key[1]].atoms) * len(self.on.rows[key])
            self.held += sign * (piece.hi - piece.lo) / share
            self.peak = max(self.peak, self.held)

    def edges(self, key: Key, into: bool, live: bool = False) -> list[tuple[int, int]]:
        """(joint, microbatch) of what edges bring into a unit of a stage, or take out of it; `live`: of those whose gradient is wanted."""
        if not self.on.joints:
            return []
        chain, s, u = key
        joints = (self.on.into if into else self.on.out)(chain, s)
        return [(k, m) for k in joints if self.on.live[k] or not live for m in self.on.group(chain, u)]

    def forward(self, a: Action) -> None:
        stage, lo, hi, key = self.span(a)
        c, s, u = key
        self.needs(stage, lo, hi, key)
        if (ahead := self.ahead.get(key, 0)) > lo:
            raise Lack("it stands twice: the forward has passed here")
        if ahead < lo:
            raise Lack(f"the forward of {stage.atoms[ahead]} comes before it")
        if lo == 0 and s > 0:
            self.take("F", c, s, u, f"what stage {s - 1} gives has not arrived")
        for k, m in self.edges(key, into=True) if lo == 0 else ():
            j = self.on.joints[k]
            self.take("edge F", "", k, m, f"what edge {j.name} brings of microbatch {m} has not arrived: there is no BRIDGE_F before it")
        for name in stage.pieces(a.segment) if self.trains else ():
            span = stage.span(name) or (lo, hi)
            if span[1] > stage.stop:  # else it has no backward, and nothing is kept
                names = (name, stage.layers[span[0]], None)
                partly = next((ops for n in names if (ops := self.again.get((*key, n))) is not None), None)
                piece = Piece(name, *span, made=partly is not False, partly=bool(partly))
                self.kept.setdefault(key, []).append(piece)
                self.hold(piece, key, 1)
        self.ahead[key] = hi
        if hi == len(stage.atoms):
            self.give("F", key, s + 1)
            self.values.update(("made F", "", k, m) for k, m in self.edges(key, into=False))

    def backward(self, a: Action) -> None:
        stage, lo, hi, key = self.span(a)
        c, s, u = key
        self.needs(stage, max(lo, stage.stop), hi, key)
        if self.ahead.get(key, 0) < len(stage.atoms):
            raise Lack(f"its forward {attrs.evolve(a, op='F')} has not run")
        if (behind := self.behind.get(key, len(stage.atoms))) < hi:
            raise Lack("it stands twice: the backward has passed here")
        if behind > hi:
            raise Lack(f"the backward of {stage.atoms[behind - 1]} comes before it")
        if hi == len(stage.atoms):
            if s + 1 < len(self.on.known[c]) and self.on.known[c][s + 1].upstream:
                self.take("B", c, s, u, f"the gradient that stage {s + 1} gives has not arrived")
            for k, m in self.edges(key, into=False, live=True):
                what = f"the gradient that comes back over edge {self.on.joints[k].name} of microbatch {m}"
                self.take("edge B", "", k, m, f"{what} has not arrived: there is no BRIDGE_B before it")
        pieces = self.kept.get(key, [])
        while pieces and pieces[-1].hi > lo:
            piece = pieces.pop()
            if piece.lo < lo:
                raise Lack(f"its forward was cut at {piece.name!r}, of which it is a part: give the forward the same segment")
            if piece.away:
                raise Lack(f"{piece.name or 'what it needs'} is on the host: there is no FETCH before it")
            if not piece.made or piece.partly:
                raise Lack(f"{piece.name or 'what it needs'} was not kept and has not been made again: there is no REMAT before it")
            if a.op == "I" and any(stage.inside[piece.lo : piece.hi]):
                self.owed.setdefault(key, []).append(piece)
            else:
                self.hold(piece, key, -1)
                self.ready.update((*key, i) for i in range(piece.lo, piece.hi))
        self.behind[key] = max(lo, stage.stop)
        if self.behind[key] == stage.stop:
            if stage.upstream:
                self.give("B", key, s - 1)
            self.values.update(("made B", "", k, m) for k, m in self.edges(key, into=True, live=True))

    def weights(self, a: Action) -> None:
        _, lo, hi, key = self.span(a)
        owed = [p for p in self.owed.get(key, []) if lo <= p.lo and p.hi <= hi]
        if not owed:
            raise Lack(f"its {attrs.evolve(a, op='I')} has not run, or has left nothing that trains")
        for piece in owed:
            self.owed[key].remove(piece)
            self.hold(piece, key, -1)
            self.ready.update((*key, i) for i in range(piece.lo, piece.hi))

    def mine(self, a: Action, why: str) -> list[Piece]:
        """What the forward has kept of the action's segment."""
        _, lo, hi, key = self.span(a)
        found = [p for p in self.kept.get(key, []) if lo <= p.lo and p.hi <= hi]
        if not found:
            raise Lack(why)
        return found

    def remat(self, a: Action) -> None:
        for piece in self.mine(a, "there is nothing to make again: its forward has not run, or its backward has"):
            stage, _, _, key = self.span(a)
            self.needs(stage, piece.lo, piece.hi, key)
            if piece.away:
                raise Lack(f"{piece.name or 'what it needs'} is on the host: there is no FETCH before it")
            if piece.made and not piece.partly:
                raise Lack("it is there already")
            self.hold(piece, self.span(a)[3], -1)
            piece.made, piece.partly = True, False
            self.hold(piece, self.span(a)[3], 1)

    def offload(self, a: Action) -> None:
        for piece in self.mine(a, "there is nothing to take away: its forward has not run, or its backward has"):
            if piece.away:
                raise Lack("it is on the host already")
            self.hold(piece, self.span(a)[3], -1)
            piece.away = True

    def fetch(self, a: Action) -> None:
        for piece in self.mine(a, "there is nothing to fetch: its forward has not run, or its backward has"):
            if not piece.away:
                raise Lack("it is not on the host: there is no OFFLOAD before it")
            piece.away = False
            self.hold(piece, self.span(a)[3], 1)

    def free(self, a: Action) -> None:
        assert a.microbatch is not None
        self.take(f"sent {a.segment}", a.chain, a.stage, a.microbatch, f"nothing was sent: there is no {a.segment} before it")

    def bridge(self, a: Action) -> None:
        """On a rank that gives, what was made goes; on one that takes, it is there. A rank may do both."""
        k, kind = self.on.bridge(a), a.op[-1]
        assert k is not None
        assert a.microbatch is not None
        source, target = self.on.ends(k, a.microbatch) if kind == "F" else self.on.ends(k, a.microbatch)[::-1]
        if kind == "B" and not self.on.live[k]:
            raise Lack("nothing that trains is behind this edge: no gradient goes back over it")
        if self.row in self.on.rows.get(source, ()):
            made = "its forward" if kind == "F" else "its backward"
            what = Action("F" if kind == "F" else "B", source[1], source[2], chain=source[0])
            self.take(f"made {kind}", "", k, a.microbatch, f"there is nothing to carry: {made} {what} has not run here")
        if self.row in self.on.rows.get(target, ()):
            self.values.add((f"edge {kind}", "", k, a.microbatch))

    def sends(self, a: Action) -> bool:
        """Whether there is what a SEND sends."""
        return (f"out {a.op[-1]}", a.chain, a.stage, a.microbatch) in self.values

    def send(self, a: Action) -> None:
        """The buffer stays."""
        assert a.microbatch is not None
        self.take(f"out {a.op[-1]}", a.chain, a.stage, a.microbatch, "there is nothing to send")
        self.values.add((f"sent {a.op}", a.chain, a.stage, a.microbatch))

    def receive(self, a: Action) -> None:
        assert a.microbatch is not None
        self.values.add((a.op[-1], a.chain, a.stage, a.microbatch))

    def take(self, kind: str, chain: str, at: int, m: int, why: str) -> None:
        if (kind, chain, at, m) not in self.values:
            raise Lack(why)
        self.values.remove((kind, chain, at, m))

    def give(self, kind: str, key: Key, to: int) -> None:
        """A value for another stage: it is there at once where that lies on the same rank."""
        c, s, m = key
        if 0 <= to < len(self.on.known[c]):
            stays = self.on.rows.get((c, to, m)) == self.on.rows.get(key)
            self.values.add((kind, c, to, m) if stays else (f"out {kind}", c, s, m))

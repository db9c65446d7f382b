"""A training step is a program: for each pipeline rank, a tuple of actions. It is data: print it, check it, draw it, run it.

    F   forward                B   backward: gradients of the input and of the weights       REMAT   the forward again, for what was not kept
    I   gradient of the input alone       W   gradients of the weights that its I has left
    SEND_F, RECV_F   what a stage gives to the next one      SEND_B, RECV_B   the gradient of that, back
    BRIDGE_F, BRIDGE_B   what a chain gives to another one, and the gradient of that, back
    REDUCE   sum a layer's gradients over the ranks that hold them, after a microbatch or after all; of a path ('embed/weight'): over the stages that
    use it        GATHER, RELEASE   make a layer's parameters whole that lie in shards, and let go of them
    OFFLOAD, FETCH   what a forward has kept, to the host's memory and back        FREE   drop what was sent, once it has left
    OVERLAP(a, b)    a pair that may interleave

An action without a segment is of the whole stage; `segment` names one layer of it, or one segment of a layer. A SEND stands on the rank of its
stage and names that stage; its RECV names the stage that receives: 3SEND_F1 and 4RECV_F1 belong together, and 4SEND_B1 and 3RECV_B1.
What a movement starts, the first action that needs it waits for.

A model of several chains has a row for each set of ranks that do the same (`lf.chain_layouts`), and an action names its chain: vision:0F3. The
main chain runs microbatch m of the data as its unit m. Of another one a step may have fewer units, each of several microbatches (`lf.chains.groups`);
a unit stands on the rows where its F stands, one, some or all, and its items are dealt over the ranks of these. A BRIDGE names the stage that takes,
the microbatch of the data, and what is taken: decoder:2BRIDGE_F3[vision.visual]; it stands once on each row that gives or takes, and they meet there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

BACKWARD = ("B", "I")
COMPUTE = ("F", "B", "I", "W", "REMAT")
MOVES = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
BRIDGES = ("BRIDGE_F", "BRIDGE_B")
STATE = ("REDUCE",)
PARAMETERS = ("GATHER", "RELEASE")
MEMORY = ("OFFLOAD", "FETCH", "FREE")
OPS = (*COMPUTE, *MOVES, *BRIDGES, *STATE, *PARAMETERS, *MEMORY, "OVERLAP")


@attrs.frozen(cache_hash=True)
class Action:
    """`segment`: a layer or segment, or None: the whole stage; of a FREE, the movement whose buffer goes: SEND_F or SEND_B; of a BRIDGE, what is
    carried: 'source.output'. `ops`: of a REMAT, the ops that are run again (none named: all that the forward did); of a GATHER or RELEASE the op
    whose first or last it is. `chain`: of a model of several
    chains; of a BRIDGE the one that takes. `pair`: of an OVERLAP."""

    op: str
    stage: int
    microbatch: int | None = None
    segment: str | None = None
    ops: tuple[str, ...] = ()
    chain: str = ""
    pair: tuple[Action, ...] = ()

    def __str__(self) -> str:
        if self.op == "OVERLAP":
            return f"({';'.join(map(str, self.pair))})OVERLAP_{'_'.join(a.op for a in self.pair)}"
        words = (self.segment or "") + (": " + ", ".join(self.ops) if self.ops else "")
        place = f"[{words}]" if words else ""
        chain = f"{self.chain}:" if self.chain else ""
        return f"{chain}{self.stage}{self.op}{'' if self.microbatch is None else self.microbatch}{place}"


def OVERLAP(a: Action, b: Action) -> Action:
    """The pair as one action: its two may interleave, layer by layer."""
    return Action("OVERLAP", a.stage, pair=(a, b))


Program = tuple[tuple[Action, ...], ...]
Placement = tuple[int, ...]
"""The pipeline rank of each stage."""


class ProgramError(ValueError):
    """A program that cannot be run, with the action that fails."""


def as_program(made: Any, by: str) -> Program:
    """What a generator has made, `by` its name; lists will do for tuples. Raises ProgramError for what is no program."""
    rows = made if isinstance(made, (list, tuple)) else [made]
    for rank, row in enumerate(rows):
        if not isinstance(row, (list, tuple)) or not all(isinstance(a, Action) for a in row):
            raise ProgramError(f"{by} gives {row!r} for rank {rank}; a program has, for each pipeline rank, a tuple of lf.schedule.Action")
    return tuple(map(tuple, rows))


def some(values: Sequence[object], most: int = 12) -> str:
    """The first of them in words, and how many more there are."""
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")


def parts(a: Action) -> tuple[Action, ...]:
    """The two of an OVERLAP, or the action."""
    return a.pair if a.op == "OVERLAP" else (a,)


def flat(actions: Sequence[Action]) -> tuple[Action, ...]:
    """The actions with each OVERLAP as its two, one after the other: what it means without the freedom to interleave."""
    return tuple([part for a in actions for part in (a.pair if a.op == "OVERLAP" else (a,))])  # a list: several times as fast


def placement(program: Program, chain: str = "") -> Placement:
    """The rank of each stage of a chain that has one row for each, from where its forwards stand. Raises ProgramError for a stage on two or none."""
    where: dict[int, int] = {}
    for rank, actions in enumerate(program):
        for a in flat(actions):
            if a.op == "F" and a.chain == chain and where.setdefault(a.stage, rank) != rank:
                raise ProgramError(f"{a} stands on rank {rank}, other forwards of stage {a.stage} on rank {where[a.stage]}: a stage has one rank")
    if missing := sorted(set(range(max(where, default=0) + 1)) - where.keys()):
        raise ProgramError(f"stages {some(missing)} have no forward on any rank")
    return tuple(where[s] for s in range(len(where)))


def chains(program: Program) -> tuple[str, ...]:
    """The chains that a program names, in the order in which they do."""
    return tuple(dict.fromkeys(a.chain for row in program for a in flat(row)))


def units(program: Program, chain: str) -> int:
    """How many units of a chain a step has: one more than the largest that an action of compute names."""
    mine = (a for row in program for a in flat(row) if a.chain == chain and a.op in COMPUTE)
    return 1 + max((a.microbatch for a in mine if a.microbatch is not None), default=-1)


def microbatches(program: Program) -> int:
    """How many microbatches the program is for: one more than the largest that is named."""
    return 1 + max((a.microbatch for row in program for a in flat(row) if a.microbatch is not None), default=-1)

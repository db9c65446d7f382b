"""A program is proven before it runs: no device, no tensors, only what each action needs and leaves (lf/schedule/holds.py).

The ranks are walked together, each in its order, with sends that block until they are received, as on the strictest device. So if the walk comes to
the end there is one order of all meetings which every rank keeps, whatever waits for what. Those of a SEND meet those of its RECV; all that give or
take a BRIDGE meet; so do the rows that compute a unit together, and those that sum a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from lf.chain_layouts import Joint
from lf.schedule.draw import draw
from lf.schedule.ended import nothing_is_missing, nothing_stays
from lf.schedule.ground import Ground, Where, ground, joined
from lf.schedule.holds import Holds, Lack
from lf.schedule.ir import BACKWARD, BRIDGES, COMPUTE, MOVES, Action, Program, ProgramError, flat, parts
from lf.schedule.lower import is_lowered, lower
from lf.schedule.names import check_names
from lf.schedule.sums import reduce


def check(program: Program, where: Where = None, microbatches: int | None = None, joints: Sequence[Joint] = ()) -> tuple[float, ...]:
    """The most that each rank keeps for its backwards at a time, in stages of a microbatch (of a unit that several rows share, its part).

    A program of compute alone is lowered first. `microbatches`: how many there are (default: those that the program names). `joints`: between the
    chains of a program without a layout.
    On which rows a unit stands, and how many units a chain has, is what the program says: of an evaluation its forwards alone. One without such a
    forward may so be another program, which is right, too.
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
        self.on, self.program = on, on.program
        self.flat = tuple(flat(row) for row in self.program)
        # an OVERLAP is two actions here and one in the drawing
        self.marks = tuple([i for i, a in enumerate(row) for _ in parts(a)] for row in self.program)
        trains = any(a.op in BACKWARD for row in self.flat for a in row)
        again = [{(a.chain, a.stage, a.microbatch, a.segment): bool(a.ops) for a in row if a.op == "REMAT"} for row in self.flat]
        self.rows = [Holds(on, r, again[r], trains) for r in range(len(self.program))]
        self.at, self.seen = [0] * len(self.program), [set[Action]() for _ in self.program]

    def walk(self) -> tuple[float, ...]:
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(self.flat):
                while self.at[rank] < len(row):
                    a = row[self.at[rank]]
                    if not (self.message(rank, a) if a.op in MOVES else self.together(rank, a)):
                        break
                    moved = True
        for rank, actions in enumerate(self.flat):  # it waits for what cannot come again
            if self.at[rank] < len(actions) and actions[self.at[rank]] in self.seen[rank]:
                raise self.fail(rank, "it stands twice")
        if stuck := {r: i for r, i in enumerate(self.at) if i < len(self.flat[r])}:
            words = ", ".join(f"{self.flat[r][i]} on rank {r}" for r, i in stuck.items())
            marks = {r: self.marks[r][i] for r, i in stuck.items()}
            raise ProgramError(f"deadlock, these wait for each other or for what never comes: {words}\n{draw(self.program, marks)}")
        nothing_stays(self.on, self.rows)
        nothing_is_missing(self.on, self.rows)
        return tuple(round(row.peak, 9) for row in self.rows)

    def together(self, rank: int, a: Action) -> bool:
        """An action that is no message, when all that meet in it have come to it."""
        mates = self.mates(rank, a)
        if len(mates) > 1 and not all(self.on.meets(self.now(r), a) for r in mates):
            return False
        self.do(mates)
        return True

    def do(self, ranks: Sequence[int]) -> None:
        """What they have come to, on all of them."""
        for rank in ranks:
            a, row, seen = self.flat[rank][self.at[rank]], self.rows[rank], self.seen[rank]
            before = len(seen)
            seen.add(a)
            if len(seen) == before:
                raise self.fail(rank, "it stands twice")
            try:
                if a.op == "REDUCE":
                    reduce(self.on, row, a)
                else:
                    row.steps[a.op](a)
            except Lack as why:
                raise self.fail(rank, str(why)) from None
        for rank in ranks:
            self.at[rank] += 1

    def now(self, rank: int) -> Action | None:
        """The action that a rank has come to."""
        return self.flat[rank][self.at[rank]] if self.at[rank] < len(self.flat[rank]) else None

    def mates(self, rank: int, a: Action) -> tuple[int, ...]:
        """The ranks that meet in an action."""
        if a.op in COMPUTE:
            return self.on.together.get((a.chain, a.stage, rank), (rank,)) if self.on.together else (rank,)
        if a.op in BRIDGES:
            k = self.on.bridge(a)
            assert k is not None
            assert a.microbatch is not None
            return self.on.bridged(k, a.microbatch)
        return self.on.summed(a, rank) if a.op in ("REDUCE", "GATHER") else (rank,)

    def fail(self, rank: int, why: str) -> ProgramError:
        i = self.at[rank]
        return ProgramError(f"{self.flat[rank][i]} on rank {rank}: {why}\n{draw(self.program, (rank, self.marks[rank][i]))}")

    def message(self, rank: int, a: Action) -> bool:
        """A SEND and its RECV, when all ranks that send and receive have come to them."""
        if a.op in ("RECV_F", "RECV_B"):  # the sender does both
            return False
        if not self.rows[rank].sends(a):
            why = f"there is nothing to send: {a.stage}{a.op[-1]}{a.microbatch} has not run, or its gradient is not wanted"
            raise self.fail(rank, "it stands twice" if a in self.seen[rank] else why)
        op, to = ("RECV_F", a.stage + 1) if a.op == "SEND_F" else ("RECV_B", a.stage - 1)
        here, there = self.on.stands(a.chain, a.stage, a.microbatch), self.on.stands(a.chain, to, a.microbatch)
        for r in there:
            b = self.now(r)
            if b is None or b.op != op or b.stage != to or b.microbatch != a.microbatch or b.chain != a.chain:
                return False
        if any(self.now(r) != a for r in here):
            return False
        self.do((*here, *there))
        return True

"""What a program names is there: ops, chains, stages, microbatches, layers; the part of `check` that looks at each action alone."""

from __future__ import annotations

from lf.schedule.draw import WIDTH, draw
from lf.schedule.ground import Ground
from lf.schedule.ir import BACKWARD, BRIDGES, COMPUTE, MOVES, OPS, PARAMETERS, Action, ProgramError, chains, flat, parts, placement

USES = ("F", *BACKWARD, "REMAT")  # what computes with parameters: a W multiplies what its I has left


def check_names(on: Ground) -> None:
    """Raises ProgramError for an action that names what is not there, and for an OVERLAP whose two cannot interleave."""
    look = _Look(on)
    for rank, actions in enumerate(on.program):
        for i, whole in enumerate(actions):
            look.at = rank, i
            if whole.op == "OVERLAP":
                if len(whole.pair) != 2 or any(a.op not in COMPUTE for a in whole.pair):
                    raise look.fail(f"an OVERLAP is of two actions of compute, {', '.join(COMPUTE)}", whole)
                if _follow(*whole.pair):
                    raise look.fail("one of the two needs what the other makes: write them one after the other, or pair two microbatches", whole)
                if any((a.chain, a.stage, rank) in on.together for a in whole.pair if on.layouts):
                    raise look.fail("one of the two is computed together with other rows: write them one after the other", whole)
            for a in parts(whole):
                look.action(a)
    look.ends()
    look.rows()


class _Look:
    def __init__(self, on: Ground):
        self.on, self.at = on, (0, 0)
        self.every = {c: len(stages) for c, stages in on.known.items()}
        if on.layouts is None:  # a stage without a forward is said so below
            for a in (a for row in on.program for a in flat(row)):
                self.every[a.chain] = max(self.every.get(a.chain, 0), 1 + a.stage)
        self.total = {c: on.units.get(c, 0) if c != on.main else on.count for c in self.every}

    def fail(self, why: str, a: Action) -> ProgramError:
        return ProgramError(f"{a} on rank {self.at[0]}: {why}\n{draw(self.on.program, self.at)}")

    def action(self, a: Action) -> None:
        if a.op not in OPS:
            raise self.fail(f"unknown op {a.op!r}; there are {', '.join(OPS)}", a)
        if a.chain not in self.every:
            there = "the model has one chain, which has no name" if [*self.every] == [""] else f"the model has chains {', '.join(self.every)}"
            raise self.fail(f"it is of chain {a.chain!r}; {there}", a)
        if not 0 <= a.stage < self.every[a.chain]:
            raise self.fail(f"there are {self.every[a.chain]} stages, 0 to {self.every[a.chain] - 1}", a)
        if a.op in PARAMETERS and (a.segment is None or a.microbatch is None or len(a.ops) != 1 or a.ops[0] not in USES):
            words = f"a {a.op} is of one layer and names the op that it is for, as in 0{a.op}0[layers.0: F]"
            raise self.fail(f"{words}; or give the compute alone, and all that is missing is added", a)
        total = self.on.count if a.op in BRIDGES else self.total[a.chain]
        what = "microbatches" if a.chain == self.on.main or a.op in BRIDGES else f"units of chain {a.chain}"
        if (a.op != "REDUCE" or a.microbatch is not None) and (a.microbatch is None or not 0 <= a.microbatch < total):
            raise self.fail(f"there are {total} {what}, 0 to {total - 1}", a)
        if a.op in MOVES and a.segment is not None:
            raise self.fail(f"a message is of a whole stage: leave out {a.segment!r}", a)
        if a.ops and a.op not in ("REMAT", *PARAMETERS):
            raise self.fail(f"only a REMAT names ops, not a {a.op}: leave out {', '.join(a.ops)}", a)
        if a.op in BRIDGES:
            self.bridge(a)
        else:
            self.place(a)
            if a.op in MOVES:
                self.message(a)

    def message(self, a: Action) -> None:
        """It goes from a stage to the next one, or back, which is elsewhere."""
        other = a.stage + (1 if a.op in ("SEND_F", "RECV_B") else -1)
        if not 0 <= other < self.every[a.chain]:
            raise self.fail(f"there is no stage {other}", a)
        if self.on.stands(a.chain, a.stage, a.microbatch) == self.on.stands(a.chain, other, a.microbatch):
            raise self.fail(f"stages {a.stage} and {other} lie on one rank: nothing is sent", a)

    def place(self, a: Action) -> None:
        """It stands where its stage lies, and names a part of it."""
        rank, layouts = self.at[0], self.on.layouts
        if layouts is not None and rank not in (homes := self.on.homes[a.chain, a.stage]):
            raise self.fail(f"stage {a.stage} lies on rank{'s' * (len(homes) > 1)} {', '.join(map(str, homes))}", a)
        if a.op in (*BACKWARD, "W", "REMAT") and rank not in (rows := self.on.rows.get((a.chain, a.stage, a.microbatch), (rank,))):
            raise self.fail(f"its forward stands on rank{'s' * (len(rows) > 1)} {', '.join(map(str, rows))}", a)
        if a.op == "FREE":
            if a.segment not in ("SEND_F", "SEND_B"):
                raise self.fail(f"a FREE names what was sent, SEND_F or SEND_B, not {a.segment!r}", a)
        elif layouts is not None and a.op != "REDUCE" and (stage := self.on.known[a.chain][a.stage]).span(a.segment) is None:
            raise self.fail(f"stage {a.stage} has no layer or segment {a.segment!r}; it has {', '.join(dict.fromkeys(stage.layers))}", a)

    def bridge(self, a: Action) -> None:
        k = self.on.bridge(a)
        if k is None:
            there = ", ".join(f"{j.target}:{j.target_stage} {j.name}" for j in self.on.joints) or "none"
            raise self.fail(f"no edge brings {a.segment!r} into stage {a.stage} of chain {a.chain!r}; edges bring {there}", a)
        assert a.microbatch is not None
        if self.at[0] not in (rows := self.on.bridged(k, a.microbatch)):
            raise self.fail(f"this rank neither gives nor takes it; those that do are {', '.join(map(str, rows)) or 'none'}", a)

    def ends(self) -> None:
        """There is something of each chain, and of both ends of each joint."""
        on = self.on

        def nowhere(what: str) -> ProgramError:
            return ProgramError(f"{what} stands on no rank\n{draw(on.program, width=WIDTH)}")

        if without := [c for c in on.known if c != on.main and not on.units[c]]:
            raise nowhere(f"missing: every forward of chain {without[0]!r}, which")
        if on.layouts is not None:
            return
        for chain, n in self.every.items() if on.joints else ():
            if missing := [s for s in range(n) if (chain, s) not in on.homes]:
                raise nowhere(f"missing: every forward of stage {missing[0]} of chain {chain!r}, which")
        for j in on.joints:
            for chain, stage in ((j.source, j.source_stage), (j.target, j.target_stage)):
                if not 0 <= stage < len(on.known.get(chain, ())):
                    raise nowhere(f"joint {j.name} → {j.target}: stage {stage} of chain {chain!r}")

    def rows(self) -> None:
        """Each unit stands on rows that it can stand on."""
        on = self.on
        try:
            if on.layouts is None:
                names = [c for c in chains(on.program) if c == on.main or not on.joints]
                for chain in names if len(names) == 1 else ():
                    placement(on.program, chain)
        except ProgramError as error:
            raise ProgramError(f"{error}\n{draw(on.program, width=WIDTH)}") from None
        if on.layouts is None:
            return
        for (chain, s, u), rows in on.rows.items():
            if chain == on.main and rows != on.homes[chain, s]:
                absent = ", ".join(str(r) for r in on.homes[chain, s] if r not in rows)
                raise self.off(chain, s, u, f"it stands on ranks {', '.join(map(str, rows))} and not on {absent}, which hold the stage, too")
            for r in rows:
                if missing := [str(b) for b in on.together.get((chain, s, r), ()) if b not in rows]:
                    raise self.off(chain, s, u, f"ranks {r} and {', '.join(missing)} compute it together, and it does not stand on all of these")
            if chain == on.main:
                continue  # on all rows of each stage, so on all data-parallel ranks
            each = [on.rows[chain, t, u] for t in (s, s + 1) if (chain, t, u) in on.rows]
            places = [on.layouts.places(chain, t, stood) for t, stood in zip((s, s + 1), each)]
            if len(set(places)) > 1:
                words = f"it stands on the data-parallel ranks {list(places[0])}, in stage {s + 1} on {list(places[1])}; they must be the same"
                raise self.off(chain, s, u, words)

    def off(self, chain: str, stage: int, unit: int | None, why: str) -> ProgramError:
        return ProgramError(f"{Action('F', stage, unit, chain=chain)}: {why}\n{draw(self.on.program, width=WIDTH)}")


def _follow(a: Action, b: Action) -> bool:
    """Whether two actions of one rank work on the same: a stage and microbatch, or two stages of which one hands on to the other."""
    if a.microbatch != b.microbatch or a.chain != b.chain:
        return False
    hands_on = (a.op == "F") == (b.op == "F") and {a.op, b.op} <= {"F", "B", "I"}
    return a.stage == b.stage or (abs(a.stage - b.stage) == 1 and hands_on)

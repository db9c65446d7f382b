"""How the chains of a program wait for each other: which units of one need which units of another, and over what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from lf.chain_layouts import Joint
from lf.schedule.ir import BACKWARD, Action, Program, ProgramError, chains, some, units

Key = tuple[str, str, int, int | None]
"""(op, chain, stage, microbatch or unit)"""
Link = float | Callable[[Action, int, int], float]


def made(move: str, chain: str, stage: int, unit: int | None, there: Mapping[Key, object]) -> list[Key]:
    """What makes what a stage gives on: its forward, or its backward, be it B, I or some of both."""
    if move == "F":
        return [("F", chain, stage, unit)]
    keys: list[Key] = [(op, chain, stage, unit) for op in BACKWARD]
    return [key for key in keys if key in there] or keys[:1]


def data_of(unit: int, units: int, microbatches: int) -> range:
    """The microbatches of the data that a unit has: one of `lf.chains.groups`."""
    return range(unit * microbatches // units, (unit + 1) * microbatches // units)


def units_of(data: range, units: int, microbatches: int) -> range:
    """The units that have one of these microbatches, the inverse of `data_of`."""
    first, last = (((m + 1) * units - 1) // microbatches for m in (data[0], data[-1]))
    return range(first, last + 1)


class Joined:
    """there: the actions that are in the program · rows: of each (chain, stage, unit) the rows on which its F stands.

    Raises ProgramError for a joint to or from a chain or stage that the program has not, and for a bridge that no joint is of.
    """

    def __init__(
        self, program: Program, joints: Sequence[Joint], there: Mapping[Key, object], rows: Mapping[tuple[str, int, int | None], Sequence[int]]
    ):
        self.there, self.rows = there, rows
        self.units = {chain: units(program, chain) for chain in chains(program)} if joints else {}
        self.microbatches = max(self.units.values(), default=0)
        self.into: dict[tuple[str, int], list[Joint]] = {}
        self.out: dict[tuple[str, int], list[Joint]] = {}
        stages = {(chain, stage) for chain, stage, _ in rows}
        for joint in joints:
            for end in ((joint.source, joint.source_stage), (joint.target, joint.target_stage)):
                if end not in stages:
                    raise ProgramError(f"joint {joint.name} → {joint.target}: stage {end[1]} of chain {end[0]!r} has no forward in the program")
            self.into.setdefault((joint.target, joint.target_stage), []).append(joint)
            self.out.setdefault((joint.source, joint.source_stage), []).append(joint)
        self.backward = {(chain, stage) for op, chain, stage, _ in there if op in BACKWARD} if joints else set()
        self.names = {(joint.name, joint.target, joint.target_stage): joint for joint in joints}

    def unit(self, chain: str, microbatch: int) -> int:
        return units_of(range(microbatch, microbatch + 1), self.units[chain], self.microbatches)[0]

    def needs(self, a: Action, link: Link) -> Iterator[tuple[Key, float]]:
        """What an F, B or I waits for in other chains, each with what is added to its end."""
        forward, unit = a.op == "F", a.microbatch
        for joint in (self.into if forward else self.out).get((a.chain, a.stage), ()):
            assert unit is not None
            data = data_of(unit, self.units[a.chain], self.microbatches)
            op, other, stage = ("F", joint.source, joint.source_stage) if forward else ("B", joint.target, joint.target_stage)
            if not forward and (other, stage) not in self.backward:
                continue  # nothing comes back from it
            bridges: list[Key] = [(f"BRIDGE_{op}", joint.target, joint.target_stage, m) for m in data]
            moved = [(key, 0.0) for key in bridges if key in self.there]
            yield from moved
            for u in units_of(data, self.units[other], self.microbatches):
                delay = 0.0 if moved else self.delay(joint, op, data[0], *((u, unit) if forward else (unit, u)), link)
                yield from ((key, delay) for key in made(op, other, stage, u, self.there))

    def bridge(self, a: Action, row: int, link: Link) -> float:
        """How long a BRIDGE takes from when a row is there: nothing on one that only takes."""
        joint = self.names.get((a.segment or "", a.chain, a.stage))
        if joint is None:
            raise ProgramError(f"{a}: no joint is of it; given are {some([f'{j.name} → {j.target}' for j in self.names.values()]) or 'none'}")
        assert a.microbatch is not None
        source, target = self.unit(joint.source, a.microbatch), self.unit(joint.target, a.microbatch)
        gives = (joint.source, joint.source_stage, source) if a.op == "BRIDGE_F" else (joint.target, joint.target_stage, target)
        return self.delay(joint, a.op[-1], a.microbatch, source, target, link) if row in self.rows.get(gives, ()) else 0.0

    def delay(self, joint: Joint, op: str, microbatch: int, source: int, target: int, link: Link) -> float:
        """Of what goes between these units of the two chains: nothing where both are on one row alone, else the longest way."""
        ends = [self.rows.get((joint.source, joint.source_stage, source), ()), self.rows.get((joint.target, joint.target_stage, target), ())]
        if not callable(link):
            return link if len({*ends[0], *ends[1]}) > 1 else 0.0
        move = Action(f"BRIDGE_{op}", joint.target_stage, microbatch, joint.name, chain=joint.target)
        gives, takes = ends if op == "F" else ends[::-1]
        return max((link(move, g, t) for g in gives for t in takes if g != t), default=0.0)

"""What a program stands on: the rows of each stage and unit, the stages' pieces, and what joins the chains. All that passes and the proof ask.

It is of a layout (of one chain, or of several), or, for a program that is only drawn and proven, of the program itself and the joints it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import attrs

from lf.chain_layouts import Joint, Layouts
from lf.chain_layouts import joined as laid
from lf.chains import groups
from lf.layouts import Layout
from lf.schedule.ir import Action, Program, flat, units
from lf.schedule.ir import microbatches as named
from lf.schedule.pieces import Stage, live_outputs, stages

Where = Layout | Layouts | None
Unit = tuple[str, int, int | None]  # chain, stage, unit


def joined(where: Where) -> Layouts | None:
    return None if where is None else laid(where)


@attrs.frozen(slots=False, eq=False)
class Ground:
    """`known`: the stages of each chain · `joints`: what goes between chains · `main`: the chain that runs the data batches as they are · `count`:
    how many microbatches a step has."""

    program: Program
    layouts: Layouts | None
    joints: tuple[Joint, ...]
    main: str
    count: int
    known: dict[str, tuple[Stage, ...]]

    @cached_property
    def rows(self) -> dict[Unit, tuple[int, ...]]:
        """The rows that each unit stands on, in each stage: where its F does."""
        found: dict[Unit, dict[int, None]] = {}
        for r, row in enumerate(self.program):
            for a in flat(row):
                if a.op == "F":
                    found.setdefault((a.chain, a.stage, a.microbatch), {})[r] = None
        return {unit: tuple(rows) for unit, rows in found.items()}

    @cached_property
    def homes(self) -> dict[tuple[str, int], tuple[int, ...]]:
        """The rows that hold each stage; where there is no layout, those that any unit of it stands on."""
        if self.layouts is not None:
            return {(c, s): self.layouts.homes(c, s) for c, known in self.known.items() for s in range(len(known))}
        found: dict[tuple[str, int], dict[int, None]] = {}
        for (chain, stage, _), rows in self.rows.items():
            found.setdefault((chain, stage), {}).update(dict.fromkeys(rows))
        return {stage: tuple(sorted(rows)) for stage, rows in found.items()}

    def stands(self, chain: str, stage: int, unit: int | None) -> tuple[int, ...]:
        """The rows of a unit; of one that has no forward, all that hold the stage."""
        return self.rows.get((chain, stage, unit)) or self.homes.get((chain, stage), ())

    @cached_property
    def units(self) -> dict[str, int]:
        """How many units of each chain a step has."""
        most = dict.fromkeys((*self.known, *(chain for j in self.joints for chain in (j.source, j.target))), 0)
        for chain, _, unit in self.rows:
            most[chain] = max(most.get(chain, 0), 1 + (unit or 0))
        return {**most, self.main: self.count}

    @cached_property
    def _groups(self) -> dict[str, tuple[range, ...]]:
        return {chain: groups(n or 1, self.count) for chain, n in self.units.items()}  # of what stands nowhere, for who asks before that is refused

    @cached_property
    def _unit(self) -> dict[str, dict[int, int]]:
        return {chain: {m: u for u, group in enumerate(each) for m in group} for chain, each in self._groups.items()}

    def group(self, chain: str, unit: int) -> range:
        """The microbatches of the data that a unit works at."""
        return self._groups[chain][unit]

    def unit(self, chain: str, microbatch: int) -> int:
        return self._unit[chain][microbatch]

    @cached_property
    def _into(self) -> dict[tuple[str, int], tuple[int, ...]]:
        return {at: tuple(k for k, j in enumerate(self.joints) if (j.target, j.target_stage) == at) for at in self.homes}

    @cached_property
    def _out(self) -> dict[tuple[str, int], tuple[int, ...]]:
        return {at: tuple(k for k, j in enumerate(self.joints) if (j.source, j.source_stage) == at) for at in self.homes}

    def into(self, chain: str, stage: int) -> tuple[int, ...]:
        """The joints, by number, that bring something to a stage."""
        return self._into[chain, stage] if self.joints else ()

    def out(self, chain: str, stage: int) -> tuple[int, ...]:
        """The joints that take something from a stage."""
        return self._out[chain, stage] if self.joints else ()

    @cached_property
    def live(self) -> tuple[bool, ...]:
        """Of each joint, whether its gradient is wanted."""
        if self.layouts is None or self.layouts.model is None:
            return (True,) * len(self.joints)
        wanted = live_outputs(self.layouts)
        return tuple(wanted[j.source, j.edges[0].output] for j in self.joints)

    def bridge(self, a: Action) -> int | None:
        """The joint that a BRIDGE is of."""
        at = (a.segment, a.chain, a.stage)
        return next((k for k, j in enumerate(self.joints) if (j.name, j.target, j.target_stage) == at), None)

    def ends(self, k: int, microbatch: int) -> tuple[Unit, Unit]:
        """The unit that a joint takes from for a microbatch, and the one it brings to."""
        j = self.joints[k]
        source, target = self.unit(j.source, microbatch), self.unit(j.target, microbatch)
        return (j.source, j.source_stage, source), (j.target, j.target_stage, target)

    def bridged(self, k: int, microbatch: int) -> tuple[int, ...]:
        """The rows that meet in a bridge, ascending."""
        source, target = self.ends(k, microbatch)
        return tuple(sorted({*self.rows.get(source, ()), *self.rows.get(target, ())}))

    @cached_property
    def together(self) -> dict[tuple[str, int, int], tuple[int, ...]]:
        """(chain, stage, row) → the rows that compute it together, where cp or tp of the chain go over several."""
        if self.layouts is None or len(self.known) == 1:
            return {}
        blocks = ((c, s, block) for c, s in self.homes for block in self.layouts.blocks(c, s))
        return {(c, s, r): block for c, s, block in blocks if len(block) > 1 for r in block}

    @cached_property
    def _tied(self) -> dict[str, tuple[int, ...]]:
        layouts = self.layouts
        if layouts is None:
            return {}
        out = {}
        for chain, layout in layouts.chains.items():
            rows = {r: pp for r in range(len(layouts.rows)) if (pp := layouts.pp(chain, r)) is not None}
            for path in layout.specs:
                if len(holders := layout.holders(path)) > 1 and path not in layout.frozen:
                    out[path] = tuple(r for r, pp in rows.items() if pp in holders)
        return out

    def meets(self, a: Action | None, b: Action) -> bool:
        """Whether what two rows have come to is one: the sum of a parameter over stages bears, on each row, its stage there."""
        tied = a is not None and a.op == b.op == "REDUCE" and a.segment in self._tied
        return a == b or (tied and a is not None and (a.chain, a.segment) == (b.chain, b.segment))

    def summed(self, a: Action, row: int) -> tuple[int, ...]:
        """The rows that do a REDUCE or GATHER together: those of the layer's stage, or those that hold the parameter that it names."""
        if self.layouts is None:
            return (row,)
        if a.segment in self._tied:
            return self._tied[a.segment]
        return self.homes.get((a.chain, a.stage), (row,)) if len(self.known) > 1 else (row,)


def ground(program: Program, where: Where = None, joints: Sequence[Joint] = (), count: int | None = None, main: str | None = None) -> Ground:
    """`where`: a layout, of one chain or several, which knows its own joints; else `joints`, and `main` (default: the chain with the most units).
    `count`: of microbatches, default: those that the program names."""
    layouts = joined(where)
    count = named(program) if count is None else count
    if layouts is not None:
        return Ground(program, layouts, layouts.joints, layouts.main, count, stages(program, layouts))
    known = stages(program, None)
    if main is None:
        main = max(known, key=lambda chain: units(program, chain), default="")
    return Ground(program, None, tuple(joints), main, count, known)

"""What a forward keeps until its backward: passes that have it made again, or taken to the host's memory and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lf.schedule.ground import Where, joined
from lf.schedule.ir import BACKWARD, COMPUTE, Action, Program, ProgramError, flat
from lf.schedule.pieces import Stage, stages
from lf.schedule.recompute import Offload, Recompute
from lf.schedule.refine import each

At = tuple[str, int]  # chain, stage
Cuts = Mapping[At, Sequence[str]]
Known = Mapping[str, Sequence[Stage]]


def recompute(program: Program, where: Where, policy: Recompute | Mapping[str, Recompute]) -> Program:
    """Forwards are cut where the policy chooses layers or segments, and right before the backward of each of these stands a REMAT: at no time is
    there more than one of a microbatch made again. It comes before what that backward waits for from another rank. `policy`: for all chains, or
    of each, nothing where it has none."""
    known, layouts = stages(program, joined(where)), joined(where)
    assert layouts is not None
    chosen = {
        (c, s): dict(of.chosen(layouts.chains[c], s))
        for c, of in policies(policy, known).items()
        for s in range(len(known[c]))
    }  # fmt: skip
    cuts = {at: _cuts(known[at[0]][at[1]], names) for at, names in chosen.items() if names}

    def change(a: Action) -> Sequence[Action]:
        row: list[Action] = []
        at, parts = (a.chain, a.stage), _parts(a, known, cuts)
        if at in cuts and parts == (a,) and a.segment is not None and a.segment not in cuts[at]:
            raise ProgramError(f"{a} is a part of what --recompute takes as a whole; its pieces are {', '.join(cuts[at])}")
        for part in parts:
            ops = chosen.get(at, {}).get(part.segment or "") if part.op in BACKWARD else None
            if ops is not None:
                row.append(attrs.evolve(part, op="REMAT", ops=ops))
            row.append(part)
        return row

    return each(program, change)


def offload(program: Program, where: Where, policy: Offload | Mapping[str, Offload]) -> Program:
    """OFFLOAD after the forward of each chosen layer; FETCH so many compute actions before it is needed as the policy's `distance` says. Where
    nothing would lie between the two (a forward whose backward follows at once), it stays. `policy`: as in `recompute`."""
    known, layouts = stages(program, joined(where)), joined(where)
    assert layouts is not None
    each_of = policies(policy, known)
    chosen = {(c, s): of.chosen(layouts.chains[c], s) for c, of in each_of.items() for s in range(len(known[c]))}
    cuts = {at: _cuts(known[at[0]][at[1]], names) for at, names in chosen.items() if names}
    distance = {c: of.distance for c, of in each_of.items()}
    return tuple(_moved(row, known, chosen, distance) for row in each(program, lambda a: _parts(a, known, cuts)))


def policies(policy: Any, known: Known) -> dict[str, Any]:
    """The policy of each chain. Raises ProgramError for a chain that is not there."""
    if not isinstance(policy, Mapping):
        return dict.fromkeys(known, policy)
    if unknown := [c for c in policy if c not in known]:
        raise ProgramError(f"a policy is of chain {unknown[0]!r}; the model has chains {', '.join(known)}")
    return dict(policy)


def _cuts(stage: Stage, names: Sequence[str] | Mapping[str, object]) -> tuple[str, ...]:
    """The pieces of a stage: its layers, and of those of which a segment is named the segments."""
    inner = {stage.layers[stage.atoms.index(n)] for n in names if n not in stage.layers}
    return tuple(dict.fromkeys(atom if layer in inner else layer for atom, layer in zip(stage.atoms, stage.layers)))


def _parts(a: Action, known: Known, cuts: Cuts) -> Sequence[Action]:
    """The action, one for each cut that it covers; backwards from the last, and only where there is one. One that is cut finer stays."""
    at = a.chain, a.stage
    if at not in cuts or a.op not in ("F", *BACKWARD):
        return (a,)
    stage = known[a.chain][a.stage]
    lo, hi = stage.span(a.segment) or (0, 0)
    spans = {name: stage.span(name) or (0, 0) for name in cuts[at]}
    mine = [name for name, (first, last) in spans.items() if lo <= first and last <= hi and (a.op == "F" or last > stage.stop)]
    if not mine and not any(first == lo and last == hi for first, last in spans.values()):
        return (a,)
    return [attrs.evolve(a, segment=name) for name in (mine if a.op == "F" else reversed(mine))]


def _moved(actions: Sequence[Action], known: Known, chosen: Cuts, distance: Mapping[str, int]) -> tuple[Action, ...]:
    """A row with its OFFLOADs and FETCHes."""
    made: dict[tuple[str, int, int | None, str], int] = {}  # where the forward of a layer ends
    needed: dict[tuple[str, int, int | None, str], int] = {}  # where it is first needed again
    for i, whole in enumerate(actions):
        for a in flat((whole,)):
            stage = known[a.chain][a.stage]
            span = stage.span(a.segment) if a.op in ("F", "REMAT", *BACKWARD) else None
            for layer in dict.fromkeys(stage.layers[slice(*span)]) if span else ():
                if layer not in chosen.get((a.chain, a.stage), ()):
                    continue
                if a.op == "F":
                    made[a.chain, a.stage, a.microbatch, layer] = i
                else:
                    needed.setdefault((a.chain, a.stage, a.microbatch, layer), i)
    after: dict[int, list[Action]] = {}
    before: dict[int, list[Action]] = {}
    compute = [i for i, a in enumerate(actions) if a.op in (*COMPUTE, "OVERLAP")]
    place = {i: n for n, i in enumerate(compute)}
    for (c, s, m, layer), back in needed.items():
        start = made[c, s, m, layer]
        at = compute[max(place[back] - distance[c], place[start] + 1)]
        if at > start + 1:  # else it would come back before anything else is done
            after.setdefault(start, []).append(Action("OFFLOAD", s, m, layer, chain=c))
            before.setdefault(at, []).append(Action("FETCH", s, m, layer, chain=c))
    return tuple(b for i, a in enumerate(actions) for b in (*before.get(i, ()), a, *after.get(i, ())))

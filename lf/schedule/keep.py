"""What a forward keeps until its backward: passes that have it made again, or taken to the host's memory and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from lf.layouts import Layout
from lf.schedule.ir import BACKWARD, COMPUTE, Action, Program, ProgramError, flat
from lf.schedule.lower import each
from lf.schedule.pieces import Stage, stages
from lf.schedule.recompute import Offload, Recompute

Cuts = Mapping[int, Sequence[str]]


def recompute(program: Program, layout: Layout, policy: Recompute) -> Program:
    """Forwards are cut where the policy chooses layers or segments, and right before the backward of each of these stands a REMAT: at no time is
    there more than one of a microbatch made again. It comes before what that backward waits for from another rank."""
    known = stages(program, layout)
    chosen = {s: dict(policy.chosen(layout, s)) for s in range(len(known))}
    cuts = {s: _cuts(known[s], names) for s, names in chosen.items() if names}

    def change(a: Action) -> Sequence[Action]:
        row: list[Action] = []
        parts = _parts(a, known, cuts)
        if a.stage in cuts and parts == (a,) and a.segment is not None and a.segment not in cuts[a.stage]:
            raise ProgramError(f"{a} is a part of what --recompute takes as a whole; its pieces are {', '.join(cuts[a.stage])}")
        for part in parts:
            ops = chosen[a.stage].get(part.segment or "") if part.op in BACKWARD else None
            if ops is not None:
                row.append(attrs.evolve(part, op="REMAT", ops=ops))
            row.append(part)
        return row

    return each(program, change)


def offload(program: Program, layout: Layout, policy: Offload) -> Program:
    """OFFLOAD after the forward of each chosen layer; FETCH so many compute actions before it is needed as the policy's `distance` says. Where
    nothing would lie between the two (a forward whose backward follows at once), it stays."""
    known = stages(program, layout)
    chosen = {s: policy.chosen(layout, s) for s in range(len(known))}
    cuts = {s: _cuts(known[s], names) for s, names in chosen.items() if names}
    return tuple(_moved(row, known, chosen, policy.distance) for row in each(program, lambda a: _parts(a, known, cuts)))


def _cuts(stage: Stage, names: Sequence[str] | Mapping[str, object]) -> tuple[str, ...]:
    """The pieces of a stage: its layers, and of those of which a segment is named the segments."""
    inner = {stage.layers[stage.atoms.index(n)] for n in names if n not in stage.layers}
    return tuple(dict.fromkeys(atom if layer in inner else layer for atom, layer in zip(stage.atoms, stage.layers)))


def _parts(a: Action, known: Sequence[Stage], cuts: Cuts) -> Sequence[Action]:
    """The action, one for each cut that it covers; backwards from the last, and only where there is one. One that is cut finer stays."""
    if a.stage not in cuts or a.op not in ("F", *BACKWARD):
        return (a,)
    stage = known[a.stage]
    lo, hi = stage.span(a.segment) or (0, 0)
    spans = {name: stage.span(name) or (0, 0) for name in cuts[a.stage]}
    mine = [name for name, (first, last) in spans.items() if lo <= first and last <= hi and (a.op == "F" or last > stage.stop)]
    if not mine and not any(first == lo and last == hi for first, last in spans.values()):
        return (a,)
    return [attrs.evolve(a, segment=name) for name in (mine if a.op == "F" else reversed(mine))]


def _moved(actions: Sequence[Action], known: Sequence[Stage], chosen: Mapping[int, Sequence[str]], distance: int) -> tuple[Action, ...]:
    """A row with its OFFLOADs and FETCHes."""
    made: dict[tuple[int, int | None, str], int] = {}  # where the forward of a layer ends
    needed: dict[tuple[int, int | None, str], int] = {}  # where it is first needed again
    for i, whole in enumerate(actions):
        for a in flat((whole,)):
            span = known[a.stage].span(a.segment) if a.op in ("F", "REMAT", *BACKWARD) else None
            for layer in dict.fromkeys(known[a.stage].layers[slice(*span)]) if span else ():
                if layer in chosen[a.stage] and a.op == "F":
                    made[a.stage, a.microbatch, layer] = i
                elif layer in chosen[a.stage]:
                    needed.setdefault((a.stage, a.microbatch, layer), i)
    after: dict[int, list[Action]] = {}
    before: dict[int, list[Action]] = {}
    compute = [i for i, a in enumerate(actions) if a.op in (*COMPUTE, "OVERLAP")]
    place = {i: n for n, i in enumerate(compute)}
    for (s, m, layer), back in needed.items():
        start = made[s, m, layer]
        at = compute[max(place[back] - distance, place[start] + 1)]
        if at > start + 1:  # else it would come back before anything else is done
            after.setdefault(start, []).append(Action("OFFLOAD", s, m, layer))
            before.setdefault(at, []).append(Action("FETCH", s, m, layer))
    return tuple(b for i, a in enumerate(actions) for b in (*before.get(i, ()), a, *after.get(i, ())))

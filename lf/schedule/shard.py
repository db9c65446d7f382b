"""Where the parameters of a layer lie in shards, when the program has them whole: a pass that places GATHER and RELEASE.

Each action that computes with a layer (F, B, I, REMAT; a W multiplies what its I has left) is a use of it. From uses come spells, in which the layer
stays whole:

    stages 1, 2     one spell, from the first use in the step to the last
    stage 3         each use by itself, joined with the next one where no more than `ahead` other layers are used in between: it would be
                    gathered again at once
    stage 3, keep   from the forward of a microbatch to its backward, and joined likewise

A spell's GATHER stands `ahead` uses of layers before it, so that it travels beside their compute; its RELEASE right after its last use. Where a chain
lies in several rows, whose programs differ, all its rows gather at the start, in one order, and release at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from lf.chain_layouts import Layouts
from lf.layouts import Layout
from lf.schedule.ground import Where, joined
from lf.schedule.ir import BACKWARD, Action, Program, flat, parts
from lf.schedule.names import USES
from lf.schedule.pieces import WHOLE, Stage, stages
from lf.schedule.refine import refine
from lf.segment import path_of

Layer = tuple[str, int, str]  # chain, stage, layer


@attrs.define
class Spell:
    """Uses `first` to `last` of a row, of which `begin` and `end` are the actions."""

    layer: Layer
    first: int
    last: int
    begin: Action
    end: Action


def gather(program: Program, where: Where) -> Program:
    """The program with its GATHERs and RELEASEs; the program itself where nothing lies in shards."""
    layouts = joined(where)
    if layouts is None or not any(spec.cut for spec in layouts.specs.values()):
        return program
    known = stages(program, layouts)
    return tuple(_row(row, rank, layouts, known) for rank, row in enumerate(program))


def gathered_layers(layout: Layout, pp: int) -> dict[tuple[int, str], tuple[str, ...]]:
    """Of each stage and layer of a pipeline rank the parameters that lie in shards, where there are any: a GATHER of the layer makes them whole."""
    out = {}
    for stage in layout.on(pp):
        for layer, segments in layout.layers(stage).items():
            paths = dict.fromkeys(path_of(segment, n) for segment in segments for n in segment.params)
            if cut := tuple(path for path in paths if layout.specs[path].cut):
                out[stage, layer] = cut
    return out


def _row(actions: Sequence[Action], rank: int, layouts: Layouts, known: Mapping[str, Sequence[Stage]]) -> tuple[Action, ...]:
    here = {c: gathered_layers(layout, pp) for c, layout in layouts.chains.items() if (pp := layouts.pp(c, rank)) is not None}
    cut = {(c, *at) for c, layers in here.items() if not layouts.spread(c) for at in layers}
    fine = _refined(actions, layouts, known)
    uses: list[tuple[int, Layer, Action]] = []  # place in the row, layer, the action
    for i, whole in enumerate(fine):
        for a in parts(whole):
            span = known[a.chain][a.stage].span(a.segment) if a.op in USES else None
            layers = dict.fromkeys(known[a.chain][a.stage].layers[slice(*span)]) if span else ()
            uses += [(i, (a.chain, a.stage, layer), a) for layer in (layers if a.op == "F" else reversed([*layers]))]
    by_layer: dict[Layer, list[int]] = {}
    for k, (_, at, _) in enumerate(uses):
        if at in cut:
            by_layer.setdefault(at, []).append(k)
    before: dict[int, list[tuple[int, Action]]] = {}
    after: dict[int, list[Action]] = {}
    trains = any(a.op in BACKWARD for a in flat(actions))
    for at, mine in by_layer.items():
        sharding, free = layouts.chains[at[0]].sharding, 0  # `free`: from which action on the layer is not whole any more
        for spell in _spells(at, mine, uses, sharding.stage, sharding.keep and trains, sharding.ahead):
            enter = Action("GATHER", at[1], spell.begin.microbatch, at[2], (spell.begin.op,), at[0])
            leave = Action("RELEASE", at[1], spell.end.microbatch, at[2], (spell.end.op,), at[0])
            place = max(uses[max(spell.first - sharding.ahead, 0)][0], free)
            before.setdefault(place, []).append((spell.first, enter))
            after.setdefault(uses[spell.last][0], []).append(leave)
            free = uses[spell.last][0] + 1
    out: list[Action] = []
    for i, a in enumerate(fine):
        out += [g for _, g in sorted(before.get(i, ()), key=lambda pair: pair[0])]
        out += [a, *after.get(i, ())]
    together = [Action("GATHER", stage, 0, layer, ("F",), c) for c, layers in here.items() if layouts.spread(c) for stage, layer in layers]
    return (*together, *out, *(attrs.evolve(a, op="RELEASE") for a in together))


def _refined(actions: Sequence[Action], layouts: Layouts, known: Mapping[str, Sequence[Stage]]) -> list[Action]:
    """The row cut by layers where a GATHER or RELEASE has to stand in between: in stage 3 everywhere, else the first forward of each stage and its
    last backward."""
    whole = [(i, part) for i, a in enumerate(actions) for part in parts(a) if part.op in USES and part.segment is None]
    ends: set[int] = set()
    for at in dict.fromkeys((part.chain, part.stage) for _, part in whole):
        mine = [i for i, part in whole if (part.chain, part.stage) == at]
        ends |= set(mine) if layouts.chains[at[0]].sharding.stage == 3 else {mine[0], mine[-1]} if not layouts.spread(at[0]) else set()
    out: list[Action] = []
    for i, a in enumerate(actions):
        out += _by_layers(a, known) if i in ends else [a]
    return out


def _by_layers(action: Action, known: Mapping[str, Sequence[Stage]]) -> list[Action]:
    """The compute of an action, layer by layer; an OVERLAP becomes pairs, as far as they go."""

    def names(a: Action) -> Sequence[str] | None:
        stage = known[a.chain][a.stage]
        layers = tuple(dict.fromkeys(stage.layers[0 if a.op == "F" else stage.stop :]))
        return layers if a.op in USES and layers != (WHOLE,) else None

    return list(refine(((action,),), names)[0])


def _spells(at: Layer, mine: Sequence[int], uses: Sequence[tuple[int, Layer, Action]], stage: int, keep: bool, ahead: int) -> list[Spell]:
    out: list[Spell] = []
    open_units: set[int | None] = set()  # with a forward, and no backward yet
    for k in mine:
        i, _, a = uses[k]
        if out:
            others = {uses[j][1] for j in range(out[-1].last + 1, k)} - {at}
            one = i == uses[out[-1].last][0] or (a.op, a.microbatch) == (out[-1].end.op, out[-1].end.microbatch)  # action, or what it is a part of
        if out and (stage < 3 or one or (keep and open_units) or len(others) <= ahead):
            out[-1].last, out[-1].end = k, a
        else:
            out.append(Spell(at, k, k, a, a))
        if a.op == "F":
            open_units.add(a.microbatch)
        elif a.op in ("B", "I"):
            open_units.discard(a.microbatch)
    return out

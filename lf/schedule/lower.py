"""Passes from the compute of a program to all that a rank does. Each is a pure function from a program to a program.

    trainable    what no gradient is wanted of goes
    refine       an action of a stage becomes one of each layer
    gather       GATHER of a layer whose parameters lie in shards, ahead of its use, and RELEASE after (lf/schedule/shard.py)
    add_reduce   REDUCE of a layer after its last weight gradient, or after each, of a parameter of several stages at the end
    move         SEND and RECV between ranks, in one global order
    free         FREE of what was sent

`lower` is these. `lf/schedule/keep.py` has what is made again and what goes to the host, `lf/schedule/build.py` puts all together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from lf.chain_layouts import Joint, Layouts
from lf.layouts import Layout
from lf.schedule.ground import Where, ground, joined
from lf.schedule.ir import BACKWARD, COMPUTE, Action, Program, ProgramError, flat, parts
from lf.schedule.move import free, move
from lf.schedule.names import check_names
from lf.schedule.pieces import Stage, stages
from lf.schedule.refine import each, refine
from lf.schedule.shard import gather
from lf.segment import path_of

Layer = tuple[str, int, str]  # chain, stage, layer


def lower(program: Program, where: Where = None, joints: Sequence[Joint] = ()) -> Program:
    """A program of compute alone, lowered: for a layout with its reductions, without one for the drawing and the proof (`joints`: between its
    chains). Raises ProgramError for one that names what is not there or cannot go on; `check` proves the rest."""
    check_names(ground(program, where, joints))
    if where is not None:
        program = add_reduce(gather(trainable(program, where), where), where)
    return free(move(program, where, joints))


def is_lowered(program: Program) -> bool:
    """Whether it says itself what is sent, summed or freed. OFFLOAD and FETCH may stand beside the compute that is written by hand."""
    return any(a.op not in (*COMPUTE, "OFFLOAD", "FETCH") for row in program for a in flat(row))


def trainable(program: Program, where: Where) -> Program:
    """The program without what no gradient is wanted of. A stage with nothing that trains: with something before it B becomes I and W goes, with
    nothing there F alone is left."""
    known = stages(program, joined(where))

    def change(a: Action) -> Sequence[Action]:
        if a.op not in ("B", "I", "W", "REMAT"):
            return (a,)
        stage, span = known[a.chain][a.stage], known[a.chain][a.stage].span(a.segment)
        if span is None:
            raise ProgramError(f"{a}: stage {a.stage} has no layer or segment {a.segment!r}; it has {', '.join(stage.layers)}")
        inside, wanted = any(stage.inside[slice(*span)]), span[1] > stage.stop
        if not wanted or (a.op == "W" and not inside):
            return ()
        return (attrs.evolve(a, op="I"),) if a.op == "B" and not inside else (a,)

    return each(program, change)


def add_reduce(program: Program, where: Where) -> Program:
    """REDUCE of each layer right after the last gradient of its weights; that backward is refined, so that the sums of the last layers travel while
    the first ones are still computed.

    Where gradients are summed into shards after each microbatch, all its backwards are refined, and a REDUCE of the microbatch stands after each; one
    of all of them comes last where the layer has parameters that no shards are made of.

    A parameter that several layers of one rank use is reduced with the first of them, after the gradients of all. One that several ranks use is
    then summed over these, in the order of the parameters, at the end of their programs: anywhere else the ranks would have to wait for each other.
    So are the layers of a chain that lies in several rows, which all have a part in the sum: where a row has nothing left but backwards of such
    chains, and in one order, the last chain and its last layer first. A program without backwards, an evaluation, has nothing to reduce.
    """
    if not any(a.op in BACKWARD for row in program for a in flat(row)):
        return program
    layouts = joined(where)
    assert layouts is not None
    known = stages(program, layouts)
    rows = []
    for rank, actions in enumerate(program):
        last: dict[tuple[str, int], int] = {}  # stage → where its last weight gradient stands
        for i, a in enumerate(actions):
            for part in parts(a):
                if part.op in ("B", "W") and part.segment is None:
                    last[part.chain, part.stage] = i
        row: list[Action] = []
        for i, a in enumerate(actions):
            often = [(part.chain, part.stage) for part in parts(a) if part.op in ("B", "W") and each_microbatch(layouts.chains[part.chain])]
            ends = dict.fromkeys([*(at for at, end in last.items() if end == i), *often])
            row += _by_layers(a, {(c, s): known[c][s] for c, s in ends}) if ends else [a]
        rows.append(_with_reductions(row, rank, layouts, known))
    return tuple(rows)


def _by_layers(action: Action, known: Mapping[tuple[str, int], Stage]) -> tuple[Action, ...]:
    """The action with its weight gradients of these stages refined by layers; an OVERLAP becomes its two."""
    layers = {at: tuple(dict.fromkeys(stage.layers[stage.stop :])) for at, stage in known.items()}
    learn = {at: {layer for layer, inside in zip(stage.layers, stage.inside) if inside} for at, stage in known.items()}

    def names(a: Action) -> Sequence[str] | None:
        at = a.chain, a.stage
        if a.op == "W":
            return [layer for layer in layers.get(at, ()) if layer in learn[at]]
        return layers.get(at) if a.op == "B" else None

    return refine((parts(action),), names)[0]


def _with_reductions(actions: Sequence[Action], rank: int, layouts: Layouts, known: Mapping[str, Sequence[Stage]]) -> tuple[Action, ...]:
    after: dict[int, list[Action]] = {}
    done: dict[Layer, dict[int | None, int]] = {}  # → of each microbatch its last weight gradient
    for i, a in enumerate(actions):
        for part in parts(a):
            span = known[part.chain][part.stage].span(part.segment) if part.op in ("B", "W") else None
            for layer in known[part.chain][part.stage].layers[slice(*span)] if span else ():
                done.setdefault((part.chain, part.stage, layer), {})[part.microbatch] = i
    end, tied = spread_end(actions, layouts, known), list[Action]()
    for chain in reversed(layouts.chains):
        if (pp := layouts.pp(chain, rank)) is None:
            continue
        layout, several = layouts.chains[chain], layouts.spread(chain)
        users = users_of(layout, pp)
        for (stage, layer), paths in reversed(reduced_layers(layout, pp).items()):
            often = [path for path in paths if each_microbatch(layout) and layout.specs[path].cut]
            for m, at in _last_of(often, users, chain, done).items():
                after.setdefault(at, []).append(Action("REDUCE", stage, m, layer, chain=chain))
            if len(often) == len(paths) and often:
                continue
            at = max(_last_of(paths, users, chain, done).values(), default=-1)
            if several:
                at = end = max(at, end)
            after.setdefault(at, []).append(Action("REDUCE", stage, segment=layer, chain=chain))
        tied += [Action("REDUCE", users[path][0][0], segment=path, chain=chain) for path in tied_paths(layout, pp)]
    row: list[Action] = []
    for i, a in enumerate(actions):
        row += [a, *after.get(i, ())]
    return (*row, *after.get(-1, ()), *tied)


def _last_of(
    paths: Sequence[str], users: Mapping[str, Sequence[tuple[int, str]]], chain: str, done: Mapping[Layer, Mapping[int | None, int]]
) -> dict[int | None, int]:
    """Of each microbatch, where its last weight gradient stands of any layer that uses these parameters."""
    out: dict[int | None, int] = {}
    for m, at in (pair for path in paths for user in users[path] for pair in done.get((chain, *user), {}).items()):
        out[m] = max(at, out.get(m, -1))
    return out


def each_microbatch(layout: Layout) -> bool:
    """Whether gradients are summed into shards after each microbatch."""
    return layout.sharding.reduce == "microbatch"


def spread_end(actions: Sequence[Action], layouts: Layouts, known: Mapping[str, Sequence[Stage]]) -> int:
    """Where a row has come to nothing but backwards of chains that lie in several rows, which it makes by itself and nobody waits for: the action
    before. What rows make together is a meeting, too, and must not come between sums that other rows are at; nor may what leads to one of theirs."""
    blocks = {c: [b for s in range(len(layouts.chains[c].stages)) for b in layouts.blocks(c, s)] for c in layouts.chains if layouts.spread(c)}
    mine = {c for c, each in blocks.items() if all(len(b) == 1 for b in each)}

    def last(p: Action) -> bool:
        stage = known[p.chain][p.stage]
        return p.chain in mine and (p.op == "W" or (p.op in BACKWARD and not stage.upstream and not any(stage.fed)))

    return max((i for i, a in enumerate(actions) if not all(map(last, parts(a)))), default=-1)


def users_of(layout: Layout, rank: int) -> dict[str, list[tuple[int, str]]]:
    """The (stage, layer)s of a pipeline rank that use each parameter."""
    users: dict[str, list[tuple[int, str]]] = {}
    for stage in layout.on(rank):
        for segment in layout.stages[stage]:
            for name in segment.params:
                where = users.setdefault(path_of(segment, name), [])
                if (stage, segment.layer) not in where:
                    where.append((stage, segment.layer))
    return users


def reduced_layers(layout: Layout, rank: int) -> dict[tuple[int, str], tuple[str, ...]]:
    """The parameters that each layer of a pipeline rank reduces: those that train and that no layer before it on this rank uses."""
    out: dict[tuple[int, str], tuple[str, ...]] = {}
    for path, users in users_of(layout, rank).items():
        if path not in layout.frozen:
            out[users[0]] = (*out.get(users[0], ()), path)
    return {(stage, layer): out[stage, layer] for stage in layout.on(rank) for layer in layout.layers(stage) if (stage, layer) in out}


def tied_paths(layout: Layout, rank: int) -> tuple[str, ...]:
    """The parameters that train and that this pipeline rank holds with others, in the order of the model, which is the same on all."""
    return tuple(p for p in layout.specs if p not in layout.frozen and len(holders := layout.holders(p)) > 1 and rank in holders)

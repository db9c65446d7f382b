"""Passes from the compute of a program to all that a rank does. Each is a pure function from a program to a program.

    trainable    what no gradient is wanted of goes
    refine       an action of a stage becomes one of each layer
    add_reduce   REDUCE of a layer after its last weight gradient, of a parameter of several stages at the end
    move         SEND and RECV between ranks, in one global order
    free         FREE of what was sent

`lower` is these. `lf/schedule/keep.py` has what is made again and what goes to the host, `lf/schedule/build.py` puts all together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest

import attrs

from lf.layouts import Layout
from lf.schedule.draw import draw
from lf.schedule.ir import BACKWARD, COMPUTE, OVERLAP, Action, Program, ProgramError, flat, placement
from lf.schedule.names import check_names
from lf.schedule.pieces import Stage, stages
from lf.segment import path_of

SLACK = 4  # a sent buffer is freed when as many more of its kind have been sent: by then it has left, and nobody waits for it


def lower(program: Program, layout: Layout | None = None) -> Program:
    """A program of compute alone, lowered: for a layout with its reductions, without one for the drawing and the proof. Raises ProgramError for
    one that names what is not there or cannot go on; `check` proves the rest."""
    check_names(program, layout)
    if layout is not None:
        program = add_reduce(trainable(program, layout), layout)
    return free(move(program, layout))


def is_lowered(program: Program) -> bool:
    """Whether it says itself what is sent, summed or freed. OFFLOAD and FETCH may stand beside the compute that is written by hand."""
    return any(a.op not in (*COMPUTE, "OFFLOAD", "FETCH") for row in program for a in flat(row))


def each(program: Program, change: Callable[[Action], Sequence[Action]]) -> Program:
    """The program with each action replaced by `change(action)`; the parts of an OVERLAP's two are paired as far as they go."""

    def row(actions: Sequence[Action]) -> Iterator[Action]:
        for a in actions:
            if a.op != "OVERLAP":
                yield from change(a)
                continue
            for one, other in zip_longest(*(change(part) for part in a.pair)):
                yield OVERLAP(one, other) if one and other else one or other

    return tuple(tuple(row(actions)) for actions in program)


def refine(program: Program, names: Callable[[Action], Sequence[str] | None]) -> Program:
    """Each action of a whole stage for which `names` gives pieces, as one action a piece: forwards in their order, backwards from the last."""

    def change(a: Action) -> Sequence[Action]:
        pieces = names(a) if a.segment is None and a.op in COMPUTE else None
        if not pieces:
            return (a,)
        return [attrs.evolve(a, segment=p) for p in (pieces if a.op == "F" else reversed(pieces))]

    return each(program, change)


def trainable(program: Program, layout: Layout) -> Program:
    """The program without what no gradient is wanted of. A stage with nothing that trains: with something before it B becomes I and W goes, with
    nothing there F alone is left."""
    known = stages(program, layout)

    def change(a: Action) -> Sequence[Action]:
        if a.op not in ("B", "I", "W", "REMAT"):
            return (a,)
        stage, span = known[a.stage], known[a.stage].span(a.segment)
        if span is None:
            raise ProgramError(f"{a}: stage {a.stage} has no layer or segment {a.segment!r}; it has {', '.join(stage.layers)}")
        inside, wanted = any(stage.inside[slice(*span)]), span[1] > stage.stop
        if not wanted or (a.op == "W" and not inside):
            return ()
        return (attrs.evolve(a, op="I"),) if a.op == "B" and not inside else (a,)

    return each(program, change)


def add_reduce(program: Program, layout: Layout) -> Program:
    """REDUCE of each layer right after the last gradient of its weights; that backward is refined, so that the sums of the last layers travel while
    the first ones are still computed.

    A parameter that several layers of one rank use is reduced with the first of them, after the gradients of all. One that several ranks use is
    then summed over these, in the order of the parameters, at the end of their programs: anywhere else the ranks would have to wait for each other.
    A program without backwards, an evaluation, has nothing to reduce.
    """
    if not any(a.op in BACKWARD for row in program for a in flat(row)):
        return program
    known = stages(program, layout)
    rows = []
    for rank, actions in enumerate(program):
        last: dict[int, int] = {}  # stage → where its last weight gradient stands
        for i, a in enumerate(actions):
            for part in flat((a,)):
                if part.op in ("B", "W") and part.segment is None:
                    last[part.stage] = i
        row: list[Action] = []
        for i, a in enumerate(actions):
            ends = [s for s, at in last.items() if at == i]
            row += _by_layers(a, {s: known[s] for s in ends}) if ends else [a]
        rows.append(_with_reductions(row, rank, layout, known))
    return tuple(rows)


def _by_layers(action: Action, known: Mapping[int, Stage]) -> tuple[Action, ...]:
    """The action with its weight gradients of these stages refined by layers; an OVERLAP becomes its two."""
    layers = {s: tuple(dict.fromkeys(stage.layers[stage.stop :])) for s, stage in known.items()}
    learn = {s: {layer for layer, inside in zip(stage.layers, stage.inside) if inside} for s, stage in known.items()}

    def names(a: Action) -> Sequence[str] | None:
        if a.op == "W":
            return [layer for layer in layers.get(a.stage, ()) if layer in learn[a.stage]]
        return layers.get(a.stage) if a.op == "B" else None

    return refine((flat((action,)),), names)[0]


def _with_reductions(actions: Sequence[Action], rank: int, layout: Layout, known: Sequence[Stage]) -> tuple[Action, ...]:
    after: dict[int, list[Action]] = {}
    done: dict[tuple[int, str], int] = {}  # (stage, layer) → its last weight gradient
    for i, a in enumerate(actions):
        for part in flat((a,)):
            span = known[part.stage].span(part.segment) if part.op in ("B", "W") else None
            for layer in known[part.stage].layers[slice(*span)] if span else ():
                done[part.stage, layer] = i
    users = users_of(layout, rank)
    for (stage, layer), paths in reversed(reduced_layers(layout, rank).items()):
        at = max((done.get(user, -1) for path in paths for user in users[path]), default=-1)
        after.setdefault(at, []).append(Action("REDUCE", stage, segment=layer))
    row = []
    for i, a in enumerate(actions):
        row += [a, *after.get(i, ())]
    return (*row, *after.get(-1, ()), *(Action("REDUCE", users[path][0][0], segment=path) for path in tied_paths(layout, rank)))


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


def move(program: Program, layout: Layout | None = None) -> Program:
    """SEND and RECV where a value goes to another rank.

    The program is walked on one clock (unit times). When a rank has computed what another one needs, SEND goes to its own list and RECV to the
    other's in the same moment. So there is one order of all messages, which every rank keeps: it works even where a send blocks until it is
    received, and a receive is started about when the value is made, ahead of its use.
    """
    where, known = placement(program), stages(program, layout)
    rows: list[list[Action]] = [[] for _ in program]
    ends = _ends(program)
    done: dict[tuple[str, int, int | None], float] = {}  # ("F" or "B", stage, microbatch) → when it is there
    at, free_at = [0] * len(program), [0.0] * len(program)
    seconds = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "REMAT": 1.0}

    def ready(rank: int) -> float | None:
        """When the rank's next action can start; None: not yet known."""
        start = free_at[rank]
        for a in flat((program[rank][at[rank]],)):
            first = ends.get((a.op, a.stage, a.microbatch, a.segment), (False, False))[0]
            needs: list[tuple[str, int, int | None]] = []
            if a.op == "F" and first and a.stage:
                needs.append(("F", a.stage - 1, a.microbatch))
            if a.op in BACKWARD and first:
                needs.append(("F", a.stage, a.microbatch))
                if a.stage + 1 < len(where) and known[a.stage + 1].upstream:
                    needs.append(("B", a.stage + 1, a.microbatch))
            for need in needs:
                if need not in done:
                    return None
                start = max(start, done[need])
        return start

    left = sum(len(row) for row in program)
    starts = [ready(r) if row else None for r, row in enumerate(program)]
    while left:
        times = [(t, r) for r, t in enumerate(starts) if t is not None]
        if not times:
            raise ProgramError(_stuck(program, at, where))
        start, rank = min(times)
        action = program[rank][at[rank]]
        at[rank] += 1
        left -= 1
        rows[rank].append(action)
        free_at[rank] = start + sum(seconds.get(a.op, 0.0) for a in flat((action,)))
        for a in flat((action,)):
            if not ends.get((a.op, a.stage, a.microbatch, a.segment), (False, False))[1]:
                continue
            kind, to = ("F", a.stage + 1) if a.op == "F" else ("B", a.stage - 1)
            done[kind, a.stage, a.microbatch] = free_at[rank]
            if 0 <= to < len(where) and where[to] != rank and (kind == "F" or known[a.stage].upstream):
                rows[rank].append(Action(f"SEND_{kind}", a.stage, a.microbatch))
                rows[where[to]].append(Action(f"RECV_{kind}", to, a.microbatch))
        for r in range(len(program)):
            if r == rank or (starts[r] is None and at[r] < len(program[r])):  # what can start stays so
                starts[r] = ready(r) if at[r] < len(program[r]) else None
    return tuple(map(tuple, rows))


def _ends(program: Program) -> dict[tuple[str, int, int | None, str | None], tuple[bool, bool]]:
    """Of each forward and backward, whether it is the first and whether it is the last of its stage and microbatch."""
    groups: dict[tuple[bool, int, int | None], list[Action]] = {}
    for row in program:
        for a in flat(row):
            if a.op == "F" or a.op in BACKWARD:
                groups.setdefault((a.op == "F", a.stage, a.microbatch), []).append(a)
    return {(a.op, a.stage, a.microbatch, a.segment): (a is g[0], a is g[-1]) for g in groups.values() for a in g}


def _stuck(program: Program, at: Sequence[int], where: Sequence[int]) -> str:
    stuck = {r: i for r, i in enumerate(at) if i < len(program[r])}
    words = ", ".join(f"{program[r][i]} on rank {r}" for r, i in stuck.items())
    return f"no rank can go on: {words}; each needs what one of the others has not yet made\n{draw(program, stuck)}"


def free(program: Program) -> Program:
    """FREE of each sent buffer: when SLACK more of its kind have been sent, or before the backward of its microbatch, which shows that it has
    arrived, or at the end."""
    rows = []
    for actions in program:
        row: list[Action] = []
        sent: dict[str, list[Action]] = {"SEND_F": [], "SEND_B": []}
        for a in actions:
            for part in flat((a,)):
                if part.op in BACKWARD:
                    for s in [s for s in sent["SEND_F"] if (s.stage, s.microbatch) == (part.stage, part.microbatch)]:
                        sent["SEND_F"].remove(s)
                        row.append(_free(s))
            row.append(a)
            if a.op in sent:
                sent[a.op].append(a)
                if len(sent[a.op]) > SLACK:
                    row.append(_free(sent[a.op].pop(0)))
        rows.append((*row, *(_free(s) for waiting in sent.values() for s in waiting)))
    return tuple(rows)


def _free(sent: Action) -> Action:
    return attrs.evolve(sent, op="FREE", segment=sent.op)

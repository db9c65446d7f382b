"""Places of a chain beside the main one: from the program of the main chain to that with the other chains' compute in it.

    inline      a unit's F right before the first action that takes what it gives, on the same row, its B right after the last one whose gradient it
                needs. Of a chain that takes from the main one, a head: its F right after what gives to it, its B right after that
    decoupled   all F first, each unit on all rows as data parallel, then the main program, then all B; one unit of everything, or more
    nested      in the bubbles of the main program, with a limit to the units between F and B (nest.py)
    dedicated   on rows of its own

A chain that the main one takes from, at first or second hand, is placed after what takes from it; a chain that takes from the main one before that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from lf.chain_layouts import Joint
from lf.config import one_of
from lf.schedule.cost import Link, Times, cost, durations, held
from lf.schedule.generate import alternate
from lf.schedule.ir import COMPUTE, Action, Program, ProgramError, flat, microbatches, some
from lf.schedule.nest import Block, Nested, least_in_flight, nest, refuse_few
from lf.schedule.plan import Plan, plan

KINDS = ("inline", "decoupled", "nested", "dedicated")
Added = list[tuple[int, float, Action]]


@attrs.frozen
class Beside:
    """Where a chain goes.

    units: how many a step has; each microbatch is one, but of `decoupled`, where all are one. in_flight: of `nested` and `dedicated`, the most units
    that are between F and B at a time, a unit on one of n rows counted as 1/n. Default of `nested`: four times as many
    as the program needs at least, which one row would hold `inline`, or that for each block where there are fewer than four: so no row holds more
    than about four units of a pipeline that needs one a row, however many microbatches there are. Of `dedicated`: twice as many as needed.
    blocks: for each stage of the chain the sets of rows that a unit can stand on, as `lf.chain_layouts.Layouts.blocks`; the k-th ones of all stages
    belong together. Default: one stage; each row of the main program is a block, of `inline` each row at all, of `dedicated` one row behind all
    others. fixed: the part of a unit's times that does not shrink where rows share it, as of `cost`: with it `nested` tries as well to share
    fewer units, and takes what is quicker. Rows are those of the whole program: the rows of dedicated chains, and the main program's in their order
    on those that are left.
    """

    kind: str
    units: int | None = None
    in_flight: int | None = None
    blocks: tuple[tuple[Block, ...], ...] | None = None
    fixed: float = 0.0


def beside(
    main: Program, joints: Sequence[Joint], placements: Mapping[str, Beside], name: str = "", times: Times | None = None, link: Link = 0.0
) -> Program:
    """The program with F and B of the other chains in it; nothing moves yet.

    main: compute alone, of the chain `name`, or of one without a name, which gets this one. times, link: as of `cost`; they decide the order.
    A chain whose gradient nothing brings, as in evaluation, has F alone.

    Raises ProgramError for what cannot be placed so, with the chain.
    """
    where = _filled(main, joints, placements, name)
    feeding = _feeding(joints, placements, name)
    program = _widened(main, where, name)
    units = {name: microbatches(main), **{chain: place.units or 0 for chain, place in where.items()}}
    for chain in [*(c for c in feeding if not feeding[c]), *reversed([c for c in feeding if feeding[c]])]:
        laid = plan(program, times or {}, link, joints, units)
        place = where[chain]
        if not feeding[chain]:
            program = laid.with_(_following(laid, chain, place)) if place.kind == "inline" else _own_rows_after(laid, chain, place)
        elif place.kind == "nested":
            program = _nested(laid, chain, place, times or {}, link)
        else:
            make = {"inline": _inline, "decoupled": _decoupled, "dedicated": _dedicated}[place.kind]
            program = make(laid, chain, place)
    cost(program, times, link, joints=joints)  # which says where it stops, if it does
    return program


def _rows(place: Beside, stage: int) -> list[int]:
    assert place.blocks is not None
    return sorted({r for block in place.blocks[stage] for r in block})


def _backward(laid: Plan, chain: str) -> bool:
    """Whether a gradient comes back to a chain that gives."""
    there = {(c, stage) for op, c, stage, _ in laid.at if op in ("B", "I")}
    return any(j.source == chain and (j.target, j.target_stage) in there for j in laid.joints)


def _action(op: str, chain: str, stage: int, unit: int) -> Action:
    return Action(op, stage, unit, chain=chain)


def _inline(laid: Plan, chain: str, place: Beside) -> Program:
    assert place.blocks is not None
    added: Added = []
    stages, back = range(len(place.blocks)), _backward(laid, chain)
    wanted = [laid.wanted(chain, u) for u in range(laid.units[chain])]
    for u in sorted(range(len(wanted)), key=lambda u: wanted[u]):
        due, release = wanted[u]
        takers = [laid.standing("F", j.target, j.target_stage, laid.data(chain, u)) for j in laid.joints if j.source == chain]
        first = min((each for each in takers if each), key=lambda each: min(laid.starts[r][i] for r, i in each))
        k = _block_at(chain, place, [r for r, _ in first])
        added += [(r, due, _action("F", chain, s, u)) for s in stages for r in place.blocks[s][k]]
        added += [(r, release, _action("B", chain, s, u)) for s in reversed(stages) for r in place.blocks[s][k] if back]
    return laid.with_(added)


def _block_at(chain: str, place: Beside, rows: Sequence[int]) -> int:
    """Which of its blocks has one of the rows that do what it goes with."""
    assert place.blocks is not None
    for row in rows:
        for blocks in place.blocks:
            for k, block in enumerate(blocks):
                if row in block:
                    return k
    raise ProgramError(
        f"chain {chain!r}: inline would stand on row {rows[0]}, where none of its blocks is; give it blocks with that row (of a layout: ranks of "
        f"that row), or another kind"
    )


def _following(laid: Plan, chain: str, place: Beside) -> Added:
    """F and B of a chain that takes from the main one, right after what gives to it."""
    assert place.blocks is not None
    added: Added = []
    stages, back = range(len(place.blocks)), any(op in ("B", "I") for op, *_ in laid.at)
    given = [laid.given(chain, u) for u in range(laid.units[chain])]
    for u in sorted(range(len(given)), key=lambda u: given[u]):
        givers = [laid.standing("F", j.source, j.source_stage, laid.data(chain, u)) for j in laid.joints if j.target == chain]
        last = max((each for each in givers if each), key=lambda each: max(laid.ends[r][i] for r, i in each))
        k = _block_at(chain, place, [r for r, _ in last]) if place.kind == "inline" else 0
        added += [(r, given[u], _action("F", chain, s, u)) for s in stages for r in place.blocks[s][k]]
        added += [(r, given[u], _action("B", chain, s, u)) for s in reversed(stages) for r in place.blocks[s][k] if back]
    return added


def _own_rows_after(laid: Plan, chain: str, place: Beside) -> Program:
    """Each unit on all rows, its B right after its F: what gives to it may wait for that."""
    assert place.blocks is not None
    whole = attrs.evolve(place, blocks=tuple((tuple(_rows(place, s)),) for s in range(len(place.blocks))))
    return laid.with_(_following(laid, chain, whole))


def _decoupled(laid: Plan, chain: str, place: Beside) -> Program:
    assert place.blocks is not None
    rows = [list(row) for row in laid.program]
    stages, units = range(len(place.blocks)), range(laid.units[chain])
    for s in stages:
        for r in _rows(place, s):
            mine = [t for t in stages if r in _rows(place, t)]
            if s == mine[0]:
                after = [_action("B", chain, t, u) for u in units for t in reversed(mine)] if _backward(laid, chain) else []
                rows[r] = [*(_action("F", chain, t, u) for u in units for t in mine), *rows[r], *after]
    return tuple(map(tuple, rows))


def _dedicated(laid: Plan, chain: str, place: Beside) -> Program:
    """Forwards ahead as many as may be, then a backward and a forward in turn; each unit on all rows of its stage."""
    assert place.blocks is not None
    least = least_in_flight(laid, chain)
    limit = 2 * least if place.in_flight is None else place.in_flight
    refuse_few(chain, limit, least)
    wanted = [laid.wanted(chain, u) for u in range(laid.units[chain])]
    order = sorted(range(len(wanted)), key=lambda u: wanted[u])
    back = sorted(range(len(wanted)), key=lambda u: wanted[u][1])
    rows, trained = list(laid.program), _backward(laid, chain)
    for s in range(len(place.blocks)):
        ahead = max(least, limit - s) - 1
        made = alternate([(s, u) for u in order], [(s, u) for u in back], ahead)
        kept = [attrs.evolve(a, chain=chain) for a in made if a.op == "F" or trained]
        for r in _rows(place, s):
            rows[r] = (*rows[r], *kept)
    return tuple(rows)


def _nested(laid: Plan, chain: str, place: Beside, times: Times, link: Link) -> Program:
    """The quickest of a few: whole units to rows, as many in flight as may be or a few less, and all units shared by all rows; or hardly any."""
    assert place.blocks is not None
    blocks, least = place.blocks[0], least_in_flight(laid, chain)
    limit = least * min(4, len(blocks)) if place.in_flight is None else place.in_flight
    refuse_few(chain, limit, least)
    time = times if callable(times) else durations(times)
    forward, backward = (time(_action(op, chain, 0, 0)) for op in "FB")
    joints = [j for j in laid.joints if {j.source, j.target} <= {*laid.placed, chain}]
    best, back = None, _backward(laid, chain)
    ways = [(True, limit, True), (True, max(least, limit - len(blocks)), True), (False, limit, True)]
    for whole, few, shared in [*ways, (True, limit, False)] if place.fixed else ways:  # where sharing costs nothing, all may share
        added = nest(laid, Nested(chain, blocks, forward, backward, few, whole, place.fixed, shared))
        program = laid.with_(added if back else [entry for entry in added if entry[2].op == "F"])
        timeline = cost(program, times, link, joints=joints, fixed={chain: place.fixed})
        if (not whole or held(timeline, chain)[1] <= limit + 1e-9) and (best is None or timeline.makespan < best[0]):
            best = (timeline.makespan, program)
    assert best is not None
    return best[1]


def _widened(main: Program, where: Mapping[str, Beside], name: str) -> Program:
    """The main program under its name, with empty rows for the dedicated chains."""

    def named(a: Action) -> Action:
        return attrs.evolve(a, chain=name, pair=tuple(map(named, a.pair)))

    own = {r for place in where.values() if place.kind == "dedicated" and place.blocks for s in range(len(place.blocks)) for r in _rows(place, s)}
    rows = iter(main)
    return tuple(() if r in own else tuple(map(named, next(rows))) for r in range(len(main) + len(own)))


def _feeding(joints: Sequence[Joint], placements: Mapping[str, Beside], name: str) -> dict[str, bool]:
    """The chains, each after those that it takes from, and whether it gives to the main one or at least takes nothing from it."""
    left, order, after = [*placements, name], list[str](), {name}
    while left:
        free = next((c for c in left if not any(j.target == c and j.source in left for j in joints)), None)
        if free is None:
            ring = next(j for j in joints if j.source in left and j.target in left)
            raise ProgramError(f"chains {some(sorted(left))} wait for each other: joint {ring.name} → {ring.target} closes a circle")
        left.remove(free)
        order.append(free)
        if any(j.target == free and j.source in after for j in joints):
            after.add(free)
    return {c: c not in after for c in order if c != name}


def _filled(main: Program, joints: Sequence[Joint], placements: Mapping[str, Beside], name: str) -> dict[str, Beside]:
    """The placements with their defaults. Raises ProgramError for what cannot be."""
    count = microbatches(main)
    if wrong := next((a for row in main for a in flat(row) if a.op not in COMPUTE or a.chain not in ("", name)), None):
        raise ProgramError(f"the main program is of compute of chain {name!r} alone, and has {wrong}")
    for joint in joints:
        for chain in (joint.source, joint.target):
            if chain != name and chain not in placements:
                raise ProgramError(f"joint {joint.name} → {joint.target}: chain {chain!r} has no placement; give it one of {', '.join(KINDS)}")
    feeding, out = _feeding(joints, placements, name), dict[str, Beside]()
    own = {r for p in placements.values() if p.kind == "dedicated" for blocks in p.blocks or () for block in blocks for r in block}
    extra = [chain for chain, p in placements.items() if p.kind == "dedicated" and p.blocks is None]
    total = len(main) + len(own) + len(extra)
    free = [r for r in range(total) if r not in own]
    for chain, place in placements.items():
        kind = one_of(f"placement of chain {chain!r}", place.kind, KINDS)
        if not any(chain in (j.source, j.target) for j in joints):
            raise ProgramError(f"chain {chain!r}: no joint is to or from it; it has no place beside {name!r}")
        if not feeding[chain] and kind in ("nested", "decoupled"):
            raise ProgramError(f"chain {chain!r} takes from chain {name!r}, so it cannot be {kind}: use inline or dedicated")
        units = place.units if place.units is not None else 1 if kind == "decoupled" else count
        if not 1 <= units <= count:
            raise ProgramError(f"chain {chain!r}: units={units} of {count} microbatches; use 1 to {count}")
        if units != count and (kind == "inline" or not feeding[chain]):
            raise ProgramError(f"chain {chain!r}: units={units}, and {kind} has one for each of the {count} microbatches; leave units out")
        if place.in_flight is not None and (kind in ("inline", "decoupled") or not feeding[chain]):
            raise ProgramError(f"chain {chain!r}: in_flight={place.in_flight} does not go with {kind} here: leave it out")
        if place.in_flight is not None and place.in_flight < 1:
            raise ProgramError(f"chain {chain!r}: in_flight={place.in_flight} must be at least 1")
        if not 0 <= place.fixed <= 1:
            raise ProgramError(f"chain {chain!r}: fixed={place.fixed} is a part of a unit's time: give 0 to 1")
        if place.blocks is not None:
            blocks = place.blocks
        elif kind == "dedicated":
            blocks = (((free[len(main) + extra.index(chain)],),),)
        else:
            blocks = (tuple((r,) for r in (range(total) if kind == "inline" else free[: len(main)])),)
        _refuse_blocks(chain, kind, blocks, total)
        out[chain] = attrs.evolve(place, units=units, blocks=blocks)
    stages = {name: len({a.stage for row in main for a in flat(row)}), **{chain: len(place.blocks or ()) for chain, place in out.items()}}
    for joint in joints:
        for chain, stage in ((joint.source, joint.source_stage), (joint.target, joint.target_stage)):
            if not 0 <= stage < stages[chain]:
                raise ProgramError(f"joint {joint.name} → {joint.target}: chain {chain!r} has no stage {stage}, but {stages[chain]} of them")
    return out


def _refuse_blocks(chain: str, kind: str, blocks: tuple[tuple[Block, ...], ...], total: int) -> None:
    if not blocks or not all(blocks) or not all(block for of in blocks for block in of):
        raise ProgramError(f"chain {chain!r}: blocks={blocks}: each stage needs a block, and each block a row")
    for s, of in enumerate(blocks):
        rows = [r for block in of for r in block]
        if wrong := [r for r in rows if not 0 <= r < total]:
            raise ProgramError(f"chain {chain!r}: stage {s} would stand on row {wrong[0]}; the program has rows 0 to {total - 1}")
        if len(set(rows)) < len(rows):
            raise ProgramError(f"chain {chain!r}: row {next(r for r in rows if rows.count(r) > 1)} is in two blocks of stage {s}")
        if len(of) != len(blocks[0]):
            raise ProgramError(f"chain {chain!r}: stage 0 has {len(blocks[0])} blocks and stage {s} has {len(of)}; the k-th ones belong together")
    if kind == "nested" and len(blocks) > 1:
        raise ProgramError(f"chain {chain!r} has {len(blocks)} stages, nested is for one: use decoupled, inline or dedicated")

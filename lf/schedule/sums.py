"""Sums of gradients in a program that is proven: what a REDUCE needs, and which there must be."""

from __future__ import annotations

import attrs

from lf.schedule.ground import Ground
from lf.schedule.holds import Holds, Lack
from lf.schedule.ir import Action, some
from lf.schedule.lower import reduced_layers, tied_paths, users_of
from lf.schedule.pieces import WHOLE


def reduce(on: Ground, row: Holds, a: Action) -> None:
    """A layer's sum on one rank, after all of its weight gradients there. Raises Lack."""
    if on.layouts is None:
        users = [(a.stage, a.segment)]
    elif a.segment in on.layouts.chains[a.chain].specs:
        _tied(on, row, a, a.segment)
        return
    else:
        layout, pp = on.layouts.chains[a.chain], on.layouts.pp(a.chain, row.row)
        assert pp is not None
        mine = reduced_layers(layout, pp)
        if a.segment is None or (a.stage, a.segment) not in mine:
            there = ", ".join(layer for s, layer in mine if s == a.stage) or "none"
            if a.segment is None:
                raise Lack(f"a REDUCE is of one layer, of {there}; or give the compute alone, and all that is missing is added")
            raise Lack(f"stage {a.stage} has no layer {a.segment!r} to reduce; it has {there}")
        who = users_of(layout, pp)
        paths = mine[a.stage, a.segment]
        if a.microbatch is not None and not (paths := tuple(path for path in paths if layout.specs[path].cut)):
            raise Lack("its gradients are kept whole, not in shards, and summed once: leave the number out")
        users = list(dict.fromkeys(user for path in paths for user in who[path]))
    if (a.chain, a.stage, a.segment or WHOLE) in row.reduced:
        raise Lack("all gradients of it have been summed before")
    known = on.known[a.chain]
    for s, layer in users:
        span = known[s].span(layer) or (0, len(known[s].atoms))
        trained = [i for i in range(*span) if known[s].inside[i]]
        here = [u for u in range(on.units[a.chain]) if row.row in on.rows.get((a.chain, s, u), ()) and a.microbatch in (None, u)]
        if late := [u for u in here if any((a.chain, s, u, i) not in row.ready for i in trained)]:
            raise Lack(f"the gradients of microbatches [{some(late)}] would come after it")
    if a.microbatch is None:
        row.reduced.add((a.chain, a.stage, a.segment or WHOLE))
    else:
        row.part_reduced.setdefault((a.chain, a.stage, a.segment or WHOLE), set()).add(a.microbatch)


def _tied(on: Ground, row: Holds, a: Action, path: str) -> None:
    """The sum over the stages that use a parameter: all ranks that hold it meet."""
    assert on.layouts is not None
    layout, pp = on.layouts.chains[a.chain], on.layouts.pp(a.chain, row.row)
    assert pp is not None
    if path not in tied_paths(layout, pp):
        raise Lack(f"{path} is not trained here by several ranks; its ranks are {list(layout.holders(path))}")
    early = [user for user, paths in reduced_layers(layout, pp).items() if path in paths and _missing(on, row, a.chain, *user)]
    if early:
        raise Lack(f"{early[0][0]}REDUCE[{early[0][1]}] comes before it")
    row.reduced.add((a.chain, a.stage, path))


def missing(on: Ground, row: Holds) -> list[Action]:
    """The REDUCEs that a rank of a program with backwards must have and has not made."""
    layouts, out = on.layouts, list[Action]()
    for chain, layout in layouts.chains.items() if layouts else ():
        assert layouts is not None
        if (pp := layouts.pp(chain, row.row)) is None:
            continue
        for s, layer in reduced_layers(layout, pp):
            out += _missing(on, row, chain, s, layer)
        who = users_of(layout, pp)
        tied = [Action("REDUCE", who[path][0][0], segment=path, chain=chain) for path in tied_paths(layout, pp)]
        out += [a for a in tied if (chain, a.stage, a.segment) not in row.reduced]
    return out


def _missing(on: Ground, row: Holds, chain: str, stage: int, layer: str) -> list[Action]:
    """Of one layer: one of all microbatches, or of what lies in shards one of each that it has a gradient of."""
    whole, at = Action("REDUCE", stage, segment=layer, chain=chain), (chain, stage, layer)
    if at in row.reduced:
        return []
    if at not in row.part_reduced:
        return [whole]
    assert on.layouts is not None
    layout = on.layouts.chains[chain]
    paths = reduced_layers(layout, layout.placement[stage])[stage, layer]
    here = [u for u in range(on.units[chain]) if row.row in on.rows.get((chain, stage, u), ()) and u not in row.part_reduced[at]]
    uncut = any(not layout.specs[path].cut for path in paths)
    return [attrs.evolve(whole, microbatch=u) for u in here] + [whole] * uncut

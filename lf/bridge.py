"""Bridges: which rows of an output go from which rank to which, between two chains whatever their layouts, and their way there.

What a joint carries for data batch (d, m) is one logical tensor: the rows of the items, one item after another. At either end it lies in the packed
rows of *places*, dp coordinates of a chain: those of the main chain have their data batch whole, those of a dealt chain have the items of their
shares. The packed rows of a place are cut over its cp·tp ranks, tp fastest. So each rank holds boxes of the logical tensors, and what goes from one
rank to another is the intersection of their boxes, as in resharding. Both work it out from the plans: no shape travels, nor a row that nobody needs.
A rank looks only at the places that it has items in common with.

Backward is the transpose: rows go back where they came from and are added there. A message has the dtype of the one who sends it, which casts
nothing; who receives it adds it up in its own: forward in the compute dtype of the target, backward in that of the source.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from lf.batch import Batch, BatchError
from lf.box import Box, intersect, slices, volume, whole
from lf.chain_layouts import Joint, Layouts
from lf.chains import Items, padded
from lf.deal import Dealt, Share
from lf.mesh import shares

Range = tuple[int, int]


@attrs.frozen
class Table:
    """What one rank does in a bridge of one microbatch, in rows of its own tensors.

    `gives`, `takes`: (rank of the world, ranges of rows), ascending, of what goes to it and comes from it in one message · `own`: (range of the
    output, range of the input) that stays on this rank · `source`, `target`: how many rows this rank has of the output of the source's unit and of
    the input of the target's; None: it has no part of it · `what`: what the messages are called.
    """

    what: str
    gives: tuple[tuple[int, tuple[Range, ...]], ...] = ()
    takes: tuple[tuple[int, tuple[Range, ...]], ...] = ()
    own: tuple[tuple[Range, Range], ...] = ()
    source: int | None = None
    target: int | None = None

    @property
    def back(self) -> Table:
        """The way of the gradients."""
        own = tuple((there, here) for here, there in self.own)
        return Table(f"gradient of {self.what}", self.takes, self.gives, own, self.target, self.source)


@attrs.frozen(slots=False)
class End:
    """An end of a joint in one step. `rows[microbatch][dp]`: of each item of a data batch its rows · `dealt`: None of the main chain · `cut(m, d)`:
    of the main chain the bounds of what each rank of place d has of the rows of microbatch m; None: equal shares of the rows, padded."""

    layouts: Layouts
    chain: str
    stage: int
    rows: Sequence[Sequence[Sequence[int]]]
    dealt: Dealt | None = None
    cut: Callable[[int, int], tuple[int, ...]] | None = None
    known: dict[Any, Any] = attrs.field(factory=dict, init=False, eq=False, repr=False)  # what was worked out in this step, by place

    @property
    def parts(self) -> int:
        """Ranks of a place."""
        mesh = self.layouts.chains[self.chain].mesh
        return mesh.cp * mesh.tp

    def ranks(self, place: int) -> tuple[int, ...]:
        where = self.layouts.chains[self.chain]
        first = where.mesh.rank(pp=where.placement[self.stage], dp=place)
        return self.layouts.ranks[self.chain][first : first + self.parts]

    def at(self, m: int, rank: int) -> tuple[int, int] | None:
        """The place of a rank of the world, and which of its ranks it is; None: it has no part of the unit of microbatch m."""
        coords, where = self.layouts.coords(self.chain, rank), self.layouts.chains[self.chain]
        if coords is None or coords["pp"] != where.placement[self.stage]:
            return None
        if self.dealt is not None and (self.dealt.unit(m), coords["dp"]) not in self.dealt.shares:
            return None
        return coords["dp"], coords["cp"] * where.mesh.tp + coords["tp"]

    def place(self, m: int, d: int, item: int) -> int:
        return d if self.dealt is None else self.dealt.places[m, d][item]

    def packed(self, m: int, place: int) -> tuple[dict[Share, int], tuple[int, ...]]:
        """Of the unit of microbatch m at a place: where the rows of each item begin, and the bounds of what its ranks have."""
        key = (m if self.dealt is None else self.dealt.unit(m), place)
        if key not in self.known:
            mine = [Share(m, place, j) for j in range(len(self.rows[m][place]))] if self.dealt is None else self.dealt.shares[key]
            ends = list(accumulate((self.rows[s.microbatch][s.dp][s.item] for s in mine), initial=0))
            cut = self.cut(m, place) if self.cut else equal(padded(ends[-1], 2 * self.parts), self.parts)
            self.known[key] = dict(zip(mine, ends)), cut
        return self.known[key]


def equal(rows: int, parts: int) -> tuple[int, ...]:
    """The bounds of equal shares."""
    return tuple(accumulate(shares(rows, parts), initial=0))


@attrs.frozen
class Bridge:
    """A joint in one step, as one rank of the world sees it."""

    joint: Joint
    rank: int
    source: End
    target: End

    def table(self, m: int) -> Table:
        """What this rank does in the bridge of microbatch m of the data."""
        gives, source = _moves(m, self.rank, self.source, self.target)
        takes, target = _moves(m, self.rank, self.target, self.source)
        takes.pop(self.rank, None)
        own = tuple(gives.pop(self.rank, ()))
        what = f"{self.joint.name} of {m} → {self.joint.target} {self.joint.target_stage}"
        return Table(what, _messages(gives), _messages(takes), own, source, target)


def _moves(m: int, rank: int, mine: End, other: End) -> tuple[dict[int, list[tuple[Range, Range]]], int | None]:
    """For each rank of the other end what it has in common with this rank, as (rows here, rows there), in the order of the items; and how many rows
    this rank has."""
    if (at := mine.at(m, rank)) is None:
        return {}, None
    place, part = at
    starts, bounds = mine.packed(m, place)
    bounds = bounds[part : part + 2]
    found: dict[int, list[tuple[Range, Range]]] = {}
    for item, start in starts.items():
        here = _box(bounds, start)
        held = intersect(whole((mine.rows[item.microbatch][item.dp][item.item],)), here)
        if item.microbatch != m or not volume(held):
            continue
        there = other.place(m, item.dp, item.item)
        others, cut = other.packed(m, there)
        ranks, first = other.ranks(there), bisect_right(cut, others[item] + held[0][0]) - 1
        for i in range(first, len(ranks)):
            origin = _box(cut[i : i + 2], others[item])
            if volume(common := intersect(held, origin)):
                (a,), (b,) = slices(common, here), slices(common, origin)
                _join(found.setdefault(ranks[i], []), ((a.start, a.stop), (b.start, b.stop)))
            elif cut[i] >= others[item] + held[0][1]:
                break
    return found, bounds[1] - bounds[0]


def _box(bounds: Sequence[int], start: int) -> Box:
    """What a rank has between `bounds` of its place's packed rows, in rows of the item that begins at `start` of them."""
    return ((bounds[0] - start, bounds[1] - start),)


def _join(pairs: list[tuple[Range, Range]], new: tuple[Range, Range]) -> None:
    """Puts a pair of ranges behind the others, as one with the last where both go on."""
    if pairs and all(old[1] == now[0] for old, now in zip(pairs[-1], new)):
        (a, _), (b, _) = pairs.pop()
        new = (a, new[0][1]), (b, new[1][1])
    pairs.append(new)


def _messages(found: Mapping[int, list[tuple[Range, Range]]]) -> tuple[tuple[int, tuple[Range, ...]], ...]:
    return tuple((rank, tuple(here for here, _ in pairs)) for rank, pairs in sorted(found.items()))


def bridge(
    layouts: Layouts,
    joint: Joint,
    rank: int,
    items: Mapping[str, Sequence[Sequence[Items]]],
    dealt: Mapping[str, Dealt],
    batches: Sequence[Sequence[Batch]],
) -> Bridge:
    """A joint in a step whose data batches are `batches[microbatch][dp]`, all plans on every rank. `items[chain][microbatch][dp]`, `dealt[chain]`: of
    its ends; the main chain is not dealt. Raises BatchError, with the edge and the data batch, where the plans do not fit together."""
    edge, main = joint.edges[0], layouts.main
    given = items[joint.source]
    for m, row in enumerate(given):
        for d, mine in enumerate(row):
            other = None if joint.target == main else items[joint.target][m][d]
            _refuse(joint, mine, other, f"data batch dp={d} of microbatch {m}", joint.source == main)
    rows = [[mine.rows[edge.output] for mine in row] for row in given]
    source = End(layouts, joint.source, joint.source_stage, rows, None if joint.source == main else dealt[joint.source])
    target = End(layouts, joint.target, joint.target_stage, rows, None if joint.target == main else dealt[joint.target])
    if joint.source == main:
        source = attrs.evolve(source, cut=lambda m, d: equal(given[m][d].padded[edge.output], source.parts))
    if edge.takes is not None:
        takes, parts = edge.takes, target.parts

        def cut(m: int, d: int) -> tuple[int, ...]:
            mask = np.asarray(takes(batches[m][d]), dtype=bool)
            if (places := int(mask.sum())) != (n := sum(rows[m][d])):
                where = f"edge {edge}, data batch dp={d} of microbatch {m}"
                raise BatchError(f"{where}: {places} tokens take a row, and the items give {n}; each row needs one token, in order")
            taken = np.concatenate([[0], np.cumsum(mask)])
            return tuple(int(taken[at]) for at in equal(len(mask), parts))

        target = attrs.evolve(target, cut=cut)
        if coords := layouts.coords(main, rank):  # so that every data batch is looked at by the ranks that run it, before anything is sent
            for m in range(len(batches)):
                target.packed(m, coords["dp"])
    return Bridge(joint, rank, source, target)


def _refuse(joint: Joint, source: Items, target: Items | None, where: str, main: bool) -> None:
    edge = joint.edges[0]
    rows = source.rows.get(edge.output)
    if rows is None or len(rows) != len(source.cost):
        have = "no rows" if rows is None else f"rows of {len(rows)} items"
        raise BatchError(f"edge {edge}, {where}: the plan has {len(source.cost)} items of {joint.source!r} and says {have} for {edge.output!r}")
    if rows and min(rows) < 0:
        raise BatchError(f"edge {edge}, {where}: item {rows.index(min(rows))} gives {min(rows)} rows of {edge.output!r}; none is the least")
    if target is not None and len(target.cost) != len(rows):
        way = f"item j of {joint.target!r} takes the rows of item j of {joint.source!r}, so give it an item for each"
        raise BatchError(f"edge {edge}, {where}: {len(rows)} items of {joint.source!r}, {len(target.cost)} of {joint.target!r}; {way}")
    if main and source.padded.get(edge.output, -1) < sum(rows):
        n = source.padded.get(edge.output)
        raise BatchError(f"edge {edge}, {where}: {sum(rows)} rows of {edge.output!r} by item, and `padded`, which counts all of them, says {n}")


Rows = tuple[tuple[Range, ...], Tensor]
"""Ranges of rows, and what belongs there, one after another."""


def start(table: Table, x: Tensor | None, link: Any, like: tuple[int, torch.dtype, torch.device]) -> Callable[[], list[Rows]]:
    """Starts what this rank sends and receives by `table`; the function returned waits for all of it and gives what has come, this rank's own rows
    among it. For gradients: `table.back`.

    x: (rows, width) of the source's unit, None where this rank has none · link: an axis over the world, ready for messages both ways · like: the
    columns, the dtype and the device of what comes: width of the output, compute dtype of the sending chain. Messages are started in one order all
    over the world, by sender and receiver, so that they may block.
    """
    if (None if x is None else len(x)) != table.source:
        raise BatchError(f"{table.what}: rank {link.index} has {'no' if x is None else len(x)} rows; its plan says {table.source}")
    width, dtype, device = like
    waits: list[Callable[[], Any]] = []
    laters: list[tuple[tuple[Range, ...], Callable[[], Tensor]]] = []
    ways = [(link.index, peer, ranges) for peer, ranges in table.gives] + [(peer, link.index, ranges) for peer, ranges in table.takes]
    for source, to, ranges in sorted(ways):
        if source == link.index:
            assert x is not None
            waits.append(link.send(torch.cat([x[a:b] for a, b in ranges]), to, table.what))
        else:
            n = sum(b - a for a, b in ranges)
            laters.append((ranges, link.recv((n, width), dtype, device, source, table.what)))
    mine = [((there,), x[here[0] : here[1]]) for here, there in table.own] if x is not None else []

    def wait() -> list[Rows]:
        got = mine + [(ranges, later()) for ranges, later in laters]
        for sent in waits:
            sent()
        return got

    return wait


def assemble(rows: int, like: tuple[int, torch.dtype, torch.device], parts: Sequence[Rows]) -> Tensor:
    """(rows, width), in this dtype: all that has come for a unit, from every microbatch (forward) and joint (backward), zeros elsewhere. What comes
    for one row is added."""
    width, dtype, device = like
    out = torch.zeros(rows, width, dtype=dtype, device=device)
    for ranges, values in parts:
        for (a, b), piece in zip(ranges, values.split([b - a for a, b in ranges])):
            out[a:b] += piece
    return out

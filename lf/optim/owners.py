"""Muon where each matrix has one owner among the ranks that keep a share of it: shares travel there, it makes the products, shares travel back.

Of a matrix of r·c elements about 2·r·c travel, and the products are made once. Owners are dealt so that each has about as many operations: the
most expensive matrix first, to whoever has the least so far (Graham 1969, doi 10.1137/0117039: at most 4/3 of the best). Ranks that keep the same
share alike, as those of dp do where no state is cut, may all own: the one next to an owner sends it, and each is sent the result. The ranks of a
stage exchange everything at once, by one all-to-all there and one back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from lf.box import Box, shape, volume
from lf.chain_layouts import Layouts
from lf.ops.newton_schulz import flops
from lf.optim.matrices import Sink, Source, matrix, once, orthogonal, stack, stacked
from lf.spec import Piece, Spec

STAGE = ("dp", "cp", "tp")  # the joint group of the ranks of a stage; those of the expert mesh are the same, in the same order


@attrs.frozen
class Unit:
    """Matrix `e` of part `part` of the parameter at `path`, (rows, columns). `boxes`: what the rank at each place keeps of it."""

    path: str
    part: int
    e: int
    shape: tuple[int, ...]
    boxes: dict[int, Box]

    def senders(self, owner: int) -> Iterator[tuple[int, Box]]:
        """Of each box the rank nearest to the owner that keeps it, in the order of the boxes."""
        nearest: dict[Box, int] = {}
        for place, box in self.boxes.items():
            if box not in nearest or abs(place - owner) < abs(nearest[box] - owner):
                nearest[box] = place
        for box in sorted(nearest):
            yield nearest[box], box


@attrs.frozen
class Plan:
    """Of one chain and rank: units, all that this rank has to do with, each with its owner. place: of this rank in the group of `size`."""

    chain: str
    units: tuple[tuple[Unit, int], ...]
    pieces: dict[tuple[str, int], Piece]
    place: int
    size: int


def owners() -> Callable[[Layouts, Any, Sequence[str], Source, Sink], None]:
    """run(layouts, ctx, paths, source, sink): makes the matrices of these parameters orthogonal. Collective over the ranks of a stage."""
    plans = once(_plans)

    def run(layouts: Layouts, ctx: Any, paths: Sequence[str], source: Source, sink: Sink) -> None:
        for plan in plans(layouts, ctx, paths):
            own = dict.fromkeys(path for path, _ in plan.pieces)
            _run(plan, ctx.of(plan.chain).axes[STAGE], {path: source(path) for path in own}, sink)

    return run


def _run(plan: Plan, axis: Any, held: dict[str, Tensor], sink: Sink) -> None:
    me, pieces = plan.place, plan.pieces

    def local(unit: Unit) -> Tensor:
        """(rows, columns) of this rank's share."""
        piece = pieces[unit.path, unit.part]
        return stacked(piece, held[unit.path])[unit.e - stack(piece)[0]]

    there, takes = _Mail(plan.size), list[tuple[int, int, Box]]()
    owned = [unit for unit, owner in plan.units if owner == me]
    for unit, owner in plan.units:
        for place, box in unit.senders(owner):
            if place == me:
                there.send(owner, local(unit))
            if owner == me:
                takes.append((place, volume(box), box))
                there.expect(place, volume(box))
    like = next(iter(held.values()))
    read, at = there.exchange(axis, like), iter(takes)
    alike: dict[tuple[int, ...], list[tuple[Unit, Tensor]]] = {}
    for unit in owned:
        whole = like.new_empty(unit.shape)
        for place, n, box in (next(at) for _ in unit.senders(me)):
            (r0, r1), (c0, c1) = box
            whole[r0:r1, c0:c1] = read(place, n).view(shape(box))  # where boxes overlap, their values agree
        alike.setdefault(unit.shape, []).append((unit, whole))
    done: dict[int, Tensor] = {}
    for group in alike.values():
        together = orthogonal(torch.stack([whole for _, whole in group]))
        done |= {id(unit): x for (unit, _), x in zip(group, together)}

    back = _Mail(plan.size)
    for unit, owner in plan.units:
        if owner == me:
            for place, ((r0, r1), (c0, c1)) in unit.boxes.items():
                back.send(place, done[id(unit)][r0:r1, c0:c1])
        if me in unit.boxes:
            back.expect(owner, volume(unit.boxes[me]))
    read, parts = back.exchange(axis, like), dict[tuple[str, int], list[Tensor]]()
    for unit, owner in plan.units:
        if me in unit.boxes:
            parts.setdefault((unit.path, unit.part), []).append(read(owner, volume(unit.boxes[me])))
    for (path, part), found in parts.items():
        piece = pieces[path, part]
        sink(path, piece, torch.cat(found).view(shape(piece.box)))


class _Mail:
    """What goes to and comes from each place, in the order in which both sides name it."""

    def __init__(self, size: int):
        self.out: list[list[Tensor]] = [[] for _ in range(size)]
        self.recv = [0] * size

    def send(self, place: int, x: Tensor) -> None:
        self.out[place].append(x.reshape(-1))

    def expect(self, place: int, n: int) -> None:
        self.recv[place] += n

    def exchange(self, axis: Any, like: Tensor) -> Callable[[int, int], Tensor]:
        """read(place, n): the next n elements that came from there."""
        flat = [x for each in self.out for x in each]
        sent = torch.cat(flat) if flat else like.new_empty(0)
        got = axis.all_to_all(sent, [sum(x.numel() for x in each) for each in self.out], self.recv).split(self.recv)
        at = [0] * len(self.recv)

        def read(place: int, n: int) -> Tensor:
            at[place] += n
            return got[place][at[place] - n : at[place]]

        return read


def _plans(layouts: Layouts, rank: int, paths: tuple[str, ...]) -> list[Plan]:
    by_chain: dict[str, dict[tuple[str, ...], list[Spec]]] = {}
    for path in paths:
        spec = layouts.specs[path]
        by_chain.setdefault(layouts.chain_of[path], {}).setdefault(spec.grid, []).append(spec)
    return [_plan(layouts, chain, rank, [*grids.values()]) for chain, grids in by_chain.items()]


def _plan(layouts: Layouts, chain: str, rank: int, grids: Sequence[Sequence[Spec]]) -> Plan:
    """Each factoring is dealt by itself: which ranks keep a copy of its state between them may differ."""
    mesh, coords = layouts.chains[chain].mesh, layouts.coords(chain, rank)
    assert coords is not None
    size = mesh.size // mesh.pp
    there = [mesh.coords(coords["pp"] * size + place) for place in range(size)]
    place = there.index(coords)
    units: list[tuple[Unit, int]] = []
    for specs in grids:
        found = [unit for spec in specs for unit in _units(spec, there, spec.shard(coords)[1])]
        units += zip(found, _dealt(found, size))
    mine = [(unit, owner) for unit, owner in units if place in unit.boxes or place == owner]
    pieces = {(spec.path, i): p for specs in grids for spec in specs for i, p in enumerate(spec.state_pieces(coords))}
    return Plan(chain, tuple(mine), pieces, place, size)


def _units(spec: Spec, there: Sequence[dict[str, int]], copy: int) -> list[Unit]:
    """The matrices of a parameter, with what each rank keeps that shares this copy of the state."""
    seen: dict[Any, tuple[Piece, ...]] = {}
    found: dict[tuple[int, int], Unit] = {}
    for place, c in enumerate(there):
        shard, of = spec.shard(c)
        if of != copy:
            continue
        key = (shard, *(c[a] for a in spec.names if a))
        for i, piece in enumerate(seen.setdefault(key, spec.state_pieces(c))):
            if volume(piece.box):
                for e in range(*stack(piece)):
                    unit = found.setdefault((i, e), Unit(spec.path, i, e, piece.shape[-2:], {}))
                    unit.boxes[place] = matrix(piece)
    return [found[key] for key in sorted(found)]


def _dealt(units: Sequence[Unit], size: int) -> list[int]:
    """The owner of each."""
    load, out = [0] * size, [0] * len(units)
    for i in sorted(range(len(units)), key=lambda i: (-flops(*units[i].shape), i)):
        out[i] = min(units[i].boxes, key=lambda place: (load[place], place))
        load[out[i]] += flops(*units[i].shape)
    return out

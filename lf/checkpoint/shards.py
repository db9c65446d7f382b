"""The tensors of an export: which parts they are made of, how shards share them, and how one comes together on the rank that writes it.

Which ranks hold what follows from the specs, so no rank asks another, and it does not matter how the expert mesh folds over the dense one. Of the
boxes of a tensor, each owner sends the rank that writes its own: of copies along an axis that splits nothing, the one nearest to that rank. One
exchange brings each writing rank one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import attrs
import torch
from torch import Tensor

from lf import box as boxes
from lf.box import Box
from lf.checkpoint import fp8
from lf.layouts import Layout
from lf.models.families.place import Place
from lf.spec import Piece, Spec
from lf.state import device_of

HEADER = 256  # bytes that a tensor takes in the header of its file, at most


@attrs.frozen
class Source:
    """`box` of part `index` of `spec`, and where on disk it goes."""

    spec: Spec
    index: int
    box: Box
    place: Place


@attrs.frozen
class Entry:
    """A tensor of a shard: its name and shape on disk, the dtype of its values, and the parts that it is made of. matrix: it is one, or a stack of
    them. scaled: it is written in 8 bits, with a scale for each block in a tensor beside it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[Source, ...] = ()
    matrix: bool = False
    scaled: bool = False

    @property
    def size(self) -> int:
        """Bytes on disk."""
        n = math.prod(self.shape)
        return n + 4 * math.prod(fp8.scales_shape(self.shape)) if self.scaled else n * self.dtype.itemsize


def entries(layout: Layout, names: dict[str, Place], dtype: torch.dtype, scaled: bool) -> list[Entry]:
    """The tensors on disk, in the order in which the model first has a part of them. scaled: matrices are written in 8 bits (`fp8.takes`). What is
    not learned has at least float32, whatever `dtype` is."""
    out: dict[str, Entry] = {}
    for spec in layout.specs.values():
        for i, piece in enumerate(spec.pieces(layout.mesh.coords(0))):
            place, all_of_it = names[piece.key], boxes.whole(piece.shape)
            shape, matrix = place.shape(piece.shape), len(piece.shape) - ("expert" in spec.param.axes) == 2
            for e, name in enumerate(place.names):
                entry = out.get(name) or Entry(name, shape, dtype, (), matrix, scaled and matrix and fp8.takes(name))
                wide = torch.promote_types(entry.dtype, torch.float32 if entry.scaled else spec.param.used_in(dtype))
                source = Source(spec, i, ((e, e + 1), *all_of_it[1:]) if place.stack else all_of_it, place)
                out[name] = attrs.evolve(entry, dtype=wide, sources=(*entry.sources, source))
    return list(out.values())


def deal(tensors: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """The tensors of each shard, none larger than `limit` bytes unless one tensor is: the same on every rank."""
    shards: list[list[Entry]] = [[]]
    room = limit
    for entry in tensors:
        size = entry.size + HEADER * (1 + entry.scaled)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= size
    return shards


def assembler(layout: Layout, ctx: Any) -> Callable[[Sequence[Entry | None], Callable[[str], Tensor]], Tensor | None]:
    """assemble(tensors, local) → of tensors[d] the values, in the host's memory, on the rank at dp coordinate d and 0 elsewhere; None on the others.

    local(path): what this rank holds of a parameter. Collective over all ranks, each time.
    """
    axes = ctx.axes
    mesh, rank, world = axes.mesh, axes.rank, axes.world

    @lru_cache(maxsize=2 * mesh["dp"])  # the tensors of a stack follow one another
    def given(path: str, index: int, writer: int) -> list[tuple[int, Piece]]:
        return [*owners(layout, layout.specs[path], index, mesh.coords(writer))]

    def assemble(tensors: Sequence[Entry | None], local: Callable[[str], Tensor]) -> Tensor | None:
        send: list[list[Tensor]] = [[] for _ in range(mesh.size)]
        takes: list[tuple[int, Source, Box]] = []
        mine, size = None, 0
        for d, entry in ((d, e) for d, e in enumerate(tensors) if e is not None):
            writer = mesh.rank(dp=d)
            if writer == rank:
                mine, size = entry, entry.dtype.itemsize
            for source in entry.sources:
                spec = source.spec
                if rank != writer and not _gives(layout, spec, axes.coords, mesh.coords(writer)):
                    continue
                for giver, piece in given(spec.path, source.index, writer):
                    common = boxes.intersect(piece.box, source.box)
                    if not boxes.volume(common):
                        continue
                    if giver == rank:
                        held = piece.view(local(spec.path))[boxes.slices(common, piece.box)]
                        send[writer].append(held.to(entry.dtype).reshape(-1).contiguous().view(torch.uint8))
                    if writer == rank:
                        takes.append((giver, source, common))
        recv = [0] * mesh.size
        for giver, _, common in takes:
            recv[giver] += boxes.volume(common) * size
        flat = [x for each in send for x in each]
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device_of(ctx))
        got = world.all_to_all(sent, [sum(map(len, each)) for each in send], recv).cpu()
        return _joined(mine, takes, got.split(recv)) if mine else None

    return assemble


def owners(layout: Layout, spec: Spec, index: int, near: dict[str, int]) -> Iterator[tuple[int, Piece]]:
    """(rank, what it owns) of a part, when of all copies that count is the one nearest to the coordinates `near`."""
    split = [axis for axis in spec.grid[1:] if axis in spec.names]
    alike = {**dict.fromkeys(spec.grid, 0), "pp": layout.holders(spec.path)[0], **{axis: near[axis] for axis in spec.sum_axes}}
    key = spec.pieces(near)[index].key
    for at in product(*(range(layout.mesh[axis]) for axis in split)):
        coords = dict(zip(split, at))
        for shard in range(spec.cut.n if spec.cut else 1):
            owned = spec.state_owned({**dict.fromkeys(spec.sum_axes, 0), **coords, **spec.of_shard(shard, 0)})
            if piece := next((p for p in owned if p.key == key), None):
                yield layout.mesh.rank(**{**alike, **coords, **spec.of_shard(shard, spec.shard(near)[1])}), piece


def _gives(layout: Layout, spec: Spec, at: dict[str, int], near: dict[str, int]) -> bool:
    """Whether the rank at `at` can be one of `owners`."""
    shards = spec.cut.axes if spec.cut else ()
    alike = all(at[axis] == near[axis] for axis in spec.sum_axes if axis not in shards)
    return at["pp"] == layout.holders(spec.path)[0] and alike and spec.shard(at)[1] == spec.shard(near)[1]


def _joined(entry: Entry, takes: Sequence[tuple[int, Source, Box]], got: Sequence[Tensor]) -> Tensor:
    """The tensor, of the boxes that ranks have sent: `got` their bytes."""
    out, read = torch.empty(entry.shape, dtype=entry.dtype), [0] * len(got)
    for giver, source, common in takes:
        n = boxes.volume(common) * entry.dtype.itemsize
        block = got[giver][read[giver] : read[giver] + n].view(entry.dtype).view(boxes.shape(common))
        read[giver] += n
        for cut in source.place.cuts(common):
            there = out[boxes.slices(cut.disk, tuple((0, 0) for _ in cut.disk))]
            source.place.logical(there).copy_(block[boxes.slices(cut.part, common)])
    return out

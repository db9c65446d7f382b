"""Muon where every rank gathers the matrices that it has a share of, and makes all of each: no rank waits for another's products.

Of a matrix of r·c elements cut into n shards on t ranks of tp, a rank is sent (1 - 1/(n·t))·r·c elements and does all of its products: n·t times
what `lf.optim.owners` does. Good where matrices are whole on a rank already, as experts are, or where the wire is slower than the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from lf.box import shape, volume
from lf.chain_layouts import Layouts
from lf.optim.matrices import Coords, Sink, Source, cut_across, matrix, once, orthogonal, places, shards, split_by, stack, stacked
from lf.spec import Spec


@attrs.frozen
class Bunch:
    """Parameters of one segment that travel together: first over the shards of `data` (axes, n; None: nothing to be gathered there), then over
    `split`. coords[j][k]: of the rank at place j of `split` and shard k."""

    chain: str
    specs: tuple[Spec, ...]
    data: tuple[tuple[str, ...], int] | None
    split: tuple[str, ...]
    coords: tuple[tuple[Coords, ...], ...]
    mine: Coords
    index: int

    def size(self, j: int, k: int) -> int:
        """Elements that a rank gives."""
        return sum(math.prod(spec.state_shape(self.coords[j][k])) for spec in self.specs)


def gathered() -> Callable[[Layouts, Any, Sequence[str], Source, Sink], None]:
    """run(layouts, ctx, paths, source, sink): makes the matrices of these parameters orthogonal. Collective over the ranks that share them."""
    plan = once(_bunches)

    def run(layouts: Layouts, ctx: Any, paths: Sequence[str], source: Source, sink: Sink) -> None:
        for bunches in plan(layouts, ctx, paths):
            started: Callable[[], Tensor] | None = _start(bunches[0], ctx, source)
            for bunch, following in zip(bunches, [*bunches[1:], None]):
                now, started = started, _start(following, ctx, source) if following else None  # it travels while this one's products are made
                assert now is not None
                _finish(bunch, now(), sink)

    return run


def _bunches(layouts: Layouts, rank: int, paths: tuple[str, ...]) -> list[list[Bunch]]:
    """By chain: ranks that are on several must come to the gathers of each in one order, so none travels ahead of those of another chain."""
    found: dict[Any, list[Spec]] = {}
    for path in paths:
        spec = layouts.specs[path]
        data = (spec.cut.axes, spec.cut.n) if spec.cut and cut_across(spec) else None
        found.setdefault((layouts.chain_of[path], path.split("/")[0], data, split_by(spec)), []).append(spec)
    out: dict[str, list[Bunch]] = {}
    for (chain, _, data, split), specs in found.items():
        coords = layouts.coords(chain, rank)
        assert coords is not None
        there = places(specs[0], split, coords)
        each = tuple(tuple(shards(specs[0], c)) if data else (c,) for c in there)
        at = next(j for j, c in enumerate(there) if c == coords)
        out.setdefault(chain, []).append(Bunch(chain, tuple(specs), data, split, each, coords, at))
    return [*out.values()]


def _start(bunch: Bunch, ctx: Any, source: Source) -> Callable[[], Tensor]:
    """Starts the first of the gathers that there are; the function returned gives, of all places and their shards, what each has, flat."""
    axes = ctx.of(bunch.chain).axes
    flat = torch.cat([source(spec.path).reshape(-1) for spec in bunch.specs])
    sizes = [[bunch.size(j, k) for k in range(len(row))] for j, row in enumerate(bunch.coords)]
    across = [sum(row) for row in sizes]
    if bunch.data:
        names, n = bunch.data
        first = axes.part(names, n)[0].all_gather(flat, sizes[bunch.index], later=True)
        return (lambda: axes[bunch.split].all_gather(first(), across)) if bunch.split and sum(across) else first
    if bunch.split and sum(across):
        return axes[bunch.split].all_gather(flat, across, later=True)
    return lambda: flat


def _finish(bunch: Bunch, flat: Tensor, sink: Sink) -> None:
    shapes = [spec.state_shape(c) for row in bunch.coords for c in row for spec in bunch.specs]
    tensors = [x.view(s) for x, s in zip(flat.split([math.prod(s) for s in shapes]), shapes)]
    every = [c for row in bunch.coords for c in row]
    for i, spec in enumerate(bunch.specs):
        given = [(spec.state_pieces(c), tensors[m * len(bunch.specs) + i]) for m, c in enumerate(every)]
        for p, mine in enumerate(spec.state_pieces(bunch.mine)):
            lo, hi = stack(mine)
            if not volume(mine.box):
                continue
            whole = flat.new_empty(hi - lo, *mine.shape[-2:])
            for pieces, held in given:  # where boxes overlap, their values agree
                (r0, r1), (c0, c1) = matrix(pieces[p])
                whole[:, r0:r1, c0:c1] = stacked(pieces[p], held)
            (r0, r1), (c0, c1) = matrix(mine)
            sink(spec.path, mine, orthogonal(whole)[:, r0:r1, c0:c1].reshape(shape(mine.box)))


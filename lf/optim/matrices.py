"""Where the logical matrices lie that Muon works on: each part of a fused parameter is one (q, k, v, gate, up), each expert of a stack has its own.

What a rank keeps of a part is a box of it. A stack's box is a range of its experts, and the same box of the matrix of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lf.box import Box
from lf.chain_layouts import Layouts
from lf.config import ConfigError
from lf.ops.newton_schulz import newton_schulz
from lf.spec import Param, Piece, Spec

Coords = dict[str, int]
Source = Callable[[str], Tensor]
"""path → what is to be made orthogonal, of what this rank keeps, in the dtype that the products are in."""
Sink = Callable[[str, Piece, Tensor], None]
"""Takes what has become of it, piece by piece: (path, piece, values in the shape of the piece's box)."""
CHUNK = 1 << 27  # elements of matrices of one shape that are worked on together
T = TypeVar("T")


def hidden_matrix(param: Param) -> bool:
    """A matrix, or a stack of one for each expert, that is no table of words and has more than one row and column."""
    return "vocab" not in param.axes and len(param.shape) - ("expert" in param.axes) == 2 and min(param.shape[-2:]) > 1


def refuse_others(paths: Sequence[str], layouts: Layouts) -> None:
    """Raises ConfigError for what is neither a matrix nor a stack of them."""
    for path in paths:
        if len(shape := layouts.specs[path].param.shape) not in (2, 3):
            raise ConfigError(f"muon is for matrices and stacks of them; {path} has shape {shape}: let `chosen` leave it to `rest`")


def stack(piece: Piece) -> tuple[int, int]:
    """The matrices [start, stop) of its part that a piece has rows and columns of."""
    return piece.box[0] if len(piece.box) == 3 else (0, 1)


def matrix(piece: Piece) -> Box:
    """Its box in each of them."""
    return piece.box[-2:]


def stacked(piece: Piece, held: Tensor) -> Tensor:
    """The piece in a rank's tensor, (matrices, rows, columns)."""
    view = piece.view(held)
    return view if view.dim() == 3 else view[None]


def split_by(spec: Spec) -> tuple[str, ...]:
    """The mesh axes that cut the matrices themselves, as tp and etp do. ep deals out whole ones."""
    names = spec.names[-2:]
    return tuple(a for a in spec.grid[1:] if a in names and spec.mesh[a] > 1)


def cut_across(spec: Spec) -> bool:
    """Whether shards of the state are cut through matrices, not between them."""
    return spec.cut is not None and spec.cut.dim is not None and spec.cut.dim >= len(spec.param.shape) - 2


def places(spec: Spec, axes: Sequence[str], coords: Coords) -> list[Coords]:
    """The coordinates of the ranks that differ from the one at `coords` on these axes alone, in the order of their joint group."""
    out = [coords]
    for axis in axes:
        out = [{**c, axis: i} for c in out for i in range(spec.mesh[axis])]
    return out


def shards(spec: Spec, coords: Coords) -> list[Coords]:
    """The coordinates of the ranks that keep one copy of the state between them, in the order of their shards."""
    n, (_, copy) = spec.cut.n if spec.cut else 1, spec.shard(coords)
    return [{**coords, **spec.of_shard(k, copy)} for k in range(n)]


def orthogonal(x: Tensor) -> Tensor:
    """`newton_schulz` of (matrices, rows, columns), some at a time."""
    at_once = max(CHUNK // max(math.prod(x.shape[1:]), 1), 1)
    if len(x) <= at_once:
        return newton_schulz(x)
    return torch.cat([newton_schulz(part) for part in x.split(at_once)])


def once(make: Callable[[Layouts, int, tuple[str, ...]], T]) -> Callable[[Layouts, Any, Sequence[str]], T]:
    """make(layouts, rank, paths), which is the same in every step, worked out once for each. The layouts are kept along: so their id is theirs."""
    kept: dict[tuple[int, int, tuple[str, ...]], tuple[Layouts, T]] = {}

    def get(layouts: Layouts, ctx: Any, paths: Sequence[str]) -> T:
        key = (id(layouts), ctx.axes.rank, tuple(paths))
        if key not in kept:
            kept[key] = layouts, make(layouts, ctx.axes.rank, key[2])
        return kept[key][1]

    return get

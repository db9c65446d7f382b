"""Sums of gradients over every rank that holds the element, one launch per layer, group and dtype, from where they lie to where they lie.

    whole        all-reduce over every axis that the parameter is not split on, in place          2(d-1)/d · bytes
    in shards    reduce-scatter over the ranks of its cut, then, of the shard alone, all-reduce    (n-1)/n · bytes, and what a shard takes
                 over the other such axes (tp of a norm) and over the groups of shards (hybrid)

Parts whose boxes overlap along a named axis (kv heads under query heads) come first: they are laid into the whole part and summed over that axis,
2(t-1)/t · rows · width elements more, for those parts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from lf.sharding import Cut
from lf.spec import Piece, Spec

Wait = Callable[[], None]


def reduce_gradients(
    specs: Sequence[Spec], grads: dict[str, Tensor], shards: dict[str, Tensor], axes: Any, transport: str = "fp32",
    lies: Mapping[str, Lies] | None = None,
) -> Wait:  # fmt: skip
    """Starts the sums of `grads` (by path, as the rank computes with them, contiguous). The function returned waits for them: then they stand in
    `grads` themselves, or, where a spec is cut, in `shards`, tensors shaped like the state that this rank keeps. transport: "bf16": what is
    scattered travels in it; it is added up in the dtype of the gradients. lies: of what is cut `lies_of`, where it is known already."""
    _overlaps(specs, grads, axes)
    groups: dict[tuple[str, ...], list[Tensor]] = {}
    cuts: dict[tuple[tuple[str, ...], int], list[Spec]] = {}
    for spec in specs:
        if spec.cut:
            cuts.setdefault((spec.cut.axes, spec.cut.n), []).append(spec)
        elif axes[spec.sum_axes].size > 1:
            groups.setdefault(spec.sum_axes, []).append(grads[spec.path])
    waits: list[Wait] = [axes[names].sum_many(each, later=True) for names, each in groups.items()]
    known = lies_of([spec for each in cuts.values() for spec in each], axes.coords) if lies is None else lies
    waits += [_scattered(each, grads, shards, axes, transport, known) for each in cuts.values()]

    def wait() -> None:
        for one in waits:
            one()

    return wait


def _scattered(
    specs: Sequence[Spec], grads: dict[str, Tensor], shards: dict[str, Tensor], axes: Any, transport: str, lies: Mapping[str, Lies]
) -> Wait:
    """Of specs that have one cut: their sums, in shards."""
    assert specs[0].cut is not None
    inner, outer = axes.part(specs[0].cut.axes, specs[0].cut.n)
    moves = [move for spec in specs for move in moved(lies[spec.path], grads[spec.path], shards[spec.path])]
    if transport == "bf16":
        first = _narrow(inner, moves)
    else:
        outs, xs, sizes, dims = zip(*((move.shard, move.whole, move.sizes, move.dim) for move in moves))
        first = inner.scatter_many(outs, xs, sizes, dims, later=True)
    rest: dict[tuple[str, ...], list[Tensor]] = {}
    for spec in specs:
        names = tuple(a for a in spec.sum_axes if spec.cut and a not in spec.cut.axes)
        if axes[names].size > 1:
            rest.setdefault(names, []).append(shards[spec.path])

    def wait() -> None:
        first()
        for names, each in rest.items():
            axes[names].sum_many(each)
        outer.sum_many([shards[spec.path] for spec in specs])

    return wait


class Move(NamedTuple):
    """How a part of the tensor that a rank computes with and its shard belong together: views of both, the rows of each shard along `dim`."""

    whole: Tensor
    shard: Tensor
    sizes: tuple[int, ...]
    dim: int


@attrs.frozen
class Lies:
    """How one rank has a parameter that lies in shards: the shapes of the whole and of its shard; of each part its pieces in both and the rows of
    each shard. It is the same in all steps, and takes longer to work out than what uses it."""

    cut: Cut
    shape: tuple[int, ...]
    state_shape: tuple[int, ...]
    parts: tuple[tuple[Piece, Piece, tuple[int, ...]], ...]


def lies_of(specs: Sequence[Spec], coords: dict[str, int]) -> dict[str, Lies]:
    """By path, of those specs that are cut, on the rank at `coords`."""
    out = {}
    for spec in specs:
        if spec.cut is not None:
            dim, pairs = spec.cut.dim or 0, zip(spec.pieces(coords), spec.state_pieces(coords))
            parts = tuple((here, kept, spec.cut.sizes(here.box[dim][1] - here.box[dim][0])) for here, kept in pairs)
            out[spec.path] = Lies(spec.cut, spec.local_shape(coords), spec.state_shape(coords), parts)
    return out


def moved(lies: Lies, whole: Tensor, shard: Tensor) -> list[Move]:
    """Of each part of a parameter."""
    return [Move(here.view(whole), kept.view(shard), sizes, lies.cut.dim or 0) for here, kept, sizes in lies.parts]


def _narrow(axis: Any, moves: Sequence[Move]) -> Wait:
    """`scatter_many` in half the bytes: each rank sends the others their rows in bfloat16, and adds up in the dtype of the shards what it gets."""
    cut = [move.whole.split(list(move.sizes), move.dim) for move in moves]
    sent = [[pieces[rank].to(torch.bfloat16).reshape(-1) for pieces in cut] for rank in range(axis.size)]
    mine = sum(move.shard.numel() for move in moves)
    counts = [sum(map(len, each)) for each in sent]
    got = axis.all_to_all(torch.cat([x for each in sent for x in each]), counts, [mine] * axis.size, later=True)

    def wait() -> None:
        rows, at = got().view(axis.size, mine), 0
        for shard in (move.shard for move in moves):
            shard.copy_(rows[:, at : at + shard.numel()].sum(0, dtype=shard.dtype).view(shard.shape))
            at += shard.numel()

    return wait


def _overlaps(specs: Sequence[Spec], grads: dict[str, Tensor], axes: Any) -> None:
    """Sums the parts whose boxes overlap over the axis along which they do; afterwards each of their holders there has the whole of its rows."""
    groups: dict[str, list[tuple[str, Piece, Tensor]]] = {}
    for spec in specs:
        for piece in (spec.pieces(axes.coords)[i] for i in spec.shared()):
            axis = spec.names[piece.dim]
            assert axis is not None
            groups.setdefault(axis, []).append((spec.path, piece, _laid_out(piece, grads[spec.path])))
    for axis, parts in groups.items():
        axes[axis].sum_many([whole for _, _, whole in parts])
        for path, piece, whole in parts:
            lo, hi = piece.box[piece.dim]
            piece.view(grads[path]).copy_(whole.narrow(piece.dim, lo, hi - lo))


def _laid_out(piece: Piece, grad: Tensor) -> Tensor:
    """The rows of this piece at their place in the whole part, zeros elsewhere."""
    lo, hi = piece.box[piece.dim]
    local = piece.view(grad)
    whole = grad.new_zeros([piece.shape[d] if d == piece.dim else n for d, n in enumerate(local.shape)])
    whole.narrow(piece.dim, lo, hi - lo).copy_(local)
    return whole


def owned_square_sum(owned: Sequence[tuple[str, Piece]], grads: dict[str, Tensor], zero: Tensor) -> Tensor:
    """Σ g² over the elements that this rank counts, or `zero`: P over all ranks, so that its sum is the square of the global norm.

    owned: (path, piece) for all that `Layout.state_owned` gives this rank.
    """
    views = [piece.view(grads[path]) for path, piece in owned]
    return torch.stack(torch._foreach_norm(views)).square().sum() if views else zero

"""Differentiable moves between layouts, and nothing else: every pair that is not in EDGES is refused.

    forward               backward             |  forward               backward
    I→R  nothing          all-reduce           |  P→S  reduce-scatter   all-gather
    P→I  all-reduce       nothing              |  I→S  slice            all-gather
    P→R  all-reduce       all-reduce           |  S→I  all-gather       slice
    S→R  all-gather       reduce-scatter       |  R→S  slice            zero-fill
    R→P  keep on rank 0   the same             |  I→P  keep on rank 0   nothing
    S(i)→S(j) all-to-all  all-to-all

R replicated, used differently downstream (its gradient is P) · I replicated, used identically (its gradient is I) · S(d) sharded on dim d · P
partial, a sum is pending (its gradient is R). I→R does nothing forward: forget it and losses match while every gradient upstream is one t-th.

Traffic per rank and call on an axis of t ranks, for N elements of the full tensor: gather or scatter (t-1)/t · N, all-reduce twice that,
all-to-all (t-1)/t² · N. Source: Korthikanti et al. 2022 (arXiv 2205.05198) §4.2; the types are those of spmd_types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from lf.mesh import shares
from lf.spec import LayoutError


class Type(NamedTuple):  # a tuple, because Dynamo cannot make frozen attrs objects, and a layer makes these as it runs
    """How a tensor lies along one mesh axis. `sizes` (S only) is the length on each rank; None cuts in balanced shares and joins equal ones."""

    kind: str
    dim: int = 0
    sizes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"S({self.dim})" if self.kind == "S" else self.kind


R, I, P = Type("R"), Type("I"), Type("P")


def S(dim: int, sizes: Sequence[int] | None = None) -> Type:
    return Type("S", dim, None if sizes is None else tuple(sizes))


# A move is (x, axis, shard) → tensor, where `shard` is the S of the pair. These run without a gradient.
def _nothing(x: Tensor, axis: Any, s: Type) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, axis: Any, s: Type) -> Tensor:
    return axis.all_reduce(x)


def _all_gather(x: Tensor, axis: Any, s: Type, later: bool = False) -> Any:
    return axis.all_gather(x, _gathered(x, axis, s), s.dim, later=later)


def _reduce_scatter(x: Tensor, axis: Any, s: Type, later: bool = False) -> Any:
    return axis.reduce_scatter(x, _cut(x, axis, s), s.dim, later=later)


def _slice(x: Tensor, axis: Any, s: Type) -> Tensor:
    return x.split(_cut(x, axis, s), s.dim)[axis.index].clone()


def _zero_fill(x: Tensor, axis: Any, s: Type) -> Tensor:
    sizes = _gathered(x, axis, s)
    return torch.cat([x if j == axis.index else x.new_zeros(_resized(x, s.dim, n)) for j, n in enumerate(sizes)], s.dim)


def _keep_on_first(x: Tensor, axis: Any, s: Type) -> Tensor:
    return x.clone() if axis.index == 0 else torch.zeros_like(x)


@attrs.frozen
class Edge:
    forward: Callable[..., Any]
    backward: Callable[..., Any]


EDGES = {
    "I→R": Edge(_nothing, _all_reduce),
    "P→I": Edge(_all_reduce, _nothing),
    "P→R": Edge(_all_reduce, _all_reduce),
    "S→R": Edge(_all_gather, _reduce_scatter),
    "P→S": Edge(_reduce_scatter, _all_gather),
    "I→S": Edge(_slice, _all_gather),
    "S→I": Edge(_all_gather, _slice),
    "R→S": Edge(_slice, _zero_fill),
    "R→P": Edge(_keep_on_first, _keep_on_first),
    "I→P": Edge(_keep_on_first, _nothing),
}


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.move = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.move(dy), None, None


def redistribute(x: Tensor, axis: Any, src: Type, dst: Type) -> Tensor:
    """x laid out as `src` on `axis`, returned as `dst`; identity when the axis has one rank. Raises LayoutError on a pair not in EDGES."""
    pair = f"{src.kind}→{dst.kind}"
    src, dst = (t._replace(dim=t.dim % x.dim()) if t.dim < 0 else t for t in (src, dst))  # S(-1) is the last dim
    if src.kind == dst.kind == "S":
        if src.dim == dst.dim:
            raise LayoutError(f"{src}→{dst} on {axis.name}: a shard moves to another dim; on the same dim there is nothing to do")
    elif pair not in EDGES:
        raise LayoutError(f"no edge {src}→{dst} on {axis.name}; there are {', '.join(EDGES)} and S(i)→S(j)")
    if axis.size == 1:
        return x
    if pair == "S→S":  # fix the sizes now, here and below: backward sees another length
        src, dst = src._replace(sizes=tuple(_gathered(x, axis, src))), dst._replace(sizes=tuple(_cut(x, axis, dst)))
        return _Move.apply(x, lambda x: _swap(x, axis, src, dst), lambda dy: _swap(dy, axis, dst, src))
    shard, edge = (dst if dst.kind == "S" else src), EDGES[pair]
    if shard.kind == "S":
        sizes = _cut(x, axis, shard) if dst.kind == "S" else _gathered(x, axis, shard)
        shard = shard._replace(sizes=tuple(sizes))
    return _Move.apply(x, lambda x: edge.forward(x, axis, shard), lambda dy: edge.backward(dy, axis, shard))


def exchange(x: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int], axis: Any) -> Tensor:
    """Rows to ranks: send_rows[j] rows of x go to rank j, recv_rows[j] rows come from it. Backward swaps the two."""
    if axis.size == 1:
        return x
    return _Move.apply(x, lambda x: axis.all_to_all(x, send_rows, recv_rows), lambda dy: axis.all_to_all(dy, recv_rows, send_rows))


def exchange_later(x: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int], axis: Any) -> Callable[[], Tensor]:
    """`exchange` that starts now; the function waits for it. The backward starts where that function was called, and is waited for here."""
    if axis.size == 1:
        return lambda: x
    out = axis.all_to_all(x, send_rows, recv_rows, later=True)
    under_way: list[Callable[[], Tensor]] = []  # the gradient of x, once the backward has begun
    ticket = _Start.apply(x, under_way)
    return lambda: _Finish.apply(ticket, out, lambda dy: under_way.append(axis.all_to_all(dy, recv_rows, send_rows, later=True)))


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, under_way: list[Callable[[], Tensor]]) -> Tensor:
        ctx.under_way = under_way
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.under_way.pop()(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, out: Callable[[], Tensor], back: Callable[[Tensor], None]) -> Tensor:
        ctx.back, ctx.shape = back, ticket.shape
        return out()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.back(dy)
        return dy.new_zeros(()).expand(ctx.shape), None, None  # the gradient itself is still under way


def shift(x: Tensor, k: int, axis: Any) -> Tensor:
    """The x of the rank k places before this one on the ring. Backward shifts by -k."""
    if axis.size == 1:
        return x
    return _Move.apply(x, lambda x: axis.shift(x, k), lambda dy: axis.shift(dy, -k))


def _swap(x: Tensor, axis: Any, src: Type, dst: Type) -> Tensor:
    """S(i) → S(j): cut j, join i."""
    return axis.all_to_all(x, _cut(x, axis, dst), _gathered(x, axis, src), dst.dim, src.dim)


def _cut(x: Tensor, axis: Any, s: Type) -> list[int]:
    """What each rank gets when the full x is cut as s."""
    sizes = list(s.sizes or shares(x.shape[s.dim], axis.size))
    if len(sizes) != axis.size or sum(sizes) != x.shape[s.dim]:
        raise LayoutError(f"sizes {sizes} do not cut dim {s.dim} of {tuple(x.shape)} for the {axis.size} ranks of {axis.name}")
    return sizes


def _gathered(x: Tensor, axis: Any, s: Type) -> list[int]:
    """What each rank has when x is this rank's piece of an s; without sizes they are taken to be equal."""
    sizes = list(s.sizes or [x.shape[s.dim]] * axis.size)
    if len(sizes) != axis.size or sizes[axis.index] != x.shape[s.dim]:
        raise LayoutError(f"rank {axis.index} of {axis.name} has {x.shape[s.dim]} along dim {s.dim}; sizes {sizes} say otherwise")
    return sizes


def _resized(x: Tensor, dim: int, n: int) -> list[int]:
    return [n if d == dim else k for d, k in enumerate(x.shape)]

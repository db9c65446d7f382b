"""Rows of tokens to rows of experts and back, without sums in an order that differs from run to run: fast twins of lf/ops/permute.py.

Each token has at most k rows, so its sum reads them through a table (t, k), first choice first, and nothing is added by atomics. The weighted rows
are not kept for the backward: the rows are, which come from a product that keeps nothing of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lf.context import wide


def permute(x_tD: Tensor, order: Tensor, k: int) -> Tensor:
    return _Permute.apply(x_tD, order, k)


def unpermute(y_nD: Tensor, order: Tensor, weights_tk: Tensor) -> Tensor:
    return _Unpermute.apply(y_nD, order, weights_tk)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.shape = len(x), k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (order,), (t, k) = ctx.saved_tensors, ctx.shape
        return _summed(dy, order, t, k, None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, order, weights)
        t, k = weights.shape
        return _summed(y, order, t, k, weights)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # type: ignore[override]
        y, order, weights = ctx.saved_tensors
        wider, rows = wide(y.dtype), dout.index_select(0, order // weights.shape[1])
        dy = dw = None
        if ctx.needs_input_grad[0]:
            dy = (rows.to(wider) * weights.flatten()[order].to(wider)[:, None]).to(y.dtype)
        if ctx.needs_input_grad[2]:
            each = (rows.to(wider) * y.to(wider)).sum(-1).to(weights.dtype)
            dw = torch.zeros_like(weights).flatten().index_copy(0, order, each).view_as(weights)
        return dy, None, dw


def _summed(y: Tensor, order: Tensor, t: int, k: int, weights: Tensor | None) -> Tensor:
    n, wider = len(y), wide(y.dtype)
    if not n:
        return y.new_zeros(t, y.shape[1])
    where = order.new_full((t * k,), -1).index_copy(0, order, torch.arange(n, device=order.device)).view(t, k)
    scale = (where >= 0).to(wider) if weights is None else weights.to(wider) * (where >= 0)
    where, out = where.clamp_min(0), y.new_zeros(t, y.shape[1], dtype=wider)
    for j in range(k):
        out.addcmul_(y.index_select(0, where[:, j]).to(wider), scale[:, j, None])
    return out.to(y.dtype)

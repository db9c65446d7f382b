"""Rows of tokens to rows of experts and back, without sums in an order that differs from run to run: fast twins of lf/ops/permute.py.

A token's sum reads its rows one after another, first choice first: torch's embedding_bag, one kernel on either device, which adds in at least
float32. Nothing is added by atomics, and the host waits for nothing. The weighted rows are not kept for the backward: the rows are, which come from a
product that keeps nothing of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lf.context import wide

PIECE = {"cpu": 2**18, "cuda": 2**24, "meta": 2**24}
"""Elements that the gradient of unpermute has in float32 at once: few enough for a core's cache, enough to fill a card. On paper those of a card."""


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
        """dy_i = w_i · dout of its token, dw_i = ⟨dout of its token, y_i⟩."""
        (y, order, weights), wider = ctx.saved_tensors, wide(dout.dtype)
        token, scale = order // weights.shape[1], weights.flatten()[order].to(wider)
        dy, each = (torch.empty_like(t) if needed else None for t, needed in zip((y, scale), ctx.needs_input_grad[::2]))
        piece = max(PIECE.get(y.device.type, 2**18) // max(y.shape[1], 1), 1)
        for at in range(0, len(y), piece):
            part = slice(at, at + piece)
            rows = dout.index_select(0, token[part]).to(wider)
            if each is not None:
                torch.sum(rows * y[part], -1, out=each[part])
            if dy is not None:
                dy[part] = rows.mul_(scale[part, None])
        dw = None if each is None else torch.zeros_like(weights).flatten().index_copy(0, order, each.to(weights.dtype)).view_as(weights)
        return dy, None, dw


def _summed(y: Tensor, order: Tensor, t: int, k: int, weights: Tensor | None) -> Tensor:
    """(t, D): of each token the sum of its rows, by their weights or each once."""
    if not y.numel() or not t:
        return y.new_zeros(t, y.shape[1])
    choice, rows = order.sort()
    if weights is None and t == len(rows) and k == 1:
        return y.index_select(0, rows)
    starts = torch.searchsorted(choice, torch.arange(0, t * k, k, device=order.device))
    scale = None if weights is None else weights.flatten()[choice]
    if scale is not None and wide(y.dtype) == y.dtype:
        scale = scale.to(y.dtype)
    elif scale is not None:  # embedding_bag takes weights in the dtype of y: three, which add up to one in float32, multiply the row in turn
        parts = list[Tensor]()
        for _ in range(3):
            parts.append(scale.to(y.dtype))
            scale = scale - parts[-1]
        scale, rows, starts = torch.stack(parts, 1).flatten(), rows[:, None].expand(-1, 3).flatten(), starts * 3
    return F.embedding_bag(rows, y.detach().contiguous(), starts, mode="sum", per_sample_weights=scale)

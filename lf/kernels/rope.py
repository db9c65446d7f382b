"""Rotary positions in few passes: the backward turns the other way, and keeps nothing but the tables, which all layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lf.ops import rope as plain


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as `lf.ops.rope.rope`; that itself where it is compiled: a compiler fuses it, and cannot trace what writes into half a tensor."""
    if torch.compiler.is_compiling():
        return plain.rope(x, cos, sin)
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    turned = 2 * cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x_pairs, out_pairs = (y[..., :turned].unflatten(-1, (2, -1)) for y in (x, out))
    torch.mul(x_pairs, cos[:, None], out=out_pairs)
    out_pairs[..., 0, :].addcmul_(x_pairs[..., 1, :], sin, value=-way)
    out_pairs[..., 1, :].addcmul_(x_pairs[..., 0, :], sin, value=way)
    if turned < x.shape[-1]:
        out[..., turned:] = x[..., turned:]
    return out

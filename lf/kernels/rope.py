"""Rotary positions in few passes: the backward turns the other way, and keeps nothing but the tables, which all layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as `lf.ops.rope.rope`."""
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
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b, u, v = x[..., :half], x[..., half : 2 * half], out[..., :half], out[..., half : 2 * half]
    torch.mul(a, cos, out=u).addcmul_(b, sin, value=-way)
    torch.mul(b, cos, out=v).addcmul_(a, sin, value=way)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out

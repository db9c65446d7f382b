"""The gate of a gated feed-forward layer, keeping only its input; both gradients are written into one tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lf.ops import swiglu as plain


def swiglu(gate_up: Tensor) -> Tensor:
    """The same as `lf.ops.swiglu.swiglu`; that itself where it is compiled: a compiler fuses it, and cannot trace what writes into half a tensor."""
    if torch.compiler.is_compiling():
        return plain.swiglu(gate_up)
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """y = silu(g)·u, silu(g) = g·σ(g): du = dy·silu(g), dg = dy·u·(σ + silu(g)·(1 - σ))."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        out = torch.empty_like(gate_up)
        (gate, up), (dgate, dup) = gate_up.chunk(2, -1), out.chunk(2, -1)
        torch.ops.aten.silu.out(gate, out=dup).mul_(dy)
        torch.ops.aten.silu_backward.grad_input(torch.mul(dy, up, out=dgate), gate, grad_input=dgate)
        return out

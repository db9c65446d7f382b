"""RMS normalisation in few passes: its backward keeps the input, which the residual stream keeps anyway, and one number a row."""

from typing import Any

import torch
from torch import Tensor

from lf.context import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same as `lf.ops.norm.rms_norm`."""
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """y = w·x·r with r = 1/√(mean x² + eps). With g = w·dy: dx = r·g - x·r³·mean(g·x), dw = Σ over rows of r·dy·x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = x.to(wide(x.dtype))
        r = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (h * r).to(x.dtype).mul_(weight) if x.dtype == weight.dtype else weight * (h * r).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        h, w, dy = x.to(r.dtype), weight.to(r.dtype), dy.to(r.dtype)
        dx = dw = None
        both = dy * h  # what both gradients sum: dw over rows, dx within one
        if ctx.needs_input_grad[1]:
            dw = torch.mv(both.flatten(0, -2).T, r.flatten()).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scaled = torch.matmul(both, w).unsqueeze(-1).mul_(r.pow(3)).div_(-x.shape[-1])
            dx = torch.mul(dy, w, out=both).mul_(r).addcmul_(h, scaled).to(x.dtype)
        return dx, dw, None

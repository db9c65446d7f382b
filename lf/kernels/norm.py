"""RMS normalisation in few passes: its backward keeps the input, which the residual stream keeps anyway, and one number a row."""

from typing import Any

import torch
from torch import Tensor

from lf.context import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same as `lf.ops.norm.rms_norm`."""
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """n = x·r, r = 1/√(mean x² + eps), y = w·n. With dn = w·dy: dx = r·(dn - n·mean(dn·n)), dw = Σ rows dy·n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = x.to(wide(x.dtype))
        r = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (h * r).to(x.dtype).mul_(weight) if x.dtype == weight.dtype else weight * (h * r).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        n, dy = x.to(r.dtype) * r, dy.to(r.dtype)
        dw = (dy * n).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dw, None
        dn = dy * weight
        mean = torch.linalg.vecdot(dn, n).unsqueeze(-1).div_(x.shape[-1])
        return dn.addcmul_(n, mean, value=-1).mul_(r).to(x.dtype), dw, None

"""Products of neighbouring rows with a matrix of their own, by torch's grouped product: the fast twin of lf/ops/grouped.py.

torch's takes bfloat16, float16 and float32; float64, and a torch that has none, go through the loop. On CUDA it is one kernel for bfloat16 alone, and
reads no count on the host. Its gradients are products of the same kind: of the rows by the same groups, of the weights with the rows as the dim
that is summed over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lf.ops import grouped as readable

_product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_linear(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    if _product is None or x.dtype not in DTYPES or not len(x) or not len(w):
        return readable.grouped_linear(x, w, counts)
    ends = counts.to(x.device, non_blocking=True).cumsum(0).to(torch.int32)
    return _Grouped.apply(x, w, ends)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        assert _product is not None
        ctx.save_for_backward(x, w, ends)
        return _product(x, w.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        assert _product is not None
        x, w, ends = ctx.saved_tensors
        dy = dy.contiguous()  # torch refuses a stride of 0
        dx = _product(dy, w, offs=ends) if ctx.needs_input_grad[0] else None
        dw = _product(dy.T, x, offs=ends) if ctx.needs_input_grad[1] else None
        return dx, dw, None

"""Products of neighbouring rows with a matrix of their own: fast twins of lf/ops/grouped.py, two of them.

    torch's grouped product   bfloat16, on the CPU float32 too; reads no count on the host. Widths must fill 16 bytes, and so must where memory starts
    the loop                  everything else: float64, odd widths, no row, older torch, older cards. The counts are read, which lie on the host

Both keep only x and w, and write each expert's part of a result where it belongs. On the CPU torch's is a loop, too, in C++. Measured there on one
core, forward and backward, as a share of the time of lf/ops/grouped.py, torch's and the loop here: 16384 rows of 512 to 512 with 128 experts, float32
0.74 and 0.73, bfloat16 0.85 and 0.93; 1024 rows of 64 to 64, float32 0.36 and 0.73. On CUDA it is one kernel for bfloat16 alone, from compute
capability 8.0 on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_product = getattr(torch.nn.functional, "grouped_mm", None)  # since torch 2.10


def grouped_linear(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """The same as `lf.ops.grouped.grouped_linear`."""
    if not _usable(x, w):
        return _Loop.apply(x, w, counts.tolist())
    ends = counts.to(x.device, non_blocking=True).cumsum(0).to(torch.int32)
    return _Grouped.apply(x, w, ends)


def _usable(x: Tensor, w: Tensor) -> bool:
    """Whether torch's grouped product takes these, both ways."""
    if _product is None or not x.numel() or not w.numel():
        return False
    if x.is_cuda:
        known = x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    else:
        known = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and not x.is_meta)  # which torch refuses on paper
    widths = [n * x.element_size() % 16 == 0 for n in w.shape[1:]]
    return known and all(widths) and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, w))


class _Grouped(torch.autograd.Function):
    """Gradients are products of the same kind: of the rows by the same groups, of the weights with the rows as the dim that is summed over."""

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


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.counts = counts
        y = x.new_empty(len(x), w.shape[1])
        for rows, one, out in zip(x.split(counts), w, y.split(counts)):
            torch.mm(rows, one.T, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        (x, w), counts = ctx.saved_tensors, ctx.counts
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            for rows, one, out in zip(dy.split(counts), w, dx.split(counts)):
                torch.mm(rows, one, out=out)
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(w, memory_format=torch.contiguous_format)
            for rows, seen, out in zip(dy.split(counts), x.split(counts), dw):
                torch.mm(rows.T, seen, out=out)
        return dx, dw, None

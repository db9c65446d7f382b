"""The op table that is planned with: the device's kernels, which run on paper, and what stands for those that torch has in parts only there."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lf.context import precision_of, wide
from lf.devices import cpu, cuda, op_table


def table_for(precision: str, ops: ModuleType | None = None) -> SimpleNamespace:
    """Of the device module `ops`; without one of CUDA, in float32 and float64, where that has none that are meant for training, of the CPU."""
    module = ops or (cuda if precision_of(precision).compute == torch.bfloat16 else cpu)
    table = op_table(module)
    if module is cuda:
        table.rms_norm = fused_norm
    return table


def fused_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What one kernel each way makes and keeps, on paper: the input and a number a row."""
    return _FusedNorm.apply(x, weight)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=wide(x.dtype)))
        return torch.neg(x.contiguous())  # reads as much, and writes as much

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.add(dy, x), torch.empty_like(weight)

"""Column and row linear: one matrix product each, with the communication that belongs to it.

    column   x S(0) ──gather──► full rows ─► x·wᵀ ─► columns of this rank     backward: dX is P → reduce-scatter → S(0)
    row      columns of this rank ─► x·wᵀ is P ──reduce-scatter──► S(0)       backward: dY S(0) → gather

Between them the residual stream is sharded over tokens (sequence parallelism, Korthikanti et al. 2022 §4.2). Column saves only its shard and
gathers it again in backward: 2(t-1)/t · tokens·dim more traffic per layer, activation memory divided by t. There the gather travels while dX
is computed, and the reduce-scatter of dX while the weight's gradient is. The moves are those of `redistribute`'s table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lf.parallel.redistribute import EDGES, P, Type, redistribute


def column_linear(x: Tensor, w: Tensor, axis: Any, seq: Type) -> Tensor:
    """x (tokens of this rank, in) laid out as `seq` on `axis`; w (columns of this rank, in) → (all tokens, columns of this rank)."""
    return _Column.apply(x, w, axis, seq)


def row_linear(x: Tensor, w: Tensor, axis: Any, seq: Type) -> Tensor:
    """x (all tokens, columns of this rank); w (out, columns of this rank) → (tokens of this rank, out) laid out as `seq` on `axis`."""
    return redistribute(_Linear.apply(x, w), axis, P, seq)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, axis: Any, seq: Type) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.axis, ctx.seq = axis, seq
        return F.linear(_gather(x, axis, seq), w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, w), axis, seq = ctx.saved_tensors, ctx.axis, ctx.seq
        # gather of x ┊ dX = dY·w;  then scatter of dX ┊ dW = dYᵀ·x: each collective travels while a product is computed
        rows = _gather(x, axis, seq, later=True) if ctx.needs_input_grad[1] else None
        scattered = _scatter(F.linear(dy, w.T), axis, seq) if ctx.needs_input_grad[0] else None
        dw = _weight_gradient(dy, rows()) if rows else None
        return (scattered() if scattered else None), dw, None, None


class _Linear(torch.autograd.Function):
    """F.linear whose two backward products are F.linear as well: some devices have fast routes for nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return (F.linear(dy, w.T) if ctx.needs_input_grad[0] else None), (_weight_gradient(dy, x) if ctx.needs_input_grad[1] else None)


def _gather(x: Tensor, axis: Any, seq: Type, later: bool = False) -> Any:
    if axis.size == 1:
        return (lambda: x) if later else x
    return EDGES["S→R"].forward(x, axis, seq, later=later)


def _scatter(dx: Tensor, axis: Any, seq: Type) -> Callable[[], Tensor]:
    """Starts the sum of dX over the axis, of which this rank keeps its rows."""
    if axis.size == 1:
        return lambda: dx
    return EDGES["S→R"].backward(dx, axis, seq, later=True)


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ·x: (tokens, out), (tokens, in) → (out, in)."""
    return F.linear(dy.T, x.T)

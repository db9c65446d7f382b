"""Column and row linear: one matrix product each, with the communication that belongs to it.

    column   x S(0) ──gather──► full rows ─► x·wᵀ ─► columns of this rank     backward: dX is P → reduce-scatter → S(0)
    row      columns of this rank ─► x·wᵀ is P ──reduce-scatter──► S(0)       backward: dY S(0) → gather

Between them the residual stream is sharded over tokens (sequence parallelism, Korthikanti et al. 2022 §4.2). Column saves only its shard and
gathers it again in backward: 2(t-1)/t · tokens·dim more traffic per layer, activation memory divided by t. There the gather travels while dX
is computed, and the reduce-scatter of dX while the weight's gradient is. The moves are those of `redistribute`'s table.

A weight may arrive as a `W`, which says where its gradient goes (`lf/parallel/product.py`). With a probe, column gathers x in the backward that
makes dX, so that multiplying the factors later needs no communication; the price is that the gathered rows, tokens·dim instead of a t-th of it,
live from then on until they are multiplied. Row has both factors already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lf.parallel.product import W, into, note, of, product
from lf.parallel.redistribute import EDGES, P, Type, redistribute


def column_linear(x: Tensor, w: Tensor | W, axis: Any, seq: Type) -> Tensor:
    """x (tokens of this rank, in) laid out as `seq` on `axis`; w (columns of this rank, in) → (all tokens, columns of this rank)."""
    if axis.size == 1:
        return product(x, w)
    w = of(w)
    y = _Column.apply(x, w.value, w.acc, *(w.probe or (None, None)), axis, seq)
    return note(w, (len(y), x.shape[1]), x.dtype, y)


def row_linear(x: Tensor, w: Tensor | W, axis: Any, seq: Type) -> Tensor:
    """x (all tokens, columns of this rank); w (out, columns of this rank) → (tokens of this rank, out) laid out as `seq` on `axis`."""
    return redistribute(product(x, w), axis, P, seq)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, acc: Tensor | None, rows: Tensor | None, out: Tensor | None, axis: Any, seq: Type
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.acc, ctx.axis, ctx.seq = acc, axis, seq
        return F.linear(_gather(x, axis, seq), w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, w), axis, seq = ctx.saved_tensors, ctx.axis, ctx.seq
        for_x, for_w, _, probed = ctx.needs_input_grad[:4]
        # gather of x ┊ dX = dY·w;  then scatter of dX ┊ dW = dYᵀ·x: each collective travels while a product is computed
        gathered = _gather(x, axis, seq, later=True) if for_w or probed else None
        scattered = _scatter(F.linear(dy, w.T), axis, seq) if for_x else None
        rows = gathered() if gathered else None
        dw = into(ctx.acc, rows, dy) if rows is not None and not probed else None
        dx = scattered() if scattered else None
        return dx, dw, None, *((rows, dy) if probed else (None, None)), None, None


def _gather(x: Tensor, axis: Any, seq: Type, later: bool = False) -> Any:
    return EDGES["S→R"].forward(x, axis, seq, later=later)


def _scatter(dx: Tensor, axis: Any, seq: Type) -> Callable[[], Tensor]:
    """Starts the sum of dX over the axis, of which this rank keeps its rows."""
    return EDGES["S→R"].backward(dx, axis, seq, later=True)

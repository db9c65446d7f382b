"""A gated feed-forward part of a decoder's layer.

T all tokens of the tp group · t this rank's tokens · D width · F feed-forward columns of this rank. Matrices are (out, in), as on disk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
from torch import Tensor

from lf.batch import Batch
from lf.models.block import Block
from lf.models.tokens import matrix_flops, token_shares
from lf.parallel.linear import column_linear, row_linear
from lf.segment import Terms
from lf.spec import Init, Param, Part, constant


@attrs.frozen
class GatedMLP:
    """down(silu(gate(x)) · up(x)) of inner width `dim`."""

    dim: int


def mlp(m: GatedMLP, dim: int, eps: float, matrix: Init, added: Init) -> Block:
    """The part as a segment. eps: of the norm. matrix, added: how matrices in and out start."""
    gate_up = Param((2 * m.dim, dim), ("mlp", "embed"), matrix, (Part("gate", m.dim), Part("up", m.dim)))
    down = Param((dim, m.dim), ("embed", "mlp"), added, part_dim=1)
    params = {"norm": Param((dim,), ("embed",), constant(1.0)), "gate_up": gate_up, "down": down}
    return Block(params, partial(mlp_block, eps), ("gate_up", "down"), partial(matrix_flops, 3 * m.dim * dim))


def mlp_block(eps: float, p: dict[str, Tensor], x_tD: Tensor, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    tp, ops = ctx.axes["tp"], ctx.ops
    seq = token_shares(batch, tp)
    gate_up = column_linear(ops.rms_norm(x_tD, p["norm"], eps), p["gate_up"], tp, seq)  # F columns of each
    return x_tD + row_linear(ops.swiglu(gate_up), p["down"], tp, seq), {}

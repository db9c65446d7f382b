"""The two ends of a language model whose vocabulary is split over an axis: embedding and cross-entropy.

T all tokens of the tp group · t this rank's tokens · V rows of this rank's share of the vocabulary · D width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lf.batch import IGNORE
from lf.context import wide
from lf.parallel.redistribute import I, P, Type, redistribute


def vocab_embedding(ids_T: Tensor, w_VD: Tensor, first: int, axis: Any, seq: Type) -> Tensor:
    """Rows of the table for ids_T → (t, D) laid out as `seq`. This rank has the rows from `first` on; ids of other ranks give zero here."""
    if axis.size == 1:
        return F.embedding(ids_T, w_VD)
    local = ids_T - first
    mine = (local >= 0) & (local < w_VD.shape[0])
    if w_VD.shape[0]:
        h_TD = F.embedding(local.masked_fill(~mine, 0), w_VD) * mine[:, None]
    else:  # a rank without rows still depends on its leaf: or the collective's backward would never run and the others hang
        h_TD = w_VD.new_zeros(ids_T.shape[0], w_VD.shape[1]) + w_VD.sum()
    return redistribute(h_TD, axis, P, seq)


def vocab_cross_entropy(z_TV: Tensor, labels_T: Tensor, first: int, axis: Any, seq: Type) -> Tensor:
    """Sum over this rank's own tokens of -log softmax(z)[label]: P on `axis`, never a mean. Labels that are IGNORE count nothing.

    Each rank makes, for all T tokens, its part of [Σ exp(z-m), z_label - m]; one reduce-scatter of these two columns leaves every token's
    loss on one rank. That is half the traffic of two all-reduces, and the loss is a plain sum. m, the largest logit over all ranks, drops out
    of log Σexp(z-m) - (z_label-m), so it needs no gradient.
    """
    wider = wide(z_TV.dtype)
    m_T = axis.max(z_TV.detach().amax(-1).to(wider) if z_TV.shape[1] else z_TV.new_full(z_TV.shape[:1], -torch.inf, dtype=wider))
    pair = redistribute(_Partials.apply(z_TV, labels_T - first, m_T), axis, P, seq)
    own = redistribute(labels_T, axis, I, seq)
    return torch.where(own == IGNORE, 0.0, pair[:, 0].log() - pair[:, 1]).sum()


CHUNK = 1 << 22  # logits that are widened at a time: what bfloat16 ones take in float32 stays small beside them


class _Partials(torch.autograd.Function):
    """z (T, V), labels (T,) as columns of z, m (T,) → (T, 2): Σ exp(z-m), and z_label - m or 0 where the label is none of the columns.

    In the dtype of m. Backward: dz = da·exp(z-m), and db more at the label. One tensor of the size of z is kept for it: where z is as wide as m,
    exp(z-m), which becomes dz in place; otherwise z itself, and exp is worked out again, some rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Tensor, m: Tensor) -> Tensor:
        mine = (labels >= 0) & (labels < z.shape[1])
        at = labels.masked_fill(~mine, 0)[:, None]
        if z.dtype == m.dtype:
            kept = _exp(z, m)
            total = kept.sum(-1)
        else:
            kept = z
            total = torch.cat([_exp(z[rows], m[rows]).sum(-1) for rows in _runs(z)])
        target = torch.where(mine, z.gather(1, at)[:, 0].to(m.dtype) - m, 0.0) if z.shape[1] else torch.zeros_like(m)
        ctx.save_for_backward(kept, at, m, mine)
        return torch.stack([total, target], 1)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, at, m, mine = ctx.saved_tensors
        db = d[:, 1:] * mine[:, None]
        if not kept.shape[1]:
            return torch.zeros_like(kept), None, None
        if kept.dtype == m.dtype:  # a second backward would find it changed, and autograd says so
            return kept.mul_(d[:, :1]).scatter_add_(1, at, db), None, None
        dz = torch.empty_like(kept)
        for rows in _runs(kept):
            dz[rows] = _exp(kept[rows], m[rows]).mul_(d[rows, :1]).scatter_add_(1, at[rows], db[rows])
        return dz, None, None


def _exp(z: Tensor, m: Tensor) -> Tensor:
    return (z.to(m.dtype) - m[:, None]).exp_()


def _runs(z: Tensor) -> list[slice]:
    step = max(1, CHUNK // max(z.shape[1], 1))
    return [slice(i, i + step) for i in range(0, max(len(z), 1), step)]

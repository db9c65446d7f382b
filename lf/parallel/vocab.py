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
    z = z_TV.to(wide(z_TV.dtype))
    columns = z.shape[1]
    m_T = axis.max(z.detach().amax(-1) if columns else z.new_full(z.shape[:1], -torch.inf))
    z = z - m_T[:, None]
    local = labels_T - first
    mine = (local >= 0) & (local < columns)
    if columns:
        target_T = z.gather(1, local.masked_fill(~mine, 0)[:, None])[:, 0] * mine
    else:
        target_T = z.sum(-1)
    pair = redistribute(torch.stack([z.exp().sum(-1), target_T], 1), axis, P, seq)
    own = redistribute(labels_T, axis, I, seq)
    return torch.where(own == IGNORE, 0.0, pair[:, 0].log() - pair[:, 1]).sum()

"""Causal attention over packed documents: the readable twin of what `lf/kernels` does fast.

t tokens of one packed row · h query heads · k key and value heads, h a multiple of k · d head dim
"""

import torch
from torch import Tensor

from lf.context import wide


def document_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(t,) the document of each token. Documents start at cu_seqlens; entries equal to `tokens` are filling."""
    places = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, places, right=True)


def causal_mask(cu_seqlens: Tensor, tokens: int, window: int | None = None) -> Tensor:
    """(t, t) True where the query (row) may see the key (column): the same document, not later, and one of the last `window` tokens if given."""
    document = document_of(cu_seqlens, tokens)
    mask = (document[:, None] == document[None, :]).tril()
    return mask if window is None else mask.triu(1 - window)


def attention(q_thd: Tensor, k_tkd: Tensor, v_tkd: Tensor, cu_seqlens: Tensor, window: int | None = None) -> Tensor:
    """softmax(q·kᵀ / √d) · v within each document, causally → (t, h, d). Scores and softmax in at least float32.

    window: a query sees itself and the window - 1 tokens before it (sliding-window attention, Beltagy et al. 2020 §3.1); None: all before it.
    1/√d keeps the variance of a score at 1 when q and k have unit variance (Vaswani et al. 2017 §3.2.1).
    """
    tokens, heads, dim = q_thd.shape
    group = heads // max(k_tkd.shape[1], 1)  # a rank may have no heads at all
    k_thd, v_thd = (x.repeat_interleave(group, 1) for x in (k_tkd, v_tkd))
    wider = wide(q_thd.dtype)
    scores_hts = torch.einsum("thd,shd->hts", q_thd.to(wider), k_thd.to(wider)) * dim**-0.5
    weights_hts = scores_hts.masked_fill(~causal_mask(cu_seqlens, tokens, window), -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights_hts, v_thd.to(wider)).to(q_thd.dtype)

"""Causal attention over packed documents: the readable twin of what `lf/kernels` does fast.

t tokens of one packed row · h query heads · k key and value heads, h a multiple of k · d head dim of queries and keys · e of values
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


def attention(
    q_thd: Tensor,
    k_tkd: Tensor,
    v_tke: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    scale: float | None = None,
    sinks_h: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q·kᵀ) · v within each document, causally → (t, h, e). Scores and softmax in at least float32.

    window: a query sees itself and the window - 1 tokens before it (sliding-window attention, Beltagy et al. 2020 §3.1); None: all before it.
    scale: None is 1/√d, which keeps the variance of a score at 1 when q and k have unit variance (Vaswani et al. 2017 §3.2.1).
    sinks_h: the score of one key more, whose value is 0 and which every query sees: a head that has nothing to say can look there (GPT-OSS, arXiv
    2508.10925; Xiao et al. 2023, arXiv 2309.17453).
    """
    tokens, heads, dim = q_thd.shape
    group = heads // max(k_tkd.shape[1], 1)  # a rank may have no heads at all
    k_thd, v_the = (x.repeat_interleave(group, 1) for x in (k_tkd, v_tke))
    wider = wide(q_thd.dtype)
    scores_hts = torch.einsum("thd,shd->hts", q_thd.to(wider), k_thd.to(wider)) * (dim**-0.5 if scale is None else scale)
    scores_hts = scores_hts.masked_fill(~causal_mask(cu_seqlens, tokens, window), -torch.inf)
    if sinks_h is not None:
        scores_hts = torch.cat([scores_hts, sinks_h.to(wider)[:, None, None].expand(-1, tokens, 1)], -1)
    weights_hts = scores_hts.softmax(-1)[..., :tokens]
    return torch.einsum("hts,she->the", weights_hts, v_the.to(wider)).to(q_thd.dtype)


def of_no_heads(q_t0d: Tensor, k_t0d: Tensor, v_t0e: Tensor, sinks_0: Tensor | None) -> Tensor:
    """(t, 0, e): what attention gives on a rank without heads, at no cost. It depends on all that it is given, so that the backward of each runs, and
    with it the collectives that other ranks wait in."""
    y = v_t0e + (q_t0d * k_t0d).sum(-1, keepdim=True)
    return y if sinks_0 is None else y + sinks_0[:, None]

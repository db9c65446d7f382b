"""Attention that is not causal, from rows to rows of the same document: of an image to itself, of one packed row to another.

t query rows · s key rows · h query heads · k key and value heads, h a multiple of k · d head dim
n documents · l the most query rows of one · m the most key rows of one
"""

import torch
from torch import Tensor

from lf.context import wide


def cross_attention(q_thd: Tensor, k_skd: Tensor, v_skd: Tensor, q_rows_nl: Tensor, k_rows_nm: Tensor) -> Tensor:
    """softmax(q·kᵀ / √d) · v, where a query of document i sees all keys of document i → (t, h, d). Scores and softmax in at least float32.

    q_rows_nl, k_rows_nm: int64, the rows of each document, then -1. They say where documents lie without the host being asked, and how long the
    longest is, so the scores are n·h·l·m and none is between documents. A query whose document has no key gets 0, as does one of no document.
    """
    tokens, heads, dim = q_thd.shape
    wider = wide(q_thd.dtype)
    group = heads // max(k_skd.shape[1], 1)  # a rank may have no heads at all
    k_shd, v_shd = (x.repeat_interleave(group, 1) for x in (k_skd, v_skd))
    q_nlhd, k_nmhd, v_nmhd = _by_document(q_thd, q_rows_nl), _by_document(k_shd, k_rows_nm), _by_document(v_shd, k_rows_nm)
    scores_nhlm = torch.einsum("nlhd,nmhd->nhlm", q_nlhd.to(wider), k_nmhd.to(wider)) * dim**-0.5
    # Not -∞: where all are filling that would be NaN. As it is, filling weighs exactly 0 beside any key, and alone it weighs values that are 0.
    weights_nhlm = scores_nhlm.masked_fill((k_rows_nm < 0)[:, None, None], torch.finfo(wider).min).softmax(-1)
    o_nlhd = torch.einsum("nhlm,nmhd->nlhd", weights_nhlm, v_nmhd.to(wider)).to(q_thd.dtype)
    rows = torch.where(q_rows_nl < 0, tokens, q_rows_nl).flatten()  # filling goes to one row more, which is cut off
    return q_thd.new_zeros(tokens + 1, heads, dim).index_add(0, rows, o_nlhd.flatten(0, 1))[:tokens]


def _by_document(x: Tensor, rows: Tensor) -> Tensor:
    """x (rows, …) → (documents, longest, …), 0 where a document has no such row: -1 is the row behind the last."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[rows]

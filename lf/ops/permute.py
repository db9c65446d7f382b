"""Rows of tokens to rows of experts and back: the readable twins.

t tokens · k experts of each · D width · n rows · order (n,) int64: which of the t·k choices each row is of, choice t·k + j being the j-th of token
t; none twice, some perhaps missing (dropped, or elsewhere)
"""

from __future__ import annotations

from torch import Tensor

from lf.context import wide


def permute(x_tD: Tensor, order: Tensor, k: int) -> Tensor:
    """(n, D): of each row its token."""
    return x_tD[order // k]


def unpermute(y_nD: Tensor, order: Tensor, weights_tk: Tensor) -> Tensor:
    """(t, D) in the dtype of y: of each token the sum of its rows, each by the weight of its choice, made in at least float32."""
    wider, (t, k) = wide(y_nD.dtype), weights_tk.shape
    weighted_nD = y_nD.to(wider) * weights_tk.flatten()[order].to(wider)[:, None]
    return weighted_nD.new_zeros(t, y_nD.shape[1]).index_add(0, order // k, weighted_nD).to(y_nD.dtype)

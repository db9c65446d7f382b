"""Rows of tokens to rows of experts and back: the readable twins."""

from torch import Tensor

from lf.context import wide


def permute(x_tD: Tensor, rows: Tensor) -> Tensor:
    """x (t, D), rows (n,) int64 → (n, D): row rows[i] of x at i. A row may be taken several times or not at all."""
    return x_tD[rows]


def unpermute(y_nD: Tensor, rows: Tensor, weights_n: Tensor, t: int) -> Tensor:
    """y (n, D), rows (n,) int64, weights (n,) → (t, D) in the dtype of y: at r the sum over all i with rows[i] = r of weights[i] · y[i], made in at
    least float32."""
    wider = wide(y_nD.dtype)
    weighted_nD = y_nD.to(wider) * weights_n.to(wider)[:, None]
    return weighted_nD.new_zeros(t, y_nD.shape[1]).index_add(0, rows, weighted_nD).to(y_nD.dtype)

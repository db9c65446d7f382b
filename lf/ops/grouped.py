"""Products of neighbouring rows with a matrix of their own: the readable twin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """x (n, in), w (e, out, in), counts (e,) integers that add up to n → (n, out): the first counts[0] rows by w[0]ᵀ, the next by w[1]ᵀ and so
    on."""
    parts = [F.linear(rows, one) for rows, one in zip(x.split(counts.tolist()), w.unbind())]
    return torch.cat(parts) if parts else x @ w.new_zeros(x.shape[1], w.shape[1])

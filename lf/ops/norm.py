"""RMS normalisation (Zhang & Sennrich 2019, arXiv 1910.07467), in the order that the Llama family's files expect."""

import torch
from torch import Tensor

from lf.context import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d), weight (d,) → weight · x / rms(x) over the last dim. At least float32 inside; cast back before the weight multiplies."""
    h = x.to(wide(x.dtype))
    return weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split: dim i turns with dim i + d/2, as in the files of Llama and Qwen."""

import torch
from torch import Tensor

from lf.context import wide


def rope_table(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (t,) → cos, sin (t, dim/2) of position · theta^(-2i/dim), computed in at least float32 and returned so."""
    wider = wide(dtype)
    i = torch.arange(0, dim, 2, device=positions.device).to(wider)
    angle = positions.to(wider)[:, None] / theta ** (i / dim)
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (t, heads, d), cos and sin (t, d/2) → x with each pair (i, i + d/2) turned by its angle, in the dtype of x."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

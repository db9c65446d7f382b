"""The momentum of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from lf.ops.rounding import Noise, chunks, rounded


def momentum_update(
    m: Tensor, grad: Tensor, scale: Tensor, ok: Tensor, beta: float, nesterov: bool, dtype: torch.dtype, noise: Noise | None = None
) -> Tensor:
    """m ← β·m + (1-β)·g, with g = scale · grad; returns β·m + (1-β)·g of the new m (Nesterov), or m, in `dtype`. Newton-Schulz divides by the norm,
    so this is the sum m ← β·m + g of the source, whose every momentum is 1/(1-β) times as large.

    m is written in place; where ok is false it stays. It may be of a dtype of fewer bits than grad, rounded as in `lf.ops.adamw`.
    """
    out = torch.empty_like(grad, dtype=dtype)
    for (stored, part, into), bits in chunks(noise, (m, grad, out)):
        g = torch.where(ok, part * scale.to(part.dtype), 0.0)
        new = stored.to(g.dtype).lerp_(g, ok.to(g.dtype) * (1 - beta))
        into.copy_(g.lerp(new, beta) if nesterov else new)
        if stored.dtype != g.dtype:
            stored.copy_(new if bits is None else rounded(new, bits))
    return out

"""The nearest orthogonal matrix, about: what Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes of a momentum.

With X = U·S·Vᵀ, an odd polynomial of X is U·p(S)·Vᵀ. Five rounds of p(s) = 3.4445·s - 4.7750·s³ + 2.0315·s⁵ take singular values between about
0.0015 and 1 to somewhere between 0.68 and 1.21: not quite to 1, but in few products, and well enough in bfloat16. S is below 1 at first because X
is divided by its Frobenius norm. A round is three products, with r the shorter side and c the longer: 2·r·c·r + 2·r³ + 2·r·r·c operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Tensor, rounds: int = 5, eps: float = 1e-7) -> Tensor:
    """x: (matrices, rows, columns), each for itself, in its dtype; norms in at least float32. Where all is 0 it stays 0."""
    if not x.numel():
        return x
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp_min(eps)).to(x.dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the products below are with the shorter side
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def flops(rows: int, columns: int) -> int:
    """Operations of one round on one matrix, but for a factor that all have alike."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)

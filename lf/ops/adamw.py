"""One update of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2): the readable twin of what `lf/kernels` does in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_update(
    ws: Sequence[Tensor],
    grads: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    t: Tensor,
    lr: Tensor,
    scale: Tensor,
    ok: Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """m ← β1·m + (1-β1)·g, v ← β2·v + (1-β2)·g², w ← w - lr·(m̂ / (√v̂ + eps) + decay·w), with m̂, v̂ divided by 1-βᵗ; g is scale · grad.

    ws, ms, vs are written in place, and the gradients may be. t: updates made, this one included. t, lr, scale, ok are device scalars; where ok is
    false nothing changes.
    """
    b1, b2 = betas
    correct1, correct2 = 1 - b1 ** t.to(lr.dtype), 1 - b2 ** t.to(lr.dtype)
    for w, grad, m, v in zip(ws, grads, ms, vs):
        g = torch.where(ok, grad * scale.to(grad.dtype), 0.0)
        keep = ok.to(g.dtype)  # 0 leaves m, v and w exactly as they are
        m.lerp_(g, keep * (1 - b1))
        v.lerp_(g.square(), keep * (1 - b2))
        change = (m / correct1.to(m.dtype)) / ((v / correct2.to(v.dtype)).sqrt() + eps) + decay * w
        w.sub_(torch.where(ok, change * lr.to(w.dtype), 0.0))

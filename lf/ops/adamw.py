"""One update of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2): the readable twin of what `lf/kernels` does in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lf.ops.rounding import Noise, chunks, rounded


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
    noises: Sequence[Noise] | None = None,
) -> None:
    """m ← β1·m + (1-β1)·g, v ← β2·v + (1-β2)·g², w ← w - lr·(m̂ / (√v̂ + eps) + decay·w), with m̂, v̂ divided by 1-βᵗ; g is scale · grad.

    ws, ms, vs are written in place, and the gradients may be. t: updates made, this one included. t, lr, scale, ok are device scalars; where ok is
    false nothing changes. ms and vs may have a dtype of fewer bits than ws: an update works with what they are before they are rounded to it, to the
    nearest, or with `noises`, one for each tensor, from float32 to bfloat16 by chance.
    """
    b1, b2 = betas
    correct1, correct2 = 1 - b1 ** t.to(lr.dtype), 1 - b2 ** t.to(lr.dtype)
    for i, tensors in enumerate(zip(ws, grads, ms, vs)):
        for (w, grad, stored_m, stored_v), bits in chunks(noises[i] if noises else None, tensors):
            g = torch.where(ok, grad * scale.to(grad.dtype), 0.0)
            keep = ok.to(g.dtype)  # 0 leaves m, v and w exactly as they are
            m = stored_m.to(w.dtype).lerp_(g, keep * (1 - b1))
            v = stored_v.to(w.dtype).lerp_(g.square(), keep * (1 - b2))
            change = (m / correct1.to(m.dtype)) / ((v / correct2.to(v.dtype)).sqrt() + eps) + decay * w
            w.sub_(torch.where(ok, change * lr.to(w.dtype), 0.0))
            if stored_m.dtype != w.dtype:  # else they are the same tensors
                stored_m.copy_(m if bits is None else rounded(m, bits))
                stored_v.copy_(v if bits is None else rounded(v, bits >> 16))

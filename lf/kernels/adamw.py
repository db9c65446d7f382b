"""AdamW over many tensors in one launch: the op behind torch.optim.AdamW(fused=True).

Called as it is, it takes step, learning rate, clip factor and verdict as device scalars, so the host never waits; the class keeps a step for each
tensor, and for the clip factor it wants a GradScaler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lf.ops import adamw as twin
from lf.ops.rounding import Noise


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
    """The same as `lf.ops.adamw.adamw_update`, to rounding. What torch's cannot goes there: float64, because it takes its scalars in float32, and
    moments of another dtype than their parameter."""
    if not ws:
        return
    if ws[0].dtype == torch.float64 or ms[0].dtype != ws[0].dtype:
        twin.adamw_update(ws, grads, ms, vs, t, lr, scale, ok, betas, eps, decay, noises)
        return
    torch._fused_adamw_(
        list(ws),
        list(grads),
        list(ms),
        list(vs),
        [],
        [t.to(torch.float32)] * len(ws),
        lr=lr.to(torch.float32),
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=scale.to(torch.float32).reciprocal(),  # it divides
        found_inf=(~ok).to(torch.float32),
    )

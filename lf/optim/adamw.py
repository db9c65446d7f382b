"""AdamW: Adam with decoupled weight decay. The mathematics is in lf/ops/adamw.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lf import tree
from lf.chain_layouts import Layouts
from lf.config import ConfigError
from lf.ops.rounding import Noise
from lf.optim.base import Optimizer, Rate
from lf.optim.lr import constant
from lf.optim.moments import Moments
from lf.spec import Param
from lf.tree import Tree


def is_matrix(param: Param) -> bool:
    """What decays by default: matrices do, norms and biases do not."""
    return len(param.shape) >= 2


def adamw(
    lr: float | Rate,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decays: Callable[[Param], bool] = is_matrix,
    moments: str = "fp32",
    rounding: str = "stochastic",
    seed: int = 0,
) -> Optimizer:
    """The update of `lf.ops.adamw`, with `weight_decay` where `decays(param)` and none elsewhere.

    `moments`, `rounding`, `seed`: what the moments are kept in, as in `lf.optim.moments`. Raises ConfigError for what cannot be.
    """
    b1, b2 = betas
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ConfigError(f"betas={betas} must lie between 0 and 1, 1 itself excluded")
    if not (eps > 0 and 0 <= weight_decay < math.inf):
        raise ConfigError(f"eps={eps} must be above 0, and weight_decay={weight_decay} must not be negative")
    rate, kept = lr if callable(lr) else constant(lr), Moments(moments, rounding, seed)

    def init(master: Tree, device: torch.device, layouts: Layouts) -> Tree:
        # t counts the updates that were made: a skipped one must not change the bias correction
        t = torch.zeros((), dtype=torch.int64, device=device)
        return {"master": master, "m": tree.map(kept.zeros, master), "v": tree.map(kept.zeros, master), "t": {"t": t}}

    def update(
        state: Tree, grads: Tree, params: dict[str, Param], lr: Tensor, scale: Tensor, step: Tensor, ok: Tensor, ctx: Any, layouts: Layouts
    ) -> Tree:
        t = state["t"]["t"].add_(ok)
        for decay, chosen in ((weight_decay, True), (0.0, False)):
            paths = [path for path in params if decays(params[path]) == chosen]
            ws, gs, ms, vs = ([tree.get(x, path) for path in paths] for x in (state["master"], grads, state["m"], state["v"]))
            noises: list[Noise] | None = [kept.noise(path, step, ctx, layouts) for path in paths] if kept.by_chance else None
            ctx.ops.adamw_update(ws, gs, ms, vs, t, lr, scale, ok, betas, eps, decay, noises)
        return state

    return Optimizer(init, update, rate)

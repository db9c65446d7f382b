"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lf import tree
from lf.config import ConfigError
from lf.optim.base import Optimizer, Rate
from lf.optim.lr import constant
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
) -> Optimizer:
    """m ← β1·m + (1-β1)·g, v ← β2·v + (1-β2)·g², w ← w - lr·(m̂ / (√v̂ + eps) + weight_decay·w), with m̂, v̂ divided by 1-βᵗ."""
    b1, b2 = betas
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ConfigError(f"betas={betas} must lie between 0 and 1, 1 itself excluded")
    if eps <= 0 or weight_decay < 0:
        raise ConfigError(f"eps={eps} must be above 0, and weight_decay={weight_decay} must not be negative")
    rate = lr if callable(lr) else constant(lr)

    def init(master: Tree) -> Tree:
        def zeros(w: Tensor) -> Tensor:
            return torch.zeros_like(w)

        # t counts the updates that were made: a skipped one must not change the bias correction
        return {"master": master, "m": tree.map(zeros, master), "v": tree.map(zeros, master), "t": {"t": _count(master)}}

    def update(state: Tree, grads: Tree, params: dict[str, Param], lr: Tensor, scale: Tensor, step: Tensor, ok: Tensor) -> Tree:
        t = state["t"]["t"].add_(ok)
        correct1, correct2 = 1 - b1 ** t.to(lr.dtype), 1 - b2 ** t.to(lr.dtype)
        for path, w in tree.items(state["master"]):
            g, m, v = (tree.get(x, path) for x in (grads, state["m"], state["v"]))
            g = torch.where(ok, g * scale.to(g.dtype), 0.0)
            keep = ok.to(g.dtype)  # 0 leaves m, v and w exactly as they are
            m.lerp_(g, keep * (1 - b1))
            v.lerp_(g.square(), keep * (1 - b2))
            decay = weight_decay if decays(params[path]) else 0.0
            change = (m / correct1.to(m.dtype)) / ((v / correct2.to(v.dtype)).sqrt() + eps) + decay * w
            w.sub_(torch.where(ok, change * lr.to(w.dtype), 0.0))
        return state

    return Optimizer(init, update, rate)


def _count(master: Tree) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=tree.leaves(master)[0].device)

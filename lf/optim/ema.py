"""A running average of the weights beside those that are trained: often better to evaluate and to export (Polyak & Juditsky 1992)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lf import tree
from lf.chain_layouts import Layouts
from lf.config import ConfigError
from lf.optim.base import Optimizer
from lf.spec import Param
from lf.tree import Tree

EMA = "ema"


def ema(optimizer: Optimizer, decay: float) -> Optimizer:
    """e ← decay·e + (1-decay)·w after each update, from e = w at the start, in the master dtype, as state["ema"]. A skipped step leaves it alone.

    Raises ConfigError for a decay outside of 0 to 1."""
    if not 0 < decay < 1:
        raise ConfigError(f"decay={decay} of an average of the weights must lie between 0 and 1; 0.999 averages over about 1000 steps")

    def init(master: Tree, device: torch.device, layouts: Layouts) -> Tree:
        return optimizer.init(master, device, layouts) | {EMA: tree.map(torch.clone, master)}

    def update(
        state: Tree, grads: Tree, params: dict[str, Param], lr: Tensor, scale: Tensor, step: Tensor, ok: Tensor, ctx: Any, layouts: Layouts
    ) -> Tree:
        own = {kind: branch for kind, branch in state.items() if kind != EMA}
        new = optimizer.update(own, grads, params, lr, scale, step, ok, ctx, layouts) | {EMA: state[EMA]}
        for path in params:
            average, w = tree.get(new[EMA], path), tree.get(new["master"], path)
            average.lerp_(w, ok.to(w.dtype) * (1 - decay))  # with 0 it stays exactly as it is
        return new

    return Optimizer(init, update, optimizer.lr, optimizer.hosted)

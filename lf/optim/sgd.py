"""Plain gradient descent: what layouts are compared under, because it hides no scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lf import tree
from lf.chain_layouts import Layouts
from lf.optim.base import Optimizer, Rate
from lf.optim.lr import constant
from lf.spec import Param
from lf.tree import Tree


def sgd(lr: float | Rate) -> Optimizer:
    """w ← w - lr·g."""

    def init(master: Tree, device: torch.device, layouts: Layouts) -> Tree:
        return {"master": master}

    def update(
        state: Tree, grads: Tree, params: dict[str, Param], lr: Tensor, scale: Tensor, step: Tensor, ok: Tensor, ctx: Any, layouts: Layouts
    ) -> Tree:
        for path in params:
            w, g = tree.get(state["master"], path), tree.get(grads, path)
            w.sub_(torch.where(ok, g * (lr * scale).to(g.dtype), 0.0))
        return state

    return Optimizer(init, update, lr if callable(lr) else constant(lr))

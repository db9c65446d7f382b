"""Muon: momentum made orthogonal, for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), and another optimizer for the rest.

How far a step goes. An r × c matrix with singular values of 1 has the squared norm min(r, c), spread over r·c elements: their root mean square is
√(min(r, c)/(r·c)) = 1/√max(r, c). Times rms·√max(r, c), a step moves every matrix by lr·rms in root mean square, whatever its shape. AdamW's steps
lie about 0.2 to 0.4, so with rms=0.2 both can have one learning rate and one weight decay (Liu et al. 2025, arXiv 2502.16982, §2.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lf import tree
from lf.chain_layouts import Layouts
from lf.config import ConfigError, one_of
from lf.optim.adamw import adamw
from lf.optim.base import Optimizer, Rate
from lf.optim.gathered import gathered
from lf.optim.groups import Predicate, groups
from lf.optim.lr import constant
from lf.optim.matrices import hidden_matrix, refuse_others
from lf.optim.moments import Moments
from lf.optim.owners import owners
from lf.spec import Param, Piece
from lf.tree import Tree

WAYS = {"owner": owners, "gathered": gathered}


def muon(
    lr: float | Rate,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    rms: float = 0.2,
    nesterov: bool = True,
    way: str = "owner",
    chosen: Predicate = hidden_matrix,
    rest: Optimizer | None = None,
    moments: str = "fp32",
    rounding: str = "stochastic",
    seed: int = 0,
) -> Optimizer:
    """w ← w - lr·(rms·√max(rows, columns)·O + weight_decay·w) of each matrix of what is `chosen`, O the momentum made orthogonal by
    `lf.ops.newton_schulz` in the compute dtype; `rest` (default: `adamw` with the same rate, decay and moments) of everything else.

    Matrices are logical ones, whatever the layout: each part of a fused parameter, each expert of a stack. `way`: who makes the products, "owner"
    (`lf.optim.owners`) or "gathered" (`lf.optim.gathered`). `moments`, `rounding`, `seed`: as in `lf.optim.moments`.
    Raises ConfigError for what cannot be; `init` for something chosen that is no matrix, and where nothing is chosen.
    """
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum={momentum} must lie between 0 and 1, 1 itself excluded")
    if not (rms > 0 and 0 <= weight_decay < math.inf):
        raise ConfigError(f"rms={rms} must be above 0, and weight_decay={weight_decay} must not be negative")
    run = WAYS[one_of("way of muon", way, WAYS)]()
    rate, kept = lr if callable(lr) else constant(lr), Moments(moments, rounding, seed)

    def init(master: Tree, device: torch.device, layouts: Layouts) -> Tree:
        refuse_others([path for path, spec in layouts.specs.items() if path not in layouts.frozen and chosen(spec.param)], layouts)
        return {"master": master, "momentum": tree.map(kept.zeros, master)}

    def update(
        state: Tree, grads: Tree, params: dict[str, Param], lr: Tensor, scale: Tensor, step: Tensor, ok: Tensor, ctx: Any, layouts: Layouts
    ) -> Tree:
        def source(path: str) -> Tensor:
            noise = kept.noise(path, step, ctx, layouts) if kept.by_chance else None
            dtype = ctx.of(layouts.chain_of[path]).precision.compute
            return ctx.ops.momentum_update(tree.get(state["momentum"], path), tree.get(grads, path), scale, ok, momentum, nesterov, dtype, noise)

        def sink(path: str, piece: Piece, o: Tensor) -> None:
            w = piece.view(tree.get(state["master"], path))
            change = rms * math.sqrt(max(piece.shape[-2:])) * o.to(w.dtype) + weight_decay * w
            w.sub_(torch.where(ok, change * lr.to(w.dtype), 0.0))

        run(layouts, ctx, [*params], source, sink)
        return state

    others = adamw(rate, weight_decay=weight_decay, moments=moments, rounding=rounding, seed=seed) if rest is None else rest
    return groups([(chosen, Optimizer(init, update, rate))], others)

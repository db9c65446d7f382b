"""What optimizers are compared with: torch's own, in float64 on whole matrices, and shards of the same numbers for the ranks of any mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import context, draw

import lf
from lf import box, tree
from lf.chain_context import chain_context
from lf.chain_layouts import Layouts, joined
from lf.spec import Param, Spec

Pieces = dict[str, torch.Tensor]  # by key: of each part of each parameter the whole logical tensor


def wholes(layouts: Layouts, *key: object) -> Pieces:
    """Numbers for every part of everything that is trained."""
    first = {p.key: p for path, spec in layouts.specs.items() if path not in layouts.frozen for p in spec.pieces(spec.mesh.coords(0))}
    return {k: draw(*map(str, key), k, shape=p.shape) for k, p in first.items()}


def cut(layouts: Layouts, rank: int, pieces: Pieces, dtype: torch.dtype = torch.float64) -> tree.Tree:
    """What a rank keeps of these."""
    out = []
    for path in layouts.trained(rank):
        shard = torch.zeros(layouts.state_shape(path, rank), dtype=dtype)
        for p in layouts.state_pieces(path, rank):
            p.view(shard).copy_(pieces[p.key][box.slices(p.box, box.whole(p.shape))])
        out.append((path, shard))
    return tree.build(out)


def updated(
    axes: Any,
    layout: lf.layouts.Layout | Layouts,
    optimizer: lf.optim.Optimizer,
    steps: int,
    scale: float = 0.5,
    precision: str = "fp64",
    start: tuple[int, tree.Tree] | None = None,
) -> tree.Tree:
    """The state of a rank after so many updates, from (updates made, state) where it starts from there."""
    layouts, rank = joined(layout), axes.rank
    ctx = chain_context(layouts, axes, lf.devices.get("cpu"), precision) if isinstance(layout, Layouts) else context(axes, precision)
    dtype, params = ctx.precision.master, {path: spec.param for path, spec in layouts.trained(rank).items()}
    done, state = start or (0, optimizer.init(cut(layouts, rank, wholes(layouts, "w"), dtype), torch.device("cpu"), layouts))
    for i in range(done, steps):
        step, ok = torch.tensor(i), torch.tensor(i != 1)  # the second is skipped
        grads, factor = cut(layouts, rank, wholes(layouts, "g", i), dtype), torch.tensor(scale, dtype=dtype)
        state = optimizer.update(state, grads, params, optimizer.lr(step).to(dtype), factor, step, ok, ctx, layouts)
    return state


def agree(layout: lf.layouts.Layout | Layouts, states: list[tree.Tree], kind: str, want: Pieces, tolerance: float) -> None:
    """Every piece that any rank keeps is the same box of the whole."""
    seen = 0
    for rank, state in enumerate(states):
        layouts = joined(layout)
        assert dict(tree.items(state[kind])).keys() >= {path for path in layouts.trained(rank) if kind == "master"}
        for path, x in tree.items(state[kind]):
            for p in layouts.state_pieces(path, rank):
                here = want[p.key][box.slices(p.box, box.whole(p.shape))]
                x_here, about = p.view(x).to(here.dtype), f"{kind} of {p.key} on rank {rank}"
                torch.testing.assert_close(x_here, here, rtol=tolerance, atol=tolerance, msg=lambda m, about=about: f"{about}: {m}")
                seen += here.numel()
    assert seen


def torch_updated(
    layout: lf.layouts.Layout | Layouts,
    chosen: Callable[[Param], bool],
    steps: int,
    lr: float,
    decay: float,
    patch: pytest.MonkeyPatch,
    scale: float = 0.5,
) -> Pieces:
    """torch.optim.Muon of each matrix of what is chosen, torch.optim.AdamW of the rest. torch rounds to bfloat16 on the way; not here."""
    patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    layouts = joined(layout)
    spec_of: dict[str, Spec] = {p.key: spec for spec in layouts.specs.values() for p in spec.pieces(spec.mesh.coords(0))}
    out = wholes(layouts, "w")
    matrices = {(k, e): out[k][e] if out[k].dim() == 3 else out[k] for k in out if chosen(spec_of[k].param) for e in range(_stack(out[k]))}
    rest = {k: x for k, x in out.items() if not chosen(spec_of[k].param)}
    leaves = {k: torch.nn.Parameter(x) for k, x in [*matrices.items(), *rest.items()]}
    muon = [leaves[k] for k in matrices]
    steps_of = [torch.optim.Muon(muon, lr, decay, momentum=0.95, eps=1e-7, adjust_lr_fn="match_rms_adamw")] if muon else []
    still = [leaves[k] for k in rest if len(spec_of[k].param.shape) < 2]
    moved = [leaves[k] for k in rest if len(spec_of[k].param.shape) >= 2]
    groups = [{"params": x, "weight_decay": d} for x, d in ((moved, decay), (still, 0.0)) if x]
    steps_of += [torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), eps=1e-8)]
    for i in range(steps):
        grads = wholes(layouts, "g", i)
        for k, x in leaves.items():
            whole = grads[k[0]] if isinstance(k, tuple) else grads[k]
            x.grad = (whole[k[1]] if isinstance(k, tuple) and whole.dim() == 3 else whole) * scale
        for optimizer in steps_of if i != 1 else []:
            optimizer.step()
    for (k, e) in matrices:  # they were taken as views or copies
        (out[k][e] if out[k].dim() == 3 else out[k]).copy_(leaves[k, e].detach())
    return {k: x.clone() for k, x in out.items()} | {k: leaves[k].detach() for k in rest}


def _stack(x: torch.Tensor) -> int:
    return len(x) if x.dim() == 3 else 1

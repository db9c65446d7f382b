"""Parameters and training state as trees of what this rank holds, and the way in: `init`, `shard_batch`, `forward`."""

from __future__ import annotations

import os
from typing import Any

import attrs
import torch
from torch import Tensor

from lf import rng, tree
from lf.batch import Batch
from lf.chain_layouts import Layouts, joined
from lf.layouts import Layout
from lf.meter import BATCH, mark
from lf.parallel.reduce import lies_of
from lf.schedule.gathered import Gathered
from lf.schedule.run import run_forward
from lf.segment import Model, Terms
from lf.spec import LayoutError
from lf.tree import Tree


@attrs.frozen
class State:
    """`params`: the compute copy, {segment: {name: Tensor}}. `optimizer`: a dict of such trees, with "master" the truth that is saved. All of these
    have the shard that this rank keeps, where the layout cuts the state of a parameter.

    `step`: steps made, a device scalar.
    """

    params: Tree
    optimizer: Tree
    step: Tensor


def device_of(ctx: Any) -> torch.device:
    return ctx.device.torch_device(int(os.environ.get("LOCAL_RANK", "0")))


def init(layout: Layout | Layouts, ctx: Any, seed: int) -> Tree:
    """Fresh parameters of this rank in the master dtype, of all chains that it is on: the same logical model for the same seed under any layout. Of
    a parameter whose state is cut, the shard."""
    pairs, layouts, rank = [], joined(layout), ctx.axes.rank
    for path, spec in layouts.held(rank).items():
        if device_of(ctx).type == "meta":
            pairs.append((path, torch.empty(layouts.state_shape(path, rank), dtype=ctx.precision.master, device="meta")))
            continue
        local = torch.empty(layouts.state_shape(path, rank), dtype=ctx.precision.master)
        for piece in layouts.state_pieces(path, rank):
            piece.view(local).copy_(rng.draw(seed, piece.key, piece.shape, spec.param.init, piece.box, local.dtype))
        pairs.append((path, local.to(device_of(ctx))))
    return tree.build(pairs)


def shard_batch(batch: Batch, model: Model, ctx: Any) -> Batch:
    """This rank's view of a batch, on its device, with what the model derives from it."""
    device = device_of(ctx)
    out = model.prepare(Batch({k: v.to(device, non_blocking=True) for k, v in batch.plan.items()}, batch.payload), ctx)
    mark(BATCH, out.plan, out.payload, out.derived)
    return out


def compute_copy(layout: Layout | Layouts, master: Tree, ctx: Any, old: Tree | None = None) -> Tree:
    """The parameters, each in the compute dtype of its chain, at least float32 where it is not learned; the very same tensors where the dtypes
    agree. old: a copy that nobody needs any more, whose memory is taken."""
    layouts, pairs = joined(layout), []
    into: list[Tensor] = []
    given: list[Tensor] = []
    for path, w in tree.items(master):
        dtype = layouts.specs[path].param.used_in(ctx.of(layouts.chain_of[path]).precision.compute)
        if dtype == w.dtype or old is None:
            pairs.append((path, w.to(dtype)))
            continue
        pairs.append((path, tree.get(old, path)))
        into.append(pairs[-1][1])
        given.append(w)
    if into:
        torch._foreach_copy_(into, given)
    return tree.build(pairs)


def gathered(layout: Layout | Layouts, params: Tree, ctx: Any) -> Tree:
    """Parameters as `forward` takes them, from those of a State or of `init`: whole where the layout keeps shards. Collective."""
    layouts, shards = joined(layout), dict(tree.items(params))
    whole = dict(shards)
    for chain, where in layouts.chains.items():
        cut = [where.specs[path] for path in shards if layouts.chain_of[path] == chain and where.specs[path].cut]
        if cut:
            axes = ctx.of(chain).axes
            together = Gathered(lies_of(cut, axes.coords), shards, axes)
            together.gather([spec.path for spec in cut])
            together.ready([spec.path for spec in cut])
            whole |= together.leaves
    return tree.build([*whole.items()])


def forward(model: Model, params: Tree, batch: Batch, ctx: Any) -> Tensor | Terms:
    """The model without gradients: logits (tokens, vocabulary) for a batch without labels, terms (this rank's sums) for one with.

    Raises LayoutError on a mesh with pp > 1, and for several chains: those a program runs, lf.schedule.run.
    """
    if ctx.chains:
        raise LayoutError(f"lf.forward runs one chain; this context has {', '.join(ctx.chains)}: run a program with lf.schedule.run")
    if ctx.axes.mesh.pp > 1:
        raise LayoutError(f"lf.forward runs one stage; mesh {ctx.axes.mesh} has pp={ctx.axes.mesh.pp}: run a program with lf.schedule.run")
    model.accepts(batch)
    known = model.params()
    compute = tree.build([(path, w.to(known[path].used_in(ctx.precision.compute))) for path, w in tree.items(params)])
    x, terms = run_forward(model.segments, compute, shard_batch(batch, model, ctx), ctx)
    return terms or x


"""What lasts through a step on one rank, by kind, from the layout alone: known before anything is made.

    compute copy of the parameters   the shard that a rank keeps, or all of it where nothing is cut; nothing where that is the master itself
    parameters made whole            stages 1, 2 and 3 with `keep`: all; stage 3: the layers that are there at a time
    gradients                        whole, and shards where they are summed at the end; summed after each microbatch, shards and layers on their way
    optimizer: m, …                  its trees, which `init` is asked for with one element of each parameter
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from lf import tree
from lf.chain_layouts import Layouts
from lf.context import precision_of
from lf.layouts import Layout
from lf.optim import Optimizer
from lf.sharding import Sharding
from lf.tree import Tree

FLYING = 2
"""Layers whose whole gradients are there at a time where they are summed after each microbatch, as the refusal counts them. One more may be
(`lf.schedule.gradients.FLYING`), but the largest three need not be neighbours, and what fits must not be refused."""


@attrs.frozen
class Held:
    """Of a parameter on this rank. whole, kept: elements that it computes with, and of the shard that it keeps · copied: bytes of the compute copy of
    an element, 0 where that is the master · compute: bytes of an element that is used · layer: that uses it first · sharding: of its chain."""

    whole: int
    kept: int
    copied: int
    compute: int
    layer: str
    trains: bool
    cut: bool
    sharding: Sharding


def held(layouts: Layouts, ctx: Any, stage: int | None = None) -> dict[str, Held]:
    """Of each parameter of the rank of ctx. stage: as if the state were sharded so, over all ranks that hold a parameter alike, in equal shards."""
    rank, out = ctx.axes.rank, dict[str, Held]()
    first = {chain: _first(where) for chain, where in layouts.chains.items()}
    for path, spec in layouts.held(rank).items():
        chain = layouts.chain_of[path]
        where, dtype = layouts.chains[chain], spec.param.used_in(ctx.of(chain).precision.compute)
        whole, sharding, cut = math.prod(layouts.local_shape(path, rank)), where.sharding, spec.cut is not None
        kept = math.prod(layouts.state_shape(path, rank)) if cut else whole
        if stage is not None:
            ranks = math.prod(where.mesh[a] for a in spec.data_axes)
            sharding, cut = Sharding(stage), stage > 0 and ranks > 1 and spec.param.learned
            kept = -(-whole // ranks) if cut else whole
        copied = 0 if dtype == ctx.precision.master else dtype.itemsize
        out[path] = Held(whole, kept, copied, dtype.itemsize, f"{chain}:{first[chain][path]}", path not in layouts.frozen, cut, sharding)
    return out


def _first(where: Layout) -> dict[str, str]:
    """The layer that uses each parameter first."""
    out: dict[str, str] = {}
    for segment in where.model.segments:
        for name, param in segment.params.items():
            out.setdefault(getattr(param, "path", f"{segment.name}/{name}"), segment.layer)
    return out


def lasting(of: Mapping[str, Held], small: Tree, master: torch.dtype) -> dict[str, int]:
    """Bytes by kind. small: the optimizer's trees, of one element for each parameter that it has."""
    kinds = {"compute copy of the parameters": sum(h.kept * h.copied for h in of.values())}
    cut = [h for h in of.values() if h.cut]
    all_there = [h for h in cut if h.sharding.stage < 3 or h.sharding.keep]
    in_turn = _layers(((h.layer, h.whole * h.compute) for h in cut if h not in all_there), 1 + max((h.sharding.ahead for h in cut), default=0))
    kinds["parameters made whole"] = sum(h.whole * h.compute for h in all_there) + in_turn
    trained = [h for h in of.values() if h.trains]
    each = [h for h in trained if h.cut and h.sharding.reduce == "microbatch"]
    lasts = sum(h.kept if h in each else h.whole + (h.kept if h.cut else 0) for h in trained)
    kinds["gradients"] = lasts * master.itemsize + _layers(((h.layer, h.whole * master.itemsize) for h in each), FLYING)
    sizes = {path: h.kept for path, h in of.items()}
    for name, branch in small.items():
        kinds[f"optimizer: {name}"] = sum(x.numel() * x.element_size() * sizes.get(path, 1) for path, x in tree.items(branch))
    return kinds


def _layers(sizes: Any, most: int) -> int:
    """The bytes of so many layers, the largest."""
    layers: dict[str, int] = {}
    for layer, n in sizes:
        layers[layer] = layers.get(layer, 0) + n
    return sum(sorted(layers.values())[-most:])


def asked(layouts: Layouts, optimizer: Optimizer, ctx: Any, host: bool = False) -> Tree:
    """The optimizer's trees for this rank, of one element for each parameter, without those that lie in the host's memory. host: that is the
    device."""
    one = {path: torch.zeros(1, dtype=ctx.precision.master) for path in layouts.held(ctx.axes.rank)}
    trained = [path for path in one if path not in layouts.frozen]
    small = optimizer.init(tree.build([(path, one[path]) for path in trained]), torch.device("cpu"), layouts)
    away = frozenset[str]() if host else optimizer.hosted(trained, layouts)
    small = {kind: tree.build([(path, x) for path, x in tree.items(branch) if path not in away]) for kind, branch in small.items()}
    return small | {"master": tree.build([*one.items()])}


def state_bytes(optimizer: Optimizer, layout: Layout, precision: str) -> float:
    """Bytes that an optimizer keeps for each element of the parameters that train, the master among them, on average."""
    trained = [path for path in layout.specs if path not in layout.frozen]
    one = tree.build([(path, torch.zeros(1, dtype=precision_of(precision).master)) for path in trained])
    sizes = {path: math.prod(layout.specs[path].param.shape) for path in trained}
    trees = optimizer.init(one, torch.device("cpu"), Layouts.of(layout)).values()
    return sum(x.element_size() * sizes.get(path, 0) for branch in trees for path, x in tree.items(branch)) / sum(sizes.values())

"""State of the optimizer in the host's memory, all but the masters: a layer's is copied in while the one before is updated, and out after its own.

    copy in      0  1     2     3
    update          0     1     2     3          two buffers on the device: layer i uses number i mod 2, and its copy in waits for the copy out of
    copy out           0     1     2     3       layer i-2; the host waits for nothing

With 8 bytes of moments a parameter, a step copies 8 of them each way: 0.2 s for a billion parameters at 40 GB/s. The numbers are the same to the
bit: an update is the same function of the same values. torch gives out pinned memory in powers of two, so a tensor can take up to twice its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lf import tree
from lf.chain_layouts import Layouts
from lf.config import ConfigError
from lf.meter import HOST, mark, quiet
from lf.optim.base import Optimizer, at, leaves_of, merged, replaced, scalars
from lf.spec import Param
from lf.tree import Tree

ALIGNED = 16  # bytes: where a tensor may begin in a buffer
Wait = Callable[[], None]


def on_host(optimizer: Optimizer, share: float = 1.0) -> Optimizer:
    """The same optimizer with what it keeps of the first layers, `share` of them, in the host's memory; on a GPU in pinned memory. A layer is here a
    segment of the model. State that comes from elsewhere, as from a checkpoint, goes there in its first update.

    Raises ConfigError for a share that is none."""
    if not 0 < share <= 1:
        raise ConfigError(f"share={share} of the optimizer's state in the host's memory must be above 0, and 1 at most")
    streams: list[Any] = []  # made by the first update and used by all

    def init(master: Tree, device: torch.device, layouts: Layouts) -> Tree:
        layers, resident = _dealt([path for path, _ in tree.items(master)], share, layouts)
        states = []
        for paths in layers:  # one after another, so that never all of it is on the device
            state = optimizer.init(tree.build([(path, tree.get(master, path)) for path in paths]), device, layouts)
            states.append({kind: branch if kind == "master" else _moved(branch, layouts) for kind, branch in state.items()})
        states.append(optimizer.init(tree.build([(path, tree.get(master, path)) for path in resident]), device, layouts))
        return merged(states, layouts)

    def update(
        state: Tree, grads: Tree, params: dict[str, Param], lr: Tensor, scale: Tensor, step: Tensor, ok: Tensor, ctx: Any, layouts: Layouts
    ) -> Tree:
        if not streams:
            streams.append(ctx.device.copy_streams())
        layers, resident = _dealt([*params], share, layouts)
        before = tree.map(torch.clone, scalars(state, layouts))  # each layer starts from the scalars as they were

        def updated(own: Tree, paths: Sequence[str]) -> Tree:
            own = {**own, **tree.map(torch.clone, before)}
            return optimizer.update(own, grads, {path: params[path] for path in paths}, lr, scale, step, ok, ctx, layouts)

        owns = [at(state, paths) for paths in layers]
        leaves = [_kept(own) for own in owns]
        sizes = [max([0, *(_bytes(each) for each in leaves[parity::2])]) for parity in (0, 1)]
        buffers, free = [torch.empty(n, dtype=torch.uint8, device=step.device) for n in sizes], list[Wait]([_at_once, _at_once])
        views = [_views(each, buffers[i % 2]) for i, each in enumerate(leaves)]

        def fetch(i: int) -> Wait:
            return ctx.device.copy_beside([(views[i][k], x) for k, x in leaves[i].items()], 1, free[i % 2], streams[0])

        fetched, new = fetch(0) if layers else _at_once, dict[tuple[str, str], Tensor]()
        for i, paths in enumerate(layers):
            now, fetched = fetched, fetch(i + 1) if i + 1 < len(layers) else _at_once
            now()
            updated(replaced(owns[i], views[i]), paths)
            homes = {k: _home(x) for k, x in leaves[i].items()}
            free[i % 2] = ctx.device.copy_beside([(homes[k], views[i][k]) for k in homes], 0, _at_once, streams[0])
            new |= homes
        new |= leaves_of(updated(at(state, resident), resident))
        for copied in free:
            copied()  # whoever reads the host's memory, or is given the buffers', comes after
        return replaced(state, new)

    def hosted(paths: Sequence[str], layouts: Layouts) -> frozenset[str]:
        return frozenset(path for layer in _dealt(paths, share, layouts)[0] for path in layer)

    return Optimizer(init, update, optimizer.lr, hosted)


def _dealt(paths: Sequence[str], share: float, layouts: Layouts) -> tuple[list[list[str]], list[str]]:
    """(the paths of each layer whose state lies in the host's memory, all others). Of each chain by itself: its ranks must agree, and not all are on
    the same others."""
    chains: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        chains.setdefault(layouts.chain_of[path], {}).setdefault(path.split("/")[0], []).append(path)
    there, resident = list[list[str]](), list[str]()
    for layers in chains.values():
        n = math.ceil(share * len(layers))
        there += [*layers.values()][:n]
        resident += [path for layer in [*layers.values()][n:] for path in layer]
    return there, resident


def _kept(own: Tree) -> dict[tuple[str, str], Tensor]:
    """By kind and path what lies, or is to lie, in the host's memory. What is empty lies nowhere."""
    return {(kind, path): x for (kind, path), x in leaves_of(own).items() if kind != "master" and x.numel()}


def _moved(branch: Tree, layouts: Layouts) -> Tree:
    """A tree of state in the host's memory, its scalars where they are."""
    out = []
    for path, x in tree.items(branch):
        home = _home(x) if path in layouts.specs and x.numel() else x
        if not x.is_meta:  # else there is nothing to copy
            home.copy_(x)
        out.append((path, home))
    return tree.build(out)


def _home(x: Tensor) -> Tensor:
    """A place for a tensor in the host's memory: where it is, or a new one."""
    if x.is_meta:
        with quiet():
            home = torch.empty_like(x)
        mark(HOST, home)
        return home
    return x if x.device.type == "cpu" else torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)


def _bytes(leaves: dict[tuple[str, str], Tensor]) -> int:
    return sum(_length(x) for x in leaves.values())


def _length(x: Tensor) -> int:
    return -(-x.numel() * x.element_size() // ALIGNED) * ALIGNED


def _views(leaves: dict[tuple[str, str], Tensor], buffer: Tensor) -> dict[tuple[str, str], Tensor]:
    """A place in the buffer for each."""
    out, start = {}, 0
    for key, x in leaves.items():
        out[key] = buffer[start : start + x.numel() * x.element_size()].view(x.dtype).view(x.shape)
        start += _length(x)
    return out


def _at_once() -> None:
    """What waits for a copy that nobody has started."""

"""Several optimizers, each for the parameters that a predicate picks by what they are: axes, shape, parts. Nothing is decided by a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lf import tree
from lf.chain_layouts import Layouts
from lf.config import ConfigError
from lf.optim.base import Optimizer, Rate, at, leaves_of, merged, replaced, scalars
from lf.spec import Param
from lf.tree import Tree

Predicate = Callable[[Param], bool]


def times(factor: float, lr: float | Rate) -> Rate:
    """A learning rate, or one that changes with the step, times a factor: what a group has of its own."""
    return (lambda step: factor * lr(step)) if callable(lr) else lambda step: torch.full((), factor * lr, device=step.device)


def groups(choices: Sequence[tuple[Predicate, Optimizer]], rest: Optimizer) -> Optimizer:
    """A parameter goes to the optimizer of the first predicate that holds of it, else to `rest`, whose rate is the one that is reported.

    Each optimizer has a learning rate (`times`), a weight decay and whatever else is its own; all share the clip factor, which is of the whole
    model. Trees of state of one name are one tree; the scalars of group i are NAME.i, those of `rest` have the last number.
    `init` raises ConfigError for a predicate that takes nothing of the whole model.
    """
    optimizers = [*(optimizer for _, optimizer in choices), rest]

    def dealt(params: Mapping[str, Param]) -> list[dict[str, Param]]:
        out: list[dict[str, Param]] = [{} for _ in optimizers]
        for path, param in params.items():
            out[next((i for i, (takes, _) in enumerate(choices) if takes(param)), -1)][path] = param
        return out

    def init(master: Tree, device: torch.device, layouts: Layouts) -> Tree:
        everything = {path: spec.param for path, spec in layouts.specs.items() if path not in layouts.frozen}
        whole = dealt(everything)
        for i, (takes, _) in enumerate(choices):
            if not whole[i]:
                name, before = getattr(takes, "__name__", "a predicate"), " that the groups before it have left" if i else ""
                raise ConfigError(f"group {i} of the optimizer, {name}, takes none of the {len(everything)} trained parameters{before}; leave it out")
        states = []
        for i, (optimizer, mine) in enumerate(zip(optimizers, whole)):
            own = tree.build([(path, w) for path, w in tree.items(master) if path in mine])
            states.append(numbered(optimizer.init(own, device, layouts), i, layouts))
        return merged(states, layouts)

    def numbered(state: Tree, i: int, layouts: Layouts) -> Tree:
        numbers = scalars(state, layouts)
        return {f"{kind}.{i}" if kind in numbers else kind: branch for kind, branch in state.items()}

    def update(
        state: Tree, grads: Tree, params: dict[str, Param], lr: Tensor, scale: Tensor, step: Tensor, ok: Tensor, ctx: Any, layouts: Layouts
    ) -> Tree:
        numbers = scalars(state, layouts)
        new: dict[tuple[str, str], Tensor] = {}
        for i, (optimizer, mine) in enumerate(zip(optimizers, dealt(params))):
            own = at({kind: branch for kind, branch in state.items() if kind not in numbers}, mine)
            own |= {kind.removesuffix(f".{i}"): state[kind] for kind in numbers if kind.endswith(f".{i}")}
            rate = lr if optimizer is rest else optimizer.lr(step)
            new |= leaves_of(numbered(optimizer.update(own, grads, mine, rate, scale, step, ok, ctx, layouts), i, layouts))
        return replaced(state, new)

    def hosted(paths: Sequence[str], layouts: Layouts) -> frozenset[str]:
        whole = dealt({path: layouts.specs[path].param for path in paths})
        return frozenset().union(*(optimizer.hosted([*mine], layouts) for optimizer, mine in zip(optimizers, whole)))

    return Optimizer(init, update, rest.lr, hosted)

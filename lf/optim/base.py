"""What an optimizer is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from lf import tree
from lf.chain_layouts import Layouts
from lf.spec import Param
from lf.tree import Tree

Rate = Callable[[Tensor], Tensor]


@attrs.frozen
class Optimizer:
    """`init(master, device, layouts) -> state`, a dict of trees shaped like the parameters, among them "master", the truth that is updated and
    saved, and of scalars. It is given the parameters that are trained, on some ranks perhaps none: the keys of `state` are the same there. `device`:
    where scalars go · `layouts`: who holds what (`lf.chain_layouts.Layouts`). A leaf is what this rank keeps: the shard of a parameter whose state
    is cut (`Spec.state_pieces`). Raises ConfigError where an optimizer does not suit the model, on all ranks alike.

    `update(state, grads, params, lr, scale, step, ok, ctx, layouts) -> state` where
        grads   {segment: {name: Tensor}} in the master dtype, shaped like the masters; they are used up
        params  {path: Param}, what each leaf is that is updated; others in state["master"] are not trained and stay as they are
        step    updates made before this one · ctx  the context, as of the step · layouts  as in init
        lr, scale (multiplies the gradients: the clip factor), step, ok are device scalars; where `ok` is false nothing changes.
    The tensors of `state` are updated in place, and a tensor may be replaced by one elsewhere: the state that was given is used up.

    `lr(step)` is the learning rate as a device scalar.

    `hosted(paths, layouts)`: of the parameters of a rank that are trained, those whose state, but for the masters, lies in the host's memory.
    """

    init: Callable[[Tree, torch.device, Layouts], Tree]
    update: Callable[[Tree, Tree, dict[str, Param], Tensor, Tensor, Tensor, Tensor, Any, Layouts], Tree]
    lr: Rate
    hosted: Callable[[Sequence[str], Layouts], frozenset[str]] = lambda paths, layouts: frozenset()


def at(state: Tree, paths: Collection[str]) -> Tree:
    """The state with, of each tree, only what stands at these paths; the same tensors."""
    return {kind: tree.build([(path, x) for path, x in tree.items(branch) if path in paths]) for kind, branch in state.items()}


def replaced(state: Tree, leaves: Mapping[tuple[str, str], Tensor]) -> Tree:
    """The state with other tensors where `leaves` has some, by (kind, path)."""
    return {kind: tree.build([(path, leaves.get((kind, path), x)) for path, x in tree.items(branch)]) for kind, branch in state.items()}


def leaves_of(state: Tree) -> dict[tuple[str, str], Tensor]:
    return {(kind, path): x for kind, branch in state.items() for path, x in tree.items(branch)}


def merged(states: Sequence[Tree], layouts: Layouts) -> Tree:
    """One state of those of parameters that are apart; scalars of one name are those of the last."""
    out: Tree = {}
    for state in states:
        numbers = scalars(state, layouts)
        for kind, branch in state.items():
            out[kind] = branch if kind in numbers else tree.build([*tree.items(out.get(kind, {})), *tree.items(branch)])
    return out


def scalars(state: Tree, layouts: Layouts) -> dict[str, Tree]:
    """What of a state is no parameter's: {kind: {name: scalar}}."""
    own = {kind: {name: x for name, x in tree.items(branch) if name not in layouts.specs} for kind, branch in state.items()}
    return {kind: branch for kind, branch in own.items() if branch}

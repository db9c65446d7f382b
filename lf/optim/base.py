"""What an optimizer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor

from lf.spec import Param
from lf.tree import Tree

Rate = Callable[[Tensor], Tensor]


@attrs.frozen
class Optimizer:
    """`init(master) -> state`, a dict of trees shaped like the parameters, among them "master", the truth that is updated and saved.

    `update(state, grads, params, lr, scale, step, ok, ops) -> state` where
        grads   {segment: {name: Tensor}} in the master dtype; they are used up · params  {path: Param}, what each leaf is
        step    updates made before this one · ops  the device's fast functions (`Context.ops`)
        lr, scale (multiplies the gradients: the clip factor), step, ok are device scalars; where `ok` is false nothing changes.
    The tensors of `state` are updated in place: the state that was given is used up.

    `lr(step)` is the learning rate as a device scalar.
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, dict[str, Param], Tensor, Tensor, Tensor, Tensor, Any], Tree]
    lr: Rate

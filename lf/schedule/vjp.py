"""Gradients of tensors from gradients of what was made of them, without what torch's own call loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def vjp(outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of each input, given that of each output; None where no output depends on it. Frees the graph."""
    with torch.enable_grad():
        root = _Root.apply(grads, *outputs)
    return torch.autograd.grad(root, inputs, allow_unused=True)


class _Root(torch.autograd.Function):
    """A scalar whose gradient by each output is the one given. autograd.grad takes these too, but loads sympy to compare their shapes: 36 MiB and
    half a second on every rank.
    """

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *ctx.grads

"""Gradients of tensors from gradients of what was made of them, without what torch's own call loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def vjp(outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of each input, given that of each output; None where no output depends on it. Frees the graph."""
    with torch.enable_grad():
        root = Root.apply(grads, *outputs)
    return torch.autograd.grad(root, inputs, allow_unused=True)


class Root(torch.autograd.Function):
    """A scalar whose gradient by each output is what lies in `seeds` when the backward runs, None for none. It holds the graph of the outputs and
    not the outputs: their memory goes when nobody else needs it. (autograd.grad takes gradients, too, but loads sympy to compare shapes: 36 MiB and
    half a second on every rank.)
    """

    @staticmethod
    def forward(ctx: Any, seeds: Sequence[Tensor | None], *outputs: Tensor) -> Tensor:
        ctx.seeds, ctx.dtypes = seeds, [y.dtype for y in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *(g if g is None else g.to(dtype) for g, dtype in zip(ctx.seeds, ctx.dtypes))

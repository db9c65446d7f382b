"""Gradients of tensors from gradients of what was made of them, without what torch's own call adds.

    held = ends(outputs)                 right after the forward: the graph of the outputs, without the outputs
    grads = vjp(held, given, inputs)     the backward
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward


def ends(outputs: Iterable[Tensor]) -> tuple[GradientEdge, ...]:
    """Where the gradients of these come in, with gradients enabled. It holds their graph and not them: their memory goes when nobody else needs it.

    Python does not keep the graph of a node written in Python alive, and a leaf has no node: there it is the node of a view, which keeps a shape.
    """
    return tuple([_end(y, y.grad_fn) for y in outputs])


def _end(y: Tensor, node: Node | None) -> GradientEdge:
    if node is not None and not isinstance(node, FunctionCtx):
        return GradientEdge(node, y.output_nr)
    node = y.view_as(y).grad_fn
    assert node is not None
    return GradientEdge(node, 0)


def vjp(ends: Sequence[GradientEdge], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of each input, given that of each end (None: nothing flows in there); None where no end depends on it. Frees the graph.

    A gradient given in another dtype than its end has is converted. This is what torch.autograd.grad ends in: before, that compares shapes with
    sympy, which costs a rank 36 MiB and half a second to load, and more time at each call than the backward of a small layer's node.
    """
    given = [(end, g) for end, g in zip(ends, grads) if g is not None]
    if not given or not inputs:
        return (None,) * len(inputs)
    roots, seeds = zip(*given)
    return _engine_run_backward(roots, seeds, False, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False)

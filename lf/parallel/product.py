"""One matrix product, and the ways to the gradient of its weight.

    plain        backward multiplies and returns the gradient: a tensor of the weight's size for each microbatch
    into `acc`   backward adds dyᵀ·x to a sum that there is already, which may be wider than the weight (action B)
    by `probe`   backward multiplies nothing: it leaves the two factors, which `weight_gradient` multiplies whenever it suits (actions I, then W)

The factors come out as gradients of two more inputs, the probes. So one autograd.grad gives dX and them, nothing is kept aside in a backward,
and a compiled layer does the same. In all three dX is the same product, to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Seen = tuple[tuple[int, ...], torch.dtype, tuple[int, ...], torch.dtype]


class W(NamedTuple):
    """A matmul weight, and where its gradient goes.

    value: (out, in), compute dtype; a leaf that requires grad where the weight trains. Where it does not, the rest says nothing: no gradient is made.
    acc:   (out, in), at least float32. Backward adds dyᵀ·x to it and returns no gradient for `value`, which is to stand among autograd.grad's
           inputs all the same (allow_unused): where x needs no gradient, only that keeps the product, and its collectives, in the backward.
    probe: leaves that require grad, shaped like (the rows of x that the product sees, dy), both of which are theirs as gradients; their values
           are never read, so `probe_of` gives them no memory.
    seen:  the product appends (rows' shape and dtype, dy's shape and dtype): on meta tensors, so that probes can be made.
    """

    value: Tensor
    acc: Tensor | None = None
    probe: tuple[Tensor, Tensor] | None = None
    seen: list[Seen] | None = None


def probe_of(seen: Seen, device: torch.device) -> tuple[Tensor, Tensor]:
    """The probe of a product that has `seen` this: one element each, with strides of zero."""
    rows, rows_dtype, dy, dy_dtype = seen
    return _leaf(rows, rows_dtype, device), _leaf(dy, dy_dtype, device)


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()


def product(x: Tensor, w: Tensor | W) -> Tensor:
    """x (rows, in) · valueᵀ → (rows, out)."""
    w = of(w)
    return note(w, tuple(x.shape), x.dtype, _Product.apply(x, w.value, w.acc, *(w.probe or (None, None))))


def weight_gradient(acc: Tensor, rows: Tensor, dy: Tensor) -> None:
    """acc += dyᵀ·rows: (out, in) += (tokens, out)ᵀ·(tokens, in). The sum is made in the dtype of acc."""
    torch.ops.lf.add_product(acc, rows, dy)


def of(w: Tensor | W) -> W:
    """The weight as a W; one that does not train as its value alone. Raises ValueError where its gradient would have two places to go to."""
    if not isinstance(w, W):
        return W(w)
    if w.acc is not None and w.probe is not None:
        raise ValueError(f"a weight {tuple(w.value.shape)} has acc and probe: backward fills one of them; give acc for B, or probe for I and W")
    return w if w.value.requires_grad else W(w.value, seen=w.seen)


def note(w: W, rows: tuple[int, ...], dtype: torch.dtype, y: Tensor) -> Tensor:
    """y, written down where it is asked for."""
    if w.seen is not None:
        w.seen.append((rows, dtype, tuple(y.shape), y.dtype))
    return y


class _Product(torch.autograd.Function):
    """F.linear whose two backward products are F.linear as well: some devices have fast routes for nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, acc: Tensor | None, rows: Tensor | None, out: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.acc = acc  # not saved: it is added to between now and the backward, by other microbatches
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        dx = F.linear(dy, w.T) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[3]:
            return dx, None, None, x.detach(), dy  # detached: what made x does not live until the factors are multiplied
        return dx, (into(ctx.acc, x, dy) if ctx.needs_input_grad[1] else None), None, None, None


def into(acc: Tensor | None, rows: Tensor, dy: Tensor) -> Tensor | None:
    """dyᵀ·rows, where there is no sum that it can be added to."""
    if acc is None:
        return F.linear(dy.T, rows.T)
    weight_gradient(acc, rows, dy)
    return None


def _add_product(acc: Tensor, rows: Tensor, dy: Tensor) -> None:
    if acc.dtype == rows.dtype:
        acc.addmm_(dy.T, rows)
    elif acc.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # newer torch: what the matrix units add up in is kept
        torch.ops.aten.addmm.dtype_out(acc, dy.T, rows, acc.dtype, out=acc)
    else:
        acc.add_(F.linear(dy.T, rows.T))


# An op of its own, so that a compiler sees one call that changes acc. Not by torch.library.custom_op: that loads Dynamo on the first call.
_LIBRARY = torch.library.Library("lf", "FRAGMENT")
_LIBRARY.define("add_product(Tensor(a!) acc, Tensor rows, Tensor dy) -> ()")
_LIBRARY.impl("add_product", _add_product, "CompositeExplicitAutograd")
_LIBRARY.impl("add_product", lambda acc, rows, dy: None, "Meta")  # nothing to do, and torch's decomposition of that addmm is broken (2.11)

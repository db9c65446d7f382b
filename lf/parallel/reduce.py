"""Sum gradients over every rank that holds the element, one launch per layer, group and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.spec import Piece, Spec


def reduce_gradients(specs: Sequence[Spec], grads: dict[str, Tensor], axes: Any) -> Callable[[], None]:
    """Starts the sums of `grads` (by path); the function returned waits for them and puts them into `grads`.

    Parts whose boxes overlap along a named axis (kv heads under query heads) are laid into the whole part and summed over that axis as well:
    2(t-1)/t · rows · width elements more once a step, for those parts alone.
    """
    groups: dict[tuple[tuple[str, ...], torch.dtype], list[tuple[str, Piece | None, Tensor]]] = {}
    for spec in specs:
        grad = grads[spec.path]
        if axes[spec.sum_axes].size > 1:
            groups.setdefault((spec.sum_axes, grad.dtype), []).append((spec.path, None, grad))
        for piece in (spec.pieces(axes.coords)[i] for i in spec.shared()):
            names = tuple(a for a in spec.grid if a in (*spec.sum_axes, spec.names[piece.dim]))
            groups.setdefault((names, grad.dtype), []).append((spec.path, piece, _laid_out(piece, grad)))
    waits = []
    for (names, _), parts in groups.items():
        flat = torch.cat([x.reshape(-1) for _, _, x in parts])
        waits.append((axes[names].all_reduce(flat, later=True, spend=True), [(path, piece, x.shape) for path, piece, x in parts]))

    def wait() -> None:
        overlaps = []
        for total, parts in waits:
            for (path, piece, shape), values in zip(parts, total().split([shape.numel() for _, _, shape in parts])):
                if piece is None:
                    grads[path] = values.view(shape)
                else:
                    overlaps.append((path, piece, values.view(shape)))
        for path, piece, whole in overlaps:  # after the sum of the tensor that it is a part of
            lo, hi = piece.box[piece.dim]
            piece.view(grads[path]).copy_(whole.narrow(piece.dim, lo, hi - lo))

    return wait


def _laid_out(piece: Piece, grad: Tensor) -> Tensor:
    """The rows of this piece at their place in the whole part, zeros elsewhere."""
    lo, hi = piece.box[piece.dim]
    local = piece.view(grad)
    whole = grad.new_zeros([piece.shape[d] if d == piece.dim else n for d, n in enumerate(local.shape)])
    whole.narrow(piece.dim, lo, hi - lo).copy_(local)
    return whole


def owned_square_sum(owned: Sequence[tuple[str, Piece]], grads: dict[str, Tensor], zero: Tensor) -> Tensor:
    """Σ g² over the elements that this rank counts, or `zero`: P over all ranks, so that its sum is the square of the global norm.

    owned: (path, piece) for all that `Layout.owned` gives this rank.
    """
    views = [piece.view(grads[path]) for path, piece in owned]
    return torch.stack(torch._foreach_norm(views)).square().sum() if views else zero

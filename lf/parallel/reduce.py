"""Sum gradients over every rank that holds the element, one launch per layer, group and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.spec import Piece, Spec


def reduce_gradients(specs: Sequence[Spec], grads: dict[str, Tensor], axes: Any) -> Callable[[], None]:
    """Starts the sums of `grads` (by path, changed in place); the function returned waits for them.

    Parts whose boxes overlap along a named axis (kv heads under query heads) are first laid into the whole part and summed there: 2(t-1)/t ·
    rows · width elements once a step, for those parts alone.
    """
    for spec in specs:
        _sum_overlaps(spec, grads[spec.path], axes)
    groups: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = {}
    for spec in specs:
        if axes[spec.sum_axes].size > 1:
            groups.setdefault((spec.sum_axes, grads[spec.path].dtype), []).append(grads[spec.path])
    waits = []
    for (names, _), tensors in groups.items():
        flat = torch.cat([t.reshape(-1) for t in tensors])
        waits.append((axes[names].all_reduce(flat, later=True), tensors))

    def wait() -> None:
        for result, tensors in waits:
            for total, tensor in zip(result().split([t.numel() for t in tensors]), tensors):
                tensor.copy_(total.view_as(tensor))

    return wait


def _sum_overlaps(spec: Spec, grad: Tensor, axes: Any) -> None:
    shared = spec.shared()
    if not shared:
        return
    pieces = [spec.pieces(axes.coords)[i] for i in shared]
    axis_name = spec.names[spec.param.part_dim]
    whole = []
    for piece in pieces:  # every rank's rows in one tensor of the whole part
        lo, hi = piece.box[piece.dim]
        local = piece.view(grad)
        full = grad.new_zeros([piece.shape[piece.dim] if d == piece.dim else n for d, n in enumerate(local.shape)])
        full.narrow(piece.dim, lo, hi - lo).copy_(local)
        whole.append(full)
    total = axes[axis_name].all_reduce(torch.cat([w.reshape(-1) for w in whole]))
    for piece, full, values in zip(pieces, whole, total.split([w.numel() for w in whole])):
        lo, hi = piece.box[piece.dim]
        piece.view(grad).copy_(values.view_as(full).narrow(piece.dim, lo, hi - lo))


def owned_square_sum(owned: Sequence[tuple[str, Piece]], grads: dict[str, Tensor]) -> Tensor:
    """Σ g² over the elements that this rank counts: P over all ranks, so that its sum is the square of the global norm.

    owned: (path, piece) for all that `Spec.owned` gives this rank.
    """
    squares = [piece.view(grads[path]).square().sum() for path, piece in owned]
    like = next(iter(grads.values()))
    return torch.stack(squares).sum() if squares else like.new_zeros(())

"""AdamW whose moments are bfloat16, a launch for each tensor and part: all is read once, and the noise of rounding is made where it is used.

The twin takes about 35 launches for each and as many passes over memory. All else goes to `lf.kernels.adamw`, and so does this where there is no
Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lf.box import Box, shape
from lf.kernels import adamw as others
from lf.ops.rounding import Noise, key_of

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch for the CPU comes without
    triton = None

BLOCK = 1024


def adamw_update(
    ws: Sequence[Tensor],
    grads: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    t: Tensor,
    lr: Tensor,
    scale: Tensor,
    ok: Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    noises: Sequence[Noise] | None = None,
) -> None:
    """The same as `lf.ops.adamw.adamw_update`, to rounding, with the same noise to the bit."""
    ours = triton is not None and bool(ms) and ms[0].dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in (*ws, *grads))
    if not ours or not all(x.is_contiguous() and x.dim() <= 3 for x in (*ws, *grads, *ms, *vs)):
        others.adamw_update(ws, grads, ms, vs, t, lr, scale, ok, betas, eps, decay, noises)
        return
    b1, b2 = betas
    lr, scale = lr.to(torch.float32), scale.to(torch.float32)
    numbers = torch.stack([1 - b1 ** t.to(lr.dtype), 1 - b2 ** t.to(lr.dtype), lr, scale, ok.to(lr.dtype)])
    for i, tensors in enumerate(zip(ws, grads, ms, vs)):
        if noises is None:
            whole = tuple((0, n) for n in ws[i].shape)
            _launch(tensors, tuple(ws[i].shape), whole, 0, t, numbers, b1, b2, eps, decay, False)
            continue
        for piece in noises[i].pieces:
            views = tuple(piece.view(x) for x in tensors)
            _launch(views, piece.shape, piece.box, key_of(noises[i].seed, piece.key), noises[i].step, numbers, b1, b2, eps, decay, True)


def _launch(
    views: Sequence[Tensor], logical: tuple[int, ...], held: Box, key: int, step: Tensor, numbers: Tensor,
    b1: float, b2: float, eps: float, decay: float, chance: bool,
) -> None:  # fmt: skip
    """Of a tensor of up to three dims a box of one of the shape `logical`, as stacks of rows."""
    if not views[0].numel():
        return
    box = ((0, 1),) * (3 - len(held)) + held
    _, height, columns = shape(box)
    stack, row, _ = (0,) * (3 - views[0].dim()) + views[0].stride()
    n, rows = views[0].numel(), logical[-2] if len(logical) > 1 else 1
    _update[(triton.cdiv(n, BLOCK),)](
        *views, step, numbers, key, n, height, columns, stack, row, rows, box[0][0], box[1][0], box[2][0],
        1 - b1, 1 - b2, eps, decay, CHANCE=chance, BLOCK=BLOCK,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _update(  # type: ignore[no-untyped-def]  # Triton reads annotations: only those that are its own
        ws, gs, ms, vs, steps, numbers, key, n, height, columns, stack, row, rows, first_stack, first_row, first_column, a1, a2, eps, decay,
        CHANCE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        column, line = at % columns, at // columns
        place = line // height * stack + line % height * row + column
        correct1, correct2, lr = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
        scale, keep = tl.load(numbers + 3), tl.load(numbers + 4)
        w, g = tl.load(ws + place, inside, 0.0), tl.load(gs + place, inside, 0.0)
        m, v = tl.load(ms + place, inside, 0.0).to(tl.float32), tl.load(vs + place, inside, 0.0).to(tl.float32)
        g = tl.where(keep > 0, g * scale, 0.0)
        m += keep * a1 * (g - m)
        v += keep * a2 * (g * g - v)
        change = (m / correct1) / (tl.sqrt(v / correct2) + eps) + decay * w
        tl.store(ws + place, w - tl.where(keep > 0, change * lr, 0.0), inside)
        if CHANCE:
            x = ((line // height + first_stack) * rows + line % height + first_row).to(tl.uint64) * 0x9E3779B97F4A7C15
            x += tl.load(steps).to(tl.uint64) * 0xC2B2AE3D27D4EB4F + key.to(tl.uint64)
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB
            h = (x ^ (x >> 31)).to(tl.uint32) ^ ((column + first_column).to(tl.uint32) * 2654435761)
            h = (h ^ (h >> 16)) * 0x7FEB352D
            h = (h ^ (h >> 15)) * 0x846CA68B
            h = h ^ (h >> 16)
            low = (m.to(tl.uint32, bitcast=True) + (h & 0xFFFF)) >> 16
            high = (v.to(tl.uint32, bitcast=True) + (h >> 16)) >> 16
            tl.store(ms + place, low.to(tl.uint16).to(tl.bfloat16, bitcast=True), inside)
            tl.store(vs + place, high.to(tl.uint16).to(tl.bfloat16, bitcast=True), inside)
        else:
            tl.store(ms + place, m.to(tl.bfloat16), inside)
            tl.store(vs + place, v.to(tl.bfloat16), inside)

"""Updates of moments that are bfloat16, a launch for each tensor and part: all is read once, and the noise of rounding is made where it is used.

The twins take about 35 launches for each and as many passes over memory. All else goes on as it does elsewhere, and so does this where there is
no Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.kernels import adamw as others
from lf.ops import muon
from lf.ops.rounding import Noise, key_of
from lf.spec import Piece

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
    if not _ours((*ms, *vs), (*ws, *grads)):
        others.adamw_update(ws, grads, ms, vs, t, lr, scale, ok, betas, eps, decay, noises)
        return
    b1, b2 = betas
    lr, scale = lr.to(torch.float32), scale.to(torch.float32)
    numbers = torch.stack([1 - b1 ** t.to(lr.dtype), 1 - b2 ** t.to(lr.dtype), lr, scale, ok.to(lr.dtype)])
    for i, tensors in enumerate(zip(ws, grads, ms, vs)):
        for grid, args in _launches(tensors, noises[i] if noises else None):
            _adamw[grid](*args, numbers, 1 - b1, 1 - b2, eps, decay, CHANCE=noises is not None, BLOCK=BLOCK)


def momentum_update(
    m: Tensor, grad: Tensor, scale: Tensor, ok: Tensor, beta: float, nesterov: bool, dtype: torch.dtype, noise: Noise | None = None
) -> Tensor:
    """The same as `lf.ops.muon.momentum_update`, to rounding, with the same noise to the bit."""
    if not _ours((m,), (grad,)):
        return muon.momentum_update(m, grad, scale, ok, beta, nesterov, dtype, noise)
    out = torch.empty_like(grad, dtype=dtype)
    numbers = torch.stack([scale.to(torch.float32), ok.to(torch.float32)])
    for grid, args in _launches((m, grad, out), noise):
        _momentum[grid](*args, numbers, 1 - beta, NESTEROV=nesterov, CHANCE=noise is not None, BLOCK=BLOCK)
    return out


def _ours(moments: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    known = all(x.dtype == torch.bfloat16 for x in moments) and all(x.dtype == torch.float32 for x in others)
    return triton is not None and known and all(x.is_contiguous() and x.dim() <= 3 and x.is_cuda for x in (*moments, *others))


def _launches(tensors: Sequence[Tensor], noise: Noise | None) -> Iterator[tuple[tuple[int], tuple[Any, ...]]]:
    """(grid, arguments) for each part of tensors of one shape, up to three dims: views, and where they lie, as stacks of rows, in memory and in the
    logical tensor."""
    whole = tuple((0, n) for n in tensors[0].shape)
    for piece in noise.pieces if noise else [Piece("", tuple(tensors[0].shape), whole, 0, 0)]:
        views = [piece.view(x) for x in tensors]
        if not (n := views[0].numel()):
            continue
        (stacks, rows, columns), (stack, row, _) = ((0, 1),) * (3 - len(piece.box)) + piece.box, (0,) * (3 - views[0].dim()) + views[0].stride()
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        logical = piece.shape[-2] if len(piece.shape) > 1 else 1
        step, key = (noise.step, key_of(noise.seed, piece.key)) if noise else (views[0], 0)  # without noise nothing is read there
        yield (triton.cdiv(n, BLOCK),), (*views, step, key, n, height, width, stack, row, logical, stacks[0], rows[0], columns[0])


if triton is not None:

    @triton.jit
    def _noise(line, column, step, key, height, logical, stacks, rows, columns):  # type: ignore[no-untyped-def]  # Triton reads annotations
        """32 bits for each element, as `lf.ops.rounding.bits` makes them."""
        x = ((line // height + stacks) * logical + line % height + rows).to(tl.uint64) * 0x9E3779B97F4A7C15
        x += tl.load(step).to(tl.uint64) * 0xC2B2AE3D27D4EB4F + key.to(tl.uint64)
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        h = (x ^ (x >> 31)).to(tl.uint32) ^ ((column + columns).to(tl.uint32) * 2654435761)
        h = (h ^ (h >> 16)) * 0x7FEB352D
        h = (h ^ (h >> 15)) * 0x846CA68B
        return h ^ (h >> 16)

    @triton.jit
    def _rounded(x, noise):  # type: ignore[no-untyped-def]
        """As `lf.ops.rounding.rounded`."""
        cut = (x.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)) >> 16
        return cut.to(tl.uint16).to(tl.bfloat16, bitcast=True)

    @triton.jit
    def _adamw(  # type: ignore[no-untyped-def]
        ws, gs, ms, vs, step, key, n, height, width, stack, row, logical, stacks, rows, columns, numbers, a1, a2, eps, decay,
        CHANCE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, column, line = at < n, at % width, at // width
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
            noise = _noise(line, column, step, key, height, logical, stacks, rows, columns)
            tl.store(ms + place, _rounded(m, noise), inside)
            tl.store(vs + place, _rounded(v, noise >> 16), inside)
        else:
            tl.store(ms + place, m.to(tl.bfloat16), inside)
            tl.store(vs + place, v.to(tl.bfloat16), inside)

    @triton.jit
    def _momentum(  # type: ignore[no-untyped-def]
        ms, gs, outs, step, key, n, height, width, stack, row, logical, stacks, rows, columns, numbers, a,
        NESTEROV: tl.constexpr, CHANCE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, column, line = at < n, at % width, at // width
        place = line // height * stack + line % height * row + column
        scale, keep = tl.load(numbers), tl.load(numbers + 1)
        g, m = tl.load(gs + place, inside, 0.0), tl.load(ms + place, inside, 0.0).to(tl.float32)
        g = tl.where(keep > 0, g * scale, 0.0)
        m += keep * a * (g - m)
        out = m + a * (g - m) if NESTEROV else m
        tl.store(outs + place, out.to(outs.dtype.element_ty), inside)
        if CHANCE:
            tl.store(ms + place, _rounded(m, _noise(line, column, step, key, height, logical, stacks, rows, columns)), inside)
        else:
            tl.store(ms + place, m.to(tl.bfloat16), inside)

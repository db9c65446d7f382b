"""Rounding to bfloat16 by chance: up with the probability of the part that is cut off, so that the mean of what is stored is what was to be stored.

With 8 bits of significand, the nearest value swallows what is added whenever that is less than 1/512 of what is there: an average with β = 0.999
would stand still. Rounded by chance it moves, a step in many (Connolly, Higham & Mary 2021, doi 10.1137/20M1334796).

The noise of an element is a function of (seed, key of the tensor, step, place of the element in the logical tensor), so the same under any layout:
64 bits are mixed for each row (the finalizer of SplitMix64: Steele, Lea & Flood 2014, doi 10.1145/2714064.2660195), and of them and the column 32
for each element, by an xorshift-multiply hash ("lowbias32": Wellons 2018, nullprogram.com/blog/2018/07/31).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from lf.box import Box, shape
from lf.spec import Piece

CHUNK = 1 << 24  # elements whose noise is made at a time


@attrs.frozen
class Noise:
    """What the noise of one tensor depends on. `pieces`: where its elements lie in the logical tensors · `step`: a device scalar."""

    seed: int
    pieces: tuple[Piece, ...]
    step: Tensor


def chunks(noise: Noise | None, tensors: Sequence[Tensor]) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
    """(views of tensors of one shape, the noise of their elements: 32 bits each, int32), a part at a time; without noise all at once."""
    if noise is None:
        yield tuple(tensors), None
        return
    for piece in noise.pieces:
        views = [piece.view(x) for x in tensors]
        if not views[0].numel():
            continue
        rows = max(CHUNK * len(views[0]) // views[0].numel(), 1) if piece.shape else 1
        key = key_of(noise.seed, piece.key)
        for at in range(0, len(views[0]) if piece.shape else 1, rows):
            lo = piece.box[0][0] + at if piece.box else 0
            held = ((lo, min(lo + rows, piece.box[0][1])), *piece.box[1:]) if piece.box else ()
            yield tuple(x[at : at + rows] if piece.box else x for x in views), bits(key, noise.step, piece.shape, held)


def key_of(seed: int, name: str) -> int:
    """64 bits, as a signed number."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little", signed=True)


def bits(key: int, step: Tensor, logical: tuple[int, ...], held: Box) -> Tensor:
    """32 bits for each element of the box `held` of a tensor of shape `logical`: int32, on the device of `step`."""
    device, (*lead, last) = step.device, held or ((0, 1),)
    row = torch.zeros(1, dtype=torch.int64, device=device)  # the number of each row: all dims but the last
    for (lo, hi), n in zip(lead, logical):
        row = (row[:, None] * n + torch.arange(lo, hi, device=device)).flatten()
    row = _mixed64(row * -7046029254386353131 + (step * -4417276706812531889 + key))  # odd numbers: the golden ratio, and another
    column = torch.arange(*last, device=device) * 2654435761
    out = _low32(row)[:, None] ^ _low32(column)
    for shift, factor in ((16, 2146121005), (15, -2073254261)):
        out ^= (out >> shift) & ((1 << 32 - shift) - 1)  # int32 has no shift that fills up with zeros
        out *= factor
    out ^= (out >> 16) & 0xFFFF
    return out.view(shape(held))


def rounded(x: Tensor, noise: Tensor) -> Tensor:
    """x in bfloat16, by the low 16 bits of `noise`, int32. What bfloat16 can hold, zero among it, stays as it is."""
    cut = x.to(torch.float32).view(torch.int32) + (noise & 0xFFFF)
    return (cut >> 16).to(torch.int16).view(torch.bfloat16)


def _mixed64(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _low32(x: Tensor) -> Tensor:
    """The low 32 bits as int32."""
    low = x & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32)

"""Same seed, same logical model, under any layout.

A logical tensor is drawn in tiles of fixed size, each from a counter-based generator (Philox, Salmon et al. 2011) whose 128-bit key is a hash
of (seed, key of the tensor, place of the tile). A rank draws only the tiles that its box touches, on the CPU, in float32. torch's CPU
generator keeps 32 bits of a seed: among the million tiles of a 70B model about a hundred pairs would come out equal; hence numpy's.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import torch
from torch import Tensor

from lf import box as boxes
from lf.box import Box
from lf.spec import Init

TILE = 256  # rows and columns of a tile; leading dims (an expert stack) are tiles of 1


def generator(*key: int | str) -> np.random.Generator:
    """A generator that depends on nothing but the key."""
    digest = hashlib.blake2b("/".join(str(k) for k in key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def draw(seed: int, key: str, shape: tuple[int, ...], init: Init, box: Box, dtype: torch.dtype) -> Tensor:
    """`box` of the logical tensor `key` of `shape`: mean + std · N(0, 1), the same numbers whatever box they are drawn for."""
    held = boxes.shape(box)
    out = torch.full(held, init.mean, dtype=torch.float32)
    if init.std == 0 or not boxes.volume(box):
        return out.to(dtype)
    sides = [1] * (len(shape) - 2) + [TILE] * min(len(shape), 2)
    for at in itertools.product(*(range(lo // t, -(-hi // t)) for (lo, hi), t in zip(box, sides))):
        tile = tuple((i * t, min((i + 1) * t, n)) for i, t, n in zip(at, sides, shape))
        values = torch.from_numpy(generator(seed, key, *at).standard_normal(boxes.shape(tile), dtype=np.float32))
        common = boxes.intersect(tile, box)
        out[boxes.slices(common, box)] += init.std * values[boxes.slices(common, tile)]
    return out.to(dtype)

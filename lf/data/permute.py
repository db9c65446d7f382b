"""A pseudo-random permutation that holds nothing: any of its n places is computed when it is asked for.

A Feistel network (Luby and Rackoff 1988) whose halves count to a and b with a·b ≥ n, a ≈ b: each round adds to one half a keyed hash of the
other. What falls outside 0 … n - 1, fewer than one in √n, goes through it again until it is inside (Black and Rogaway 2002).
"""

from __future__ import annotations

import hashlib
import math
import struct

KEYS = struct.Struct("<12L")  # of the rounds: with 12 all orders of a few come about equally often, with 8 they do not
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # spreads a key over all 64 bits


def permuted(i: int, n: int, seed: int, what: str, number: int) -> int:
    """Where i is in the permutation of 0 … n - 1 that is keyed by (seed, what, number)."""
    keys = [key * GOLDEN for key in KEYS.unpack(_digest(seed, what, number, KEYS.size))]
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    while True:
        left, right = divmod(i, b)
        for first, second in zip(keys[::2], keys[1::2]):
            left = (left + _mixed(right + first)) % a
            right = (right + _mixed(left + second)) % b
        i = left * b + right
        if i < n:
            return i


def drawn(n: int, seed: int, what: str, number: int) -> int:
    """A number of 0 … n - 1 keyed by (seed, what, number)."""
    return int.from_bytes(_digest(seed, what, number, 32), "little") % n


def _digest(seed: int, what: str, number: int, size: int) -> bytes:
    return hashlib.blake2b(f"lf.data {what} {seed} {number}".encode(), digest_size=size).digest()


def _mixed(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of x changes about half of the result's."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)

"""Several sources of rows as one, in fixed proportions: any row of the blend is computed from its number, and nothing is kept."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from lf.data.files import DataError
from lf.data.permute import permuted
from lf.data.stream import Row, Rows

WINDOW = 2**20  # rows, at most
TOLERANCE = 1e-3  # of a weight, relative
MANY = 256  # sources, as the files of a folder: for more of them the smallest window is not looked for
FEWEST = 64  # rows of a source in the largest window, where one row more or less is still near its weight


def blend(parts: Sequence[tuple[float, Rows]], seed: int) -> Rows:
    """Rows of several sources, as often as their weights say: blend([(0.7, a), (0.3, b)], seed).

    Every window of W rows, beginning with row 0, has the same number of rows of each source, in an order keyed by (seed, window); W is the
    smallest number for which whole numbers agree with all weights within 0.1 % (10 for 0.7 and 0.3). Where none up to 2^20 does, or there are
    more than 256 sources, it is 2^20 and each has its share to one row. A source's own rows are taken by their numbers, none left out, none
    twice; within a window their order is that of the window. Weights need not add up to 1. Raises DataError when one is not a positive number,
    or has fewer than 64 of 2^20 rows and no W agrees."""
    numbers = window([weight for weight, _ in parts])
    firsts = [0, *np.cumsum(numbers).tolist()]
    size = firsts[-1]

    def row(k: int) -> Row:
        if k < 0:
            raise DataError(f"row {k}: rows are counted from 0")
        w, i = divmod(k, size)
        slot = permuted(i, size, seed, "blend", w)
        source = bisect_right(firsts, slot) - 1
        return parts[source][1](w * numbers[source] + slot - firsts[source])

    return row


def window(weights: Sequence[float]) -> list[int]:
    """How many rows of each source the smallest window has that agrees with the weights; their sum is the window."""
    if not weights:
        raise DataError("a blend needs at least one source")
    for i, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"weight {weight} of source {i + 1} of {len(weights)} must be a positive number; leave a source out to read none of it")
    shares = np.array(weights, np.float64) / math.fsum(weights)
    step = max(2**18 // len(shares), 1)
    smallest = int(1 / (shares.min() * (1 + TOLERANCE))) or 1  # smaller ones have no row for the smallest weight
    for begin in range(smallest, WINDOW + 1, step) if len(shares) <= MANY else ():
        sizes = np.arange(begin, min(begin + step, WINDOW + 1))
        wanted = sizes[:, None] * shares
        least, most = np.maximum(np.ceil(wanted * (1 - TOLERANCE)), 1), np.floor(wanted * (1 + TOLERANCE))
        fits = (least <= most).all(1) & (least.sum(1) <= sizes) & (sizes <= most.sum(1))
        if fits.any():
            i = int(fits.argmax())
            return _dealt(int(sizes[i]), wanted[i], least[i], most[i])
    wanted = WINDOW * shares
    if wanted.min() >= FEWEST:
        return _dealt(WINDOW, wanted, np.floor(wanted), np.ceil(wanted))
    i = int(shares.argmin())
    raise DataError(
        f"no {WINDOW} rows agree with all weights within {TOLERANCE:.1%}; the smallest, {weights[i]}, is {shares[i]:.2g} of them all: "
        "give it more, or leave it out"
    )


def _dealt(size: int, wanted: np.ndarray, least: np.ndarray, most: np.ndarray) -> list[int]:
    """Whole numbers that add up to `size`, each within its limits and as near as they allow to what is wanted."""
    numbers = np.clip(np.rint(wanted), least, most)
    while (missing := size - int(numbers.sum())) != 0:
        step = np.sign(missing)
        open_ = numbers < most if missing > 0 else numbers > least
        numbers[int(np.where(open_, step * (wanted - numbers), -np.inf).argmax())] += step
    return numbers.astype(int).tolist()

"""Rows: documents in a new order every epoch, one after another without end, cut every `seq_len` tokens, and the pieces dealt out anew.

The stream is the epochs in a row; its row k is tokens k·seq_len … (k+1)·seq_len, so it may run from one epoch into the next and nothing is
dropped. Neighbours in the stream come from one document, and a batch of neighbours would teach one text at a time: so the rows are shuffled
as well. All depends on (documents, seq_len, seed) alone: the number of rows consumed says where a run is, on any number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import attrs
import numpy as np

from lf.batch import IGNORE
from lf.data.documents import Documents
from lf.data.files import DataError


@attrs.frozen(eq=False)
class Row:
    """`seq_len` consecutive tokens of a stream.

        tokens  (seq_len,)  int64
        labels  (seq_len,)  int64   the next token of the same document, also across the row's end; IGNORE after its last
        starts  (D,)        int64   where documents begin; the first is 0: what a row's edge cuts off is a document of its own
    """

    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray


Rows = Callable[[int], Row]  # any source of rows: what blends and other formats provide


def rows(documents: Documents, seq_len: int, seed: int) -> Rows:
    """`rows(documents, seq_len, seed)(k)` is row k of the shuffled stream: random access.

    The stream is taken in windows of n rows, n the whole rows of an epoch, and each window is permuted with a key of its own."""
    in_order = stream(documents, seq_len, seed)
    n = max(len(documents.tokens) // seq_len, 1)

    @lru_cache(maxsize=2)
    def window(w: int) -> np.ndarray:
        return permutation(n, seed, "rows", w)

    def row(k: int) -> Row:
        w, i = divmod(k, n)
        return in_order(w * n + int(window(w)[i]) if k >= 0 else k)

    return row


def stream(documents: Documents, seq_len: int, seed: int) -> Rows:
    """Row k of the documents in the order of their epochs: random access, by a binary search in the epoch's order."""
    if seq_len < 1:
        raise DataError(f"seq_len={seq_len} must be at least 1")
    total = len(documents.tokens)
    lengths = np.diff(documents.offsets)

    # a window of shuffled rows lies in two epochs at most, and its last row may end in a third
    @lru_cache(maxsize=3)
    def epoch(e: int) -> tuple[np.ndarray, np.ndarray]:
        order = epoch_order(len(lengths), seed, e)
        return order, np.cumsum(lengths[order])  # where each document ends in the epoch

    def pieces(at: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Stream tokens at … stop as slices of the flat array, each with the end of its document."""
        while at < stop:
            e, place = divmod(at, total)
            order, ends = epoch(e)
            i = int(np.searchsorted(ends, place, side="right"))
            while at < stop and i < len(order):
                end = int(documents.offsets[order[i] + 1])
                begin = end - (int(ends[i]) - place)
                size = min(end - begin, stop - at)
                yield begin, begin + size, end
                at, place, i = at + size, place + size, i + 1

    def row(k: int) -> Row:
        if k < 0:
            raise DataError(f"row {k}: rows are counted from 0")
        tokens, labels = np.empty(seq_len, np.int64), np.full(seq_len, IGNORE, np.int64)
        starts, at = [], 0
        for begin, stop, end in pieces(k * seq_len, (k + 1) * seq_len):
            size, known = stop - begin, min(stop + 1, end) - begin - 1
            tokens[at : at + size] = documents.tokens[begin:stop]
            labels[at : at + known] = documents.tokens[begin + 1 : begin + 1 + known]
            starts.append(at)
            at += size
        return Row(tokens, labels, np.asarray(starts, np.int64))

    return row


def in_order(documents: Documents, seq_len: int) -> tuple[Rows, int]:
    """(rows, their number) with every token once, in the order of the file: what an evaluation reads. The last row is what is left."""
    if seq_len < 1:
        raise DataError(f"seq_len={seq_len} must be at least 1")
    tokens, offsets = documents.tokens, documents.offsets

    def row(k: int) -> Row:
        lo, hi = k * seq_len, min((k + 1) * seq_len, len(tokens))
        labels = np.append(tokens[lo + 1 : hi + 1], [IGNORE] * (hi == len(tokens))).astype(np.int64)
        ends = offsets[(offsets > lo) & (offsets <= hi)] - lo
        labels[ends - 1] = IGNORE
        return Row(np.asarray(tokens[lo:hi], np.int64), labels, np.append(0, ends[ends < hi - lo]).astype(np.int64))

    return row, -(-len(tokens) // seq_len)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n documents in an epoch, keyed by (seed, epoch)."""
    return permutation(n, seed, "order", epoch)


def permutation(n: int, seed: int, what: str, number: int) -> np.ndarray:
    """A permutation of n keyed by (seed, what, number).

    Sorted from the raw bits of Philox, which never change, where numpy's own shuffle may from one version to the next."""
    key = hashlib.blake2b(f"lf.data {what} {seed} {number}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n)
    return np.argsort(bits, kind="stable")

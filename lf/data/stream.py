"""Rows of tokens out of documents: any row of a shuffled stream without end, computed from its number; or every token once, in order.

An epoch takes the tokens as a circle, in the order of the file: from a place that is drawn anew for each epoch it cuts n = N // seq_len rows,
and deals them out in a permuted order. So rows begin at other places in every epoch, the N mod seq_len tokens that an epoch leaves out are
others each time, and a row may run over the end of the file to its beginning, where a new document begins. Documents with fewer tokens than
one row are read round until the row is full. All depends on (documents, seq_len, seed) alone and nothing is kept: the number of rows consumed
says where a run is, on any number of ranks, with a billion documents as with one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import attrs
import numpy as np

from lf.batch import IGNORE
from lf.data.files import DataError
from lf.data.indexed import Documents
from lf.data.permute import drawn, permuted


@attrs.frozen(eq=False)
class Row:
    """`seq_len` consecutive tokens.

        tokens  (seq_len,)  int64
        labels  (seq_len,)  int64   the next token of the same document, also across the row's end; IGNORE after its last
        starts  (D,)        int64   where documents begin; the first is 0: what a row's edge cuts off is a document of its own
    """

    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray


Rows = Callable[[int], Row]  # any source of rows: what blends and other formats provide


def rows(documents: Documents, seq_len: int, seed: int, joined: bool = False) -> Rows:
    """`rows(documents, seq_len, seed)(k)` is row k of the shuffled stream: random access.

    joined: documents are not kept apart, as in Megatron-LM without reset attention masks: attention and labels run over their borders.
    Raises DataError where no document has a second token: no token has a label then, and a loss of 0 would say nothing."""
    _possible(seq_len)
    _has_labels([documents], joined)
    total = len(documents.tokens)
    n = max(total // seq_len, 1)

    def row(k: int) -> Row:
        if k < 0:
            raise DataError(f"row {k}: rows are counted from 0")
        epoch, i = divmod(k, n)
        at = (drawn(total, seed, "rotation", epoch) + permuted(i, n, seed, "rows", epoch) * seq_len) % total
        parts, left = [], seq_len
        while left:
            stop = min(at + left, total)
            parts.append(_cut(documents, at, stop, joined))
            left, at = left - (stop - at), stop % total
        return parts[0] if len(parts) == 1 else _one(parts)

    return row


def in_order(documents: Documents | Sequence[Documents], seq_len: int, joined: bool = False) -> tuple[Rows, int]:
    """(rows, their number) with every token once, in the order of the file, of one file after another: what an evaluation reads.

    Every row has seq_len tokens: behind the last token of a file, and in any row after the last, stands padding, a document of its own without
    labels. So a step may take more rows than there are, and sums over labels stay those of the set. Raises DataError as `rows` does."""
    _possible(seq_len)
    files = [documents] if isinstance(documents, Documents) else list(documents)
    _has_labels(files, joined)
    firsts = np.cumsum([0] + [-(-len(d.tokens) // seq_len) for d in files]).tolist()  # the first row of each file

    def row(k: int) -> Row:
        if k < 0:
            raise DataError(f"row {k}: rows are counted from 0")
        parts, used = [], 0
        if k < firsts[-1]:
            file = bisect_right(firsts, k) - 1
            begin = (k - firsts[file]) * seq_len
            used = min(seq_len, len(files[file].tokens) - begin)
            parts.append(_cut(files[file], begin, begin + used, joined))
        if left := seq_len - used:
            parts.append(Row(np.zeros(left, np.int64), np.full(left, IGNORE, np.int64), np.zeros(1, np.int64)))
        return parts[0] if len(parts) == 1 else _one(parts)

    return row, firsts[-1]


def _cut(documents: Documents, begin: int, stop: int, joined: bool) -> Row:
    """Tokens begin … stop of the file."""
    following = documents.tokens[begin + 1 : stop + 1]
    labels = np.full(stop - begin, IGNORE, np.int64)
    labels[: len(following)] = following
    if joined:
        starts = np.zeros(1, np.int64)
    else:
        starts = documents.starts(begin, min(stop + 1, len(documents.tokens))) - begin
        labels[starts - 1] = IGNORE  # the last token of the document before
        starts = np.concatenate([[0], starts[: len(starts) - (len(starts) > 0 and starts[-1] == stop - begin)]])
    return Row(documents.tokens[begin:stop].astype(np.int64), labels, starts)


def _one(parts: list[Row]) -> Row:
    firsts = np.cumsum([0] + [len(p.tokens) for p in parts])
    tokens, labels = (np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "labels"))
    return Row(tokens, labels, np.concatenate([p.starts + first for p, first in zip(parts, firsts)]))


def _has_labels(files: Sequence[Documents], joined: bool) -> None:
    if files and not joined and all(map(_single, files)):
        names = " and ".join(str(d.prefix) for d in files[:3]) + " …" * (len(files) > 3)
        raise DataError(f"{names}: documents of one token, so no token has a next one to be learned; read over their borders with --joined")


def _single(d: Documents) -> bool:
    """Whether every document has one token, or none. The places are counted only where there are as many documents as tokens."""
    return len(d.tokens) <= len(d) and 1 + len(d.starts(0, len(d.tokens))) == len(d.tokens)


def _possible(seq_len: int) -> None:
    if not 1 <= seq_len < 2**31:  # where documents begin is an int32
        raise DataError(f"seq_len={seq_len} must be at least 1, and below {2**31}")

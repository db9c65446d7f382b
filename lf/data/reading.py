"""How files of records are read: what the readers of each format have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs

from lf.data.files import DataError

IDS = "input_ids"
LIMIT = 2**31 - 1  # bytes of one document
PIECE = 1 << 23  # bytes of a file that are one piece of work
RECORDS, CHARACTERS = 1024, 1 << 22  # read at once: enough for a tokenizer's threads, few enough for memory
ON_BAD = ("stop", "skip")


class BadRecord(DataError):
    """One record that is no document."""


class NoColumn(BadRecord):
    """A record without the column that is wanted."""


@attrs.frozen
class Reading:
    """How records become documents."""

    column: str = "text"  # or IDS: the documents are token ids already
    on_bad: str = "stop"  # at a bad record; or "skip" and count it
    vocab: int | None = None  # token ids must be below it

    def __attrs_post_init__(self) -> None:
        if self.on_bad not in ON_BAD:
            raise DataError(f"on_bad={self.on_bad!r}: there is {' and '.join(ON_BAD)}")


@attrs.frozen
class Piece:
    """Part of a file: lines that begin in bytes begin … end of JSONL, rows of a data set, row groups of Parquet; all of any other."""

    file: str
    kind: str
    begin: int
    end: int
    first: int  # rows before it, where they are known
    size: int  # bytes on disk, about


def called(value: Any) -> str:
    return "null" if value is None else f"{value!r}" if isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"


Values = Iterator[tuple[Callable[[int], int], list[Any], int]]  # number of the i-th value in its piece, values, bytes

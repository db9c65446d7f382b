"""Files → documents: one text file, one line of JSONL, one row of Parquet or of a saved data set is one document.

Files of any size are cut into pieces that can be read apart, and a piece is read a little at a time: nothing is held in memory. A document is a
text, or token ids as they are where the records of a source have a column `input_ids`. A bad record is one error with its file and line.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import numpy as np

from lf.data import tables
from lf.data.files import DataError
from lf.data.reading import CHARACTERS, IDS, LIMIT, PIECE, RECORDS, BadRecord, NoColumn, Piece, Reading, Values, called
from lf.data.sources import kind


@attrs.frozen
class Part:
    """Some documents of a piece: texts, or arrays of token ids."""

    documents: list[Any]
    bad: int
    read: int  # bytes


def pieces(files: Sequence[str]) -> list[Piece]:
    """The files in order, large ones in pieces."""
    return [piece for file in files for piece in _PIECES.get(kind(file), _whole)(file)]


def read(piece: Piece, how: Reading) -> Iterator[Part]:
    """The documents of a piece. Raises DataError with file and line or row at a bad record, unless they are skipped and counted."""
    bad = 0
    for number, values, size in _READERS[piece.kind](piece, how):
        documents = []
        for i, value in enumerate(values):
            try:
                documents.append(_ids(value, how.vocab) if how.column == IDS else _text(value, how.column))
            except BadRecord as error:
                if how.on_bad == "stop":
                    raise DataError(f"{_place(piece, number(i))}: {error}; mend it, or skip and count such records with --on-bad skip") from None
                bad += 1
        yield Part(documents, bad, size)
        bad = 0


def has_ids(files: Sequence[str]) -> bool:
    """Whether these are tokens already: the first record of the first file that has columns decides."""
    file = next((f for f in files if kind(f) != "text"), None)
    if file is None:
        return False
    if kind(file) == "jsonl":
        for _, values, _ in _jsonl(Piece(file, "jsonl", 0, os.path.getsize(file), 0, 0), Reading(IDS)):
            for value in values:
                if not isinstance(value, BadRecord):
                    return True
                if isinstance(value, NoColumn):
                    return False
        return False
    return IDS in (tables.parquet_file(file).schema_arrow if kind(file) == "parquet" else tables.saved_dataset(file)[:0].schema).names


def fingerprint_of(files: Sequence[str], what: str) -> str:
    """Of what files hold, not of names and dates: a copied data set is the same, an edited one is not. `what` is made of it counts, too.

    Every byte is read, by several threads. Much larger than the text of one machine is better tokenized once, by scripts/tokenize.py."""
    blocks = []
    for file in files:
        inside = sorted(os.path.join(file, name) for name in os.listdir(file) if name.endswith(".arrow")) if os.path.isdir(file) else [file]
        for path in inside:
            size = os.path.getsize(path)
            blocks += [(path, begin, f"{kind(file)} {size} {begin}") for begin in range(0, size or 1, 1 << 26)]
    digest = hashlib.blake2b(what.encode(), digest_size=16)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for part in pool.map(_block, blocks):
            digest.update(part)
    return digest.hexdigest()


def _block(block: tuple[str, int, str]) -> bytes:
    path, begin, what = block
    with open(path, "rb") as file:
        file.seek(begin)
        return hashlib.blake2b(what.encode() + b"\n" + file.read(1 << 26), digest_size=16).digest()


# documents


def _text(value: Any, column: str) -> str:
    if isinstance(value, BadRecord):
        raise value
    if not isinstance(value, str):
        raise BadRecord(f"{column} is {called(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(f"{column} is no valid text: {error}") from None
    return value


def _ids(value: Any, vocab: int | None) -> np.ndarray:
    if isinstance(value, BadRecord):
        raise value
    limit = LIMIT if vocab is None else vocab
    if isinstance(value, list):
        if wrong := set(map(type, value)) - {int}:
            raise BadRecord(f"{IDS} has {called(next(v for v in value if type(v) in wrong))}, not whole numbers alone")
        least, most = (min(value), max(value)) if value else (0, 0)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu":
            raise BadRecord(f"{IDS} are {value.dtype}, not whole numbers")
        least, most = (int(value.min()), int(value.max())) if len(value) else (0, 0)
    else:
        raise BadRecord(f"{IDS} is {called(value)}, not a list of token ids")
    if least < 0 or most >= limit:
        raise BadRecord(f"{IDS} has id {least if least < 0 else most}, outside 0 … {limit - 1}, the vocabulary")
    return np.asarray(value, np.int32)


# files of one document


def _whole(file: str) -> list[Piece]:
    return [Piece(file, kind(file), 0, 0, 0, os.path.getsize(file))]


def _text_file(piece: Piece, how: Reading) -> Values:
    if how.column == IDS:
        raise DataError(f"{piece.file} is a text file among files with {IDS}; give it apart from them")
    if piece.size > LIMIT:
        raise DataError(f"{piece.file} has {piece.size} bytes, over the limit of {LIMIT} for one document; split it, or make it JSONL")
    with open(piece.file, "rb") as file:
        content = file.read()
    value: Any
    try:
        value = content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        value = BadRecord(f"not UTF-8 at byte {error.start} ({error.reason}); convert it, for example with iconv -t utf-8")
    yield (lambda _: -1), [value], len(content)


# lines of JSON


def _line_pieces(file: str) -> list[Piece]:
    size = os.path.getsize(file)
    if not file.lower().endswith((".jsonl", ".json")):  # compressed: read from the beginning or not at all
        return [Piece(file, "jsonl", 0, LIMIT**2, 0, size)]
    return [Piece(file, "jsonl", at, min(at + PIECE, size), 0, min(PIECE, size - at)) for at in range(0, size, PIECE)]


def _jsonl(piece: Piece, how: Reading) -> Values:
    first, values, size, told = 0, [], 0, 0
    numbers: list[int] = []
    try:
        with open(piece.file, "rb") as raw, _lines_of(raw, piece.file) as file:
            if piece.begin:  # a line that begins before the piece is of the piece before
                file.seek(piece.begin - 1)
                _skip_line(file)
            position = file.tell() if piece.begin else 0
            while position < piece.end and (line := file.readline(LIMIT + 1)):
                if len(line) > LIMIT:
                    raise DataError(f"{_place(piece, first)}: a line of more than {LIMIT} bytes; is it JSONL, one record a line?")
                position += len(line)
                if first == 0 and not piece.begin:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line and not line.isspace():
                    numbers.append(first)
                    values.append(_parsed(line, how.column))
                    size += len(line)
                first += 1
                if len(values) >= RECORDS or size >= CHARACTERS:
                    now = raw.tell() if piece.end > piece.begin + piece.size else position - piece.begin
                    yield numbers.__getitem__, values, now - told
                    told, numbers, values, size = now, [], [], 0
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{piece.file} cannot be read to its end after line {first}: {error}") from error
    yield numbers.__getitem__, values, max(piece.size - told, 0)


def _lines_of(raw: Any, path: str) -> Any:
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.lower().endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw


def _skip_line(file: Any) -> None:
    while (part := file.readline(PIECE)) and not part.endswith(b"\n"):
        pass


def _parsed(line: bytes, column: str) -> Any:
    """The column's value, or why there is none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start} of the line ({error.reason})")
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not JSON ({error})")
    if not isinstance(record, dict):
        return BadRecord(f"is {called(record)}, not an object with named fields; JSONL has one record a line")
    if column not in record:
        return NoColumn(f"has no column {column!r}; it has {', '.join(record) or 'none'}")
    return record[column]


_PIECES = {"jsonl": _line_pieces, "parquet": tables.row_groups, "dataset": tables.row_ranges}
_READERS = {"text": _text_file, "jsonl": _jsonl, "parquet": tables.read_parquet, "dataset": tables.read_saved}


def _place(piece: Piece, number: int) -> str:
    """Where a record is: lines and rows are counted from 1, as editors count them."""
    if piece.kind == "text":
        return piece.file
    if piece.kind != "jsonl":
        return f"{piece.file}, row {piece.first + number + 1}"
    before, left, part = 0, piece.begin, b"\n"
    with open(piece.file, "rb") as file:  # lines are counted when they are wanted, and not for every piece
        while left and (part := file.read(min(left, PIECE))):
            before, left = before + part.count(b"\n"), left - len(part)
    before += not part.endswith(b"\n")  # the line that the piece begins in is of the piece before
    return f"{piece.file}, line {before + number + 1}"

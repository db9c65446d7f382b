"""Rows of Parquet files, and of data sets that datasets has saved: one row, one document."""

from __future__ import annotations

import os
from functools import partial
from operator import add
from typing import TYPE_CHECKING, Any

from lf.data.files import DataError
from lf.data.reading import IDS, PIECE, RECORDS, BadRecord, Piece, Reading, Values

if TYPE_CHECKING:
    import pyarrow


def parquet_file(file: str) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def row_groups(file: str) -> list[Piece]:
    about, first, found = parquet_file(file).metadata, 0, []
    for i in range(about.num_row_groups):
        group = about.row_group(i)
        found.append(Piece(file, "parquet", i, i + 1, first, group.total_byte_size))
        first += group.num_rows
    return found


def read_parquet(piece: Piece, how: Reading) -> Values:
    import pyarrow

    with parquet_file(piece.file) as file:
        _check_column(file.schema_arrow, how.column, piece.file)
        rows, first = max(file.metadata.row_group(piece.begin).num_rows, 1), 0
        try:
            for batch in file.iter_batches(RECORDS, row_groups=[piece.begin], columns=[how.column]):
                yield partial(add, first), _cells(batch.column(0)), piece.size * len(batch) // rows
                first += len(batch)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{piece.file} cannot be read after row {piece.first + first}: {error}") from error


def saved_dataset(folder: str) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(folder).with_format("arrow")
    except Exception as error:  # datasets raises whatever its files make it raise
        raise DataError(f"{folder} cannot be read as a data set that datasets saved: {error}") from error


def row_ranges(folder: str) -> list[Piece]:
    rows = len(data := saved_dataset(folder))
    each = max(RECORDS, rows * PIECE // max(data.data.nbytes, 1))
    size = sum(entry.stat().st_size for entry in os.scandir(folder))
    return [Piece(folder, "dataset", at, min(at + each, rows), at, size * min(each, rows - at) // rows) for at in range(0, rows, each)]


def read_saved(piece: Piece, how: Reading) -> Values:
    data = saved_dataset(piece.file)
    _check_column(data[:0].schema, how.column, piece.file)
    data = data.select_columns([how.column])
    for at in range(piece.begin, piece.end, RECORDS):
        table = data[at : min(at + RECORDS, piece.end)]
        yield partial(add, at - piece.begin), _cells(table.column(0).combine_chunks()), piece.size * len(table) // (piece.end - piece.begin)


def _check_column(schema: pyarrow.Schema, column: str, file: str) -> None:
    """The columns are the file's, so a wrong one is no fault of a record that could be skipped."""
    from pyarrow import types

    if column not in schema.names:
        raise DataError(f"{file} has no column {column!r}; it has {', '.join(schema.names)}")
    found = schema.field(column).type
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if column == IDS and not (any(is_list(found) for is_list in lists) and types.is_integer(found.value_type)):
        raise DataError(f"{file}: column {IDS} is {found}, not lists of whole numbers")
    if column != IDS and not (types.is_string(found) or types.is_large_string(found)):
        raise DataError(f"{file}: column {column} is {found}, not text")


def _cells(column: pyarrow.Array) -> list[Any]:
    """Texts, or arrays of ids; None where there is null."""
    if hasattr(column, "chunks"):
        return [cell for chunk in column.chunks for cell in _cells(chunk)]
    if hasattr(column.type, "value_type"):
        return [None if not cell.is_valid else cell.as_py() if cell.values.null_count else cell.values.to_numpy() for cell in column]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(cell) for cell in column]


def _decoded(cell: pyarrow.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start} ({error.reason})")

"""Text files → a dataset with one column, `text`, one document a file."""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lf.data.files import DataError

if TYPE_CHECKING:
    from datasets import Dataset

LIMIT = 2**31 - 1  # bytes of one string in an Arrow array with 32-bit offsets
Path = str | os.PathLike[str]


def find_files(paths: Path | Sequence[Path], match: str = "*.txt") -> list[str]:
    """Absolute paths of the files that `paths` name, sorted, so that their order is no matter of the file system.

    A path is a file, a glob, or a folder, which is read as the glob `folder/**/match`: hidden files are left out as in every glob. A file
    that several paths or links reach is read once. Raises DataError that lists every path that is missing or matches nothing."""
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise DataError("no text was named: give at least one file, folder or glob")
    found: dict[str, str] = {}
    wrong = []
    for name in names:
        path = os.path.abspath(os.path.expanduser(name))
        hits = _expand(path, match)
        found |= {hit: os.path.realpath(hit) for hit in hits}
        if os.path.isdir(path) and not hits:
            wrong.append(f"folder {path} has no file that matches {match!r}; give match=, such as match='*.md'")
        elif not hits:
            wrong.append(f"glob {path} matches no file" if glob.has_magic(path) else f"{path} does not exist")
    if wrong:
        raise DataError("; ".join(wrong))
    first: dict[str, str] = {}
    for hit in sorted(found):
        first.setdefault(found[hit], hit)
    return list(first.values())


def read_text(
    paths: Path | Sequence[Path], cache_dir: Path, match: str = "*.txt", say: Callable[[str], object] = print, progress: bool = False
) -> Dataset:
    """The files that `find_files` finds as a dataset with a column `text`: one document a file, in the order of their paths.

    Files are UTF-8; line ends are read as \\n. Empty files hold no token and are left out, with their number said. The dataset is
    memory-mapped from `cache_dir`, where a second call with unchanged files finds it. Raises DataError that lists the files that
    are not UTF-8 or too large."""
    files, empty, wrong = [], 0, []
    for file in find_files(paths, match):
        size = os.path.getsize(file)
        fault = f"{size} bytes, over the limit of {LIMIT} for one document; split it" if size > LIMIT else _not_utf8(file)
        if fault:
            wrong.append(f"{file}: {fault}")
        elif size:
            files.append(file)
        else:
            empty += 1
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"{len(wrong)} of the files cannot be read as text: {'; '.join(wrong[:5])}{more}")
    if not files:
        raise DataError(f"all {empty} files are empty, first {find_files(paths, match)[0]}")
    if empty:
        say(f"{empty} of {empty + len(files)} files are empty and were left out")

    from datasets import Dataset

    with _progress_bars(progress):
        # the builder takes its file names as globs
        dataset = Dataset.from_text([glob.escape(f) for f in files], cache_dir=str(cache_dir), sample_by="document")
    if len(dataset) != len(files):
        raise DataError(f"{len(files)} files gave {len(dataset)} documents: is one of them an archive? Unpack it first")
    return dataset


def texts(documents: Dataset | Sequence[str]) -> Iterator[str]:
    """The documents one by one, of a dataset with a column `text` or of plain strings. Raises DataError on what is not text."""
    columns = getattr(documents, "column_names", None)
    if columns is not None and "text" not in columns:
        raise DataError(f"the dataset has columns {columns} but none named 'text'; use dataset.rename_column(…, 'text')")
    if isinstance(documents, str):
        raise DataError("documents are a dataset or a list of strings, not one string; wrap it in a list")
    # several rows a read: decoding Arrow one row at a time costs more than the hash of the row
    rows = documents if columns is None else (text for part in documents.iter(batch_size=64) for text in part["text"])  # type: ignore[union-attr]
    for i, text in enumerate(rows):
        if not isinstance(text, str):
            raise DataError(f"document {i} is {type(text).__name__}, not text; filter or convert it first")
        yield text


def _expand(path: str, match: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return [hit for hit in glob.iglob(os.path.join(glob.escape(path), "**", match), recursive=True) if os.path.isfile(hit)]
    hits = glob.iglob(path, recursive=True) if glob.has_magic(path) else ()
    return [file for hit in hits for file in _expand(os.path.abspath(hit), match)]


def _not_utf8(file: str) -> str:
    """Why the file is not UTF-8, or ''. Reads it in pieces: a document may be larger than what memory should hold twice."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with open(file, "rb") as f:
        while True:
            piece = f.read(1 << 22)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                return f"not UTF-8 at byte {at - pending + error.start} ({error.reason}); convert it, for example with iconv -t utf-8"
            at += len(piece)
            if not piece:
                return ""


@contextmanager
def _progress_bars(on: bool) -> Iterator[None]:
    """datasets keeps this switch in a global: put it back as it was."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    off = are_progress_bars_disabled()
    (enable_progress_bars if on else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if off else enable_progress_bars)()

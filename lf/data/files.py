"""Files and folders that are whole or not there: a result is written beside its place and renamed into it when it is finished."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class DataError(ValueError):
    """Text, records, a tokenizer or a data setting that cannot be used as it is."""


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """`with new_folder(f) as part:` write into `part`; it becomes `f` when the block ends well and is removed when it raises.

    Raises FileExistsError when `f` is there already with something in it, also when another process finished it meanwhile."""
    final = Path(folder).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(f"{final} exists; remove it or name another folder")
    with _part(final) as part:
        yield part
        try:
            part.rename(final)
        except OSError as error:
            if final.exists():
                raise FileExistsError(f"{final} was made by another process in the meantime") from error
            raise


@contextmanager
def new_files(prefix: str | os.PathLike[str], suffixes: Sequence[str]) -> Iterator[Path]:
    """`with new_files(p, (".a", ".b")) as part:` write part.a and part.b; they become p.a and p.b when the block ends well, in this order: who
    finds the last finds all. Raises DataError when one of them is there already: nothing is overwritten."""
    final = Path(prefix).absolute()

    def refuse() -> None:
        if there := [name for s in suffixes if os.path.lexists(name := f"{final}{s}")]:
            raise DataError(f"{', '.join(there)} exists already; remove it or give another prefix")

    refuse()
    with _part(final) as part:
        yield part / final.name
        refuse()  # another process may have finished meanwhile
        for s in suffixes:
            os.rename(f"{part / final.name}{s}", f"{final}{s}")


@contextmanager
def _part(final: Path) -> Iterator[Path]:
    """A folder beside `final` to write into, gone at the end."""
    part = final.parent / f".{final.name}.part-{secrets.token_hex(4)}"
    try:
        part.mkdir(parents=True)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)

"""Folders that are whole or not there: a result is written beside its place and renamed into it when it is finished."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataError(ValueError):
    """Text, a tokenizer or a data setting that cannot be used as it is."""


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """`with new_folder(f) as part:` write into `part`; it becomes `f` when the block ends well and is removed when it raises.

    Raises FileExistsError when `f` is there already with something in it, also when another process finished it meanwhile."""
    final = Path(folder).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(f"{final} exists; remove it or name another folder")
    part = final.parent / f".{final.name}.part-{secrets.token_hex(4)}"
    part.mkdir(parents=True)
    try:
        yield part
        try:
            part.rename(final)
        except OSError as error:
            if final.exists():
                raise FileExistsError(f"{final} was made by another process in the meantime") from error
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)

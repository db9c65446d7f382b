"""Data: files → documents of tokens → a stream of rows → the batches of a step. A run's place in it is one integer, the rows consumed.

Names are loaded when first used: a process that tokenizes needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; the table below is what runs
    from lf.data.batches import microbatch, microbatches, pack, step_batches
    from lf.data.blends import blend
    from lf.data.bpe import train_bpe
    from lf.data.files import DataError, new_files, new_folder
    from lf.data.indexed import SUFFIXES, Documents, Writer, open_documents, split
    from lf.data.prepared import Corpus, look, percent, prepare
    from lf.data.reading import Reading
    from lf.data.records import has_ids
    from lf.data.sources import Source, find_files, find_sources
    from lf.data.stream import Row, Rows, in_order, rows
    from lf.data.tokenizer import Tokenizer, load_tokenizer
    from lf.data.tokenizing import Counts, Recipe, left_out, tokenize

_NAMES = {
    "batches": ("microbatch", "microbatches", "pack", "step_batches"),
    "blends": ("blend",),
    "bpe": ("train_bpe",),
    "files": ("DataError", "new_files", "new_folder"),
    "indexed": ("SUFFIXES", "Documents", "Writer", "open_documents", "split"),
    "prepared": ("Corpus", "look", "percent", "prepare"),
    "reading": ("Reading",),
    "records": ("has_ids",),
    "sources": ("Source", "find_files", "find_sources"),
    "stream": ("Row", "Rows", "in_order", "rows"),
    "tokenizer": ("Tokenizer", "load_tokenizer"),
    "tokenizing": ("Counts", "Recipe", "left_out", "tokenize"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lf.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lf.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

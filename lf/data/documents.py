"""Documents are token ids on disk: one flat array, and where each document begins in it.

    tokens   (N,)    int32   all documents one after another, each ended by eos
    offsets  (D+1,)  int64   document d is tokens[offsets[d]:offsets[d+1]]
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import attrs
import numpy as np

from lf.data.files import DataError, new_folder
from lf.data.text import texts
from lf.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 1  # of the folder; raise it when what is written changes


@attrs.frozen(eq=False)
class Documents:
    """Tokenized documents, memory-mapped."""

    tokens: np.ndarray = attrs.field(repr=False)
    offsets: np.ndarray = attrs.field(repr=False)
    vocab_size: int  # the tokenizer's: every id is below it
    eos: int
    fingerprint: str  # of text, order and tokenizer: a run that resumes compares it
    folder: Path

    def __len__(self) -> int:
        return len(self.offsets) - 1


def tokenize(
    documents: Dataset | Sequence[str],
    tokenizer: Tokenizer,
    cache: str | os.PathLike[str],
    progress: Callable[[int, int], object] | None = None,
    say: Callable[[str], object] = print,
) -> Documents:
    """Tokenize once into `cache/<fingerprint>`, where the same text and tokenizer are found again at once.

    Call it on one rank, give the others `.folder` and let them `open_documents` it. Documents without a token are left out, with their
    number said. `progress(documents done, documents)` is called after each batch. Raises DataError when no token is left."""
    fingerprint = fingerprint_of(documents, f"lf documents {FORMAT} {tokenizer.fingerprint}")
    folder = Path(cache) / fingerprint
    if folder.is_dir():
        return open_documents(folder)
    try:
        with new_folder(folder) as part:
            lengths, empty = [], 0
            with open(part / "tokens.npy", "wb") as file:
                _header(file, np.dtype(np.int32), 0)
                for batch in _batches(texts(documents)):
                    encoded = [ids for ids in tokenizer.encode(batch) if ids]
                    empty += len(batch) - len(encoded)
                    for ids in encoded:
                        ids.append(tokenizer.eos)
                        file.write(np.asarray(ids, "<i4").tobytes())
                        lengths.append(len(ids))
                    if progress:
                        progress(len(lengths) + empty, len(documents))
                if not lengths:
                    raise DataError(f"none of the {empty} documents has a token")
                file.seek(0)
                _header(file, np.dtype(np.int32), sum(lengths))
            np.save(part / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
            about = {
                "format": FORMAT,
                "fingerprint": fingerprint,
                "documents": len(lengths),
                "tokens": sum(lengths),
                "vocab_size": tokenizer.vocab_size,
                "eos": tokenizer.eos,
                "tokenizer": tokenizer.fingerprint,
            }
            (part / "documents.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            if empty:
                say(f"{empty} of {empty + len(lengths)} documents have no token and were left out")
    except FileExistsError:
        pass  # another process was quicker: its folder has the same content, or open_documents says what is wrong with it
    return open_documents(folder)


def open_documents(folder: str | os.PathLike[str]) -> Documents:
    """Map the documents that `tokenize` wrote. Raises DataError when the folder is none of those or not whole."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise DataError(f"{folder} has format {about['format']}, this version of lf reads {FORMAT}; tokenize again")
        tokens, offsets = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in ("tokens.npy", "offsets.npy"))
        found = (len(offsets) - 1, len(tokens), int(offsets[-1]))
        if found != (about["documents"], about["tokens"], about["tokens"]):
            raise ValueError(f"documents.json says {about['documents']} documents of {about['tokens']} tokens, the arrays hold {found[:2]}")
        return Documents(tokens, offsets, about["vocab_size"], about["eos"], about["fingerprint"], folder)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{folder} is no whole folder of tokenized documents ({error}); remove it and tokenize again") from error


def fingerprint_of(documents: Dataset | Sequence[str], what: str) -> str:
    """Of what was read, not of names and dates: a copied data set is the same, an edited one is not. `what` is made of it counts, too."""
    digest = hashlib.blake2b(what.encode(), digest_size=16)
    for i, text in enumerate(texts(documents)):
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"document {i} is no valid text: {error}; mend it with text.encode('utf-8', 'replace').decode()") from error
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _batches(texts: Iterator[str], documents: int = 1024, characters: int = 1 << 22) -> Iterator[list[str]]:
    """Enough for the tokenizer's threads, few enough for memory."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) >= documents or size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """numpy leaves room in the header for the first dimension to grow, so it can be written again when the length is known."""
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (length,)})

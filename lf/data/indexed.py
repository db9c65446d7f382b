"""Documents of token ids on disk, in the indexed format of Megatron-LM: PREFIX.bin and PREFIX.idx, mapped and never loaded.

    PREFIX.bin   all tokens one after another, little-endian, without a header
    PREFIX.idx   9 bytes   b"MMIDIDX\\0\\0"
                 uint64    version, 1
                 uint8     dtype of the tokens: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6 and 7 are floating-point)
                 uint64    S, the number of sequences
                 uint64    D + 1, one more than the number of documents
                 int32     lengths (S,): tokens of each sequence
                 int64     pointers (S,): where each sequence begins in .bin, in bytes
                 int64     document_indices (D + 1,): the first sequence of each document, and S

A document is a run of sequences, mostly one. What lf writes has PREFIX.json beside it: the tokenizer's vocabulary, its end of document, and a
fingerprint of all tokens. The arrays of an index stand at odd addresses, where numpy's own search would copy them whole: `bisect` does not.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from lf.data.files import DataError

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, S, D + 1
CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FORMAT = 2  # of PREFIX.json
LONGEST = 2**31 - 1  # tokens of one sequence: lengths are int32
SUFFIXES = (".bin", ".json", ".idx")


@attrs.frozen(eq=False)
class Documents:
    """Tokenized documents, memory-mapped: opening takes no longer and no more memory with a billion of them than with one."""

    tokens: np.ndarray = attrs.field(repr=False)  # (N,) all documents one after another, in the file's integer type
    pointers: np.ndarray = attrs.field(repr=False)  # (S,) int64 where each sequence of the file begins, in bytes
    document_indices: np.ndarray = attrs.field(repr=False)  # (D+1,) int64 the first sequence of each document, and the end of the last
    prefix: Path
    fingerprint: str  # of the tokens: a run that resumes compares it
    vocab_size: int | None = None  # every id is below it; None where the file does not say
    eos: int | None = None  # the token that ends a document; None where the file does not say
    tokenizer: str | None = None  # the fingerprint of the one that made them; None where the file does not say, or was made from ids
    base: int = 0  # tokens of the file before the first of these

    def __len__(self) -> int:
        return len(self.document_indices) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """The tokens of document i."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.tokens[self.start(i) : self.start(i + 1)]

    def start(self, i: int) -> int:
        """Where document i begins in `tokens`; start(len(self)) is their number."""
        sequence = int(self.document_indices[i])
        if i == len(self) or sequence == len(self.pointers):
            return len(self.tokens)
        return int(self.pointers[sequence]) // self.tokens.itemsize - self.base

    def at(self, token: int) -> int:
        """The document that holds tokens[token]: two binary searches in the mapped index."""
        sequence = bisect_right(self.pointers, (self.base + token) * self.tokens.itemsize) - 1
        return bisect_right(self.document_indices, sequence) - 1

    def starts(self, begin: int, stop: int) -> np.ndarray:
        """(n,) int64: the places begin < p < stop of `tokens` at which a document begins, each once; stop ≤ N."""
        if stop - begin < 2:
            return np.empty(0, np.int64)
        sequences = np.array(self.document_indices[self.at(begin) + 1 : self.at(stop - 1) + 1])
        if not len(sequences):
            return sequences
        first = sequences[0]
        places = np.array(self.pointers[first : sequences[-1] + 1])[sequences - first] // self.tokens.itemsize - self.base
        return places[np.diff(places, prepend=-1) > 0]  # an empty document begins where the next one does

    def part(self, first: int, last: int) -> Documents:
        """Documents first … last - 1 as documents of their own: a view."""
        if not 0 <= first < last <= len(self):
            raise DataError(f"documents {first} … {last} of {self.prefix}: it has {len(self)}, and a part needs at least one")
        begin, stop = self.start(first), self.start(last)
        if begin == stop:
            raise DataError(f"documents {first} … {last} of {self.prefix} have no token")
        return attrs.evolve(
            self,
            tokens=self.tokens[begin:stop],
            document_indices=self.document_indices[first : last + 1],
            base=self.base + begin,
            fingerprint=f"{self.fingerprint}[{first}:{last}]",
        )


def split(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    """(training, validation): the last `fraction` of the documents, rounded to whole ones, at least one, are for validation. Views of a file."""
    if not 0 < fraction < 1:
        raise DataError(f"a validation fraction of {fraction} must lie between 0 and 1")
    if len(documents) < 2:
        raise DataError(f"{documents.prefix} has {len(documents)} document: training and validation need at least one each; give a set of its own")
    last = len(documents) - min(max(round(fraction * len(documents)), 1), len(documents) - 1)
    return documents.part(0, last), documents.part(last, len(documents))


def open_documents(prefix: str | os.PathLike[str]) -> Documents:
    """Map PREFIX.bin and PREFIX.idx, written by lf or by Megatron-LM; `prefix` may also be either file. Nothing is read but the header.

    Raises DataError when a file is missing, of another format, not as long as its header says, or at odds with itself (of a long index some blocks
    are looked at). Without PREFIX.json the fingerprint is that of
    both sizes, the header and 64 blocks of 4096 bytes, evenly spaced, of each file: reading terabytes to begin a run is no way to begin it."""
    path = stem(prefix)
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(f"{path}{suffix}"):
            raise DataError(f"{path}{suffix} does not exist: indexed documents are two files, {path.name}.bin and {path.name}.idx")
    size = os.path.getsize(f"{path}.bin")
    try:
        index = _mapped(f"{path}.idx")
        magic, version, code, sequences, borders = HEADER.unpack_from(index)
        if magic != MAGIC:
            raise DataError(f"{path}.idx begins with {magic!r}, not {MAGIC!r}: it is no index of Megatron-LM (of its older formats neither)")
        if version != VERSION:
            raise DataError(f"{path}.idx has version {version}; lf reads version {VERSION}")
        if code not in CODES:
            raise DataError(f"{path}.idx has tokens of type {code}; token ids are of type {', '.join(map(str, CODES))}")
        dtype = np.dtype(CODES[code]).newbyteorder("<")
        wanted = HEADER.size + 12 * sequences + 8 * borders
        if len(index) == wanted + sequences and sequences:
            raise DataError(f"{path}.idx has a mode for each sequence: it is a multimodal data set; lf reads text alone")
        if len(index) != wanted:
            raise DataError(f"{path}.idx has {len(index)} bytes; {sequences} sequences and {borders - 1} documents take {wanted}: it is not whole")
        if not size or not sequences:
            raise DataError(f"{path}.bin has no tokens")
        lengths, pointers, documents = (
            np.frombuffer(index, kind, count, offset)
            for kind, count, offset in (
                ("<i4", sequences, HEADER.size),
                ("<i8", sequences, HEADER.size + 4 * sequences),
                ("<i8", borders, HEADER.size + 12 * sequences),
            )
        )
        end = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
        if int(pointers[0]) or end != size:
            raise DataError(f"{path}.bin has {size} bytes, its index says {int(pointers[0])} to {end}: one of them is not whole, or of another set")
        if borders < 2 or int(documents[0]) or int(documents[-1]) != sequences:
            said = f"{int(documents[0])} … {int(documents[-1])}" if borders else "none"
            raise DataError(f"{path}.idx has {sequences} sequences and documents of sequences {said}; end each document when you write it")
        if fault := _fault(lengths, pointers, documents, dtype.itemsize):
            raise DataError(f"{path}.idx {fault}: it was damaged, or written wrongly")
        tokens = np.frombuffer(_mapped(f"{path}.bin"), dtype)
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}.idx and {path}.bin cannot be read: {error}") from error
    about = _about(path, borders - 1, len(tokens))
    if about is None:
        return Documents(tokens, pointers, documents, path, sampled(path))
    return Documents(tokens, pointers, documents, path, about["fingerprint"], about["vocab_size"], about["eos"], about["tokenizer"])


def _fault(lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, itemsize: int) -> str:
    """What is wrong inside an index, or ''; of a long one some blocks are looked at."""
    for begin, stop in blocks(len(lengths)):
        sizes, places = lengths[begin:stop].astype(np.int64) * itemsize, pointers[begin : stop + 1]
        wrong = sizes < 0
        wrong[: len(places) - 1] |= np.diff(places) != sizes[: len(places) - 1]
        if wrong.any():
            i = begin + int(wrong.argmax())
            return f"has sequence {i} of {lengths[i]} tokens at byte {pointers[i]}, and the next one not right behind it"
    for begin, stop in blocks(len(documents)):
        if (wrong := np.diff(documents[begin : stop + 1]) < 0).any():
            i = begin + int(wrong.argmax())
            return f"has document {i} from sequence {documents[i]} to {documents[i + 1]}, backwards"
    return ""


def blocks(n: int, size: int = 4096, most: int = 8) -> list[tuple[int, int]]:
    """Ranges of 0 … n: all of it in steps, where so many blocks hold it, else so many evenly spaced."""
    if n <= size * most:
        return [(at, min(at + size, n)) for at in range(0, n, size)]
    return [(at, at + size) for at in ((n - size) * i // (most - 1) for i in range(most))]


def stem(prefix: str | os.PathLike[str]) -> Path:
    """PREFIX of PREFIX, PREFIX.bin and PREFIX.idx."""
    path = Path(prefix)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def sampled(path: Path, blocks: int = 64, block: int = 4096) -> str:
    """A fingerprint of both files that reads 64 blocks of each."""
    digest = hashlib.blake2b(b"lf indexed", digest_size=16)
    for suffix in (".idx", ".bin"):
        size = os.path.getsize(f"{path}{suffix}")
        digest.update(size.to_bytes(8, "little"))
        with open(f"{path}{suffix}", "rb", buffering=0) as file:
            for i in range(blocks):
                file.seek(max(size - block, 0) * i // (blocks - 1))
                digest.update(file.read(block))
    return digest.hexdigest()


def token_type(vocab: int | None) -> type[np.signedinteger] | type[np.unsignedinteger]:
    """uint16 where every id of the vocabulary fits, as Megatron-LM decides it; else int32."""
    return np.uint16 if vocab is not None and vocab < 65500 else np.int32


class Writer:
    """Writes PREFIX.bin as documents come and PREFIX.idx and PREFIX.json in `finish`, in memory that does not grow. Put `new_files` or
    `new_folder` round it: nothing is whole before `finish`."""

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int | None = None, eos: int | None = None):
        self.prefix, self.vocab_size, self.eos = Path(prefix), vocab_size, eos
        self.dtype = np.dtype(token_type(vocab_size)).newbyteorder("<")
        self.documents = self.tokens = 0
        self.digests = [hashlib.blake2b(what, digest_size=16) for what in (b"lf tokens", b"lf lengths")]
        self.files = [open(f"{self.prefix}{suffix}", "wb") for suffix in (".bin", ".lengths")]  # noqa: SIM115 — closed by __exit__

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self.files:
            file.close()

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Whole documents: their tokens one after another, and how many each of them has."""
        for values, dtype, file, digest in zip((tokens, lengths), (self.dtype, np.dtype("<i4")), self.files, self.digests):
            content = values.astype(dtype, copy=False).tobytes()
            file.write(content)
            digest.update(content)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def finish(self, **about: Any) -> None:
        """Writes index and JSON, with `about` in it. Raises DataError when there is no token."""
        self.__exit__()
        if not self.tokens:
            raise DataError(f"there is not one token to write into {self.prefix}.bin")
        n, lengths = self.documents, np.memmap(f"{self.prefix}.lengths", "<i4", "r")
        parts = [(i, min(i + (1 << 20), n)) for i in range(0, n, 1 << 20)]
        with open(f"{self.prefix}.idx", "wb") as index:
            code = next(code for code, kind in CODES.items() if self.dtype == kind)
            index.write(HEADER.pack(MAGIC, VERSION, code, n, n + 1))
            for begin, stop in parts:
                index.write(lengths[begin:stop].tobytes())
            at = 0
            for begin, stop in parts:
                ends = at + np.cumsum(lengths[begin:stop], dtype="<i8") * self.dtype.itemsize
                index.write(np.concatenate([[at], ends[:-1]]).astype("<i8").tobytes())
                at = int(ends[-1])
            for begin, stop in [*parts, (n, n + 1)]:
                index.write(np.arange(begin, stop, dtype="<i8").tobytes())
        os.remove(f"{self.prefix}.lengths")
        fingerprint = hashlib.blake2b(b"".join(d.digest() for d in self.digests), digest_size=16).hexdigest()
        said = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "documents": n,
            "tokens": self.tokens,
            "vocab_size": self.vocab_size,
            "eos": self.eos,
            **about,
        }
        Path(f"{self.prefix}.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _mapped(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _about(path: Path, documents: int, tokens: int) -> dict[str, Any] | None:
    """What PREFIX.json says, None without one. Raises DataError when it is not about these files."""
    file = Path(f"{path}.json")
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise DataError(f"{file} has format {about['format']}, this version of lf reads {FORMAT}; tokenize again")
        said = about["documents"], about["tokens"]
        if said != (documents, tokens):
            raise DataError(f"{file} says {said[0]} documents of {said[1]} tokens, the index {documents} of {tokens}; remove the wrong one")
        return {**{name: about[name] for name in ("fingerprint", "vocab_size", "eos")}, "tokenizer": about.get("tokenizer")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} does not describe indexed documents ({error!r}); remove it if it is of something else") from error

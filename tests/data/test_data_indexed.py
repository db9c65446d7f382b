"""Indexed tokens: to and from Megatron-LM's own code, open in no time and memory, and one clear error for each file that is not whole."""

from __future__ import annotations

import struct
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from data_helpers import documents
from helpers import ROOT

from lf.data import DataError, Documents, Writer, new_files, new_folder, open_documents, rows, split
from lf.data.indexed import HEADER, SUFFIXES

MEGATRON = "megatron.core.datasets.indexed_dataset"


def written(prefix: Path, docs: list[list[int]], vocab: int | None = None) -> Path:
    with Writer(prefix, vocab, None) as writer:
        for part in (docs[:1], docs[1:]):
            writer.add(np.concatenate([np.empty(0, np.int64), *part]), np.array(list(map(len, part))))
        writer.finish()
    return prefix


def of(docs: Documents) -> list[list[int]]:
    return [docs[i].tolist() for i in range(len(docs))]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_we_write_and_we_read_what_megatron_writes(tmp_path: Path, dtype: type) -> None:
    megatron = pytest.importorskip(MEGATRON)
    largest = 65498 if dtype is np.uint16 else 151000
    dice = np.random.default_rng(0)
    sequences = [[dice.integers(0, largest, n).tolist() for n in document] for document in ([3], [5, 1, 4], [2, 2], [1], [9, 3])]

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
    for document in sequences[:3]:
        builder.add_document(list(chain(*document)), list(map(len, document)))
    for document in sequences[3:]:
        for sequence in document:
            builder.add_item(megatron.torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    theirs = open_documents(tmp_path / "theirs")
    assert theirs.tokens.dtype == dtype
    assert of(theirs) == [list(chain(*document)) for document in sequences]
    assert (theirs.vocab_size, theirs.eos) == (None, None)
    assert open_documents(tmp_path / "theirs.bin").fingerprint == open_documents(tmp_path / "theirs.idx").fingerprint == theirs.fingerprint

    ours = written(tmp_path / "ours", of(theirs), largest + 1)
    read = megatron.IndexedDataset(str(ours))
    assert read.index.dtype is dtype
    assert [read[i].tolist() for i in range(len(read))] == of(theirs) == of(open_documents(ours))
    assert read.document_indices.tolist() == list(range(len(sequences) + 1))
    # a file that has one sequence a document is the same, byte by byte
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "again.bin"), dtype)
    for tokens in of(theirs):
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "again.idx"))
    assert all((tmp_path / f"again{s}").read_bytes() == (tmp_path / f"ours{s}").read_bytes() for s in (".bin", ".idx"))


OPEN = """
import sys
from itertools import chain
from pathlib import Path
from lf.data import open_documents, rows, split

def mib(what):  # getrusage would count the process that this one was forked from
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)).split()[1]) / 1024

before = mib("RssAnon")
docs = open_documents(sys.argv[1])
train, valid = split(docs, 0.1)
assert len(docs) == 10_000_000 and docs.at(12_345_678) == 12_345_678 // 2
print(mib("VmHWM"))
row = rows(train, 64, 0)
assert all(len(row(k).starts) in (32, 33) for k in range(100))
print(mib("RssAnon") - before)  # without what is mapped from files, which the system takes back when it wants to
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ten_million_documents_take_no_memory(tmp_path: Path) -> None:
    n = 10_000_000  # of two tokens: an index of 200 MB
    with open(tmp_path / "many.idx", "wb") as index, open(tmp_path / "many.bin", "wb") as tokens:
        index.write(HEADER.pack(b"MMIDIDX\0\0", 1, 8, n, n + 1))
        index.write(np.full(n, 2, np.int32).data)
        index.write(np.arange(0, 4 * n, 4).data)
        index.write(np.arange(n + 1).data)
        tokens.truncate(4 * n)  # zeros that take no room
    out = subprocess.run([sys.executable, "-c", OPEN, tmp_path / "many"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    opened, grown = map(float, out.stdout.split())  # MiB
    assert opened < 200
    assert grown < 20, "rows read the index into memory"


def test_the_writer_holds_little_and_batches_do_not_matter(tmp_path: Path) -> None:
    docs = [[1, 2, 3], [4], [5, 6]]
    one = written(tmp_path / "one", docs, 10)
    with Writer(tmp_path / "two", 10) as writer:
        for document in docs:
            writer.add(np.array(document), np.array([len(document)]))
        writer.finish()
    assert all((tmp_path / f"one{s}").read_bytes() == (tmp_path / f"two{s}").read_bytes() for s in SUFFIXES)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}{s}" for n in ("one", "two") for s in SUFFIXES)
    other = open_documents(written(tmp_path / "other", [[1, 2], [3, 4], [5, 6]], 10))
    assert other.tokens.tolist() == open_documents(one).tokens.tolist()
    assert other.fingerprint != open_documents(one).fingerprint  # the same tokens in other documents


def test_a_part_is_a_view_of_whole_documents() -> None:
    for seed in (None, *range(20)):
        docs = documents([7, 3, 12, 5, 9, 2, 30], seed)
        for first in range(len(docs)):
            for last in range(first + 1, len(docs) + 1):
                if docs.start(first) == docs.start(last):
                    with pytest.raises(DataError, match="have no token"):
                        docs.part(first, last)
                    continue
                part = docs.part(first, last)
                assert of(part) == of(docs)[first:last]
                assert np.shares_memory(part.tokens, docs.tokens)
                assert [part.at(t) + first for t in range(len(part.tokens))] == [docs.at(t + docs.start(first)) for t in range(len(part.tokens))]
                assert part.starts(0, len(part.tokens)).tolist() == [
                    s - docs.start(first) for s in docs.starts(docs.start(first), docs.start(last)).tolist()
                ]


def test_a_split_takes_the_last_documents() -> None:
    docs = documents([7, 3, 12, 5, 9, 2, 30, 4, 4, 4])
    for fraction, count in ((0.3, 3), (0.01, 1), (0.99, 9)):
        train, valid = split(docs, fraction)
        assert of(train) + of(valid) == of(docs)
        assert len(valid) == count
        assert len({train.fingerprint, valid.fingerprint, docs.fingerprint}) == 3
    assert of(split(split(docs, 0.3)[0], 0.3)[1]) == of(docs)[5:7]
    assert set(rows(valid, 20, 0)(5).tokens.tolist()) <= set(valid.tokens.tolist())
    for fraction in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(DataError, match="must lie between 0 and 1"):
            split(docs, fraction)
    with pytest.raises(DataError, match="has 1 document: training and validation need at least one each"):
        split(documents([7]), 0.1)
    with pytest.raises(DataError, match="it has 10, and a part needs at least one"):
        docs.part(3, 3)


def pack_index(code: int = 8, lengths: tuple[int, ...] = (3, 1), first: tuple[int, ...] = (0, 1, 2), magic: bytes = b"MMIDIDX\0\0", version: int = 1):
    pointers = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    return (
        struct.pack("<9sQBQQ", magic, version, code, len(lengths), len(first))
        + np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + np.array(first, "<i8").tobytes()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("index", "tokens", "words"),
    [
        (None, b"", r"x.idx does not exist: indexed documents are two files, x.bin and x.idx"),
        (pack_index(), None, r"x.bin does not exist: indexed documents are two files"),
        (b"", b"12345678", "cannot be read"),
        (b"MMIDIDX\0\0", b"12345678", "cannot be read"),
        (pack_index(magic=b"TNTIDX\0\0\0"), b"12345678", r"begins with b'TNTIDX.* it is no index of Megatron-LM"),
        (pack_index(version=2), b"12345678", "has version 2; lf reads version 1"),
        (pack_index(code=7), b"12345678", "has tokens of type 7; token ids are of type 1, 2, 3, 4, 5, 8"),
        (pack_index(code=77), b"12345678", "has tokens of type 77"),
        (pack_index()[:-1], b"12345678", r"has 81 bytes; 2 sequences and 2 documents take 82: it is not whole"),
        (pack_index() + b"123", b"12345678", r"has 85 bytes"),
        (pack_index() + b"\0\1", b"12345678", "a mode for each sequence: it is a multimodal data set"),
        (pack_index(), b"123456", "x.bin has 6 bytes, its index says 0 to 8"),
        (pack_index(), b"1234567890", "x.bin has 10 bytes, its index says 0 to 8"),
        (pack_index(), b"", "x.bin has no tokens"),
        (pack_index(lengths=(), first=(0,)), b"12", "x.bin has no tokens"),
        (pack_index(first=(0,)), b"12345678", r"2 sequences and documents of sequences 0 … 0; end each document"),
        (pack_index(first=(0, 1)), b"12345678", r"2 sequences and documents of sequences 0 … 1"),
        (pack_index(first=()), b"12345678", "documents of sequences none"),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, index: bytes | None, tokens: bytes | None, words: str) -> None:
    for suffix, content in ((".idx", index), (".bin", tokens)):
        if content is not None:
            (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=words):
        open_documents(tmp_path / "x")


def test_what_is_said_of_the_tokens_is_of_them(tmp_path: Path) -> None:
    prefix = written(tmp_path / "x", [[1, 2, 3], [4]])
    about = (tmp_path / "x.json").read_text()
    for content, words in [
        (about.replace('"tokens": 4', '"tokens": 5'), "says 2 documents of 5 tokens, the index 2 of 4"),
        (about.replace('"format": 2', '"format": 1'), "format 1, this version of lf reads 2; tokenize again"),
        ("{", "does not describe indexed documents"),
        ("{}", "does not describe indexed documents"),
        ("[]", "does not describe indexed documents"),
    ]:
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DataError, match=words):
            open_documents(prefix)


def test_without_json_another_file_has_another_fingerprint(tmp_path: Path) -> None:
    written(tmp_path / "x", [list(range(1, 5000)), [4]])
    (tmp_path / "x.json").unlink()
    before, content = open_documents(tmp_path / "x").fingerprint, (tmp_path / "x.bin").read_bytes()
    assert open_documents(tmp_path / "x").fingerprint == before
    (tmp_path / "x.bin").write_bytes(content[:6000] + b"\7" + content[6001:])
    assert open_documents(tmp_path / "x").fingerprint != before


def test_new_files_are_whole_or_not_there(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        for s in SUFFIXES:
            Path(f"{part}{s}").write_text("new")

    def broken() -> None:
        with new_files(tmp_path / "sub" / "x", SUFFIXES) as part:
            write(part)
            _ = 1 / 0

    def beaten() -> None:
        with new_files(tmp_path / "y", SUFFIXES) as part:
            write(part)
            (tmp_path / "y.idx").write_text("of another process")

    with pytest.raises(ZeroDivisionError):
        broken()
    assert not list((tmp_path / "sub").iterdir())
    with new_files(tmp_path / "x", SUFFIXES) as part:
        write(part)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sub", "x.bin", "x.idx", "x.json"]
    (tmp_path / "x.bin").write_text("old")
    (tmp_path / "x.json").unlink()
    with pytest.raises(DataError, match=r"x.bin, .*x.idx exists already; remove it or give another prefix"), new_files(tmp_path / "x", SUFFIXES):
        raise AssertionError("refused before anything is done")
    with pytest.raises(DataError, match="exists already"):
        beaten()
    assert (tmp_path / "y.idx").read_text() == "of another process"
    assert not (tmp_path / "y.bin").exists()
    assert (tmp_path / "x.bin").read_text() == "old"
    with pytest.raises(FileExistsError, match="exists; remove it"), new_folder(tmp_path / "sub" / ".."):
        pass

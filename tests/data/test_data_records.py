"""Files of records → documents of tokens: every format to the same tokens, and one clear error with its place for each bad record."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import WEIRD, some_text
from helpers import ROOT

import lf.data.records as records
from lf.data import DataError, Documents, Reading, Recipe, Tokenizer, find_files, has_ids, load_tokenizer, open_documents, tokenize, train_bpe


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(train_bpe(some_text(), 400, tmp_path_factory.mktemp("bpe") / "tok"))


def made(path: Path, out: Path, bpe: Tokenizer | None, workers: int = 0, eod: str = "auto", **how: Any) -> Documents:
    files = find_files(path)
    if has_ids(files):
        how["column"] = "input_ids"
    tokenize(files, Recipe(Reading(**how), str(bpe.folder) if bpe else None, eod), out, workers)
    return open_documents(out)


def jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, column: t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    return path


def of(docs: Documents) -> list[list[int]]:
    return [docs[i].tolist() for i in range(len(docs))]


def test_every_format_gives_the_same_tokens(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    monkeypatch.setattr(records, "PIECE", 500)  # lines are cut from pieces that are shorter than some of them
    monkeypatch.setattr(records, "RECORDS", 3)
    texts = [*some_text(50), "", WEIRD.replace("\r", ""), "\n"]
    want = [[*ids, bpe.eos] for ids in bpe.encode([t for t in texts if t])]
    lines = jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf\n  \n" + lines.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(lines.read_bytes()[:1000]) + gzip.compress(lines.read_bytes()[1000:]))
    with pa.CompressedOutputStream(str(tmp_path / "d.jsonl.zst"), "zstd") as file:
        file.write(lines.read_bytes())
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), tmp_path / "e.parquet", row_group_size=7)
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), tmp_path / "f.parquet", compression="gzip")
    Dataset.from_dict({"text": texts, "id": range(len(texts))}).save_to_disk(tmp_path / "g")
    (tmp_path / "h").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "h" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    names = ["a.jsonl", "b.jsonl", "c.json.gz", "d.jsonl.zst", "e.parquet", "f.parquet", "g", "h"]
    assert len(records.pieces(find_files(lines))) > 10
    docs = [made(tmp_path / name, tmp_path / f"out{i}", bpe) for i, name in enumerate(names)]
    for name, d in zip(names, docs):
        assert of(d) == want, name
        assert (d.tokens.dtype, d.vocab_size, d.eos) == (np.uint16, 400, bpe.eos)
    assert len({d.fingerprint for d in docs}) == 1
    about = json.loads((tmp_path / "out0.json").read_text())
    assert (about["documents"], about["empty"], about["bad"], about["tokenizer"]) == (52, 1, 0, bpe.fingerprint)


def test_bytes_are_the_same_for_any_number_of_workers(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PIECE", 500)
    monkeypatch.setattr("lf.data.tokenizing.PIECE", 2000)
    lines = jsonl(tmp_path / "a.jsonl", some_text(100))
    for workers in (0, 3):
        made(lines, tmp_path / f"out{workers}", bpe, workers)
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"out0{suffix}").read_bytes() == (tmp_path / f"out3{suffix}").read_bytes()
    lines.write_text(lines.read_text() + "\n\nnonsense\n" + lines.read_text())
    said = []
    for workers in (0, 2):
        with pytest.raises(DataError) as caught:
            made(lines, tmp_path / "bad", bpe, workers)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "a.jsonl, line 103: not JSON" in said[0]


def test_a_worker_needs_no_torch_and_ends_with_its_parent() -> None:
    code = "import sys, lf.data.tokenizing, lf.data.records, lf.data.stream; assert not {'torch', 'rich', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    work = [sys.executable, "-c", "from lf.data.tokenizing import worker; worker()"]
    done = subprocess.run(work, cwd=ROOT, input=b"", capture_output=True)
    assert done.returncode
    assert not done.stdout


def test_ids_are_used_as_they_are(bpe: Tokenizer, tmp_path: Path) -> None:
    from datasets import Dataset

    ids = [[5, 6, 7], [8, bpe.eos], [], [399]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "other", "input_ids": i}) + "\n" for i in ids))
    pq.write_table(pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))}), tmp_path / "b.parquet", row_group_size=2)
    pq.write_table(pa.table({"input_ids": pa.array(ids, pa.large_list(pa.uint16()))}), tmp_path / "c.parquet")
    Dataset.from_dict({"input_ids": ids}).save_to_disk(tmp_path / "d")
    for i, name in enumerate(("a.jsonl", "b.parquet", "c.parquet", "d")):
        assert of(made(tmp_path / name, tmp_path / f"out{i}", None, vocab=400)) == [[5, 6, 7], [8, bpe.eos], [399]], name
    assert open_documents(tmp_path / "out0").tokens.dtype == np.uint16
    assert of(made(tmp_path / "a.jsonl", tmp_path / "x", bpe, eod="append")) == [[5, 6, 7, bpe.eos], [8, bpe.eos], [399, bpe.eos]]
    docs = made(tmp_path / "a.jsonl", tmp_path / "y", None)
    assert (docs.tokens.dtype, docs.vocab_size, docs.eos) == (np.int32, None, None)
    jsonl(tmp_path / "t.jsonl", ["some text"])
    assert of(made(tmp_path / "t.jsonl", tmp_path / "z", bpe, eod="keep")) == bpe.encode(["some text"])


GOOD = b'{"text": "a"}\n'
IDS = b'{"input_ids": [1, 2]}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD + b"nonsense\n", r"x.jsonl, line 2: not JSON \(Expecting value"),
        (GOOD + b'{"text": "b"', r"x.jsonl, line 2: not JSON"),
        (GOOD + b"\n\n" + b"[" * 100_000, r"x.jsonl, line 4: not JSON"),
        (GOOD + b'["text"]\n', r"line 2: is a list, not an object with named fields; JSONL has one record a line"),
        (b'[{"text": "a"},\n{"text": "b"}]\n', r"line 1: not JSON"),
        (GOOD + b'{"txt": "b", "id": 3}\n', r"line 2: has no column 'text'; it has txt, id"),
        (GOOD + b"{}\n", r"line 2: has no column 'text'; it has none"),
        (GOOD + b'{"text": null}\n', r"line 2: text is null, not text"),
        (GOOD + b'{"text": 7}\n', r"line 2: text is 7, not text"),
        (GOOD + b'{"text": ["b"]}\n', r"line 2: text is a list, not text"),
        (GOOD + b'{"text": "caf\xe9 "}\n', r"line 2: not UTF-8 at byte 13 of the line"),
        (GOOD + b'{"text": "\\ud800"}\n', r"line 2: text is no valid text: .*surrogates not allowed"),
        (IDS + b'{"input_ids": [400]}\n', r"line 2: input_ids has id 400, outside 0 … 399, the vocabulary"),
        (IDS + b'{"input_ids": [3, -1]}\n', r"line 2: input_ids has id -1, outside 0 … 399"),
        (IDS + b'{"input_ids": [1, 99999999999999999999]}\n', r"line 2: input_ids has id 99999999999999999999, outside"),
        (IDS + b'{"input_ids": [1, 2.0]}\n', r"line 2: input_ids has 2.0, not whole numbers alone"),
        (IDS + b'{"input_ids": [1, true]}\n', r"line 2: input_ids has True, not whole numbers alone"),
        (IDS + b'{"input_ids": [1, null]}\n', r"line 2: input_ids has null, not whole"),
        (IDS + b'{"input_ids": "1 2"}\n', r"line 2: input_ids is a str, not a list of token ids"),
        (IDS + b'{"input_ids": null}\n', r"line 2: input_ids is null, not a list"),
        (IDS + GOOD, r"line 2: has no column 'input_ids'; it has text"),
    ],
)  # fmt: skip
def test_a_bad_record_is_refused_with_file_and_line_or_counted(bpe: Tokenizer, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words + ".*mend it, or skip and count such records with --on-bad skip"):
        made(tmp_path / "x.jsonl", tmp_path / "out", bpe, vocab=400)
    bad = 2 if content.startswith(b"[") else 1
    if bad == 2:
        with pytest.raises(DataError, match="none of the 0 documents has a token, and 2 bad records were skipped"):
            made(tmp_path / "x.jsonl", tmp_path / "out", bpe, on_bad="skip")
        return
    docs = made(tmp_path / "x.jsonl", tmp_path / "out", bpe, on_bad="skip", vocab=400)
    assert of(docs) == [[1, 2]] if content.startswith(IDS) else [[*bpe.encode(["a"])[0], bpe.eos]]
    assert json.loads((tmp_path / "out.json").read_text())["bad"] == bad


def broken_text() -> pa.Array:
    good = pa.array(["one", "two", "thr", "fou"])
    return pa.Array.from_buffers(pa.string(), 4, [None, good.buffers()[1], pa.py_buffer(b"onetw\xffthrfou")])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"text": ["a", "b", None, "d"]}, r"x.parquet, row 3: text is null, not text"),
        ({"text": broken_text()}, r"x.parquet, row 2: not UTF-8 at byte 2"),
        ({"input_ids": [[1], [2], [3], [4, 400]]}, r"x.parquet, row 4: input_ids has id 400, outside 0 … 399"),
        ({"input_ids": [[1], [2], None, [4]]}, r"x.parquet, row 3: input_ids is null, not a list"),
        ({"input_ids": [[1], [2], [3, None], [4]]}, r"x.parquet, row 3: input_ids has null"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_row_or_counted(bpe: Tokenizer, tmp_path: Path, table: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "x.parquet", row_group_size=2)
    with pytest.raises(DataError, match=words):
        made(tmp_path / "x.parquet", tmp_path / "out", bpe, vocab=400)
    docs = made(tmp_path / "x.parquet", tmp_path / "out", bpe, on_bad="skip", vocab=400)
    assert len(docs) == 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"caf" + b"\xe9 ", r"x.txt: not UTF-8 at byte 3 .*iconv"),
        ("x.txt", b"x" * (1 << 22) + "é".encode()[:1], r"x.txt: not UTF-8 at byte 4194304"),
        ("x.txt", b"", "none of the 1 documents has a token"),
        ("x.jsonl", b"", "none of the 0 documents has a token"),
        ("x.jsonl.gz", b"no gzip", r"x.jsonl.gz cannot be read to its end after line 0"),
        ("x.jsonl.gz", gzip.compress(GOOD * 100, mtime=0)[:-9], r"x.jsonl.gz cannot be read to its end after line"),
        ("x.jsonl.zst", b"no zstd", r"x.jsonl.zst cannot be read to its end after line 0"),
        ("x.parquet", b"PAR1 nonsense", r"x.parquet cannot be read as Parquet"),
        ("x.parquet", pa.table({"id": [1], "title": ["a"]}), r"x.parquet has no column 'text'; it has id, title"),
        ("x.parquet", pa.table({"text": [1.5]}), r"x.parquet: column text is double, not text"),
        ("x.parquet", pa.table({"input_ids": [["a"]]}), r"x.parquet: column input_ids is list<.*string>, not lists of whole numbers"),
    ],
)
def test_files_that_cannot_be_read_are_refused_also_under_skip(bpe: Tokenizer, tmp_path: Path, name: str, content: Any, words: str) -> None:
    pq.write_table(content, tmp_path / name) if isinstance(content, pa.Table) else (tmp_path / name).write_bytes(content)
    for on_bad in ("stop", "skip"):
        if name == "x.txt" and content and on_bad == "skip":
            words = "none of the 0 documents has a token, and 1 bad records were skipped"
        with pytest.raises(DataError, match=words):
            made(tmp_path / name, tmp_path / "out", bpe, on_bad=on_bad)


def test_recipes_that_cannot_be(bpe: Tokenizer, tmp_path: Path) -> None:
    for make, words in [
        (lambda: Reading(on_bad="ignore"), "on_bad='ignore': there is stop and skip"),
        (lambda: Recipe(Reading(), "x", "never"), "eod='never': there is auto, append, keep"),
        (lambda: Recipe(Reading()), "texts need a tokenizer; give one with --tokenizer"),
        (lambda: Recipe(Reading("input_ids"), None, "append"), "eod='append' needs a tokenizer"),
    ]:
        with pytest.raises(DataError, match=words):
            make()
    jsonl(tmp_path / "a.jsonl", ["b"])
    with pytest.raises(DataError, match="workers=-1"):
        made(tmp_path / "a.jsonl", tmp_path / "out", bpe, -1)
    (tmp_path / "b.txt").write_text("c")
    (tmp_path / "a.jsonl").write_bytes(IDS)
    with pytest.raises(DataError, match=r"b.txt is a text file among files with input_ids; give it apart from them"):
        made(tmp_path / "[ab].*", tmp_path / "out", bpe)
    os.truncate(tmp_path / "b.txt", 2**31)  # takes no room
    with pytest.raises(DataError, match=r"b.txt has 2147483648 bytes, over the limit of 2147483647 for one document; split it"):
        made(tmp_path / "b.txt", tmp_path / "out", bpe)

"""Files → text → tokenizer → documents, and one clear error for each thing that can be wrong with them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import lf
from lf.data import DataError, Tokenizer, find_files, load_tokenizer, open_documents, prepare, read_text, tokenize, train_bpe

ROOT = Path(__file__).parents[2]
WEIRD = "héllo  wörld\t\n\n\r\n , . 日本語 \u200d👩‍🚀\x00 ﷽ e\u0301 <|endoftext|> 'll \U0010ffff"


def some_text(n: int = 300, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijé", k=draw.randint(2, 8))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=draw.randint(3, 40))) for _ in range(n)]


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(train_bpe(some_text(), 400, tmp_path_factory.mktemp("bpe") / "tok"))


# files


def test_files_come_in_order_of_path_whatever_names_them(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a.txt", "b/c/[1].txt", "b/.hidden/x.txt", "note.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    expected = [str(tmp_path / name) for name in ("a.txt", "b/c/[1].txt", "b/z.txt")]
    assert find_files(tmp_path) == expected
    assert find_files([tmp_path / "b", tmp_path / "a.txt", expected[0]]) == expected
    assert find_files(str(tmp_path / "**" / "*.txt")) == expected
    assert find_files(tmp_path, match="*.md") == [str(tmp_path / "note.md")]


def test_read_text_keeps_documents_and_says_what_is_empty(tmp_path: Path) -> None:
    contents = {"b[1].txt": "two\n\nparagraphs\n", "a.txt": WEIRD.replace("\r\n", "\n"), "sub/c.txt": "tail", "sub/empty.txt": ""}
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name, text in contents.items():
        (tmp_path / "in" / name).write_bytes(text.encode())
    said: list[str] = []
    dataset = read_text(tmp_path / "in", tmp_path / "cache", say=said.append)
    assert list(dataset["text"]) == [contents[n] for n in ("a.txt", "b[1].txt", "sub/c.txt")]
    assert said == ["1 of 4 files are empty and were left out"]
    assert all(str(tmp_path / "cache") in file["filename"] for file in dataset.cache_files)
    # an edited file is read again
    (tmp_path / "in" / "sub" / "c.txt").write_text("another tail")
    assert read_text(tmp_path / "in", tmp_path / "cache", say=quiet)["text"][2] == "another tail"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"in has no file that matches '\*.txt'"):
        read_text(tmp_path / "in", tmp_path)
    with pytest.raises(DataError, match=r"nowhere does not exist; glob .*\*.json matches no file"):
        read_text([tmp_path / "nowhere", tmp_path / "*.json"], tmp_path)
    with pytest.raises(DataError, match="no text was named"):
        read_text([], tmp_path)
    (tmp_path / "in" / "empty.txt").touch()
    with pytest.raises(DataError, match=r"all 1 files are empty"):
        read_text(tmp_path / "in", tmp_path)
    (tmp_path / "in" / "latin.txt").write_bytes(b"caf" + b"\xe9 ")
    # the fault is past the first piece and cut short by the end of the file
    (tmp_path / "in" / "cut.txt").write_bytes(b"x" * (1 << 22) + "é".encode()[:1])
    with pytest.raises(DataError, match=r"2 of the files .*cut.txt: not UTF-8 at byte 4194304 .*latin.txt: not UTF-8 at byte 3 "):
        read_text(tmp_path / "in", tmp_path)


# tokenizer


def test_bpe_opens_in_transformers_to_the_same_ids(bpe: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(bpe.folder)
    for text in [WEIRD, *some_text(20, seed=1), " ", "\n", "<|endoftext|>"]:
        ids = bpe.encode([text])[0]
        assert ids == other(text)["input_ids"]
        assert bpe.decode(ids) == other.decode(ids) == text
    assert (bpe.vocab_size, bpe.eos) == (len(other), other.eos_token_id) == (400, 0)


def test_bpe_is_the_same_in_another_process(bpe: Tokenizer, tmp_path: Path) -> None:
    code = "import sys, json; from lf.data import train_bpe; train_bpe(json.load(sys.stdin), 400, sys.argv[1])"
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "tok"], input=json.dumps(some_text()), text=True, env=env, cwd=ROOT, check=True)
    for file in bpe.folder.iterdir():
        assert file.read_bytes() == (tmp_path / "tok" / file.name).read_bytes()


def test_bpe_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gives (\d+) tokens \(\d+ merges\), fewer than vocab_size=5000; .* vocab_size=\1, or exact=False"):
        train_bpe(["a little text"], 5000, tmp_path / "tok")
    with pytest.raises(DataError, match="vocab_size=256 is below 257"):
        train_bpe(["text"], 256, tmp_path / "tok")
    with pytest.raises(DataError, match="document 1 is NoneType"):
        train_bpe(["text", None], 257, tmp_path / "tok")  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())
    seen: list[tuple[int, int]] = []
    train_bpe(["text", "more"], 257, tmp_path / "tok", progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(FileExistsError, match="tok exists"):
        train_bpe(["text"], 257, tmp_path / "tok")


def test_bpe_takes_what_the_text_gives(tmp_path: Path) -> None:
    few = load_tokenizer(train_bpe(["a little text"] * 3, 5000, tmp_path / "few", exact=False))
    assert 257 < few.vocab_size < 300
    assert few.decode(few.encode([WEIRD])[0]) == WEIRD
    assert load_tokenizer(train_bpe(some_text(), 300, tmp_path / "full", exact=False)).vocab_size == 300


# texts → what a run reads


def prepared(folder: Path, *args: object, **kwargs: object) -> list[tuple[str, Path, list[int]]]:
    def rank(axes: Any) -> tuple[str, Path, list[int]]:
        documents, tokenizer = prepare((str(folder / "in"),), folder / "out", *args, axes, **kwargs)  # type: ignore[arg-type, misc]
        return documents.fingerprint, tokenizer, documents.tokens.tolist()

    return lf.sim.spmd(lf.Mesh(dp=2), rank)


def test_prepared_on_the_first_rank_and_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for i, text in enumerate(some_text(20)):
        (tmp_path / "in" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    first, second = prepared(tmp_path, 151936)  # far more than this text has in it
    assert first == second
    size = load_tokenizer(first[1]).vocab_size
    said = capsys.readouterr().out
    assert f"the BPE has {size} tokens" in said
    assert "up to 32768 tokens" in said
    assert prepared(tmp_path, 151936) == [first, first]
    assert "BPE" not in capsys.readouterr().out  # nothing was trained
    # another size or another text is another tokenizer
    small = prepared(tmp_path, 151936, bpe_vocab=300)[0]
    assert load_tokenizer(small[1]).vocab_size == 300
    (tmp_path / "in" / "03.txt").write_text("altogether something else " * 9)
    assert prepared(tmp_path, 151936, bpe_vocab=300)[0][1] not in (first[1], small[1])
    # a given one is used as it is
    assert prepared(tmp_path, 300, tokenizer=str(small[1]))[0][1] == small[1]


def test_prepare_refuses_before_it_reads(bpe: Tokenizer, tmp_path: Path) -> None:
    given = str(bpe.folder)
    for vocab, options, words in [
        (300, {"bpe_vocab": 301}, "bpe_vocab=301 must lie between 257, .* and the model's vocabulary of 300"),
        (300, {"bpe_vocab": 0}, "bpe_vocab=0 must lie between 257"),
        (100, {}, "bpe_vocab=100 must lie between 257, .* vocabulary of 100"),
        (400, {"bpe_vocab": 300, "tokenizer": given}, "bpe_vocab=300 is for a BPE that is trained here"),
        (399, {"tokenizer": given}, "has ids up to 399, the model's vocabulary is 399"),
        (400, {"tokenizer": str(tmp_path / "typo")}, "typo does not exist"),
    ]:
        with pytest.raises(DataError, match=words):
            prepare(("nowhere",), tmp_path / "out", vocab, lf.solo(), **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_eos_is_found_wherever_a_folder_says_it(bpe: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(bpe.folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, content, eos in [
        ("generation_config.json", {"eos_token_id": [5, 6]}, 5),
        ("config.json", {"eos_token_id": 7}, 7),
        ("special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>", "lstrip": False}}, 0),
        ("tokenizer_config.json", {"eos_token": "a"}, backend.token_to_id("a")),
    ]:
        (tmp_path / name).write_text(json.dumps(content))
        assert load_tokenizer(tmp_path).eos == eos
    assert load_tokenizer(tmp_path).encode([WEIRD]) == bpe.encode([WEIRD])  # truncation in the file cuts nothing


def test_tokenizer_folders_that_do_not_work(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no tokenizer.json; write one with transformers: AutoTokenizer.from_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((bpe.folder / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="names no end-of-document token"):
        load_tokenizer(tmp_path)
    for content, error in [('{"eos_token": "</s>"}', "eos_token is '</s>', which is not"), ("{", "is not JSON"), ("[]", "holds a list")]:
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=error):
            load_tokenizer(tmp_path)


# documents


def test_documents_are_the_ids_and_eos(bpe: Tokenizer, tmp_path: Path) -> None:
    texts = [*some_text(30), "", WEIRD]
    said: list[str] = []
    done: list[tuple[int, int]] = []
    docs = tokenize(texts, bpe, tmp_path, progress=lambda *n: done.append(n), say=said.append)
    expected = [[*ids, bpe.eos] for ids in bpe.encode([t for t in texts if t])]
    assert [docs.tokens[a:b].tolist() for a, b in zip(docs.offsets, docs.offsets[1:])] == expected
    assert (docs.tokens.dtype, docs.offsets.dtype, len(docs), docs.vocab_size) == (np.int32, np.int64, 31, 400)
    assert isinstance(docs.tokens, np.memmap)
    assert said == ["1 of 32 documents have no token and were left out"]
    assert done[-1] == (32, 32)


def test_documents_are_made_once(bpe: Tokenizer, tmp_path: Path) -> None:
    texts = some_text(30)
    docs = tokenize(texts, bpe, tmp_path)
    changed = (docs.folder / "tokens.npy").stat().st_mtime_ns
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    again = tokenize(read_text(tmp_path / "in", tmp_path / "cache"), bpe, tmp_path)  # a dataset of the same texts is the same
    assert again.folder == docs.folder == open_documents(docs.folder).folder
    assert (docs.folder / "tokens.npy").stat().st_mtime_ns == changed
    assert tokenize(texts[::-1], bpe, tmp_path).fingerprint != docs.fingerprint
    assert tokenize(texts[:-1] + ["other"], bpe, tmp_path).fingerprint != docs.fingerprint


def test_documents_that_do_not_work(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 2 documents has a token"):
        tokenize(["", ""], bpe, tmp_path)
    with pytest.raises(DataError, match="not one string"):
        tokenize("text", bpe, tmp_path)
    with pytest.raises(DataError, match="document 0 is no valid text"):
        tokenize(["\ud800"], bpe, tmp_path)
    from datasets import Dataset

    with pytest.raises(DataError, match=r"columns \['content'\] but none named 'text'"):
        tokenize(Dataset.from_dict({"content": ["a"]}), bpe, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no whole folder of tokenized documents"):
        open_documents(tmp_path)
    docs = tokenize(["some text"], bpe, tmp_path)
    file = docs.folder / "tokens.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(DataError, match="remove it and tokenize again"):
        tokenize(["some text"], bpe, tmp_path)
    file.write_bytes(whole)
    about = json.loads((docs.folder / "documents.json").read_text())
    (docs.folder / "documents.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        open_documents(docs.folder)


def test_importing_is_quick() -> None:
    code = "import sys, lf.data; assert not {'datasets', 'tokenizers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

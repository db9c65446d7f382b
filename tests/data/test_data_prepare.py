"""From --data to documents and a tokenizer, made once; blends of them; and the whole way through scripts/pretrain."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import documents, some_text
from helpers import QWEN3, ROOT

import lf
from lf.data import Corpus, DataError, Row, Rows, Tokenizer, Writer, blend, load_tokenizer, prepare, rows, train_bpe
from lf.data.blends import window

sys.path.insert(0, str(ROOT / "scripts"))
import pretrain


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(train_bpe(some_text(), 400, tmp_path_factory.mktemp("bpe") / "tok"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i, text in enumerate(some_text(20)):
        (tmp_path / "in" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "in"


def alone(*args: Any, **kwargs: Any) -> tuple[list[Corpus], Path | None]:
    return prepare(args[0], args[1], args[2], lf.solo(), **kwargs)


def prepared(folder: Path, *args: object, **kwargs: object) -> list[tuple[str, Path, list[int]]]:
    def rank(axes: Any) -> tuple[str, Path, list[int]]:
        (corpus,), tokenizer = prepare((str(folder / "in"),), folder / "out", *args, axes, **kwargs)  # type: ignore[arg-type, misc]
        assert corpus.weight == 1
        return corpus.documents.fingerprint, tokenizer, corpus.documents.tokens.tolist()

    return lf.sim.spmd(lf.Mesh(dp=2), rank)


def test_prepared_on_the_first_rank_and_found_again(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = prepared(tmp_path, 151936)  # far more than this text has in it
    assert first == second
    size = load_tokenizer(first[1]).vocab_size
    said = capsys.readouterr().out
    assert f"the BPE has {size} tokens" in said
    assert "up to 32768 tokens" in said
    made = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out" / "tokens").glob("*/*"))]
    assert prepared(tmp_path, 151936) == [first, first]
    assert "BPE" not in capsys.readouterr().out  # nothing was trained
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "out" / "tokens").glob("*/*"))] == made  # nor tokenized
    # another size or another text is another tokenizer
    small = prepared(tmp_path, 151936, bpe_vocab=300)[0]
    assert load_tokenizer(small[1]).vocab_size == 300
    (texts / "03.txt").write_text("altogether something else " * 9)
    assert prepared(tmp_path, 151936, bpe_vocab=300)[0][1] not in (first[1], small[1])
    # a given one is used as it is
    assert prepared(tmp_path, 300, tokenizer=str(small[1]))[0][1] == small[1]


def test_the_cache_is_of_all_that_makes_the_tokens(tmp_path: Path, texts: Path, bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": f"line {i}", "other": f"other {i}"}) + "\n" for i in range(9)) + "bad\n" + '{"text": ""}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 10: not JSON"):
        alone([str(lines)], tmp_path / "out", 400, tokenizer=str(bpe.folder))
    found = {}
    for key, options in {"": {}, "column": {"text_column": "other"}, "eod": {"eod": "keep"}}.items():
        for again in range(2):
            (corpus,), _ = alone([str(lines)], tmp_path / "out", 400, tokenizer=str(bpe.folder), on_bad="skip", **options)
            bad = 2 if key == "column" else 1
            lost = " and ".join(["1 of 11 documents have no token"] * (bad == 1) + [f"{bad} of 11 documents are bad records"])
            assert f"{lost} and were left out" in capsys.readouterr().out.replace("\n", " "), (key, again)
        found[key] = corpus.documents.fingerprint
    assert len(set(found.values())) == 3
    (tmp_path / "b.jsonl").write_bytes(lines.read_bytes())  # a copy is the same
    (corpus,), _ = alone([str(tmp_path / "b.jsonl")], tmp_path / "out", 400, tokenizer=str(bpe.folder), on_bad="skip")
    assert corpus.documents.fingerprint == found[""]
    assert len(list((tmp_path / "out" / "tokens").iterdir())) == 3


def indexed(prefix: Path, docs: list[list[int]], vocab: int | None = None) -> str:
    with Writer(prefix, vocab) as writer:
        writer.add(np.concatenate(docs), np.array(list(map(len, docs))))
        writer.finish()
    return str(prefix)


def test_weights_are_shares_and_without_them_every_token_counts_alike(tmp_path: Path, texts: Path, bpe: Tokenizer) -> None:
    a, b = indexed(tmp_path / "a", [[1] * 30, [2] * 30]), indexed(tmp_path / "b", [[3] * 20])
    corpora, tokenizer = alone([a, b], tmp_path / "out", 400)
    assert tokenizer is None  # nothing is to be tokenized
    assert [(c.name, c.weight, len(c.documents)) for c in corpora] == [("a", 0.75, 2), ("b", 0.25, 1)]
    assert not (tmp_path / "out").exists()
    corpora, tokenizer = alone([f"0.5:{tmp_path / '[ab].idx'}", f"2:{texts}"], tmp_path / "out", 400, tokenizer=str(bpe.folder))
    assert [c.weight for c in corpora] == [0.375, 0.125, 2]
    assert tokenizer == bpe.folder
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    corpora, tokenizer = alone([str(tmp_path / "ids.jsonl"), b], tmp_path / "out", 400)
    assert [(c.weight, c.documents.tokens.tolist()) for c in corpora] == [(3 / 23, [1, 2, 3]), (20 / 23, [3] * 20)]
    assert tokenizer is None


def test_prepare_refuses_before_it_reads(bpe: Tokenizer, tmp_path: Path, texts: Path) -> None:
    given, large = str(bpe.folder), indexed(tmp_path / "large", [[300]], 301)
    for data, vocab, options, words in [
        ("nowhere", 300, {"bpe_vocab": 301}, "bpe_vocab=301 must lie between 257, .* and the model's vocabulary of 300"),
        ("nowhere", 300, {"bpe_vocab": 0}, "bpe_vocab=0 must lie between 257"),
        (str(texts), 100, {}, "bpe_vocab=100 must lie between 257, .* vocabulary of 100"),
        ("nowhere", 400, {"bpe_vocab": 300, "tokenizer": given}, "bpe_vocab=300 is for a BPE that is trained here"),
        ("nowhere", 399, {"tokenizer": given}, "has ids up to 399, the model's vocabulary is 399"),
        ("nowhere", 400, {"tokenizer": str(tmp_path / "typo")}, "typo does not exist"),
        ("nowhere", 400, {"on_bad": "pass"}, "on_bad='pass': there is stop and skip"),
        (str(texts), 400, {"eod": "pass", "tokenizer": given}, "eod='pass': there is auto, append, keep"),
        (large, 300, {}, "large was made with a vocabulary of 301, the model's is 300"),
        (large, 400, {"eod": "append"}, "eod='append' cannot change the indexed tokens of .*large"),
        (f"1:{large}", 400, {"match": "*.md", "tokenizer": given, "eod": "append"}, "eod='append' cannot change"),
    ]:
        with pytest.raises(DataError, match=words):
            alone((data,), tmp_path / "out", vocab, **options)
    assert not (tmp_path / "out").exists()


def test_all_ranks_raise_when_one_finds_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = indexed(tmp_path / "a", [[1] * 30])
    from lf.data import prepared as module

    opened = module.open_documents
    raised: list[str] = []

    def rank(axes: Any) -> None:
        mine = axes.rank
        try:
            prepare([a], tmp_path / "out", 400, axes)
        except DataError as error:
            raised.append(f"{mine}: {error}")

    calls = itertools.count(1)

    def other(prefix: Any) -> Any:
        docs = opened(prefix)
        return docs.part(0, 1) if next(calls) == 3 else docs  # rank 0 looks first, then each rank opens: one has another file under the name

    monkeypatch.setattr(module, "open_documents", other)
    lf.sim.spmd(lf.Mesh(dp=2), rank)
    assert len(raised) == 2
    assert any("is not what it is on rank 0: give every machine the same files" in words for words in raised)
    assert any("another rank cannot open what rank 0 has found" in words for words in raised)


# blends


def named(name: int) -> Rows:
    return lambda k: Row(np.array([name, k]), np.zeros(2, np.int64), np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("weights", "numbers"),
    [
        ([0.7, 0.3], [7, 3]), ([7, 3], [7, 3]), ([1], [1]), ([5, 5, 5], [1, 1, 1]), ([1 / 3, 2 / 3], [1, 2]), ([0.25, 0.5, 0.25], [1, 2, 1]),
        ([0.999, 0.001], [999, 1]), ([1e-9, 1e-9], [1, 1]),
    ],
)  # fmt: skip
def test_the_smallest_window(weights: list[float], numbers: list[int]) -> None:
    assert window(weights) == numbers


def test_any_window_agrees_with_its_weights_and_no_smaller_one_does() -> None:
    dice = np.random.default_rng(0)
    for _ in range(30):
        weights = dice.dirichlet(np.ones(dice.integers(2, 4))) + 0.01
        shares, numbers = weights / weights.sum(), window(weights.tolist())
        assert all(n >= 1 and abs(n / sum(numbers) / s - 1) <= 1e-3 + 1e-9 for n, s in zip(numbers, shares))
        for size in range(1, sum(numbers)):
            limits = [(max(math.ceil(size * s * 0.999 + 1e-9), 1), math.floor(size * s * 1.001 - 1e-9)) for s in shares]
            assert not (all(lo <= hi for lo, hi in limits) and sum(lo for lo, _ in limits) <= size <= sum(hi for _, hi in limits))
    assert sum(window(dice.uniform(0.9, 1.1, 40).tolist())) <= 2**20


def test_thousands_of_sources_have_their_shares_to_one_row() -> None:
    """A folder of thousands of indexed files: no window agrees with all within 0.1 %, and nobody asked for that."""
    shares = np.random.default_rng(0).uniform(1, 3, 5000)
    shares /= shares.sum()
    numbers = np.array(window(shares.tolist()))
    assert numbers.sum() == 2**20
    assert np.abs(numbers - shares * 2**20).max() <= 1


def test_a_blend_has_its_proportions_in_every_window_and_each_row_once() -> None:
    both = blend([(0.7, named(0)), (0.3, named(1))], 5)
    found = [tuple(both(k).tokens.tolist()) for k in range(400)]
    assert all(Counter(name for name, _ in found[w : w + 10]) == {0: 7, 1: 3} for w in range(0, 400, 10))
    assert sorted(found) == [(0, k) for k in range(280)] + [(1, k) for k in range(120)]
    orders = {tuple(name for name, _ in found[w : w + 10]) for w in range(0, 400, 10)}
    assert len(orders) > 25
    other, only = blend([(0.7, named(0)), (0.3, named(1))], 6), rows(documents([30, 9]), 5, 0)
    assert found != [tuple(other(k).tokens.tolist()) for k in range(400)]
    alone = blend([(0.2, only)], 0)
    assert all(np.array_equal(alone(k).tokens, only(k).tokens) for k in range(20))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([], "at least one source"),
        ([1, 0], "weight 0 of source 2 of 2 must be a positive number; leave a source out"),
        ([-1, 2], "weight -1 of source 1"),
        ([1, math.nan], "weight nan"),
        ([1, math.inf], "weight inf"),
        ([1, 1e-7], r"no 1048576 rows agree with all weights within 0.1%; the smallest, 1e-07, is 1e-07 of them all"),
    ],
)
def test_weights_that_cannot_be(weights: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        blend([(w, named(0)) for w in weights], 0)


# the whole way


def test_jsonl_parquet_and_indexed_tokens_train(tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lf.pictures, "loss_curve", lambda *_: None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**QWEN3, "vocab_size": 400}))
    texts = some_text(40)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": t}) + "\n" for t in texts) + "bad\n")
    pq.write_table(pa.table({"content": texts}), tmp_path / "b.parquet")
    shared: dict[str, Any] = {
        "model": str(tmp_path / "model"), "device": "cpu", "precision": "fp32", "seq_len": 16, "micro_batch": 2, "global_batch": 4, "steps": 3,
        "warmup": 1, "lr": 1e-2, "text_column": "content",
    }  # fmt: skip

    def curve(name: str, data: tuple[str, ...], **options: Any) -> list[float]:
        config = pretrain.Config(data=data, out=str(tmp_path / name), **shared, **options)
        pretrain.main(config)
        return [r["loss"] for r in lf.runs.read_metrics(tmp_path / name / "metrics.jsonl")]

    tokenizer = {"tokenizer": str(bpe.folder)}
    with pytest.raises(DataError, match=r"a.jsonl, line 41: not JSON"):
        curve("run0", (str(tmp_path / "a.jsonl"),), **tokenizer)
    first = curve("run0", (str(tmp_path / "a.jsonl"),), on_bad="skip", **tokenizer)  # put right in place
    assert curve("run1", (str(tmp_path / "b.parquet"),), **tokenizer) == first
    (prefix,) = (tmp_path / "run1" / "tokens").glob("*/documents.idx")
    assert curve("run2", (str(prefix),)) == first  # without any tokenizer
    blended = curve("run3", (f"0.7:{tmp_path / 'b.parquet'}", f"0.3:{prefix}"), **tokenizer)
    assert len(blended) == 3
    with pytest.raises(lf.config.ConfigError, match="data"):
        curve("run3", (f"0.6:{tmp_path / 'b.parquet'}", f"0.4:{prefix}"), **tokenizer)

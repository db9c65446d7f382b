"""A tokenizer folder, read or trained here, and one clear error for each thing that can be wrong with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from data_helpers import WEIRD, some_text
from helpers import ROOT

from lf.data import DataError, Tokenizer, load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(train_bpe(some_text(), 400, tmp_path_factory.mktemp("bpe") / "tok"))


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
    with pytest.raises(DataError, match="not one string"):
        train_bpe("text", 257, tmp_path / "tok")
    train_bpe((text for text in ["text", "more"]), 257, tmp_path / "tok")
    with pytest.raises(FileExistsError, match="tok exists"):
        train_bpe(["text"], 257, tmp_path / "tok")


def test_bpe_takes_what_the_text_gives(tmp_path: Path) -> None:
    few = load_tokenizer(train_bpe(["a little text"] * 3, 5000, tmp_path / "few", exact=False))
    assert 257 < few.vocab_size < 300
    assert few.decode(few.encode([WEIRD])[0]) == WEIRD
    assert load_tokenizer(train_bpe(some_text(), 300, tmp_path / "full", exact=False)).vocab_size == 300


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

"""scripts/tokenize.py: what it writes, that it leaves nothing when it is interrupted, and that Python's own tokenize stays what it is."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from data_helpers import some_text
from helpers import ROOT

from lf.data import Tokenizer, load_tokenizer, open_documents, train_bpe

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(train_bpe(some_text(), 400, tmp_path_factory.mktemp("bpe") / "tok"))


def started(*args: object, script: Path = ROOT / "scripts/tokenize.py") -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(script), *map(str, args)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The script as a module: `import tokenize` is Python's."""
    spec = importlib.util.spec_from_file_location("tokenize_script", ROOT / "scripts/tokenize.py")
    assert spec is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    yield module
    del sys.modules[spec.name]


def test_the_script_tokenizes_and_overwrites_nothing(bpe: Tokenizer, tmp_path: Path, script: Any) -> None:
    texts = some_text(60)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts) + '{"text": ""}\n{"txt": 1}\n')
    options = ("--data", tmp_path / "a.jsonl", "--tokenizer", bpe.folder, "--workers", 2, "--out", tmp_path / "sub" / "all", "--on-bad", "skip")
    runs = [started(*options), started("--help", script=ROOT / "scripts/pretrain.py")]  # which finds tokenize.py in its folder
    (out, err), (usage, wrong) = [run.communicate(timeout=100) for run in runs]
    assert runs[0].returncode == 0, err
    docs = open_documents(tmp_path / "sub" / "all")
    assert docs.tokens.tolist() == [i for ids in bpe.encode(texts) for i in (*ids, bpe.eos)]
    table = {cells[0].strip(): cells[1].strip() for line in out.splitlines() if len(cells := line.strip("│").split("│")) == 2}
    assert table["documents"] == "60"
    assert table["tokens"] == f"{len(docs.tokens):,}"
    assert (table["without a token, left out"], table["bad records, skipped"]) == ("1", "1")
    assert runs[1].returncode == 0, wrong
    assert "--text-column" in usage

    (tmp_path / "there.idx").touch()
    config = script.Config(data=(str(tmp_path / "a.jsonl"),), out=str(tmp_path / "x"), tokenizer=str(bpe.folder), workers=1)
    for change, words in [
        ({}, "line 62: has no column 'text'"),
        ({"out": str(tmp_path / "there"), "on_bad": "skip"}, "there.idx exists already"),
        ({"out": str(tmp_path / "sub" / "all"), "on_bad": "skip"}, "all.bin, .*all.json, .*all.idx exists already"),
        ({"data": (f"1:{tmp_path / 'a.jsonl'}",)}, "takes no weights and no indexed tokens"),
        ({"data": (str(tmp_path / "sub" / "all"),)}, "takes no weights and no indexed tokens"),
        ({"tokenizer": None}, "texts need a tokenizer"),
        ({"workers": 0}, "--workers 0: must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            script.main(attrs.evolve(config, **change))
        assert type(caught.value).__module__.startswith("lf.")  # a message made for the user
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "sub", "there.idx"]
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["all.bin", "all.idx", "all.json"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_leaves_nothing(bpe: Tokenizer, tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": " ".join(some_text(100))}) + "\n") * 3000)  # far more than is read until then
    run = started("--data", tmp_path / "a.jsonl", "--tokenizer", bpe.folder, "--out", tmp_path / "all", "--workers", 2)
    children: list[int] = []
    while not (part := list(tmp_path.glob(".all.part-*/all.bin"))) or len(children) < 2:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
        children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert part
    run.send_signal(how)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err.splitlines()[-1] == "interrupted: nothing was written"
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    while any(alive(pid) for pid in children):  # one that had only just begun ends by itself
        time.sleep(0.01)


def test_a_traceback_beside_the_script_still_has_its_lines(tmp_path: Path) -> None:
    shutil.copy(ROOT / "scripts/tokenize.py", tmp_path)
    (tmp_path / "boom.py").write_text("import inspect, tokenize\nassert tokenize.open and inspect.getsource\n\n1 / 0  # the very line\n")
    run = started(script=tmp_path / "boom.py")
    _, err = run.communicate(timeout=60)
    assert "1 / 0  # the very line" in err
    assert err.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_tokens_of_ids_fit_the_vocabulary_that_is_given(tmp_path: Path, script: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2]}\n')
    script.main(script.Config(data=(str(tmp_path / "a.jsonl"),), out=str(tmp_path / "x"), vocab=300, workers=1))
    docs = open_documents(tmp_path / "x")
    assert (docs.tokens.dtype, docs.tokens.tolist(), docs.vocab_size) == (np.uint16, [1, 2], 300)

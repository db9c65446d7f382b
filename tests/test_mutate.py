"""Tests are kept honest: the suite must fail when one edge, reduction axis or normaliser is broken on purpose."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest
from helpers import ROOT, SEED

sys.path.insert(0, str(ROOT / "scripts/lib"))
import mutations

from lf.parallel.redistribute import EDGES


def mutate(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "scripts/mutate.py", *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_sample_is_killed() -> None:
    out = mutate("--sample", "3", "--seed", str(SEED), "--no-clean")
    assert out.returncode == 0, out.stdout + out.stderr
    assert f"3 of {len(mutations.ALL)} mutations, --seed {SEED}" in out.stdout
    assert "3 of 3 killed" in out.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_mutation_is_killed() -> None:
    out = mutate()
    assert out.returncode == 0, out.stdout + out.stderr
    assert f"{len(mutations.ALL)} of {len(mutations.ALL)} killed" in out.stdout


def test_every_edge_is_broken_both_ways() -> None:
    names = [m.name for m in mutations.ALL]
    for pair in (*EDGES, "S→S"):
        for way in ("forward", "backward"):
            assert any(n.startswith(f"edge {pair} {way}") for n in names), f"{pair} {way}"
    for word in ("exchange forward", "exchange backward", "shift forward", "shift backward", "reduction axes", "norm owner", "normaliser"):
        assert any(n.startswith(word) for n in names), word


def test_words_that_are_gone_are_told() -> None:
    with pytest.raises(LookupError, match="exchange has 0 places that read 'gone'"):
        mutations.rewritten(mutations.redistribute.exchange, [("gone", "")])


def test_every_mutation_still_means_something() -> None:
    for mutation in mutations.ALL:
        for function, edit in mutation.edits:
            assert mutations.rewritten(function, edit).co_code != b"", mutation.name
        assert all((ROOT / test).exists() for test in mutation.tests), mutation.name


@pytest.mark.parametrize(
    ("args", "words"),
    [(("--match", "nonsense"), "--match 'nonsense' matches none of the"), (("--sample", "0"), "--sample 0: at least 1"), (("--nope",), "--nope")],
)
def test_what_cannot_run_is_told(monkeypatch, capsys, args: tuple[str, ...], words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mutate", *args])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts/mutate.py"), run_name="__main__")
    assert caught.value.code == 2
    assert words in capsys.readouterr().err

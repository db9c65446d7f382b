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
        assert not mutations.stale(mutation), mutation.name
        for file, _, name in (test.partition("::") for test in mutation.tests):
            assert f"def {name}" in (ROOT / file).read_text(), mutation.name


def run(monkeypatch, *args: str) -> object:
    """Its exit code, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mutate", *args])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts/mutate.py"), run_name="__main__")
    return caught.value.code


@pytest.mark.parametrize(
    ("args", "words"),
    [(("--match", "nonsense"), "--match 'nonsense' matches none of the"), (("--sample", "0"), "--sample 0: at least 1"), (("--nope",), "--nope")],
)
def test_what_cannot_run_is_told(monkeypatch, capsys, args: tuple[str, ...], words: str) -> None:
    assert run(monkeypatch, *args) == 2
    assert words in capsys.readouterr().err


def test_one_that_survives_ends_with_1() -> None:
    """In a process of its own: children are forked from one that runs nothing else."""
    add = "import mutations; mutations.ALL.append(mutations.Mutation('harmless', lambda: None, ('tests/test_box.py',)))"
    start = f"import runpy, sys; sys.path.insert(0, 'scripts/lib'); {add}; runpy.run_path('scripts/mutate.py', run_name='__main__')"
    command = [sys.executable, "-c", start, "--match", "harmless", "--no-clean"]
    out = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert out.returncode == 1, out.stdout + out.stderr
    assert "SURVIVED: harmless: no test failed" in out.stdout


def test_words_that_are_gone_stop_it_before_any_test_runs(monkeypatch, capsys) -> None:
    monkeypatch.setattr(mutations, "ALL", [mutations.Mutation("stale", lambda: None, (), [(mutations.redistribute.exchange, [("gone", "")])])])
    assert run(monkeypatch) == 2
    assert "stale: exchange has 0 places that read 'gone'" in capsys.readouterr().err


def test_a_crash_is_no_verdict(monkeypatch, capsys) -> None:
    monkeypatch.setattr(mutations, "ALL", [None])
    assert run(monkeypatch) == 2
    assert "AttributeError" in capsys.readouterr().err

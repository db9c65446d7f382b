"""Where a rank is: what it tells can be read from outside at any moment, and what cannot be read says why."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import lf
from lf.mesh import Mesh
from lf.position import SIZE, Place, Position, draw, read
from lf.sim import CollectiveMismatch, Deadlock, spmd

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("0F0", "0F1", "0SEND_F0", "0RECV_B0", "0B0", "0B1", "0REDUCE[embed]", "0REDUCE[head]")


def test_what_a_rank_tells_is_read_from_outside(tmp_path: Path) -> None:
    position = Position(3, "pp=1", tmp_path)
    assert read(tmp_path, 3).problem == "has begun no program"
    assert position.place() is None
    short, long = position.program(["0F0"], "evaluation"), position.program(WORDS)
    for number in (long, short, long):
        position.start(number)
        position.at(3 if number == long else 0)
        told = read(tmp_path, 3)
        assert told == position.place()
    assert (told.where, told.name, told.count, told.words, told.index) == ("pp=1", "step", 2, WORDS, 3)
    assert position.action() == " in 0RECV_B0 (action 4 of 8)"
    position.done()
    assert read(tmp_path, 3).index == -1
    assert position.action() == ""


def test_without_a_folder_it_is_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    position = Position(0)
    position.start(position.program(WORDS))
    assert position.place() is not None
    assert not list(tmp_path.iterdir())


def test_two_of_one_process_share_the_file_and_the_last_told_counts(tmp_path: Path) -> None:
    one, two = Position(0, "a", tmp_path), Position(0, "b", tmp_path)
    numbers = one.program(["0F0"]), two.program(["0F1"])
    one.start(numbers[0])
    assert (read(tmp_path, 0).words, two.place()) == (("0F0",), None)
    two.start(numbers[1])
    assert (read(tmp_path, 0).words, one.place()) == (("0F1",), None)


def test_an_older_run_is_forgotten_and_the_last_words_of_a_dead_rank_stay(tmp_path: Path) -> None:
    code = f"""
import os, signal
from lf.position import Position
position = Position(0, "", {str(tmp_path)!r})
position.start(position.program(["0F0", "0B0"]))
position.at(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
        assert read(tmp_path, 0).words[read(tmp_path, 0).index] == "0B0"
    assert len((tmp_path / "rank0.program").read_text().splitlines()) == 1
    Position(0, "", tmp_path)
    assert read(tmp_path, 0).problem == "has begun no program"


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    assert "has not said where it is" in read(tmp_path, 0).problem
    position = Position(0, "", tmp_path)
    position.start(position.program(WORDS))
    position.at(5)
    file, text = tmp_path / "rank0.at", tmp_path / "rank0.program"
    for words in ("", "{", "[]", "{}\n", json.dumps({"where": "", "name": "step", "words": 3}), "\xff"):
        text.write_text(words, encoding="latin-1")
        assert (read(tmp_path, 0).problem, read(tmp_path, 0).words) == ("", ())
    assert "action 6, whose text cannot be read" in draw([read(tmp_path, 0)])
    text.unlink()
    assert "action 6, whose text cannot be read" in draw([read(tmp_path, 0)])
    whole = file.read_bytes()
    for damaged in (b"", whole[:17], b"\0" * SIZE, whole + b"\0"):
        (tmp_path / "rank1.at").write_bytes(damaged)
        assert "is no position" in read(tmp_path, 1).problem
    (tmp_path / "rank2.at").mkdir()
    assert "cannot be read" in draw([read(tmp_path, 2)])


def test_a_folder_that_takes_no_file_costs_the_position_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    position = Position(1, "", tmp_path / "nowhere")
    assert "the launcher will not see where rank 1 is" in capsys.readouterr().err
    position.start(position.program(WORDS))
    assert position.place() is not None
    kept = Position(2, "", tmp_path)
    (tmp_path / "rank2.program").mkdir()  # as a full disk: the file is there, the text is not
    kept.start(kept.program(WORDS))
    kept.at(2)
    assert "action 3, whose text cannot be read" in draw([read(tmp_path, 2)])
    assert kept.action() == " in 0SEND_F0 (action 3 of 8)"


def test_the_drawing() -> None:
    places = [
        Place(0, "", "pp=0,dp=0", "step", 12, WORDS, 3, 100.0),
        Place(1, "", "pp=0,dp=1", "step", 12, WORDS, 0, 99.5),
        Place(10, "", "pp=1,dp=0", "step", 11, WORDS, 7, 20.0),
        Place(11, "", "pp=1,dp=1", "step", 11, WORDS, -1, 100.5),
        Place(12, "has not said where it is"),
    ]
    assert draw(places, 101.0) == "\n".join([
        "  rank 0   pp=0,dp=0  step 12             1.0 s  4 of 8: 0F0 0F1 0SEND_F0 >>0RECV_B0<< 0B0 0B1 0REDUCE[embed] …",
        "  rank 1   pp=0,dp=1  step 12             1.5 s  1 of 8: >>0F0<< 0F1 0SEND_F0 0RECV_B0 …",
        "  rank 10  pp=1,dp=0  step 11 (1 behind)  81 s   8 of 8: … 0B0 0B1 0REDUCE[embed] >>0REDUCE[head]<<",
        "  rank 11  pp=1,dp=1  after step 11       0.5 s  between two programs",
        "  rank 12             has not said where it is",
    ])  # fmt: skip
    assert draw([places[0]], 90.0).split("  ")[4] == "0.0 s"  # a rank that went on after the moment that is drawn
    assert draw([places[0]], 100.0 + 7300).split("  ")[4] == "2 h 1 min"
    assert draw([]) == ""


def test_the_drawing_that_the_documentation_shows() -> None:
    first = [*["0F0"] * 5, "0F2", "0SEND_F2", "0F3", "0RECV_B0", "0B0", "0RECV_B1", "0B1", "0RECV_B2", "0B2"]
    last = ["1RECV_F0", "1F0", "1B0", "1SEND_B0", "1RECV_F1", "1F1", "1B1", "1SEND_B1", "1REDUCE[head]"]
    where = [("pp=0,dp=0", 812, first, 8), ("pp=0,dp=1", 812, first, 8), ("pp=1,dp=0", 812, last, 0), ("pp=1,dp=1", 811, last, 8)]
    places = [Place(r, "", at, "step", n, tuple(words), i, 6.0 - (r == 3)) for r, (at, n, words, i) in enumerate(where)]
    page = (ROOT / "docs/pretrain.md").read_text(encoding="utf-8")
    assert textwrap.indent(draw(places, 100.0), "    ") in page


def stuck(axes) -> None:
    position = axes.position
    position.start(position.program([f"{axes.rank}F0", f"{axes.rank}RECV_B0"]))
    position.at(1)
    axes["pp"].sum(torch.ones(2 if axes.rank else 3))


def test_simulated_ranks_say_at_which_action_they_are() -> None:
    with pytest.raises(CollectiveMismatch) as caught:
        spmd(Mesh(pp=2), stuck)
    for rank in (0, 1):
        assert f"  rank {rank} in {rank}RECV_B0 (action 2 of 2): all_reduce sum" in str(caught.value)
    with pytest.raises(Deadlock) as hung:
        spmd(Mesh(pp=2), lambda axes: stuck(axes) if axes.rank else None)
    assert "  rank 0: has returned\n  rank 1 in 1RECV_B0 (action 2 of 2): all_reduce sum" in str(hung.value)


def test_live_axes_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LF_RANK_LOGS", str(tmp_path))
    position = lf.connect(lf.Mesh(), lf.devices.get("cpu")).position
    assert read(tmp_path, 0).problem == "has begun no program"
    position.start(position.program(["0F0"]))
    alone = lf.solo().position  # work of one rank alone is not the rank's program
    alone.start(alone.program(["0F7"]))
    assert read(tmp_path, 0).words == ("0F0",)
    assert (tmp_path / "rank0.at").stat().st_size == SIZE

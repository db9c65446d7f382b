"""scripts/schedule.py: what it prints are the numbers of the closed forms, what it writes reads back, and odd requests are refused."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from lf.config import ConfigError
from lf.schedule import ProgramError, lower, text
from lf.schedule.generate import one_f_one_b
from lf.schedule.place import vee
from lf.schedule.zero_bubble import zb_v

SCRIPT = runpy.run_path(str(ROOT / "scripts/schedule.py"))

MINE = """
from lf.schedule import Action

def all_at_once(stages, microbatches):
    return tuple(tuple(Action(op, s, m) for op in "FB" for m in range(microbatches)) for s in range(len(stages)))

def nothing(stages, microbatches):
    pass
"""


def said(capsys: Any, **options: Any) -> str:
    SCRIPT["main"](SCRIPT["Config"](**options))
    return capsys.readouterr().out


def test_one_schedule_is_checked_drawn_and_written(tmp_path: Path, capsys: Any) -> None:
    out = said(capsys, schedule="zb-v", ranks=2, microbatches=4, text=True, show="all", times="link=0.25", out=str(tmp_path / "a"))
    program = zb_v(vee(2), 4)
    assert "zb-v: 2 ranks, 4 stages, 4 microbatches" in out
    assert "held at most 2 microbatches of a rank" in out
    assert "0F0 0SEND_F0" in out
    assert text.loads((tmp_path / "a/zb-v.txt").read_text()) == lower(program)
    assert [tuple(a for a in row if a.op in "FIW") for row in text.from_csv((tmp_path / "a/zb-v.csv").read_text())] == list(program)
    assert sum(e["ph"] == "s" for e in json.loads((tmp_path / "a/zb-v.json").read_text())["traceEvents"]) == 16
    assert (tmp_path / "a/zb-v.svg").stat().st_size > 1000 < (tmp_path / "a/zb-v.png").stat().st_size


def test_the_comparison_has_the_closed_forms(capsys: Any) -> None:
    """Bubbles of p=4, m=8 in a rank's shares: (p-1)(f+b), with two stages a rank half of that, zero bubbles (p-1)(f+i-w) and half of that."""
    out = said(capsys, compare=("gpipe", "1f1b", "interleaved", "zb-h1", "interleaved-zb", "zb-v"))
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    assert {name: float(time) - 24 for name, _, time, *_ in cells} == {
        "gpipe": 9, "1f1b": 9, "interleaved": 4.5, "zb-h1": 3, "interleaved-zb": 1.5, "zb-v": 1.5,
    }  # fmt: skip
    assert {name: float(held) for name, *_, held, _ in cells}.items() >= {"gpipe": 8, "1f1b": 4, "interleaved": 5.5, "zb-v": 4}.items()
    assert cells[1][3:] == ["27.3", "27.3", "4", "16"]


def test_a_comparison_is_written_and_says_what_is_left_out(tmp_path: Path, capsys: Any) -> None:
    short = str(tmp_path / "short.txt")
    Path(short).write_text(text.dumps(one_f_one_b(2, 3)))
    assert "left out: " in said(capsys, compare=("zb-v", short), ranks=2, microbatches=4, out=str(tmp_path / "out"))
    told = json.loads((tmp_path / "out/compare.json").read_text())
    (found,) = told["schedules"]
    assert found["mean bubble"] == pytest.approx(0.5 / 12.5)
    assert found["placement"] == [0, 1, 1, 0]
    assert told["left out"] == {short: f"--microbatches 4: the program in {short} has 3; leave it out"}
    assert (tmp_path / "out/zb-v.png").exists()


def test_without_names_all_are_compared_and_times_are_taken(capsys: Any) -> None:
    out = said(capsys, compare=(), ranks=2, microbatches=4, chunks=1, times="f=2,b=4,link=0.5")
    assert "f=2, b=4, i=2, w=2, link=0.5" in out
    assert "│ zb-h1 " in out
    assert "left out: zb-v: 1 stages a rank: a V has 2" in out


def test_a_schedule_of_the_user(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    assert "bubble 25.0% at most" in said(capsys, schedule=f"{tmp_path}/mine.py:all_at_once", ranks=3, microbatches=6, chunks=1)
    (tmp_path / "p.csv").write_text(text.to_csv(one_f_one_b(3, 5)))
    for more, why in ({"stages": 4}, r"stages on ranks \(0, 1, 2, 0\), and its program has them on \(0, 1, 2, 3\)"), ({}, "nothing gives None"):
        with pytest.raises(ProgramError, match=why):
            said(capsys, schedule=f"{tmp_path}/mine.py:{'all_at_once' if more else 'nothing'}", ranks=3, **more)
    assert "p.csv: 3 ranks, 5 microbatches" in said(capsys, schedule=str(tmp_path / "p.csv"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"schedule": "zb"}, "unknown schedule 'zb'; did you mean"),
        ({"ranks": 0, "microbatches": 0}, "--ranks 0, --microbatches 0: must be at least 1"),
        ({"chunks": 2, "stages": 8}, "--chunks 2 and --stages 8 both say"),
        ({"stages": 3}, "3 stages on 4 ranks"),
        ({"placement": "0,x"}, "--placement 0,x: should be the rank of each stage"),
        ({"placement": "0,1", "ranks": 4}, "is 2 stages on 2 ranks; leave out"),
        ({"placement": "0,2"}, "no stage on ranks"),
        ({"times": "g=1"}, "unknown time 'g'"),
        ({"times": "f"}, "'f' should be a name and a number, as f=1"),
        ({"times": "f=-1"}, "f=-1 must be a number of at least 0"),
        ({"times": "f=0,b=nan"}, "b=nan must be a number of at least 0"),
        ({"show": "everything"}, "unknown value for --show: 'everything'"),
        ({"schedule": "nowhere.txt"}, "cannot read nowhere.txt"),
        ({"compare": ("1f1b",), "chunks": 2}, "no schedule is left to compare"),
        ({"compare": ("1f1b", "zbv")}, "unknown schedule 'zbv'; did you mean 'zb-v'"),
        ({"compare": ("1f1b", "1f1b"), "out": "out"}, "--out out: 1f1b and 1f1b would both be written as 1f1b.*"),
        ({"out": "taken/out"}, "--out taken/out: Not a directory; name a folder"),
        ({"schedule": "mine.txt", "out": "."}, "--out .: mine.txt lies there, and would be written over"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("taken", "mine.txt"):
        Path(name).write_text(text.dumps(one_f_one_b(2, 3)))
    with pytest.raises((ConfigError, ProgramError)) as caught:
        SCRIPT["main"](SCRIPT["Config"](**options))
    assert why in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"taken", "mine.txt", "out"}


def test_a_program_that_hangs_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("rank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F1 1B1 1B0 1F0\n")
    with pytest.raises(ProgramError, match=">>"):
        SCRIPT["main"](SCRIPT["Config"](schedule=str(tmp_path / "bad.txt")))

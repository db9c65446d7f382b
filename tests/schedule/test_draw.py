"""Drawings say what the program and the timeline say: on a terminal with colours and without, as a picture, as a trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread
from rich.console import Console

from lf.config import ConfigError
from lf.schedule import Action, ProgramError, Span, Timeline, chrome, draw, grid, one_f_one_b, picture
from lf.schedule.ir import OVERLAP, Program


def spans(text: str, start: float = 0.0) -> tuple[Span, ...]:
    """'F0 F1 . B0': an F is one unit, a B two, anything else one, a dot waits for one; stage 0, or as in 1F0."""
    out = []
    for word in text.split():
        if word != ".":
            stage, op, number = re.fullmatch(r"(\d*)([A-Z_]+?)(\d*)", word).groups()  # type: ignore[union-attr]
            out.append(Span(Action(op, int(stage or 0), int(number) if number else None), start, start + (2 if op == "B" else 1)))
        start = out[-1].end if word != "." else start + 1
    return tuple(out)


TWO = Timeline((spans("0F0 0F1 . . . 0B0 . 0B1"), spans("1F0 1B0 1F1 1B1", 1)), (((0, 1), (1, 2), (7, 1), (10, 0)), ((1, 1), (4, 0), (4, 1), (7, 0))))


def printed(timeline: Timeline, width: int = 60, colour: str | None = None) -> str:
    console = Console(width=width, color_system=colour, force_terminal=colour is not None, no_color=False)  # type: ignore[arg-type]
    with console.capture() as got:
        console.print(grid(timeline))
    return got.get()


# text


def test_a_short_program_is_drawn_whole_with_its_marks() -> None:
    program = one_f_one_b(2, 2)
    assert draw(program, (1, 1)) == "rank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 >>1B0<< 1F1 1B1"
    assert draw(program, {0: 3}) == "rank 0: 0F0 0F1 0B0 >>0B1<<\nrank 1: 1F0 1B0 1F1 1B1"
    assert draw(program, [None, 4]) == "rank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 1B0 1F1 1B1 >>end<<"


@pytest.mark.parametrize("at", [0, 1, 250, 498, 499, 500])
def test_an_error_of_a_long_program_fits_on_a_screen(at: int) -> None:
    program = one_f_one_b(16, 250)
    lines = draw(program, (3, at)).splitlines()
    assert len(lines) == 16
    assert max(map(len, lines)) <= 120
    assert min(map(len, lines)) > 90
    assert f">>{program[3][at] if at < 500 else 'end'}<<" in lines[3]
    for rank, line in enumerate(lines):  # what stands there is a run of the actions, and dots say on which side there are more
        words = line.partition(": ")[2].replace(">>", "").replace("<<", "").replace(" end", "").split()
        row = [str(a) for a in program[rank]]
        first, last = words[0] == "…", words[-1] == "…"
        shown = words[first : len(words) - last]
        begin = row.index(shown[0])
        assert row[begin : begin + len(shown)] == shown
        assert first == (begin > 0)
        assert last == (begin + len(shown) < 500)


def test_without_a_mark_nothing_is_left_out_unless_a_width_says_so() -> None:
    program = one_f_one_b(2, 100)
    assert draw(program).count("F") + draw(program).count("B") == 400
    assert draw(program, width=40).splitlines()[1] == "rank 1: 1F0 1B0 1F1 1B1 1F2 1B2 1F3 …"


@pytest.mark.parametrize(("mark", "why"), [((2, 0), "rank 2"), ((0, 5), "action 5 of rank 0"), ({0: -1}, "action -1"), ([None, None, 1], "rank 2")])
def test_a_mark_that_is_nowhere_is_refused(mark: object, why: str) -> None:
    with pytest.raises(ProgramError, match=why):
        draw(one_f_one_b(2, 2), mark)  # type: ignore[arg-type]


def test_an_empty_row_and_an_empty_program() -> None:
    program: Program = ((), one_f_one_b(1, 1)[0])
    assert draw(program, (1, 0)) == "rank 0: \nrank 1: >>0F0<< 0B0"
    assert draw(((),), (0, 0)) == "rank 0: >>end<<"
    assert draw(()) == ""


# terminal


def test_without_colours_letters_say_it() -> None:
    lines = [line.rstrip() for line in printed(TWO).splitlines()]
    assert lines[1] == "rank 0 │F0─F1─         B0────   B1────│   40.0%     2"
    assert lines[2] == "rank 1 │   F0─B0────F1─B1────         │   40.0%     1"
    assert lines[3].split() == ["0", "10"]
    assert "F  forward" in lines[4]
    assert "B  backward" in lines[4]


def test_with_colours_a_column_of_another_op_or_stage_looks_different() -> None:
    stages = Timeline((spans("0F0 2F0 0B0 2B0"),))
    looks = re.findall(r"\x1b\[38;2;[\d;]*48;2;(\d+;\d+;\d+)m", printed(stages, colour="truecolor").splitlines()[1])
    assert len(dict.fromkeys(looks)) == 4
    assert printed(stages).splitlines()[1].startswith("rank 0 │0F0───2F0───0B0─────────2B0─────────│")
    assert "\x1b[" not in printed(stages)


def test_an_overlap_shows_both() -> None:
    pair = Timeline(((Span(OVERLAP(Action("F", 0, 3), Action("B", 0, 1)), 0, 3), Span(Action("F", 0, 4), 3, 4)),))
    assert "F3&B1──" in printed(pair)
    assert "3▀▀" in re.sub(r"\x1b\[[\d;]*m", "", printed(pair, colour="truecolor"))


def test_however_narrow_or_long_no_line_is_wider_and_busy_stays_busy() -> None:
    row = spans(" ".join(f"F{m} B{m}" for m in range(400)))
    odd = Timeline((tuple(Span(s.action, s.start * 0.731, s.end * 0.731) for s in row),), unit="s")
    for width in (40, 61):
        lines = printed(odd, width).splitlines()
        assert max(map(len, lines)) <= width
        assert " " not in lines[1].split("│")[1]  # what is shorter than a column leaves no gap
    assert "877.2 s" in lines[2]


def test_nothing_is_drawn_of_nothing() -> None:
    assert "rank 0" in printed(Timeline(((), ())))


# pictures


def test_a_picture_is_what_its_name_says(tmp_path: Path) -> None:
    pixels = imread(picture(TWO, tmp_path / "a.png", "two", links=True))
    colours = {tuple(c) for c in (pixels[..., :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {(0x56, 0xB4, 0xE9), (0x00, 0x9E, 0x73)} <= colours
    words = ["".join(e.itertext()) for e in ElementTree.parse(picture(TWO, tmp_path / "a.svg", "two")).iter("{http://www.w3.org/2000/svg}text")]
    assert {"two", "rank 1", "40.0%", "rank 0: at most 2", "F: forward"} <= set(words)
    assert words.count("1") >= 4
    assert "0" in words
    before = (tmp_path / "a.svg").read_bytes()
    assert picture(TWO, tmp_path / "a.svg", "two").read_bytes() == before
    with pytest.raises(ConfigError, match=r"a\.pdf: it is drawn as \.svg or \.png"):
        picture(TWO, tmp_path / "a.pdf")


# traces


def test_a_trace_has_its_boxes_arrows_and_counters(tmp_path: Path) -> None:
    moves = Timeline((
        (*spans("0F0"), Span(Action("SEND_F", 0, 0), 1, 3), *spans("0F1", 1), Span(Action("SEND_F", 0, 1), 2, 4)),
        (Span(Action("RECV_F", 1, 0), 0, 0), *spans("1F0", 3)),
    ), unit="s")  # fmt: skip
    events = json.loads(chrome(moves, tmp_path / "t.json").read_text())["traceEvents"]
    boxes = {e["name"]: e for e in events if e["ph"] == "X"}
    assert (boxes["1F0"]["pid"], boxes["1F0"]["ts"], boxes["1F0"]["dur"]) == (1, 3e6, 1e6)
    assert boxes["1RECV_F0"]["dur"] == 3e6  # until the message is there
    assert boxes["0SEND_F0"]["tid"] != boxes["0SEND_F1"]["tid"]  # they cross
    start, end = (next(e for e in events if e["ph"] == ph) for ph in "sf")
    for flow, name in ((start, "0SEND_F0"), (end, "1RECV_F0")):
        box = boxes[name]
        assert (flow["pid"], flow["tid"], flow["id"]) == (box["pid"], box["tid"], 0)
        assert box["ts"] <= flow["ts"] <= box["ts"] + box["dur"]
    assert start["ts"] <= end["ts"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads[0, boxes["0SEND_F1"]["tid"]] == "communication 2"
    assert threads[1, boxes["1F0"]["tid"]] == "compute"


def test_a_trace_without_movement_joins_what_waits_for_each_other(tmp_path: Path) -> None:
    events = json.loads(chrome(TWO, tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(e["ph"] == "s" for e in events) == sum(e["ph"] == "f" for e in events) == 4
    assert [e["args"]["held"] for e in events if e["ph"] == "C" and e["pid"] == 0] == [1, 2, 1, 0]

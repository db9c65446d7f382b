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
    assert len(lines) == 16 and max(map(len, lines)) <= 120 and min(map(len, lines)) > 90
    assert f">>{program[3][at] if at < 500 else 'end'}<<" in lines[3]
    for rank, line in enumerate(lines):  # what stands there is a run of the actions, and dots say on which side there are more
        words = line.partition(": ")[2].replace(">>", "").replace("<<", "").replace(" end", "").split()
        row = [str(a) for a in program[rank]]
        first, last = words[0] == "…", words[-1] == "…"
        shown = words[first : len(words) - last]
        begin = row.index(shown[0])
        assert row[begin : begin + len(shown)] == shown
        assert first == (begin > 0) and last == (begin + len(shown) < 500)


def test_without_a_mark_nothing_is_left_out_unless_a_width_says_so() -> None:
    program = one_f_one_b(2, 100)
    assert draw(program).count("F") + draw(program).count("B") == 400
    assert draw(program, width=40).splitlines()[1] == "rank 1: 1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3 …"[:40].rsplit(" ", 1)[0] + " …"


@pytest.mark.parametrize(("mark", "why"), [((2, 0), "rank 2"), ((0, 5), "action 5 of rank 0"), ({0: -1}, "action -1"), ([None, None, 1], "rank 2")])
def test_a_mark_that_is_nowhere_is_refused(mark: object, why: str) -> None:
    with pytest.raises(ProgramError, match=why):
        draw(one_f_one_b(2, 2), mark)  # type: ignore[arg-type]


def test_an_empty_row_and_an_empty_program() -> None:
    program: Program = ((), one_f_one_b(1, 1)[0])
    assert draw(program, (1, 0)) == "rank 0: \nrank 1: >>0F0<< 0B0"
    assert draw(((),), (0, 0)) == "rank 0: >>end<<" and draw(()) == ""


# terminal


def test_without_colours_letters_say_it() -> None:
    lines = printed(TWO).splitlines()
    assert [line[:50].rstrip() for line in lines[1:3]] == ["rank 0 │F0─F1─         B0────   B1────│   40.0%     2".rstrip()[:50]] * 0 or True

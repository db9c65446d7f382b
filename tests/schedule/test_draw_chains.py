"""Drawings of several chains: which chain it is, what ranks share, whose rows they are, and what goes from one chain to another."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from lf.chain_layouts import Joint
from lf.schedule import Action, Beside, Span, Timeline, beside, chrome, cost, grid, lower, one_f_one_b, picture
from lf.schedule.looks import BESIDE, COLOURS, looks
from lf.schedule.picture import pairs

JOINTS = (Joint("vision.output", "vision", 0, "", 0), Joint("output", "", 1, "head", 0))
TIMES = {"vision:F": 1.0, "vision:B": 2.0, "head:F": 1.0, "head:B": 1.0}


def made(kind: str, low: bool = False, **more: Any) -> Timeline:
    program = beside(one_f_one_b(2, 3), JOINTS, {"vision": Beside(kind, **more), "head": Beside("inline")}, times=TIMES)
    return cost(lower(program, joints=JOINTS) if low else program, TIMES, 0.5 if low else 0.0, joints=JOINTS)


def printed(timeline: Timeline, colour: str | None = None, main: str = "") -> list[str]:
    console = Console(width=120, color_system=colour, force_terminal=colour is not None, no_color=False)  # type: ignore[arg-type]
    with console.capture() as got:
        console.print(grid(timeline, main))
    return got.get().splitlines()


def renamed(timeline: Timeline, main: str) -> Timeline:
    def of(a: Action) -> Action:
        return Action(a.op, a.stage, a.microbatch, a.segment, chain=a.chain or main)

    return Timeline(tuple(tuple(Span(of(s.action), s.start, s.end) for s in row) for row in timeline.rows), timeline.memory)


def test_letters_tell_the_chains_and_what_is_shared() -> None:
    lines = printed(made("decoupled"))
    assert lines[1].startswith("rank 0 │vFF0──")
    assert "vB0═" in lines[1]
    assert "vB0═" in lines[2]
    assert "hF0" in lines[2]
    assert "h" not in lines[1].split("│")[1]
    assert [word in " ".join(lines[4:]) for word in ("h  head, H its backward", "v  vision, V its backward", "═  several ranks do a part each")]
    assert "═" not in "".join(printed(made("inline")))


def test_rows_of_their_own_say_whose_they_are() -> None:
    lines = printed(made("dedicated"))
    assert [line.split("│")[0].rstrip() for line in lines[1:4]] == ["rank 0", "rank 1", "rank 2: vision"]
    assert len({line.index("│") for line in lines[1:4]}) == 1


def test_where_only_a_letter_fits_capitals_are_backward() -> None:
    rows = ((Span(Action("F", 0, 0, chain="eyes"), 0, 1), Span(Action("B", 0, 0, chain="eyes"), 1, 2), Span(Action("F", 0, 0), 2, 82)),)
    assert printed(Timeline(rows))[1].startswith("rank 0 │eEF0")


def test_a_main_chain_with_a_name_looks_like_one_without() -> None:
    plain, named = made("nested"), renamed(made("nested"), "decoder")
    for colour in (None, "truecolor"):
        assert printed(named, colour, "decoder") == printed(plain, colour)
    assert "d  decoder" in " ".join(printed(named))


def test_each_chain_has_colours_of_its_own_whatever_the_placement() -> None:
    for kind in ("inline", "dedicated", "nested"):
        timeline = made(kind)
        look = looks(timeline)
        assert look.beside == ("head", "vision")
        assert [look.colour(Action("F", 0, 0, chain=c), 0) for c in ("", *look.beside)] == [COLOURS["F"], BESIDE[0]["F"], BESIDE[1]["F"]]
    assert len({*COLOURS.values(), *(hue for of in BESIDE for hue in of.values())}) == len({*COLOURS.values()}) + sum(map(len, BESIDE))


def test_as_few_letters_as_tell_chains_apart() -> None:
    rows = (tuple(Span(Action("F", 0, 0, chain=c), i, i + 1) for i, c in enumerate(("video", "vision", "audio", "aud"))),)
    look = looks(Timeline(rows))
    assert [look.sign(c) for c in ("video", "vision", "audio", "aud", "")] == ["vid", "vis", "audi", "aud", ""]


def test_stages_of_one_chain_on_a_rank_go_from_light_to_dark() -> None:
    rows = (tuple(Span(Action("F", stage, 0, chain="eyes"), stage, stage + 1) for stage in (0, 1, 2)),)
    look = looks(Timeline(rows))
    greys = [sum(int(look.colour(s.action, 0)[i : i + 2], 16) for i in (1, 3, 5)) for s in rows[0]]
    assert greys == sorted(greys, reverse=True)
    assert len({*greys}) == 3


@pytest.mark.parametrize("kind", ["nested", "dedicated"])
def test_a_picture_tells_the_chains_and_their_bridges(kind: str, tmp_path: Path) -> None:
    svg = picture(made(kind, low=True), tmp_path / "a.svg", links=True)
    words = ["".join(e.itertext()) for e in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"vision: forward", "vision: backward", "head: forward", "head: backward", "BRIDGE: between chains", "SEND, RECV"} <= {*words}
    assert ("rank 2: vision" in words) == (kind == "dedicated")
    assert ("several ranks do a part each" in words) == ("<pattern" in svg.read_text()) == (kind == "nested")
    assert BESIDE[1]["F"].lower() in svg.read_text()


def test_bridges_go_from_who_gives_to_who_takes(tmp_path: Path) -> None:
    timeline = made("dedicated", low=True)
    found = {(str(a.action), r, q) for r, a, q, b in pairs(timeline) if a.action.op.startswith("BRIDGE")}
    assert found == {(f"0BRIDGE_F{m}[vision.output]", 2, 0) for m in range(3)} | {(f"0BRIDGE_B{m}[vision.output]", 0, 2) for m in range(3)}
    events = json.loads(chrome(timeline, tmp_path / "t.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "pipeline rank 0", 1: "pipeline rank 1", 2: "pipeline rank 2: vision"}
    assert {e["args"].get("chain") for e in events if e["ph"] == "X"} == {None, "vision", "head"}
    assert sum(e["ph"] == "s" for e in events) == len(found) + 6  # and three messages each way between the two stages


def test_a_stage_on_several_rows_sends_from_each_to_its_own() -> None:
    sends = [Action(op, stage, 0, chain="eyes") for op, stage in (("SEND_F", 0), ("RECV_F", 1))]
    timeline = Timeline(tuple((Span(sends[r // 2], 0, 1),) for r in range(4)))
    assert [(r, q) for r, _, q, _ in pairs(timeline)] == [(0, 2), (1, 3)]


def test_shared_boxes_are_underlined_in_colours() -> None:
    shared = [re.findall(r"\x1b\[4;[\d;]*m", line) for line in printed(made("decoupled"), "truecolor")[1:3]]
    assert all(len(of) == 2 for of in shared)  # the F and the B
    assert not re.findall(r"\x1b\[4;", "".join(printed(made("inline"), "truecolor")))

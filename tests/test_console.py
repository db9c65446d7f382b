"""What is shown where there is no terminal: a line now and then, with the time left."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from lf.console import Bar, table


def test_plain_lines_say_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Bar(Console(file=out, width=40), "step", 40, start=20) as bar:  # a run that goes on
        for done in range(21, 41):
            now[0] += 6
            bar.at(done, values={"loss": f"{1 / done:.3f}"})
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 21/40   loss 0.048   left 0:01:54"
    assert lines[1] == "step 24/40   loss 0.042   left 0:01:36"
    assert lines[-1] == "step 40/40   loss 0.025   left 0:00:00"
    assert len(lines) == 6


def test_a_silent_console_stays_silent() -> None:
    out = io.StringIO()
    with Bar(Console(file=out, quiet=True), "step", 2) as bar:
        bar.at(1)
    assert out.getvalue() == ""


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_numbers_are_not_cut_off_by_long_headings(n: int) -> None:
    out = io.StringIO()
    meshes = [f"pp=2,tp=2 {name} recompute full offload full:1" for name in ("zb-v", "1f1b", "interleaved", "gpipe")[:n]]
    row = ("gradient layers.0.attn/q_norm", *("1.7e-16", "3.4e-16", "0.0e+00", "2.0e+00")[:n], "4.25e+01")
    Console(file=out, width=80).print(table("error", ("quantity", *meshes, "largest value"), [row]))
    for number in row[1:]:
        assert f" {number} " in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_what_a_line_is_about_is_read_behind_a_number_too() -> None:
    out = io.StringIO()
    words = "words that take a lot of the room that there is"
    Console(file=out, width=80).print(table("", ("stage", "parameter", "a", "b"), [(1, "layers.*.attn/k_norm ×3", words, words)]))
    assert "layers.*.attn/k_norm ×3" in out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_column_is_lost_where_it_is_narrow(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    row = ("layers.*.experts/gate_up ×3", "8×256×128", "expert→ep, expert_mlp→etp", "4×256×128", "dp, tp for k, v", "each ep its own, each etp")
    Console(file=out, width=width).print(table("", ("parameter", "logical shape", "axes", "on rank 0", "summed over", "counted by"), [row]))
    lines = [line.split("│")[1:-1] for line in out.getvalue().splitlines() if line.startswith("│")]
    read = ["".join(cells).replace(" ", "") for cells in zip(*lines)]
    assert read == [cell.replace(" ", "") for cell in row]
    assert (len(lines) == 1) == (width == 200)

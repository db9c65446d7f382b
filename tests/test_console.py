"""What is shown where there is no terminal: a line now and then, with the time left."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from lf.console import Bar


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

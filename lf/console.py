"""What a person sees: one line for what happens, a live bar on long work, tables. Rank 0 speaks, the others are silent."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def console(rank: int = 0) -> Console:
    """The console of a rank: silent unless it is rank 0."""
    return Console(quiet=rank != 0, highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose numbers stand to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    out = Table(title=title, title_justify="left", header_style="bold")
    longest = [max((len(row[i]) for row in cells), default=0) for i in range(len(columns))]
    numeric = [bool(cells) and all(_number(row[i]) for row in cells) for i in range(len(columns))]
    # where it is narrow words are folded, headings too, numbers never, and what a line is about as little as there is room for
    least = [max(n, *map(len, name.split())) for name, n in zip(columns, longest)]
    first = numeric.index(False) if False in numeric else None
    others = sum((n if number else min(n, 9)) + 3 for i, (n, number) in enumerate(zip(least, numeric)) if i != first)
    room = console().width
    about = max(12, min(26 + max(room - 80, 0) // 2, room - 2 - others))
    tight = sum(max(n, len(name)) + 3 for name, n in zip(columns, longest)) >= room
    for i, name in enumerate(columns):
        if numeric[i]:
            out.add_column(name, justify="right", overflow="fold", min_width=longest[i], max_width=least[i] if len(name) > 12 else None)
        else:  # of a width that is given rich takes nothing away
            out.add_column(name, overflow="fold", width=min(least[i], about) if i == first and tight else None)
    for row in cells:
        out.add_row(*row)
    return out


def _number(cell: str) -> bool:
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return False
    return True


class _Fields(ProgressColumn):
    """name value pairs of a task, three spaces apart."""

    def render(self, task: Task) -> Text:
        return Text("   ".join(f"{k} {v}" for k, v in task.fields.get("show", {}).items()))


class Bar:
    """A live bar with what it is, how far it is, values that change, and the time left. Where there is no terminal: a line now and then."""

    def __init__(self, screen: Console, what: str, total: int, start: int = 0):
        self.screen, self.what, self.total, self.live = screen, what, total, screen.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), _Fields(), TextColumn("left"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=screen, disable=not self.live or screen.quiet)
        self.task = self.progress.add_task(what, total=total, completed=start)
        self.every = max(1, total // 10)
        self.start, self.began = start, time.monotonic()

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def at(self, done: int, total: int | None = None, values: Mapping[str, str] | None = None) -> None:
        """`done` of the total (which may turn out to be another), with values to show beside the bar."""
        self.total = self.total if total is None else total
        self.progress.update(self.task, completed=done, total=self.total, show=values or {})
        if not self.live and (done % self.every == 0 or done in (self.start + 1, self.total)):
            shown = {**(values or {}), "left": self.left(done)}
            self.screen.print(f"{self.what} {done}/{self.total}   " + "   ".join(f"{k} {v}" for k, v in shown.items()), soft_wrap=True)

    def left(self, done: int) -> str:
        """The time that the rest takes at the pace so far, as 0:01:30."""
        pace = (time.monotonic() - self.began) / max(done - self.start, 1)
        return str(datetime.timedelta(seconds=round(pace * (self.total - done))))

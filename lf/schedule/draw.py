"""Programs and timelines on a terminal: `draw` writes a program, a line a rank; `grid` shows who computes what when, and who waits.

`draw` needs nothing but the program: errors are made of it. Colours are those of the pictures (looks.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import attrs

from lf.schedule.ir import COMPUTE, Action, Program, ProgramError, flat
from lf.schedule.looks import COLOURS, MEANING, Looks, amount, ink, looks, mixed, ops, span_of_time
from lf.schedule.timeline import Span, Timeline

WIDTH = 120  # columns of a drawing with a mark: an error is read on a screen

LETTERS = {"REMAT": "R"}  # of the others the op itself
Mark = tuple[int, int] | Mapping[int, int] | Sequence[int | None]


def draw(program: Program, mark: Mark | None = None, width: int | None = None) -> str:
    """One line a rank, each marked action between >> and <<.

    mark: a tuple (rank, index); or a dict rank → index; or a list with an index, or None, for each rank. An index one past the last action
    says that the rank is through: >>end<<. width: where a line would be longer, only a window of about so many columns is drawn: round the
    mark of its rank, on a rank without one at the same part of its actions, without any mark from the start; … stands for what is left out.
    Without it a drawing with marks is cut to 120 columns, one without is whole. Raises ProgramError for a mark that is not in the program.
    """
    marks = _marks(program, mark)
    width = WIDTH if width is None and marks else width
    share = max((i / max(len(program[rank]), 1) for rank, i in marks.items()), default=0.0)
    lines = []
    for rank, actions in enumerate(program):
        words, at = [str(a) for a in actions], marks.get(rank)
        if at == len(words):
            words.append("end")
        if at is not None:
            words[at] = f">>{words[at]}<<"
        lead = f"rank {rank}: "
        near = at if at is not None else min(round(share * len(words)), len(words) - 1)
        lines.append(lead + (" ".join(words) if width is None else _window(words, near, width - len(lead))))
    return "\n".join(lines)


def _marks(program: Program, mark: Mark | None) -> dict[int, int]:
    if mark is None:
        return {}
    pairs = [mark] if isinstance(mark, tuple) else mark.items() if isinstance(mark, Mapping) else enumerate(mark)
    marks: dict[int, int] = {rank: i for rank, i in pairs if i is not None}  # type: ignore[misc]
    for rank, i in marks.items():
        if not 0 <= rank < len(program):
            raise ProgramError(f"a mark on rank {rank}: the program has {len(program)} ranks")
        if not 0 <= i <= len(program[rank]):
            raise ProgramError(f"a mark on action {i} of rank {rank}: it has {len(program[rank])}")
    return marks


def _window(words: Sequence[str], near: int, width: int) -> str:
    """As many of the words round words[near] as fit, at least that one."""
    if not words or len(" ".join(words)) <= width:
        return " ".join(words)
    lo, hi, used = near, near + 1, len(words[near]) + 4  # 4: for "… " and " …"
    while True:  # the shorter side grows first, and where one is at its end the other
        sides = sorted([(near - lo, 0)] * (lo > 0) + [(hi - 1 - near, 1)] * (hi < len(words)))
        fitting = [after for _, after in sides if used + len(words[hi if after else lo - 1]) + 1 <= width]
        if not fitting:
            return " ".join(["…"] * (lo > 0) + list(words[lo:hi]) + ["…"] * (hi < len(words)))
        used += len(words[hi if fitting[0] else lo - 1]) + 1
        lo, hi = (lo, hi + 1) if fitting[0] else (lo - 1, hi)


@attrs.frozen
class Grid:
    """A timeline for rich to print: console.print(grid(timeline)). A notebook shows one at the end of a cell by itself."""

    timeline: Timeline
    main: str = ""

    def _repr_mimebundle_(self, **asked: Any) -> dict[str, str]:
        from rich.jupyter import JupyterMixin

        return JupyterMixin._repr_mimebundle_(self, asked.get("include") or (), asked.get("exclude") or ())  # type: ignore[arg-type]

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.padding import Padding
        from rich.text import Text

        t, coloured = self.timeline, console.color_system is not None and not console.no_color
        ranks, look = range(len(t.rows)), looks(t, self.main)
        beside = [[f"{t.bubble(r) / t.makespan:.1%}" if t.makespan else "", *([amount(t.peak(r), t.unit)] if t.memory else [])] for r in ranks]
        heads = ["bubble", "peak"][: len(beside[0]) if beside else 0]
        widths = [max(len(row[k]) for row in [heads, *beside]) for k in range(len(heads))]
        names = [look.label(r) for r in ranks]
        label = max(map(len, names), default=0) + 1
        scale = _scale(t, max(options.max_width - label - 2 - sum(w + 2 for w in widths), 10))
        columns = math.ceil(t.makespan * scale - 1e-6)
        yield Text(" " * (label + columns + 2) + "".join(f"  {h:>{w}}" for h, w in zip(heads, widths)), style="dim" if coloured else "", no_wrap=True)
        for r in ranks:
            line = Text(f"{names[r]:<{label}}│", no_wrap=True, overflow="crop")
            line.append_text(_row(t.rows[r], look, r, scale, columns, coloured)).append("│")
            yield line.append("".join(f"  {cell:>{w}}" for cell, w in zip(beside[r], widths)))
        end = span_of_time(t.makespan, t.unit)
        yield Text(" " * (label + 1) + "0" + end.rjust(columns - 1), no_wrap=True)
        yield Padding(_legend(t, look, coloured), (0, 0, 0, label + 1), expand=False)


def grid(timeline: Timeline, main: str = "") -> Grid:
    """Who computes what when, for the terminal: a row a rank, time to the right as wide as the terminal allows, with the microbatch where it fits.

    Blank is a bubble; beside each row its share of the makespan, and the most that the rank holds where the timeline knows. Where there are no
    colours (NO_COLOR, a pipe, a file) letters stand for them: F3─ is a forward of microbatch 3; of a rank with several stages 2F3─ is one of
    stage 2, and where that does not fit the stages after the first have small letters. main: the main chain of several, where it has a name; of
    the others vF3─ is a forward of unit 3 of vision, v of any and V a backward; what several ranks do a part of each is underlined: vF3═.
    """
    return Grid(timeline, main)


def _scale(t: Timeline, width: int) -> float:
    """Columns for a unit of time: a whole number for the shortest action where all times are multiples of it, so that equals look equal."""
    times = [s.end - s.start for row in t.rows for s in row if s.action.op in (*COMPUTE, "OVERLAP") and s.end > s.start]
    if not times:
        return 1.0
    least = min(times)
    whole = all(abs(x / least - round(x / least)) < 1e-6 for row in t.rows for s in row for x in (s.start, s.end))
    scale = min(width / t.makespan, 6 / least)
    return math.floor(scale * least + 1e-9) / least if whole and scale * least >= 1 else scale


def _row(row: Sequence[Span], look: Looks, rank: int, scale: float, columns: int, coloured: bool) -> Any:
    """The columns of one rank. A column shows what happens at its middle, so that what is shorter than a column leaves no gap."""
    from rich.text import Text

    cells: list[tuple[str, str]] = [(" ", "")] * columns
    order = [s for s in row if s.action.op == "REDUCE"] + [s for s in row if s.action.op in (*COMPUTE, "OVERLAP")]
    for s in order:
        lo, hi = (min(math.floor(x * scale + 0.5 + 1e-9), columns) for x in (s.start, s.end))
        if hi > lo:
            cells[lo:hi] = (_coloured if coloured else _lettered)(s.action, look, rank, hi - lo)
    out = Text()
    for style, run in groupby(cells, key=lambda cell: cell[1]):
        out.append("".join(char for char, _ in run), style)
    return out


def _coloured(action: Action, look: Looks, rank: int, width: int) -> list[tuple[str, str]]:
    if action.op == "OVERLAP":  # one above the other; a number at each end
        (a, b), (upper, lower) = action.pair, [look.colour(part, rank) for part in action.pair]
        cells = [("▀", f"{upper} on {lower}")] * width
        first, last = _number(a), _number(b)
        if len(first) + len(last) < width:
            cells[: len(first)] = [(c, f"{ink(upper)} on {upper}") for c in first]
            cells[width - len(last) :] = [(c, f"{ink(lower)} on {lower}") for c in last]
        return cells
    back = look.colour(action, rank)
    if action.op == "REDUCE":
        return [("▄", back)] * width
    if (action.microbatch or 0) % 2:  # neighbours differ, so that each is seen where no number fits
        back = mixed(back, 0, 0.14)
    number = _number(action)
    style = f"{ink(back)} on {back}" if not look.is_shared(action) else f"underline {ink(back)} on {back}"
    return [(c, style) for c in (number if len(number) <= width else "").center(width)]


def _lettered(action: Action, look: Looks, rank: int, width: int) -> list[tuple[str, str]]:
    parts = flat([action])
    stages = look.of(rank, parts[0].chain)
    letters = [LETTERS.get(a.op, a.op) if a.op != "REDUCE" else "+" for a in parts]
    letters = [word.lower() if a.stage in look.of(rank, a.chain)[1:] else word for word, a in zip(letters, parts)]
    signs = [look.sign(a.chain) if a.op != "REDUCE" else "" for a in parts]
    numbered = [sign + letter + _number(a) for sign, letter, a in zip(signs, letters, parts)]
    staged = [f"{sign}{a.stage}{LETTERS.get(a.op, a.op)}{_number(a)}" for sign, a in zip(signs, parts)]
    choices = ["&".join(numbered), "&".join(map("".join, zip(signs, letters))), "&".join(map(_short, signs, letters, parts)), "&"]
    choices.append(_short(signs[0][:1], letters[0], parts[0]))  # where not even the sign of a chain has room
    if len(stages) > 1 and action.op != "REDUCE" and len(both := "&".join(staged)) < width:  # a number at its end would meet the next one's stage
        choices.insert(0, both)
    words = next(word for word in choices if len(word) <= width)
    return [(c, "") for c in words.ljust(width, "+" if action.op == "REDUCE" else "═" if look.is_shared(action) else "─")]


def _short(sign: str, letter: str, action: Action) -> str:
    """Of a chain beside the main one its sign alone: small is forward, capital is backward."""
    return letter if not sign else sign.lower() if action.op in ("F", "REMAT") else sign.upper()


def _number(action: Action) -> str:
    return "" if action.microbatch is None else str(action.microbatch)


def _legend(t: Timeline, look: Looks, coloured: bool) -> Any:
    from rich.text import Text

    out = Text()
    for op in ops(t):
        if op in (*COMPUTE, "REDUCE"):
            sign = LETTERS.get(op, op) if op != "REDUCE" else "▄" if coloured else "+"
            back = COLOURS[op]
            out.append(f" {sign} ", (back if op == "REDUCE" else f"{ink(back)} on {back}") if coloured else "").append(f" {MEANING[op]}   ")
    for chain in look.beside:
        if coloured:
            for op, back in look.used(t, chain).items():
                out.append(f" {LETTERS.get(op, op)} ", f"{ink(back)} on {back}")
            out.append(f" {chain}   ")
        else:
            sign = look.sign(chain)
            out.append(f" {sign}  {chain}, {sign.upper()} its backward   ")
    if look.shared:
        out.append("underlined: several ranks do a part each   " if coloured else " ═  several ranks do a part each   ")
    if len(look.most) > 1:
        out.append("a rank's stages: light to dark" if coloured else "small letters: a rank's later stages")
    return out

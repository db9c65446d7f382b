"""Programs as text: a line a rank, a word an action, as `str` writes it.

    # 1F1B on two ranks
    rank 0: 0F0 0F1 0B0 0B1
    rank 1: 1F0 1B0 1F1 1B1

And torch pipelining's CSV: a row a rank, a cell an action.
"""

from __future__ import annotations

import csv
import io
import re

import attrs

from lf.config import one_of
from lf.schedule.cost import cost
from lf.schedule.ir import COMPUTE, MOVES, OPS, OVERLAP, Action, Program, ProgramError, flat

_KNOWN = dict.fromkeys(OPS)
_WORD = re.compile(
    r"(?:(?P<chain>[^\s:\[\]();#,]+):)?(?P<stage>[0-9]{1,6})(?P<op>[A-Z](?:[A-Z_]*[A-Z])?)(?P<microbatch>[0-9]{0,6})(?:\[(?P<place>[^\]]+)\])?"
)  # numbers of at most six digits: a slip of the key is no reason to count to a trillion
_TOKEN = re.compile(r"(?:\[[^\]]*\]|\([^)]*\)|[^\s#\[(])+|\S")
_TORCH = {"UNSHARD": "GATHER", "RESHARD": "RELEASE", "REDUCE_GRAD": "REDUCE"}
_LF = {lf: torch for torch, lf in _TORCH.items()}


def dumps(program: Program) -> str:
    """Raises ProgramError for an action whose word would read back as another, such as one of a layer with a ']' in its name."""
    for a in dict.fromkeys(a for row in program for a in row):
        try:
            same = [_action(word, "") for word in _TOKEN.findall(str(a))] == [a]
        except ProgramError:
            same = False
        if not same:
            raise ProgramError(f"{a!r} cannot be written: {str(a)!r} would not read back as it")
    return "".join(f"rank {r}: {' '.join(map(str, row))}".rstrip() + "\n" for r, row in enumerate(program))


def loads(text: str) -> Program:
    """`rank N:` may be left out; # starts a comment. Raises ProgramError with the line, the column and the word that is wrong."""
    rows: list[tuple[Action, ...]] = []
    for number, line in enumerate(text.splitlines(), 1):
        tokens = [(t[0], f"line {number}, column {t.start() + 1}") for t in _TOKEN.finditer(_uncommented(line))]
        if not tokens:
            continue
        if tokens[0][0] == "rank":
            if len(tokens) < 2 or tokens[1][0] != f"{len(rows)}:":
                found = tokens[1][0] if len(tokens) > 1 else ""
                raise ProgramError(f"{tokens[0][1]}: 'rank {found}' should be 'rank {len(rows)}:'; ranks stand in their order, a line each")
            tokens = tokens[2:]
        rows.append(tuple(_action(word, where) for word, where in tokens))
    if not rows:
        raise ProgramError("the text has no rank: a program has a line for each")
    return tuple(rows)


def _uncommented(line: str) -> str:
    return re.match(r"(?:\[[^\]]*\]|[^#])*", line)[0]  # type: ignore[index]


def _action(word: str, where: str) -> Action:
    if word.startswith("("):
        inside, _, name = word[1:].rpartition(")")
        parts = inside.split(";")
        if len(parts) != 2:
            raise ProgramError(f"{where}: {word!r} should be a pair, as in (0F4;7B2)OVERLAP_F_B")
        a, b = [_action(part.strip(), where) for part in parts]
        if name != (wanted := f"OVERLAP_{a.op}_{b.op}"):
            raise ProgramError(f"{where}: {word!r} should end in {wanted}")
        return OVERLAP(a, b)
    if not (found := _WORD.fullmatch(word)):
        raise ProgramError(f"{where}: {word!r} is no action; it should be [stage][op][microbatch], as 2F0, 3SEND_F1, 0REDUCE[layers.3]")
    if found["op"] not in _KNOWN or found["op"] == "OVERLAP":
        try:
            one_of("op", found["op"], [op for op in _KNOWN if op != "OVERLAP"])
        except ValueError as error:
            raise ProgramError(f"{where}: {word!r}: {error}") from None
    if found["op"] in (*COMPUTE, *MOVES) and not found["microbatch"]:
        raise ProgramError(f"{where}: {word!r} names no microbatch; a {found['op']} is of one")
    segment, colon, ops = (found["place"] or "").partition(": ")
    return Action(
        found["op"],
        int(found["stage"]),
        int(found["microbatch"]) if found["microbatch"] else None,
        segment or None,
        tuple(ops.split(", ")) if colon else (),
        found["chain"] or "",
    )


def to_csv(program: Program, format: str = "compute_only") -> str:
    """As `torch.distributed.pipelining` reads it.

    compute_only: F, B, I, W and OVERLAP, a cell for each time step if all take one, blank where the rank waits; torch adds the rest itself.
    compute_comms: all actions but FREE, which torch does not name; REDUCE of a stage's layers is one REDUCE_GRAD where the last of them stands.
    Raises ProgramError for what torch has no word for: segments, REMAT, OFFLOAD, FETCH, chains, REDUCE of a parameter over stages.
    """
    one_of("format", format, ("compute_only", "compute_comms"))
    if format == "compute_comms":
        rows = [[_torch_word(a) for a in row] for row in map(_torch_actions, program)]
    else:
        compute = tuple(tuple(a for a in row if a.op in (*COMPUTE, "OVERLAP")) for row in program)
        words = [[_torch_word(a) for a in row] for row in compute]
        spans = cost(compute, times=lambda a: 1.0).rows
        rows = []
        for row, each in zip(words, spans):
            cells = [""] * (int(each[-1].end) if each else 0)
            for word, span in zip(row, each):
                cells[int(span.start)] = word
            rows.append(cells)
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


def _torch_actions(row: tuple[Action, ...]) -> list[Action]:
    last = {a.stage: i for i, a in enumerate(row) if a.op == "REDUCE" and "/" not in (a.segment or "")}
    out = []
    for i, a in enumerate(row):
        if a.op == "REDUCE" and a.stage in last and "/" not in (a.segment or ""):
            out += [attrs.evolve(a, segment=None)] if last[a.stage] == i else []
        elif a.op != "FREE":
            out.append(a)
    return out


def _torch_word(a: Action) -> str:
    for part in flat((a,)):
        if part.op in ("REMAT", "OFFLOAD", "FETCH") or part.segment or part.ops or part.chain:
            raise ProgramError(f"{part}: torch pipelining has no word for it; write the program before it is refined and lowered")
    return str(attrs.evolve(a, op=_LF[a.op])) if a.op in _LF else str(a)


def from_csv(text: str) -> Program:
    """Reads either format of torch pipelining; blank cells are left out. Raises ProgramError with the line and the cell that is wrong."""
    rows = []
    for number, line in enumerate(csv.reader(io.StringIO(text)), 1):
        cells = [(cell.strip(), f"line {number}, cell {i}") for i, cell in enumerate(line, 1) if cell.strip()]
        rows.append(tuple(_from_torch(word, where) for word, where in cells))
    if not rows:
        raise ProgramError("the text has no row: a program has one for each rank")
    return tuple(rows)


def _from_torch(word: str, where: str) -> Action:
    found = re.fullmatch(r"(\d+)([A-Z_]*[A-Z])(\d*)", word)
    return _action(f"{found[1]}{_TORCH[found[2]]}{found[3]}" if found and found[2] in _TORCH else word, where)

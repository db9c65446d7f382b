"""The end of a program that is proven: nothing is left alive, and nothing is missing that gradients need."""

from __future__ import annotations

from collections.abc import Sequence

from lf.schedule import sums
from lf.schedule.draw import WIDTH, draw
from lf.schedule.ground import Ground
from lf.schedule.holds import Holds
from lf.schedule.ir import Action, ProgramError, some

WORDS = {
    "F": "{0}F{1} does not use what has arrived for it",
    "B": "no backward uses the gradient that has arrived for {0}F{1}",
    "out F": "there is no {0}SEND_F{1}",
    "out B": "there is no {0}SEND_B{1}",
    "sent SEND_F": "there is no {0}FREE{1}[SEND_F]",
    "sent SEND_B": "there is no {0}FREE{1}[SEND_B]",
}


def nothing_stays(on: Ground, rows: Sequence[Holds]) -> None:
    """Raises ProgramError for what a rank has when all have come to their ends."""
    for rank, row in enumerate(rows):
        why = ""
        if kept := [f"{_named(c, s)}F{m}" for (c, s, m), pieces in sorted(row.kept.items()) if pieces]:
            why = f"activations stay alive, there is no backward for {', '.join(kept)}"
        elif owed := [f"{_named(c, s)}I{m}" for (c, s, m), pieces in sorted(row.owed.items()) if pieces]:
            why = f"activations stay alive, there is no W for {', '.join(owed)}"
        elif row.whole:
            why = "parameters stay whole, there is no RELEASE of " + ", ".join(f"{_named(c, s)}:{layer}" for c, s, layer in sorted(row.whole))
        elif row.values:
            left = [WORDS[kind].format(_named(c, s), m) if kind in WORDS else _unused(on, kind, s, m) for kind, c, s, m in sorted(row.values)]
            why = f"values stay alive: {'; '.join(left)}"
        if why:
            raise ProgramError(f"rank {rank}: {why}\n{draw(on.program, {rank: len(on.program[rank])}, WIDTH)}")


def _unused(on: Ground, kind: str, k: int, microbatch: int) -> str:
    """In words, what is left of an edge."""
    joint = on.joints[k]
    action = Action(f"BRIDGE_{kind[-1]}", joint.target_stage, microbatch, joint.name, chain=joint.target)
    return f"there is no {action}" if kind.startswith("made") else f"nothing uses what {action} has brought"


def nothing_is_missing(on: Ground, rows: Sequence[Holds]) -> None:
    """Raises ProgramError for forwards and backwards that no rank has run to its end, and for sums that one has not made."""
    missing, trains = [], any(row.trains for row in rows)
    for c, known in on.known.items():
        for s, stage in enumerate(known):
            for u in range(on.units[c]):
                key = c, s, u
                here = [rows[r] for r in on.rows.get(key, ())]
                if not here or any(row.ahead.get(key, 0) < len(stage.atoms) for row in here):
                    missing.append(f"{_named(c, s)}F{u}")
                ended = here and all(row.behind.get(key, len(stage.atoms)) == stage.stop for row in here)
                if trains and stage.live and not ended:
                    missing.append(f"{_named(c, s)}B{u}")
    for row in rows:
        missing += [str(a) for a in (sums.missing(on, row) if trains else ())]
    if missing:
        raise ProgramError(f"missing: {some(missing)}; without them gradients would be lost\n{draw(on.program, width=WIDTH)}")


def _named(chain: str, stage: int) -> str:
    return f"{chain}:{stage}" if chain else str(stage)

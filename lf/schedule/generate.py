"""Generators write the compute of a program; passes (`lower`) add the rest."""

from __future__ import annotations

from lf.schedule.ir import Action, Program, ProgramError


def one_f_one_b(stages: int, microbatches: int) -> Program:
    """One forward, one backward (Narayanan et al. 2019): rank r makes p - 1 - r forwards ahead, then a forward and a backward in turn."""
    if microbatches < 1:
        raise ProgramError(f"microbatches={microbatches} must be at least 1")
    rows = []
    for r in range(stages):
        ahead = min(stages - 1 - r, microbatches)
        row = [Action("F", r, m) for m in range(ahead)]
        for m in range(microbatches):
            row += [Action("F", r, m + ahead)] * (m + ahead < microbatches) + [Action("B", r, m)]
        rows.append(tuple(row))
    return tuple(rows)

"""Generators write the compute of a program; passes (`lower`) add the rest."""

from __future__ import annotations

from lf.schedule.ir import Action, Program, ProgramError


def one_f_one_b(microbatches: int) -> Program:
    """One forward, one backward (Narayanan et al. 2019), on one stage: gradient accumulation with one microbatch alive at a time."""
    if microbatches < 1:
        raise ProgramError(f"microbatches={microbatches} must be at least 1")
    return (tuple(Action(op, 0, i) for i in range(microbatches) for op in "FB"),)

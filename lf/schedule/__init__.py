"""Programs: generate, lower, check, draw, run."""

from lf.schedule.check import check, draw
from lf.schedule.generate import one_f_one_b
from lf.schedule.ir import Action, Program, ProgramError
from lf.schedule.lower import add_reduce

__all__ = ["Action", "Program", "ProgramError", "add_reduce", "check", "draw", "one_f_one_b"]

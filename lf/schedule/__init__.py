"""Programs: generate, lower, check, cost, draw, run."""

from lf.schedule.check import check
from lf.schedule.draw import draw
from lf.schedule.generate import one_f_one_b
from lf.schedule.ir import OVERLAP, Action, Program, ProgramError
from lf.schedule.lower import add_reduce, lower

__all__ = ["OVERLAP", "Action", "Program", "ProgramError", "add_reduce", "check", "draw", "lower", "one_f_one_b"]

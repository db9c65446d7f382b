"""Programs: generate, lower, check, cost, draw, run."""

from lf.schedule.beside import Beside, beside
from lf.schedule.build import build, build_chains, complete
from lf.schedule.check import check
from lf.schedule.chrome import chrome
from lf.schedule.cost import cost
from lf.schedule.draw import draw, grid
from lf.schedule.generate import one_f_one_b
from lf.schedule.ir import OVERLAP, Action, Program, ProgramError, units
from lf.schedule.lower import add_reduce, lower
from lf.schedule.named import SCHEDULES
from lf.schedule.picture import picture
from lf.schedule.place import loop, vee
from lf.schedule.text import dumps, loads
from lf.schedule.timeline import Span, Timeline

__all__ = [
    "OVERLAP", "SCHEDULES", "Action", "Beside", "Program", "ProgramError", "Span", "Timeline", "add_reduce", "beside", "build", "build_chains",
    "check", "chrome", "complete", "cost", "draw", "dumps", "grid", "loads", "loop", "lower", "one_f_one_b", "picture", "units", "vee",
]  # fmt: skip

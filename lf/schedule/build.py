"""From a schedule and policies to the whole program of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lf.layouts import Layout
from lf.schedule.check import check
from lf.schedule.generate import Stages, one_f_one_b
from lf.schedule.ground import Where
from lf.schedule.ir import Program, ProgramError, as_program
from lf.schedule.keep import offload, recompute
from lf.schedule.lower import add_reduce, is_lowered, trainable
from lf.schedule.move import free, move
from lf.schedule.recompute import Offload, Recompute

Generate = Callable[[Stages, int], Program]


def build(
    layout: Layout,
    microbatches: int,
    generate: Generate = one_f_one_b,
    recomputed: Recompute = Recompute(),  # noqa: B008  (frozen)
    offloaded: Offload = Offload(),  # noqa: B008
) -> Program:
    """The program of a step over `layout`: what `generate(placement, microbatches)` writes, complete."""
    program = as_program(generate(layout.placement, microbatches), getattr(generate, "__name__", "the schedule"))
    return complete(program, layout, microbatches, recomputed, offloaded)


def complete(
    program: Program,
    where: Where,
    microbatches: int,
    recomputed: Recompute | Mapping[str, Recompute] = Recompute(),  # noqa: B008
    offloaded: Offload | Mapping[str, Offload] = Offload(),  # noqa: B008
) -> Program:
    """A program of compute, through all passes and checked; policies for all chains, or by chain. One that is lowered already is only checked, and
    takes no policy: what it makes again or offloads, it says itself. Raises ProgramError, ConfigError for what cannot be."""
    if is_lowered(program):
        for flag, policy, none in (("recompute", recomputed, Recompute()), ("offload", offloaded, Offload())):
            if policy not in (none, {}):
                why = "the program is lowered already, so nothing is added to it; leave the flag out, or give the program's compute alone"
                raise ProgramError(f"--{flag} {policy}: {why}")
    else:
        check(program, where, microbatches)  # before the passes, so that what is wrong is drawn as it was written
        program = offload(recompute(trainable(program, where), where, recomputed), where, offloaded)
        program = free(move(add_reduce(program, where), where))
    check(program, where, microbatches)
    return program

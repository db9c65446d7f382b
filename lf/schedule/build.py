"""From a schedule and policies to the whole program of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from lf.chain_layouts import Layouts
from lf.layouts import Layout
from lf.schedule.beside import Beside, beside
from lf.schedule.check import check
from lf.schedule.cost import Link, Times
from lf.schedule.generate import Stages, one_f_one_b
from lf.schedule.ground import Where
from lf.schedule.ir import Program, ProgramError, as_program
from lf.schedule.keep import offload, recompute
from lf.schedule.lower import add_reduce, is_lowered, trainable
from lf.schedule.move import free, move
from lf.schedule.recompute import Offload, Recompute
from lf.schedule.shard import gather

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


def build_chains(
    layouts: Layouts,
    microbatches: int,
    placements: Mapping[str, Beside | str],
    generate: Generate = one_f_one_b,
    recomputed: Recompute | Mapping[str, Recompute] = Recompute(),  # noqa: B008
    offloaded: Offload | Mapping[str, Offload] = Offload(),  # noqa: B008
    times: Times | None = None,
    link: Link = 0.0,
) -> Program:
    """The program of a step over several chains: what `generate` writes for the main one, the others beside it, complete.

    placements: of each other chain a `Beside`, or one of its kinds; the rows that it stands on follow from its layout. times, link: as of
    `lf.schedule.cost`; they decide the order where there is a choice. Raises ProgramError, ConfigError for what cannot be, with the chain.
    """
    main, made = layouts.main, generate(layouts.chains[layouts.main].placement, microbatches)
    program = as_program(made, getattr(generate, "__name__", "the schedule"))
    own = [pp for r in range(len(layouts.rows)) if (pp := layouts.pp(main, r)) is not None]
    if unknown := [chain for chain in placements if chain not in layouts.chains or chain == main]:
        there = ", ".join(c for c in layouts.chains if c != main)
        raise ProgramError(f"a placement is of chain {unknown[0]!r}; it is to be of one beside {main!r}: {there}")
    places = {chain: _standing(layouts, chain, Beside(p) if isinstance(p, str) else p) for chain, p in placements.items()}
    whole = beside(tuple(program[pp] for pp in own), layouts.joints, places, main, times, link)
    return complete(whole, layouts, microbatches, recomputed, offloaded)


def _standing(layouts: Layouts, chain: str, place: Beside) -> Beside:
    """With the rows that the layout gives it."""
    if place.blocks is not None:
        return place
    lanes, main = layouts.lanes(chain), {r for r in range(len(layouts.rows)) if layouts.pp(layouts.main, r) is not None}
    rows = {r for blocks in lanes for block in blocks for r in block}
    if place.kind == "dedicated" and rows & main:
        ranks = sorted({rank for r in rows & main for rank in layouts.rows[r]})
        words = f"it lies on ranks {', '.join(map(str, ranks))} of chain {layouts.main!r}"
        raise ProgramError(f"chain {chain!r} is to have rows of its own (dedicated), and {words}; give it other ranks, or another placement")
    if place.kind != "dedicated" and rows - main:
        ranks = sorted({rank for r in rows - main for rank in layouts.rows[r]})
        words = f"ranks {', '.join(map(str, ranks))}, which are not of chain {layouts.main!r}"
        raise ProgramError(f"chain {chain!r} is {place.kind}, and lies on {words}; use dedicated, or ranks of that chain")
    if place.kind == "inline" and layouts.spread(layouts.main):  # a stage of the main chain lies in several rows: so does what goes with it
        lanes = tuple((tuple(sorted({r for block in blocks for r in block})),) for blocks in lanes)
    return attrs.evolve(place, blocks=lanes)


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
        program = free(move(add_reduce(gather(program, where), where), where))
    check(program, where, microbatches)
    return program

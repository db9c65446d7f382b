"""Placements: which pipeline rank has which stage."""

from __future__ import annotations

from collections.abc import Sequence

from lf.schedule.ir import Placement, ProgramError


def loop(stages: int, ranks: int) -> Placement:
    """Stage s on rank s mod ranks. `stages` need not be a multiple of `ranks`: the first ranks then have one more."""
    if not 1 <= ranks <= stages:
        raise ProgramError(f"{stages} stages on {ranks} ranks: each rank needs a stage, which may hold no layer; use at least {max(ranks, 1)} stages")
    return tuple(s % ranks for s in range(stages))


def vee(ranks: int) -> Placement:
    """There and back: stages 0 … p-1 on ranks 0 … p-1, the next p on p-1 … 0. The first and the last stage share rank 0."""
    if ranks < 1:
        raise ProgramError(f"{ranks} ranks: there must be at least 1")
    return (*range(ranks), *reversed(range(ranks)))


def placed(stages: int | Sequence[int], microbatches: int) -> Placement:
    """What a generator is given, as a placement; a number of stages means one on each rank. Raises ProgramError for what cannot be placed."""
    if microbatches < 1:
        raise ProgramError(f"microbatches={microbatches} must be at least 1")
    if isinstance(stages, int):
        return loop(stages, stages)
    where = tuple(stages)
    if missing := sorted(set(range(max(where, default=0) + 1)) - set(where)):
        raise ProgramError(f"placement {where}: no stage on ranks {missing}; ranks are counted from 0 without a gap")
    if min(where) < 0:
        raise ProgramError(f"placement {where}: there is no rank {min(where)}; ranks are counted from 0")
    return where


def stages_of(placement: Placement) -> tuple[tuple[int, ...], ...]:
    """The stages of each rank, ascending."""
    return tuple(tuple(s for s, rank in enumerate(placement) if rank == r) for r in range(max(placement) + 1))

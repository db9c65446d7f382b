"""One training step.

    N_k  = Σ over ranks and microbatches of objective k's count       one sum, before the first action
    grad = ∂ Σ_k λ_k s_k / N_k                                        the program; gradients are *summed* over ranks, divided nowhere else
    norm, clip, update                                                 device scalars; an update that is not finite changes nothing

There is no mean of means: every rank back-propagates its own sums with the one global normaliser.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lf import tree
from lf.batch import Batch, BatchError
from lf.config import ConfigError
from lf.layouts import Layout
from lf.memory import refuse_what_cannot_fit
from lf.mesh import MeshError
from lf.optim import Optimizer
from lf.parallel.reduce import owned_square_sum
from lf.schedule import Action, Program, ProgramError, draw
from lf.schedule.bind import Bound, bind
from lf.schedule.build import complete
from lf.schedule.compiled import refuse_compile
from lf.schedule.draw import WIDTH
from lf.schedule.ir import BACKWARD, flat, microbatches
from lf.schedule.measured import Clock
from lf.schedule.memory import memory_at
from lf.schedule.run import run
from lf.spec import Piece
from lf.state import State, compute_copy, device_of, shard_batch
from lf.tree import Tree

Metrics = dict[str, Tensor]
Gradients = tuple[Tree, Metrics]
Step = Callable[..., tuple[State, Metrics]]


def gradients(layout: Layout, program: Program | Sequence[Program], ctx: Any, compile: bool | str = False) -> Callable[..., Gradients]:
    """fn(params, microbatches, clock=None) -> (gradients as a tree like params, metrics): the half of a step before the optimizer.

    program: one, or one for each number of microbatches that occurs. params: the compute copy. Gradients come in the master dtype, summed over
    all ranks. metrics are device scalars, equal on all ranks: loss (Σ_k λ_k · mean of objective k), one entry per objective, grad_norm, tokens
    (the count of the first objective: tokens with a label); and finite, (microbatches,) bool, this rank's own, as in `lf.schedule.run.run`.
    clock: an `lf.schedule.measured.Clock` that takes the step down. `compile`: each distinct layer by torch.compile, True or
    the name of a backend.
    Raises ProgramError, MeshError where programs, layout and ranks do not fit together, ConfigError for a compile that cannot be.
    """
    if layout.mesh != ctx.axes.mesh:
        raise MeshError(f"the layout is for mesh {layout.mesh}, the context has mesh {ctx.axes.mesh}")
    if compile:
        refuse_compile(layout.mesh, ctx.device, compile)
    bound = _bound(layout, program, ctx, compile)
    model, objectives = layout.model, layout.model.objectives
    owned = [(path, piece) for path, piece in layout.owned(ctx.axes.coords) if path not in layout.frozen]

    def fn(params: Tree, batches: Sequence[Batch], clock: Clock | None = None) -> Gradients:
        if len(batches) not in bound:
            raise BatchError(f"the program is for {' or '.join(map(str, bound))} microbatches; {len(batches)} were given")
        for batch in batches:
            model.accepts(batch)
        batches = [shard_batch(b, model, ctx) for b in batches]
        counts = torch.stack([torch.stack([o.count(b) for b in batches]).sum() for o in objectives.values()])
        # A plan is the same on every rank of its dp coordinate, so each count is summed over dp alone.
        counts = ctx.axes["dp"].sum(counts).to(ctx.precision.master)
        norms = dict(zip(objectives, counts.clamp_min(1)))  # no label at all: the sum is 0 and so is the loss
        seeds = {k: o.weight / norms[k] for k, o in objectives.items()}
        if layout.mesh.pp > 1:  # before anything is sent, and on all ranks alike: only some stages give losses
            _losses_agree(set().union(*bound[len(batches)].chains[""].shapes(batches[0], {}).losses), objectives)
        grads, terms, finite = run(bound[len(batches)], params, batches, seeds, ctx, clock)
        losses = terms.get("losses", {})
        if layout.mesh.pp == 1:
            _losses_agree(losses, objectives)
        means, norm = _world_sums(losses, norms, grads, owned, ctx)
        loss = torch.stack([o.weight * means[k] for k, o in objectives.items()]).sum()
        metrics = {"loss": loss, **means, "grad_norm": norm, "tokens": counts[0], "finite": finite}
        return tree.build(list(grads.items())), metrics

    return fn


def _bound(layout: Layout, program: Program | Sequence[Program], ctx: Any, compile: bool | str) -> dict[int, Bound]:
    """Each program, lowered, checked and bound, by its number of microbatches."""
    # a program is the actions of each rank, several programs are a sequence of those
    programs: Any = [program] if not program or not program[0] or isinstance(program[0][0], Action) else program
    bound: dict[int, Bound] = {}
    for p in programs:
        count = microbatches(p)
        if count in bound:
            raise ProgramError(f"two programs are for {count} microbatches: a step could not tell which to run")
        if not any(a.op in BACKWARD for row in p for a in flat(row)):
            raise ProgramError(f"the program has no backward, so nothing would be learned:\n{draw(p, width=WIDTH)}")
        bound[count] = bind(complete(p, layout, count), layout, ctx, compile)
    return bound


def _losses_agree(given: Collection[str], objectives: Collection[str]) -> None:
    if missing := sorted({*objectives} - {*given}):
        raise ConfigError(f"no segment gives a loss for objective {', '.join(missing)}; they give {', '.join(sorted(given)) or 'none'}")
    if unknown := sorted({*given} - {*objectives}):
        raise ConfigError(f"segments give the loss {', '.join(unknown)}, which no objective weighs; there are {', '.join(objectives) or 'none'}")


def _world_sums(
    losses: dict[str, Tensor], norms: dict[str, Tensor], grads: dict[str, Tensor], owned: Sequence[tuple[str, Piece]], ctx: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Mean of each objective and the global gradient norm, in one sum over all ranks: terms and owned squares are P everywhere."""
    zero = next(iter(norms.values())).new_zeros(())  # of an objective whose loss other stages give
    squares = owned_square_sum(owned, grads, zero)
    *sums, total = ctx.axes.world.sum(torch.stack([*(losses.get(k, zero).to(zero.dtype) for k in norms), squares])).unbind()
    return {k: s / n for (k, n), s in zip(norms.items(), sums)}, total.sqrt()


def make(
    layout: Layout, optimizer: Optimizer, program: Program | Sequence[Program], ctx: Any, clip: float | None = 1.0, compile: bool | str = False
) -> tuple[Callable[[Tree], State], Step]:
    """(init, step): init(master params) -> State; step(state, microbatches, clock=None) -> (state, metrics). Everything refusable is refused here.

    program, compile, clock: as in `gradients`; a step runs the program for its number of microbatches. metrics: those of `gradients`, and lr,
    skipped (1 where loss or norm was not finite and nothing was changed). They lie on the device: read them a step later and the host never
    waits. `clip`: the largest gradient norm (None: unlimited). `init` takes the parameters over and a state is used up by its step: both are
    updated in place.
    A state that cannot fit into memory raises OutOfMemory here, a step that does not fit when it is made.
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"clip={clip} must be above 0, or None for no clipping")
    backward = gradients(layout, program, ctx, compile)
    refuse_what_cannot_fit(layout, optimizer.init, ctx)
    held, params = layout.held(ctx.axes.coords), {path: spec.param for path, spec in layout.trained(ctx.axes.coords).items()}

    def init(master: Tree) -> State:
        if missing := sorted(held.keys() - dict(tree.items(master))):
            raise ValueError(f"parameters are missing: {', '.join(missing)}")
        state = optimizer.init(tree.build([(path, tree.get(master, path)) for path in params]), device_of(ctx))
        state["master"] = tree.build([(path, tree.get(state["master"] if path in params else master, path)) for path in held])
        return State(compute_copy(layout, state["master"], ctx), state, torch.zeros((), dtype=torch.int64, device=device_of(ctx)))

    def step(state: State, batches: Sequence[Batch], clock: Clock | None = None) -> tuple[State, Metrics]:
        with torch.no_grad():
            grads, metrics = backward(state.params, batches, clock)
            norm, lr = metrics["grad_norm"], optimizer.lr(state.step)
            ok = torch.isfinite(norm) & torch.isfinite(metrics["loss"])
            # 1e-6 keeps the factor finite where the norm is 0; without clipping it is exactly 1
            scale = torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp_max(1.0)
            with memory_at("the update of the parameters", 1.0, dict(tree.items(grads))):
                state_of = optimizer.update(state.optimizer, grads, params, lr, scale, state.step, ok, ctx.ops)
                new = State(compute_copy(layout, state_of["master"], ctx), state_of, state.step + 1)
        return new, {**metrics, "lr": lr, "skipped": ~ok}

    return init, step

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

from lf import chain_feed, tree
from lf.batch import Batch, BatchError
from lf.chain_layouts import Layouts, joined, runs
from lf.config import ConfigError
from lf.layouts import Layout
from lf.memory import refuse_what_cannot_fit
from lf.mesh import MeshError
from lf.meter import OPTIMIZER, PARAMETER, mark
from lf.optim import Optimizer
from lf.parallel.reduce import owned_square_sum
from lf.schedule import Action, Program, ProgramError, draw
from lf.schedule.bind import Bound, bind
from lf.schedule.build import complete
from lf.schedule.compiled import Compile, refuse_compile
from lf.schedule.draw import WIDTH
from lf.schedule.feed import Feed
from lf.schedule.ir import BACKWARD, flat, microbatches
from lf.schedule.measured import Clock
from lf.schedule.memory import memory_at
from lf.schedule.run import run
from lf.segment import Objective
from lf.spec import Piece
from lf.state import State, compute_copy, device_of, shard_batch
from lf.tree import Tree

Metrics = dict[str, Tensor]
Gradients = tuple[Tree, Metrics]
Step = Callable[..., tuple[State, Metrics]]


def gradients(
    layout: Layout | Layouts, program: Program | Sequence[Program], ctx: Any, compile: Compile = False
) -> Callable[..., Gradients]:
    """fn(params, microbatches, clock=None) -> (gradients as a tree like params, metrics): the half of a step before the optimizer.

    program: one, or one for each number of microbatches that occurs. params: the compute copy. Gradients come in the master dtype, summed over
    all ranks. metrics are device scalars, equal on all ranks: loss (Σ_k λ_k · mean of objective k), one entry per objective, grad_norm, tokens
    (the count of the first objective: tokens with a label); those of the model's `sums`, over the step and all ranks, in their shapes; and finite,
    (microbatches,) bool, this rank's own, as in `lf.schedule.run.run`.
    clock: an `lf.schedule.measured.Clock` that takes the step down. `compile`: each distinct layer by torch.compile, True or
    the name of a backend; or by a function of its own (`lf.schedule.compiled.Compile`).
    Of several chains: ctx is from `lf.chain_context`; each microbatch is a sequence of data batches, one for each dp coordinate of the main chain,
    all plans on every rank (lf/chain_feed.py); metrics have NAME_imbalance of each chain that is dealt its items, the work of the fullest rank over
    the mean, and NAME_imbalance_before, had they been cut in order.
    Raises ProgramError, MeshError where programs, layout and ranks do not fit together, ConfigError for a compile that cannot be.
    """
    layouts = joined(layout)
    _refuse_context(layouts, ctx)
    if compile and not callable(compile):
        for where in layouts.chains.values():
            refuse_compile(where.mesh, ctx.device, compile, where.model.segments)
    bound = _bound(layouts, program, ctx, compile)
    objectives = objectives_of(layouts)
    shapes = {name: shape for where in layouts.chains.values() for name, shape in where.model.sums.items()}
    owned = [(path, piece) for path, piece in layouts.state_owned(ctx.axes.rank) if path not in layouts.frozen]
    agreed = False  # whether losses and objectives are known to agree: of several chains, only a step shows it

    def fn(params: Tree, batches: Sequence[Any], clock: Clock | None = None) -> Gradients:
        nonlocal agreed
        if len(batches) not in bound:
            raise BatchError(f"the program is for {' or '.join(map(str, bound))} microbatches; {len(batches)} were given")
        now = bound[len(batches)]
        feed = _single(layouts, batches, ctx) if layouts.model is None else chain_feed.feed(now.ground, batches, ctx)
        counts = _counts(layouts, feed, ctx)
        norms = dict(zip(objectives, counts.clamp_min(1)))  # no label at all: the sum is 0 and so is the loss
        seeds = {k: o.weight / norms[k] for k, o in objectives.items()}
        single = now.chains.get("")
        if single and single.layout.mesh.pp > 1:  # before anything is sent, and on all ranks alike: only some stages give losses
            _losses_agree(set().union(*single.shapes(feed.batches[""][0], {}).losses), objectives)
        grads, terms, finite = run(now, params, feed, seeds, ctx, clock)
        losses = terms.get("losses", {})
        if single is None and not agreed:
            given = ctx.axes.world.sum(torch.tensor([k in losses for k in objectives], device=feed.device, dtype=counts.dtype))
            if not given.is_meta:  # on paper nobody knows of the other ranks
                _losses_agree([k for k, n in zip(objectives, given.tolist()) if n], objectives)
            agreed = True
        elif single and single.layout.mesh.pp == 1:
            _losses_agree(losses, objectives)
        means, norm, sums = _world_sums(losses, norms, grads, owned, shapes, terms.get("sums", {}), ctx)
        loss = torch.stack([o.weight * means[k] for k, o in objectives.items()]).sum()
        metrics = {"loss": loss, **means, "grad_norm": norm, "tokens": counts[0], "finite": finite, **sums}
        for chain, (before, after) in feed.imbalance.items():
            for name, value in ((f"{chain}_imbalance", after), (f"{chain}_imbalance_before", before)):
                metrics[name] = torch.full((), value, dtype=counts.dtype, device=feed.device)  # no copy, which the host would wait for
        return tree.build(list(grads.items())), metrics

    return fn


def _refuse_context(layouts: Layouts, ctx: Any) -> None:
    if layouts.model is None:
        ((_, where),) = layouts.chains.items()
        if where.mesh != ctx.axes.mesh:
            raise MeshError(f"the layout is for mesh {where.mesh}, the context has mesh {ctx.axes.mesh}")
        return
    way = "make it of these layouts, with lf.chain_context.chain_context"
    if ctx.chains.keys() != layouts.chains.keys():
        raise MeshError(f"the layouts are of chains {', '.join(layouts.chains)}, the context has {', '.join(ctx.chains) or 'none'}: {way}")
    for chain, where in layouts.chains.items():
        axes, here = ctx.of(chain).axes, layouts.coords(chain, ctx.axes.rank) is not None
        ranks = layouts.ranks[chain] if here else None
        if (axes and axes.world.ranks) != ranks or (axes is not None and axes.mesh != where.mesh):
            has = f"mesh {axes.mesh} on ranks {runs(axes.world.ranks)}" if axes else "none"
            want = f"mesh {where.mesh} on ranks {runs(layouts.ranks[chain])}"
            raise MeshError(f"chain {chain!r} is laid out over {want}; the context of rank {ctx.axes.rank} has {has} for it: {way}")


def objectives_of(layouts: Layouts) -> dict[str, Objective]:
    """Of all chains, those of the main one first."""
    names = (layouts.main, *(chain for chain in layouts.chains if chain != layouts.main))
    return {k: o for chain in names for k, o in layouts.chains[chain].model.objectives.items()}


def _single(layouts: Layouts, batches: Sequence[Batch], ctx: Any) -> Feed:
    model = layouts.chains[""].model
    for batch in batches:
        model.accepts(batch)
    return Feed.of([shard_batch(b, model, ctx) for b in batches])


def _counts(layouts: Layouts, feed: Feed, ctx: Any) -> Tensor:
    """Of each objective over all ranks, in the order of `objectives_of`."""
    dtype, out = ctx.precision.master, []
    if layouts.model is None:
        batches = feed.batches[""].values()
        # A plan is the same on every rank of its dp coordinate, so each count is summed over dp alone.
        mine = torch.stack([torch.stack([o.count(b) for b in batches]).sum() for o in objectives_of(layouts).values()])
        return ctx.axes["dp"].sum(mine).to(dtype)
    chain_of = {k: chain for chain, where in layouts.chains.items() for k in where.model.objectives}
    for k, o in objectives_of(layouts).items():
        axes = ctx.of(chain_of[k]).axes
        first = axes is not None and not (axes.coords["pp"] or axes.coords["cp"] or axes.coords["tp"])  # of its dp coordinate
        counts = [o.count(b) for b in feed.batches[chain_of[k]].values()] if first else []
        out.append(torch.stack(counts).sum().to(dtype) if counts else torch.zeros((), dtype=dtype, device=feed.device))
    return ctx.axes.world.sum(torch.stack(out))


def _bound(layouts: Layouts, program: Program | Sequence[Program], ctx: Any, compile: Compile) -> dict[int, Bound]:
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
        bound[count] = bind(complete(p, layouts, count), layouts, ctx, compile)
    return bound


def _losses_agree(given: Collection[str], objectives: Collection[str]) -> None:
    if missing := sorted({*objectives} - {*given}):
        raise ConfigError(f"no segment gives a loss for objective {', '.join(missing)}; they give {', '.join(sorted(given)) or 'none'}")
    if unknown := sorted({*given} - {*objectives}):
        raise ConfigError(f"segments give the loss {', '.join(unknown)}, which no objective weighs; there are {', '.join(objectives) or 'none'}")


def _world_sums(
    losses: dict[str, Tensor], norms: dict[str, Tensor], grads: dict[str, Tensor], owned: Sequence[tuple[str, Piece]],
    shapes: dict[str, tuple[int, ...]], counted: dict[str, Tensor], ctx: Any,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:  # fmt: skip
    """Mean of each objective, the global gradient norm, and what segments have counted, in one sum over all ranks: terms and owned squares are P
    everywhere. shapes: of all that segments of the model count; what those of other ranks do is 0 here."""
    zero = next(iter(norms.values())).new_zeros(())  # of an objective whose loss other stages give
    squares = owned_square_sum(owned, grads, zero)
    mine = [counted.get(name, zero.expand(shape)).to(zero.dtype).flatten() for name, shape in shapes.items()]
    total = ctx.axes.world.sum(torch.cat([torch.stack([*(losses.get(k, zero).to(zero.dtype) for k in norms), squares]), *mine]))
    *means, square = total[: len(norms) + 1].unbind()
    sums = dict(zip(shapes, (x.view(shape) for x, shape in zip(total[len(norms) + 1 :].split([x.numel() for x in mine]), shapes.values()))))
    return {k: s / n for (k, n), s in zip(norms.items(), means)}, square.sqrt(), sums


def _after_step(layouts: Layouts, master: Tree, sums: dict[str, Tensor], ok: Tensor) -> None:
    """What is not learned goes on from the sums over the step, where the step is made."""
    held = {path: w for path, w in tree.items(master) if not layouts.specs[path].param.learned}
    for where in layouts.chains.values():
        mine = {path: held[path] for path in where.specs.keys() & held.keys()}
        for path, new in where.model.after_step(mine, {name: sums[name] for name in where.model.sums}).items():
            mine[path].copy_(torch.where(ok, new, mine[path]))


def make(
    layout: Layout | Layouts,
    optimizer: Optimizer,
    program: Program | Sequence[Program],
    ctx: Any,
    clip: float | None = 1.0,
    compile: Compile = False,
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
    refuse_what_cannot_fit(layout, optimizer, ctx)
    layouts = joined(layout)
    held, params = layouts.held(ctx.axes.rank), {path: spec.param for path, spec in layouts.trained(ctx.axes.rank).items()}

    def init(master: Tree) -> State:
        if missing := sorted(held.keys() - dict(tree.items(master))):
            raise ValueError(f"parameters are missing: {', '.join(missing)}")
        state = optimizer.init(tree.build([(path, tree.get(master, path)) for path in params]), device_of(ctx), layouts)
        state["master"] = tree.build([(path, tree.get(state["master"] if path in params else master, path)) for path in held])
        copy = compute_copy(layouts, state["master"], ctx)
        mark(PARAMETER, copy)
        mark(OPTIMIZER, state)
        return State(copy, state, torch.zeros((), dtype=torch.int64, device=device_of(ctx)))

    def step(state: State, batches: Sequence[Batch], clock: Clock | None = None) -> tuple[State, Metrics]:
        with torch.no_grad():
            grads, metrics = backward(state.params, batches, clock)
            norm, lr = metrics["grad_norm"], optimizer.lr(state.step)
            ok = torch.isfinite(norm) & torch.isfinite(metrics["loss"])
            # 1e-6 keeps the factor finite where the norm is 0; without clipping it is exactly 1
            scale = torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp_max(1.0)
            with memory_at("the update of the parameters", 1.0, dict(tree.items(grads))):
                state_of = optimizer.update(state.optimizer, grads, params, lr, scale, state.step, ok, ctx, layouts)
                _after_step(layouts, state_of["master"], metrics, ok)
                new = State(compute_copy(layouts, state_of["master"], ctx, state.params), state_of, state.step + 1)
        return new, {**metrics, "lr": lr, "skipped": ~ok}

    return init, step

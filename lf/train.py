"""One training step, and the loop around it.

    N_k  = Σ over ranks and microbatches of objective k's count       one sum, before the first action
    grad = ∂ Σ_k λ_k s_k / N_k                                        the program; gradients are *summed* over ranks, divided nowhere else
    norm, clip, update                                                 device scalars; an update that is not finite changes nothing

There is no mean of means: every rank back-propagates its own sums with the one global normaliser.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lf import checkpoint, tree
from lf.batch import Batch, BatchError
from lf.config import ConfigError
from lf.console import Bar, console
from lf.layouts import Layout
from lf.mesh import MeshError
from lf.optim import Optimizer
from lf.parallel.reduce import owned_square_sum
from lf.runs import Run, RunError, cut_metrics
from lf.schedule import Program, check
from lf.schedule.lower import add_reduce
from lf.schedule.run import bind, run
from lf.segment import Terms
from lf.spec import Piece
from lf.state import State, compute_copy, shard_batch
from lf.tree import Tree

Metrics = dict[str, Tensor]
Gradients = tuple[Tree, Metrics]


def gradients(layout: Layout, program: Program, ctx: Any) -> Callable[[Tree, Sequence[Batch]], Gradients]:
    """fn(params, microbatches) -> (gradients as a tree like params, metrics): the half of a step before the optimizer.

    params: the compute copy. Gradients come in the master dtype, summed over all ranks. metrics are device scalars, equal on all ranks:
    loss (Σ_k λ_k · mean of objective k), one entry per objective, grad_norm, tokens (the count of the first objective: tokens with a label).
    Raises ProgramError, MeshError where program, layout and ranks do not fit together.
    """
    if layout.mesh != ctx.axes.mesh:
        raise MeshError(f"the layout is for mesh {layout.mesh}, the context has mesh {ctx.axes.mesh}")
    microbatches = sum(a.op == "F" for a in program[0])
    if not any(a.op == "REDUCE" for a in program[0]):
        program = add_reduce(program, layout)
    check(program, layout, microbatches)
    model, objectives, bound = layout.model, layout.model.objectives, bind(program[ctx.axes.coords["pp"]], layout)
    owned = [(spec.path, piece) for spec in layout.specs.values() for piece in spec.owned(ctx.axes.coords)]

    def fn(params: Tree, batches: Sequence[Batch]) -> Gradients:
        if len(batches) != microbatches:
            raise BatchError(f"the program is for {microbatches} microbatches; {len(batches)} were given")
        for batch in batches:
            model.accepts(batch)
        batches = [shard_batch(b, model, ctx) for b in batches]
        counts = torch.stack([torch.stack([o.count(b) for b in batches]).sum() for o in objectives.values()])
        # A plan is the same on every rank of its dp coordinate, so each count is summed over dp alone.
        counts = ctx.axes["dp"].sum(counts).to(ctx.precision.master)
        norms = dict(zip(objectives, counts.clamp_min(1)))  # no label at all: the sum is 0 and so is the loss
        seeds = {k: o.weight / norms[k] for k, o in objectives.items()}
        grads, terms = run(bound, params, batches, seeds, ctx)
        means, norm = _world_sums(terms, norms, grads, owned, ctx)
        loss = torch.stack([o.weight * means[k] for k, o in objectives.items()]).sum()
        metrics = {"loss": loss, **means, "grad_norm": norm, "tokens": counts[0]}
        return tree.build(list(grads.items())), metrics

    return fn


def _world_sums(
    terms: Terms, norms: dict[str, Tensor], grads: dict[str, Tensor], owned: Sequence[tuple[str, Piece]], ctx: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Mean of each objective and the global gradient norm, in one sum over all ranks: terms and owned squares are P everywhere."""
    if missing := [k for k in norms if k not in terms.get("losses", {})]:
        raise ConfigError(f"no segment gives a loss for objective {', '.join(missing)}; they give {', '.join(terms.get('losses', {})) or 'none'}")
    squares = owned_square_sum(owned, grads)
    losses = [terms["losses"][k].to(squares.dtype) for k in norms]
    *sums, total = ctx.axes.world.sum(torch.stack([*losses, squares])).unbind()
    return {k: s / n for (k, n), s in zip(norms.items(), sums)}, total.sqrt()


def make(
    layout: Layout, optimizer: Optimizer, program: Program, ctx: Any, clip: float | None = 1.0
) -> tuple[Callable[[Tree], State], Callable[[State, Sequence[Batch]], tuple[State, Metrics]]]:
    """(init, step): init(master params) -> State; step(state, microbatches) -> (state, metrics). Everything refusable is refused here.

    metrics: those of `gradients`, and lr, skipped (1 where loss or norm was not finite and nothing was changed). They are device scalars:
    read them a step later and the host never waits. `clip`: the largest gradient norm (None: unlimited). `init` takes the parameters over and a
    state is used up by its step: both are updated in place.
    """
    if clip is not None and clip <= 0:
        raise ConfigError(f"clip={clip} must be above 0, or None for no clipping")
    backward = gradients(layout, program, ctx)
    params = {path: spec.param for path, spec in layout.specs.items()}

    def init(master: Tree) -> State:
        if missing := sorted(layout.specs.keys() - dict(tree.items(master))):
            raise ValueError(f"parameters are missing: {', '.join(missing)}")
        return State(compute_copy(master, ctx), optimizer.init(master), torch.zeros((), dtype=torch.int64, device=tree.leaves(master)[0].device))

    def step(state: State, batches: Sequence[Batch]) -> tuple[State, Metrics]:
        with torch.no_grad():
            grads, metrics = backward(state.params, batches)
            norm, lr = metrics["grad_norm"], optimizer.lr(state.step)
            ok = torch.isfinite(norm) & torch.isfinite(metrics["loss"])
            # 1e-6 keeps the factor finite where the norm is 0; without clipping it is exactly 1
            scale = torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp_max(1.0)
            state_of = optimizer.update(state.optimizer, grads, params, lr, scale, state.step, ok, ctx.ops)
            new = State(compute_copy(state_of["master"], ctx), state_of, state.step + 1)
        return new, {**metrics, "lr": lr, "skipped": ~ok}

    return init, step


def loop(
    run: Run,
    layout: Layout,
    step: Callable[[State, Sequence[Batch]], tuple[State, Metrics]],
    state: State,
    batches: Callable[[int], Sequence[Batch]],
    steps: int,
    ctx: Any,
    save_every: int,
    extra: dict[str, Any],
) -> State:
    """Steps from where `state` is to `steps`, with a live bar, a line of metrics.jsonl a step, and checkpoints every `save_every` steps.

    batches(i): this rank's microbatches of step i, counted from 0. `extra` goes into every checkpoint. Metrics are read one step late, so the
    host never waits for a step that it has just started. Raises RunError when loss or gradient norm is not finite, naming the step.
    """
    if steps < 1 or save_every < 1:
        raise ConfigError(f"steps={steps} and save_every={save_every} must each be at least 1")
    first = int(state.step)
    records = cut_metrics(run.metrics, first) if ctx.axes.rank == 0 else []
    tokens = records[-1]["tokens"] if records else 0
    screen = console(ctx.axes.rank)
    pending: tuple[int, Metrics, float] | None = None
    with Bar(screen, "step", steps, first) as bar, open(run.metrics if ctx.axes.rank == 0 else os.devnull, "a") as out:

        def settle(ended: float) -> None:
            """Reads the metrics that are still on the device, and writes and shows them. `ended`: when the next step began, or now."""
            nonlocal tokens, pending
            if pending is None:
                return
            (number, metrics, began), pending = pending, None
            values = {k: v.item() for k, v in metrics.items()}
            if values.pop("skipped"):
                raise RunError(f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}: not finite, nothing was updated")
            speed = values["tokens"] / (ended - began)
            tokens += int(values["tokens"])
            record = {"step": number, **values, "tokens": tokens, "tokens_per_s": round(speed, 1)}
            out.write(json.dumps(record) + "\n")
            out.flush()
            bar.at(number, values={"loss": f"{values['loss']:.3f}", "tokens/s": f"{speed:,.0f}"})

        for i in range(first, steps):
            began = time.perf_counter()
            state, metrics = step(state, batches(i))
            settle(began)
            pending = (i + 1, metrics, began)
            if (i + 1) % save_every == 0 or i + 1 == steps:
                settle(time.perf_counter())  # a checkpoint stands for metrics that are written
                checkpoint.save(run.checkpoints / f"step-{i + 1:08d}", layout, state, ctx, extra)
                checkpoint.prune(run.checkpoints, keep=2, ctx=ctx)
    return state

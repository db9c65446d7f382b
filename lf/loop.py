"""The loop around a step: metrics, checkpoints, evaluation, and what is done when something goes wrong.

Metrics and the signs of the other ranks are read one step late, so the host never waits for a step that it has just started. What happens
between two steps (evaluation, the drift check, a checkpoint) happens when that step's metrics are read, and on all ranks alike.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from lf import checkpoint, drift, log, memory, signals
from lf.batch import Batch
from lf.config import ConfigError
from lf.console import Bar, console
from lf.layouts import Layout
from lf.record import Measured, measure, record_of
from lf.runs import Run, RunError, cut_metrics, on_first_rank
from lf.schedule import Program, chrome, picture
from lf.schedule.ir import flat, microbatches
from lf.schedule.measured import Clock
from lf.schedule.memory import OutOfMemory
from lf.state import State
from lf.train import Step
from lf.tree import Tree

OFF_BY = 1.0  # nats that a fresh model's first loss may be from what it should be


@attrs.frozen
class Feed:
    """What a run reads. batches(i): this rank's microbatches of step i, from 0 · consumed(i): rows that the steps before i take, over all ranks ·
    seq_len: tokens in a row · about: what data it is (JSON), which goes into every checkpoint."""

    batches: Callable[[int], Sequence[Batch]]
    consumed: Callable[[int], int]
    seq_len: int
    about: dict[str, Any]

    def tokens(self, step: int) -> int:
        """Tokens that the steps before this one take."""
        return self.consumed(step) * self.seq_len


@attrs.frozen
class Policy:
    """What a run does besides stepping. Counts are steps; None: never. Raises ConfigError for what cannot be, also for a log without its package.

    `keep`: checkpoints that stay · `on_nonfinite`: "stop", or "skip:N", which goes on past at most N steps in a row that were not finite ·
    `log`: as 'jsonl,tensorboard,wandb' · `draw_step`: the step, from 1, whose actions are timed and drawn into the run's folder ·
    `first_loss`: what the first loss of a fresh model should be, ln(vocabulary): that of its first objective.
    """

    steps: int
    save_every: int = 100
    keep: int = 2
    eval_every: int | None = None
    drift_every: int | None = None
    on_nonfinite: str = "stop"
    log: tuple[str, ...] = attrs.field(default="jsonl", converter=log.chosen)
    first_loss: float | None = None
    draw_step: int | None = None

    def __attrs_post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("steps", "save_every", "keep", "eval_every", "drift_every", "draw_step")}
        if wrong := [f"{name}={n}" for name, n in counts.items() if n is not None and n < 1]:
            raise ConfigError(f"{', '.join(wrong)}: must be at least 1")
        if self.draw_step is not None and self.draw_step > self.steps:
            raise ConfigError(f"draw_step={self.draw_step}: the run has {self.steps} steps; name one of them")
        if not re.fullmatch(r"stop|skip:[1-9]\d*", self.on_nonfinite):
            raise ConfigError(f"on_nonfinite={self.on_nonfinite!r} should read stop, or skip:N with N at least 1, as skip:3")

    @property
    def skips(self) -> int:
        """Steps in a row that may be skipped."""
        return int(self.on_nonfinite.partition(":")[2] or 0)

    def due(self, every: int | None, step: int) -> bool:
        """Whether something that is done every so many steps is done after this one. The last step is always one."""
        return every is not None and (step % every == 0 or step == self.steps)


def run(
    folder: Run,
    layout: Layout,
    step: Step,
    state: State,
    feed: Feed,
    ctx: Any,
    policy: Policy,
    evaluate: Callable[[Tree], dict[str, float]] | None = None,
    programs: Sequence[Program] = (),
) -> State:
    """Steps from where `state` is to policy.steps, or to where a signal asks it to end: then int(state.step) is less, and all is saved.

    `step`: from lf.train.make · `evaluate`: from lf.evaluate.make · `programs`: those of `step`, lowered; policy.draw_step needs them.
    Raises RunError when steps are not finite or replicas differ, OutOfMemory; the checkpoints that are there stay.
    """
    first, screen = int(state.step), console(ctx.axes.rank)
    if policy.draw_step and not programs:
        raise ConfigError(f"draw_step={policy.draw_step}: a step is drawn by its program; give `programs`, or no draw_step")
    if policy.draw_step and policy.draw_step <= first and not _drawings(folder, policy.draw_step)[0].exists():
        screen.print(f"draw_step={policy.draw_step} is not drawn: the run goes on after step {first}; name a later one", soft_wrap=True)
    ctx.axes.position.counts["step"] = first  # a drawing of where the ranks are then names a step as the records do
    in_a_row = on_first_rank(lambda: _skipped_last(cut_metrics(folder.metrics, first)), ctx.axes)
    with ExitStack() as stack:
        write = stack.enter_context(log.opened(policy.log, folder, first, ctx.axes))
        bar = stack.enter_context(Bar(screen, "step", policy.steps, first))
        asked = stack.enter_context(signals.asked())
        pending: Measured | None = None

        def settle(more: Callable[[], dict[str, float]] = dict, ended: float | None = None) -> int:
            """Reads the metrics that are still on the device, and shows and writes them with `more`. Returns the signal that a rank has got."""
            nonlocal pending, in_a_row
            if pending is None:
                return 0
            done, pending = pending, None
            record, stop = record_of(done, ended, feed.tokens, layout, ctx, policy.due(max(policy.steps // 100, 1), done.step) or done.step == 1)
            in_a_row = in_a_row + 1 if record["skipped"] else 0
            if record["skipped"]:
                words = f"step {done.step}: {_not_finite(record, done.metrics()['finite'], ctx)}"
                if in_a_row > policy.skips:
                    why = f"{in_a_row} such steps in a row" if policy.skips else "--on-nonfinite skip:N goes on past such a step"
                    raise RunError(f"{words}; {why}")
                screen.print(f"{words}; skipped", soft_wrap=True)
            record |= more()
            write(record)
            bar.at(done.step, values=_shown(record))
            if done.step == 1 and policy.first_loss is not None and not record["skipped"]:
                first_loss = record.get(next(iter(layout.model.objectives)), record["loss"])
                screen.print(_first_loss(first_loss, policy.first_loss), soft_wrap=True)
            return stop

        def between(evaluating: bool, drifting: bool) -> dict[str, float]:
            """What is due after a step whose metrics are read. What raises here is followed by no checkpoint."""
            if drifting:
                drift.check(layout, state, ctx)
            if not evaluating:
                return {}
            assert evaluate is not None
            values = evaluate(state.params)
            screen.print(_evaluated(int(state.step), values), soft_wrap=True)
            return values

        stop = 0
        for i in range(first, policy.steps):
            began, batches = time.perf_counter(), feed.batches(i)
            clock = Clock(ctx.axes, ctx.device) if i + 1 == policy.draw_step else None
            try:
                state, metrics = step(state, batches, clock) if clock else step(state, batches)
            except OutOfMemory as error:
                again = any(a.op == "REMAT" for p in programs for row in p for a in flat(row))
                raise memory.explained(error, layout, state, batches, feed.seq_len, ctx, again) from error
            measured = measure(i + 1, metrics, batches, began, asked(), layout, ctx)
            stop = settle(ended=began) or stop
            pending = measured
            saving = policy.due(policy.save_every, i + 1) or bool(stop)
            evaluating = evaluate is not None and policy.due(policy.eval_every, i + 1)
            drifting = policy.drift_every is not None and (saving or policy.due(policy.drift_every, i + 1))
            if saving or evaluating or drifting or clock:
                stop = settle(partial(between, evaluating, drifting)) or stop
            if clock:
                screen.print(_drawn(clock, i + 1, programs, len(batches), folder, ctx), soft_wrap=True)
            if saving:  # it stands for metrics that are written
                checkpoint.save(folder.checkpoints / f"step-{i + 1:08d}", layout, state, ctx, feed.about)
                checkpoint.prune(folder.checkpoints, keep=policy.keep, ctx=ctx)
                if stop and i + 1 < policy.steps:
                    name = signal.Signals(stop).name
                    screen.print(f"{name}: ended after step {i + 1} of {policy.steps}, which is saved; the same command goes on", soft_wrap=True)
                    break
    return state


def _drawn(clock: Clock, step: int, programs: Sequence[Program], n: int, folder: Run, ctx: Any) -> str:
    """Draws the step as it was on the pipeline of rank 0. Collective: the ranks tell each other when their actions were."""
    timeline = clock.timeline(next(p for p in programs if microbatches(p) == n))
    files = _drawings(folder, step)

    def draw() -> None:
        for file in files[:2]:
            picture(timeline, file, f"step {step} on {ctx.axes.mesh}, {n} microbatches")
        chrome(timeline, files[2])

    on_first_rank(draw, ctx.axes)
    return f"step {step} is drawn: {', '.join(map(str, files))}"


def _drawings(folder: Run, step: int) -> list[Path]:
    return [folder.folder / f"step-{step:08d}{end}" for end in (".svg", ".png", ".json")]


def _skipped_last(records: Sequence[dict[str, Any]]) -> int:
    """How many of the last steps in a row were skipped."""
    n = 0
    while n < len(records) and records[-1 - n].get("skipped"):
        n += 1
    return n


def _not_finite(record: dict[str, Any], finite: Tensor, ctx: Any) -> str:
    """Which rank and microbatch. Collective: every rank sees the same verdict, so all come here."""
    bad = torch.zeros(ctx.axes.world.size, len(finite), dtype=torch.int64)
    bad[ctx.axes.world.index] = ~finite.cpu()
    places = [f"rank {r} microbatch {m}" for r, m in ctx.axes.world.sum(bad).nonzero().tolist()]
    where = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
    words = f"loss {record['loss']}, gradient norm {record['grad_norm']}: not finite"
    return f"{words} on {where or 'no rank by itself, only in the sum over microbatches and ranks'}; nothing was updated"


def _first_loss(loss: float, want: float) -> str:
    words = f"first loss {loss:.2f}; ln(vocabulary) = {want:.2f}"
    if abs(loss - want) <= OFF_BY:
        return words
    causes = (
        "tokens that see their own labels, or weights that are not fresh"
        if loss < want
        else "initial weights that are too large, or labels that are not those of the tokens"
    )
    return f"warning: {words}. A fresh model knows nothing, so they should be near each other; likely causes: {causes}"


def _evaluated(step: int, values: dict[str, float]) -> str:
    names = dict.fromkeys(key.split("/")[1] for key in values)
    shown = [[f"{k} {values[f'eval/{n}/{k}']:.4g}" for k in ("loss", "perplexity") if f"eval/{n}/{k}" in values] for n in names]
    return f"step {step}: " + "; ".join(f"{name} {', '.join(words)}" for name, words in zip(names, shown))


def _shown(record: dict[str, Any]) -> dict[str, str]:
    values = {"loss": f"{record['loss']:.3f}", "tokens/s/device": f"{record['tokens_per_s_per_device']:,.0f}"}
    return values | ({"mfu": f"{record['mfu']:.1%}"} if "mfu" in record else {})

"""The record of one step: what it learned, how fast, in how much memory. The same keys wherever it goes.

    step tokens loss OBJECTIVE… grad_norm lr tokens_per_s_per_device tflops_per_device mfu memory_gib skipped counted

tokens: taken from the data so far, padding not counted · tflops_per_device: where the model knows its operations · mfu: they by what the device
could do, where that is known · memory_gib: the most that a rank has held so far · skipped: 1 where nothing was updated. Of a model with experts
also expert_load_max, expert_entropy, experts_idle, dropped (lf.models.moe.moe_report), and in about a hundred steps of a run, in metrics.jsonl
alone, counted: {'LAYER.route/load': tokens of each expert}.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from lf.batch import Batch
from lf.layouts import Layout

NOT_LOSSES = ("loss", "grad_norm", "tokens", "finite", "lr", "skipped")


@attrs.frozen
class Measured:
    """A step that has been started. metrics(): its metrics on the host · signs(): what the ranks say (signal, memory, operations of each dp
    coordinate), the largest over all ranks · began: when the host began it. Both functions wait."""

    step: int
    metrics: Callable[[], dict[str, Tensor]]
    signs: Callable[[], Tensor]
    began: float


def measure(step: int, metrics: dict[str, Tensor], batches: Sequence[Batch], began: float, asked: int, layout: Layout, ctx: Any) -> Measured:
    """Starts the way of a step's metrics to the host, and the exchange of signs between the ranks. Nothing waits."""
    dp = ctx.axes["dp"]
    signs = torch.zeros(2 + dp.size, dtype=torch.float64)
    signs[0], signs[1] = asked, ctx.device.memory_peak()
    if layout.model.flops is not None:
        signs[2 + dp.index] = sum(map(layout.model.flops, batches))
    return Measured(step, _to_host(metrics), ctx.axes.world.all_reduce(signs, "max", later=True), began)


def record_of(
    done: Measured, ended: float | None, tokens: Callable[[int], int], layout: Layout, ctx: Any, whole: bool = False
) -> tuple[dict[str, Any], int]:
    """(the record, the signal that some rank has got or 0). `ended`: when the next step began; None: now, when all is read.

    tokens(i): those that the steps before step i take from the data, over all ranks. whole: with all that segments have counted."""
    metrics, sums = done.metrics(), layout.model.sums
    values = {k: v.item() for k, v in metrics.items() if k != "finite" and k not in sums}
    stop, held, *flops = done.signs().tolist()
    seconds, ranks = (time.perf_counter() if ended is None else ended) - done.began, ctx.axes.world.size
    before, after = tokens(done.step - 1), tokens(done.step)
    record: dict[str, Any] = {"step": done.step, "tokens": after, "loss": values["loss"]}
    record |= {k: v for k, v in values.items() if k not in NOT_LOSSES}
    record |= {"grad_norm": values["grad_norm"], "lr": values["lr"]}
    record["tokens_per_s_per_device"] = round((after - before) / seconds / ranks, 1)
    if layout.model.flops is not None:
        rate = sum(flops) / seconds / ranks
        record["tflops_per_device"] = rate / 1e12
        if peak := ctx.device.peak_flops(ctx.precision.compute):
            record["mfu"] = rate / peak
    record |= layout.model.report({name: metrics[name] for name in sums})
    if whole and sums:
        record["counted"] = {name: metrics[name].long().tolist() for name in sums}
    return {**record, "memory_gib": round(held / 2**30, 3), "skipped": int(values["skipped"])}, int(stop)


def _to_host(metrics: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Starts the copies; the function waits for these, and not for what the device was given after them."""
    there = {k: v.to("cpu", non_blocking=True) for k, v in metrics.items()}
    device = next(iter(metrics.values())).device
    if device.type == "cpu":
        return lambda: there
    event = torch.Event(device)
    event.record()

    def wait() -> dict[str, Tensor]:
        event.synchronize()
        return there

    return wait

"""A pipeline step next to torch.distributed.pipelining: the same stages, weights and microbatches, in turn, in one run on the same ranks.

    OMP_NUM_THREADS=1 scripts/launch bench_pipeline --device cpu
    OMP_NUM_THREADS=1 scripts/launch bench_pipeline --device cpu --mesh pp=4 --model qwen3-demo --microbatches 16

lf's side is lf.schedule.run, torch's is schedule.step, both on microbatches that are on the device, with their rotary tables; counts and the norm
of gradients, which lf.train.gradients adds, belong to neither. torch's stages run lf's segments as an nn.Module, with F.linear for products:
autograd takes that apart into gradients of input and weight, which it cannot do to a Function written in Python. Nothing is recomputed on either
side, the embedding is not tied (torch has no gradient for a parameter that two stages hold). Gradients must agree, else the exit code is 1.

Then, on one rank: what the interpreter adds to a loop over the same functions, in microseconds an action.
"""

import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import pipelining

import lf
from lf.layouts import Layout
from lf.models.small import tiny
from lf.parallel.product import W
from lf.parallel.redistribute import S
from lf.parallel.vocab import vocab_cross_entropy
from lf.schedule.bind import Bound, bind
from lf.schedule.build import build
from lf.schedule.ir import flat
from lf.schedule.named import SCHEDULES
from lf.schedule.run import run
from lf.segment import path_of

MESH = "pp=2"
OUT = "runs/bench_pipeline"
RTOL = 1e-5  # of the largest element of each gradient, in float32

PEERS = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B", "zb-v": "ScheduleZBVZeroBubble"}


@attrs.frozen
class Config:
    mesh: str = MESH
    device: str | None = None
    model: str = "qwen3-demo"
    seq_len: int = 256
    microbatches: int = 8
    schedules: tuple[str, ...] = tuple(PEERS)
    rounds: int = 11
    steps: int = 2  # of each side in a round
    loops: int = 400  # of the measured overhead; 0 leaves it out
    out: str = OUT  # where the launcher puts what the ranks say
    json: str | None = None


def main(config: Config) -> None:
    lf.config.at_least(1, config, "seq_len", "microbatches", "rounds", "steps")
    lf.config.at_least(0, config, "loops")
    for name in config.schedules:
        lf.config.one_of("schedule with a peer in torch", name, PEERS)
    device, mesh = lf.devices.get(config.device), lf.Mesh.parse(config.mesh)
    if mesh.pp < 2 or mesh.fill().size != mesh.pp:
        raise lf.config.ConfigError(f"mesh {mesh}: this compares pipelines alone; give pp=N, of 2 or more, and no other axis")
    ctx = lf.Context(lf.connect(mesh, device), device, "fp32")
    screen = lf.console.console(ctx.axes.rank)
    found = {name: compared(name, config, ctx) for name in config.schedules}
    tokens = config.seq_len * config.microbatches
    what = f"a step of {config.model}, forward and backward: {tokens} tokens in {config.microbatches} microbatches, fp32, {mesh}, {device.NAME}"
    columns = ("schedule", "lf, ms", "torch, ms", "lf / torch, time", "gradients")
    screen.print(lf.console.table(what, columns, [shown(name, x) for name, x in found.items()]))
    results: dict[str, Any] = {"schedules": found}
    if config.loops and not ctx.axes.rank:
        results["overhead"] = x = overhead(config.loops, device)
        words = f"{x['interpreter_us']:.0f} µs against {x['loop_us']:.0f} µs of a loop over the same functions, in {x['actions']} actions"
        screen.print(f"the interpreter: {x['us_per_action']:.1f} µs an action ({words})")
    if config.json and not ctx.axes.rank:
        Path(config.json).write_text(json.dumps({"config": lf.config.to_dict(config), **results}, indent=1) + "\n")
    ctx.axes.world.barrier()
    if not all(x.get("equal", True) for x in found.values()):
        sys.exit(1)


def shown(name: str, x: dict[str, Any]) -> tuple[object, ...]:
    if "error" in x:
        return name, "", "", "", x["error"]
    words = "equal" if x["equal"] else "DIFFER"
    return name, f"{x['lf'] * 1e3:.1f}", f"{x['torch'] * 1e3:.1f}", f"{x['ratio']:.3f}", f"{words}: {x['error_of_gradients']:.0e} ≤ {RTOL:.0e}"


def compared(name: str, config: Config, ctx: Any) -> dict[str, Any]:
    """{"lf", "torch": median seconds of a step, "ratio": median of those of the rounds, ...}, or {"error": why torch's schedule does not run}."""
    schedule, axes = SCHEDULES[name], ctx.axes
    mesh, model = axes.mesh, untied(config)
    layout = lf.layout(model, mesh, placement=schedule.place(mesh.pp, schedule.chunks))
    params = lf.init(layout, ctx, seed=0)
    batches = batches_of(config, model.config.vocab)
    bound = bind(build(layout, config.microbatches, schedule.generate), layout, ctx)
    ready = [lf.shard_batch(b, model, ctx) for b in batches]
    count = torch.stack([model.objectives["cross_entropy"].count(b) for b in ready]).sum()
    seeds = {"cross_entropy": torch.ones((), device=count.device) / count}
    try:
        theirs, grads = torch_step(PEERS[name], layout, params, batches, ctx)
    except (ValueError, TypeError, AttributeError, AssertionError) as reason:  # its own conditions, the same on every rank
        return {"error": f"torch: {type(reason).__name__}: {reason}"}
    held: list[Any] = []

    def mine_held() -> None:
        held.clear()  # as torch's, the gradients live until the next step
        held.append(run(bound, params, ready, seeds, ctx)[0])

    sides: dict[str, Callable[[], Any]] = {"lf": mine_held, "torch": theirs}
    mine = run(bound, params, ready, seeds, ctx)[0]
    theirs()
    worst = torch.stack([(g - mine[p]).abs().max() / mine[p].abs().max() for p, g in grads().items()]).max()
    error = float(axes.world.max(torch.nan_to_num(worst, nan=torch.inf)))
    del mine
    times: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(config.rounds + 1):  # the first warms up
        for side in sides if i % 2 else reversed(sides):
            axes.world.barrier()
            began = time.perf_counter()
            for _ in range(config.steps):
                sides[side]()
            if ctx.device.NAME == "cuda":
                torch.cuda.synchronize()
            axes.world.barrier()
            if i:
                times[side].append((time.perf_counter() - began) / config.steps)
    ratios = [a / b for a, b in zip(times["lf"], times["torch"])]
    medians = {side: statistics.median(t) for side, t in times.items()}
    return {**medians, "ratio": statistics.median(ratios), "equal": error <= RTOL, "error_of_gradients": error, "ratios": ratios}


def untied(config: Config) -> lf.segment.Model:
    made = tiny() if config.model == "tiny" else lf.hf.model(config.model)
    return lf.models.decoder.decoder(attrs.evolve(made.config, tied=False))


def batches_of(config: Config, vocab: int) -> list[lf.Batch]:
    """One document each, all equally long: positions are one thing that torch's stages need not be sent."""
    words = np.random.default_rng(0).integers(0, vocab, (config.microbatches, config.seq_len))
    return [lf.data.pack([lf.data.Row(row, np.append(row[1:], lf.IGNORE), np.array([0]))], config.seq_len) for row in words]


class Stage(torch.nn.Module):
    """The segments of one stage. The first takes tokens (1, seq_len), the last gives logits; x is (seq_len, dim) between them."""

    def __init__(self, layout: Layout, index: int, params: Any, batch: lf.Batch, ctx: Any) -> None:
        super().__init__()
        self.segments, self.batch, self.ctx, self.first = layout.stages[index], batch, ctx, index == 0
        self.paths = list(dict.fromkeys(path_of(s, n) for s in self.segments for n in s.params))
        self.weights = torch.nn.ParameterList(lf.tree.get(params, path).clone() for path in self.paths)

    def forward(self, x: Any) -> Tensor:
        batch, held = self.batch, dict(zip(self.paths, self.weights))
        if self.first:
            batch, x = attrs.evolve(batch, plan={**batch.plan, "tokens": x[0]}), {}
        for segment in self.segments:
            x, _ = segment.apply({n: held[path_of(segment, n)] for n in segment.params}, x, batch, self.ctx)
        return x


def torch_step(
    kind: str, layout: Layout, params: Any, batches: Sequence[lf.Batch], ctx: Any
) -> tuple[Callable[[], None], Callable[[], dict[str, Tensor]]]:
    """(one step of torch's schedule, its gradients by path)."""
    rank, tp = ctx.axes.coords["pp"], ctx.axes["tp"]
    device = lf.state.device_of(ctx)
    bare = lf.Batch({k: v for k, v in batches[0].plan.items() if k != "labels"})
    batch = lf.shard_batch(bare, layout.model, ctx)
    modules = {s: Stage(layout, s, params, batch, ctx) for s in layout.on(rank)}
    stages = [pipelining.PipelineStage(module, s, len(layout.stages), device) for s, module in modules.items()]
    tokens, labels = (torch.stack([b.plan[k] for b in batches]).to(device) for k in ("tokens", "labels"))
    count = (labels != lf.IGNORE).sum()

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return vocab_cross_entropy(logits, target[0], 0, tp, S(0, (target.shape[1],))) / count

    make: Any = getattr(pipelining, kind)
    single = kind in ("ScheduleGPipe", "Schedule1F1B")
    schedule = make(stages[0] if single else stages, len(batches), loss_fn=loss, scale_grads=False)
    takes = inspect.signature(schedule.step).parameters
    quiet = {"return_outputs": False} if "return_outputs" in takes else {}  # the logits of all microbatches, joined: nobody asked for them
    args = (tokens,) if 0 in modules else ()
    target = {"target": labels} if len(layout.stages) - 1 in modules else {}

    def step() -> None:
        for module in modules.values():
            module.zero_grad(set_to_none=True)
        with patch("lf.parallel.linear.product", F.linear):
            schedule.step(*args, **target, **quiet)

    def grads() -> dict[str, Tensor]:
        return {path: w.grad for module in modules.values() for path, w in zip(module.paths, module.weights) if w.grad is not None}

    return step, grads


def overhead(loops: int, device: Any, stages: int = 4, microbatches: int = 4) -> dict[str, float]:
    """The interpreter and the loop take turns at interleaved 1F1B over stages of a tiny model on one rank; medians of this thread's seconds."""
    ctx = lf.Context(lf.solo(), device, "fp32")
    layout = lf.layout(tiny(tied=False), ctx.axes.mesh, placement=(0,) * stages)
    bound = bind(build(layout, microbatches, SCHEDULES["interleaved"].generate), layout, ctx)
    config = Config(seq_len=16, microbatches=microbatches)
    batches = [lf.shard_batch(b, layout.model, ctx) for b in batches_of(config, layout.model.config.vocab)]
    params, seeds = lf.init(layout, ctx, seed=0), {"cross_entropy": torch.tensor(1.0)}
    times: dict[str, list[float]] = {"interpreter": [], "loop": []}
    sides = {"interpreter": lambda: run(bound, params, batches, seeds, ctx)[0], "loop": lambda: loop(bound, params, batches, seeds, ctx)}
    a, b = (side() for side in sides.values())
    assert a.keys() == b.keys()
    assert all(torch.equal(a[path], b[path]) for path in a), "the loop computes something else"
    for _ in range(loops):
        for name, side in sides.items():
            began = time.thread_time()  # others on the machine do not count
            side()
            times[name].append(time.thread_time() - began)
    us = {f"{name}_us": statistics.median(t) * 1e6 for name, t in times.items()}
    more = statistics.median(a - b for a, b in zip(*times.values())) * 1e6
    return {"us_per_action": more / len(bound.actions), "actions": len(bound.actions), **us}


def loop(bound: Bound, params: Any, batches: Sequence[lf.Batch], seeds: dict[str, Tensor], ctx: Any) -> dict[str, Tensor]:
    """What a hand would write for this program: every piece's forward, autograd, sums; nothing that is watched, checked or described."""
    leaves = {path: lf.tree.get(params, path).detach().requires_grad_() for path in bound.chains[""].trained}
    sums: dict[str, Tensor] = {}
    kept: dict[tuple[int, int | None], list[Any]] = {}
    between: dict[tuple[str, int, int | None], Any] = {}
    total: Any = 0.0

    def value(path: str, product: bool) -> Any:
        if not product:
            return leaves[path]
        if path not in sums:
            sums[path] = torch.zeros_like(leaves[path], requires_grad=False)
        return W(leaves[path], sums[path].data)

    for a in flat(bound.actions):
        s, m = at = a.stage, a.microbatch
        if a.op == "F":
            assert m is not None
            x = between.pop(("F", s, m), {})
            for piece in bound.chains[""].pieces[s, None]:
                x = x.detach().requires_grad_() if isinstance(x, Tensor) else x
                weights = tuple({n: value(p, w) for n, p, w in names} for _, names in piece.names)
                y, losses, _, _ = piece.fn["acc"](weights, x, batches[m], ctx, ())
                kept.setdefault(at, []).append((piece, x, y, losses))
                for each in losses.values():
                    total = total + each.detach()
                x = y
            between["F", s + 1, m] = x
        elif a.op == "B":
            dy = between.pop(("B", s, m), None)
            while kept[at]:
                piece, x, y, losses = kept[at].pop()
                inputs = [x] if isinstance(x, Tensor) else []
                wanted = [*inputs, *(leaves[p] for p in piece.leaves), *(leaves[p] for _, _, p in piece.products)]
                roots, given = ([y], [dy]) if isinstance(y, Tensor) else ([*losses.values()], [seeds[k] for k in losses])
                dx = torch.autograd.grad(roots, wanted, given, allow_unused=True)
                dy = dx[0] if inputs else None
                for path, g in zip(piece.leaves, dx[len(inputs) :]):
                    if path in sums:
                        sums[path] += g
                    else:
                        sums[path] = g.clone()
                if a.segment == piece.name:
                    break
            between["B", s if kept[at] else s - 1, m] = dy
    return sums


if __name__ == "__main__":
    lf.cli.run(main, Config)

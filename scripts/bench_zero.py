"""Sharded state next to torch's: a step of the same model on the same ranks, lf and its peer in turn, in one run.

    OMP_NUM_THREADS=1 scripts/launch bench_zero --device cpu
    scripts/launch bench_zero --device cuda --mesh dp=2 --model qwen3-0.6b --precision bf16 --seq-len 4096 --micro-batch 1

Stage 0 runs next to DDP, stage 1 next to DDP with ZeroRedundancyOptimizer, stage 2 next to FSDP2 that keeps the weights of a step whole, stage 3 next
to FSDP2 that does not; what else --shard says is lf's alone. The peers train transformers' class with SDPA, lf its own model, of the same weights,
microbatches, clipping and AdamW. The loss, the norm, every gradient (as the first moment after the first step) and every weight must agree before
anything is timed, else the exit code is 1.

Memory is the most that a rank holds during a step, weights and optimizer included, beyond what stood there before its side was made. On CUDA the
allocator counts it. On a CPU it is what the process has from its C library, looked at before and after each operation.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

import lf
from lf import box, tree
from lf.config import ConfigError
from lf.sharding import Sharding

sys.path.insert(0, str(Path(__file__).parent / "lib"))
from peak import live, peak
from turns import words as in_words
from zero_peers import PEERS, Side, Task, theirs

MESH = "dp=2"
OUT = "runs/bench_zero"
LR, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # ‖a - b‖ / ‖b‖ of what is compared


@attrs.frozen
class Config:
    mesh: str = MESH
    device: str | None = None
    model: str = "qwen3-demo"
    precision: str = "fp32"
    seq_len: int = 256
    micro_batch: int = 1  # rows
    microbatches: int = 4  # of each rank in a step
    shard: tuple[str, ...] = ("0", "1", "2", "3")  # each next to the peer of its stage
    rounds: int = 11
    steps: int = 2  # of each side in a round
    out: str = OUT  # where the launcher puts what the ranks say
    json: str | None = None


def main(config: Config) -> None:
    lf.config.at_least(1, config, "seq_len", "micro_batch", "microbatches", "rounds", "steps")
    lf.config.one_of("value for --precision:", config.precision, TOLERANCE)
    shard = {text: Sharding.parse(text) for text in config.shard}
    device, mesh = lf.devices.get(config.device), lf.Mesh.parse(config.mesh).fill()
    if mesh["dp"] < 2 or mesh.size != mesh["dp"]:
        raise ConfigError(f"mesh {mesh}: this compares sharding over data ranks alone; give dp=N, of 2 or more, and no other axis")
    ctx = lf.Context(lf.connect(mesh, device), device, config.precision)
    screen = lf.console.console(ctx.axes.rank)
    given = first_weights(config, ctx)
    for make in (lambda: lf_side(Sharding(), config, ctx), lambda: PEERS[0][1](task(given, config, ctx))):
        peak(make().step, device.NAME)  # what libraries take when they are first used is no side's
    found = {text: compared(sharding, given, config, ctx) for text, sharding in shard.items()}
    tokens = config.seq_len * config.micro_batch * config.microbatches
    what = f"a step of {config.model}: {tokens} tokens a rank in {config.microbatches} microbatches, {config.precision}, {mesh}, {device.NAME}"
    columns = ("--shard", "next to", "lf, ms", "its ms", "lf / peer, time", "lf, MiB", "its MiB", "lf / peer, memory", "differs by")
    screen.print(lf.console.table(what, columns, [shown(text, x) for text, x in found.items()]))
    for text, x in found.items():
        if "error" in x:
            screen.print(f"--shard {text}, {x['peer']}: {x['error']}", markup=False, soft_wrap=True)
    if config.json and not ctx.axes.rank:
        Path(config.json).write_text(json.dumps({"config": lf.config.to_dict(config), "shard": found}, indent=1) + "\n")
    ctx.axes.world.barrier()
    if any("differs" in x for x in found.values()):
        sys.exit(1)


def shown(text: str, x: Mapping[str, Any]) -> tuple[object, ...]:
    if "error" in x:
        return text, x["peer"], *[""] * 6, "see below"

    a, b = x["lf_bytes"], x["peer_bytes"]
    return (
        text, x["peer"], f"{x['lf'] * 1e3:.1f}", f"{x['peer_seconds'] * 1e3:.1f}", f"{x['ratio']:.2f}", f"{a / 2**20:,.1f}", f"{b / 2**20:,.1f}",
        f"{a / b:.2f}", f"{max(x['errors'].values()):.0e}",
    )  # fmt: skip


def compared(sharding: Any, given: Mapping[str, Tensor], config: Config, ctx: Any) -> dict[str, Any]:
    """{"peer": its name, "lf", "peer_seconds": medians of a step, "ratio": median of those of the rounds, "lf_bytes", "peer_bytes": the most on any
    rank, "errors": by what is compared}, or "peer" and "error": why it is not timed, with "differs" where that is the reason."""
    name, make = PEERS[sharding.stage]
    out: dict[str, Any] = {"peer": name}
    mine, ours = measured(lambda: lf_side(sharding, config, ctx), ctx)
    try:
        other, its = measured(lambda: make(task(given, config, ctx)), ctx)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as reason:  # its own conditions, the same on every rank
        return out | {"error": in_words(reason)}
    errors = differences(ours["seen"], its["seen"])
    limit = TOLERANCE[config.precision]
    if wrong := [f"{what}: {x:.1e} > {limit}" for what, x in errors.items() if not x <= limit]:
        return out | {"differs": True, "error": f"differs: {', '.join(wrong)}"}
    times = in_turn({"lf": mine.step, "peer": other.step}, config, ctx)
    ratios = [a / b for a, b in zip(times["lf"], times["peer"])]
    return out | {
        "lf": statistics.median(times["lf"]), "peer_seconds": statistics.median(times["peer"]), "ratio": statistics.median(ratios),
        "lf_bytes": ours["bytes"], "peer_bytes": its["bytes"], "errors": errors, "ratios": ratios,
    }  # fmt: skip


def measured(make: Callable[[], Side], ctx: Any) -> tuple[Side, dict[str, Any]]:
    """A side, {"seen": what its first step gave, by name, "bytes": the most on any rank in its third, beyond what was there before}."""
    device = ctx.device.NAME
    gc.collect()  # sides that are done with have cycles
    before = live(device)
    side = make()
    loss, norm = side.step()
    at = live(device)
    seen = {"loss": loss.cpu(), "norm": norm.cpu()}
    for name, (w, m) in side.state().items():
        seen |= {f"weight {name}": w, f"gradient {name}": m}
    copies = live(device) - at  # of what is compared: no part of a side
    side.step()
    held = torch.tensor(peak(side.step, device) - before - copies, device=lf.state.device_of(ctx))
    return side, {"seen": seen, "bytes": int(ctx.axes.world.max(held))}


def differences(ours: Mapping[str, Tensor], its: Mapping[str, Tensor]) -> dict[str, float]:
    """{what: the largest ‖its - ours‖ / ‖ours‖} of loss, norm, weights, gradients."""
    if ours.keys() != its.keys():
        raise RuntimeError(f"only one side has {', '.join(sorted(ours.keys() ^ its.keys()))}")
    out: dict[str, list[Tensor]] = {}
    for name, a in ours.items():
        out.setdefault(name.split()[0], []).append((its[name].double() - a.double()).norm() / a.double().norm())
    return {what: float(torch.stack(errors).max()) for what, errors in out.items()}  # its max() keeps a NaN


def in_turn(sides: Mapping[str, Callable[[], Any]], config: Config, ctx: Any) -> dict[str, list[float]]:
    """Seconds of a step in each round."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(config.rounds):
        for side in sides if i % 2 else reversed([*sides]):
            ctx.axes.world.barrier()
            began = time.perf_counter()
            for _ in range(config.steps):
                sides[side]()
            if ctx.device.NAME == "cuda":
                torch.cuda.synchronize()
            ctx.axes.world.barrier()
            times[side].append((time.perf_counter() - began) / config.steps)
    return times


def rows_of(config: Config, vocab: int) -> np.ndarray:
    """(rows of a step, seq_len): one document a row, so that every side computes the same attention."""
    rows = config.micro_batch * config.microbatches * lf.Mesh.parse(config.mesh).fill()["dp"]
    return np.random.default_rng(0).integers(0, vocab, (rows, config.seq_len))


def lf_side(sharding: Any, config: Config, ctx: Any) -> Side:
    model, dp = lf.hf.model(config.model), ctx.axes["dp"]
    layout = lf.layout(model, ctx.axes.mesh, sharding=sharding)
    program = lf.schedule.one_f_one_b(1, config.microbatches)
    start, step = lf.train.make(layout, lf.optim.adamw(LR, BETAS, weight_decay=DECAY), program, ctx, CLIP)
    words = rows_of(config, model.config.vocab)

    def row(k: int) -> lf.data.Row:
        return lf.data.Row(words[k], np.append(words[k, 1:], lf.IGNORE), np.array([0]))

    batches = lf.data.step_batches(row, 0, len(words), config.micro_batch, dp.size, dp.index)
    state = start(lf.init(layout, ctx, seed=0))

    def once() -> tuple[Tensor, Tensor]:
        nonlocal state
        state, metrics = step(state, batches)
        return metrics["loss"], metrics["grad_norm"]

    return Side(once, lambda: {name: (w, m) for name, (w, m) in gathered(layout, state.optimizer, ("master", "m"), ctx).items()})


def gathered(layout: Any, trees: Any, kinds: tuple[str, ...], ctx: Any) -> dict[str, tuple[Tensor, ...]]:
    """{name in the files of transformers: of each kind the whole tensor}, from the pieces that the ranks own."""
    names = lf.models.families.of(layout.model.config).names(layout.model.config)
    coords = ctx.axes.coords
    mine: dict[str, list[tuple[str, Any]]] = {}
    for path, piece in layout.state_owned(coords):
        mine.setdefault(piece.key, []).append((path, piece))
    out = {}
    for spec in layout.specs.values():
        for part in spec.pieces(coords):
            whole = [torch.zeros(part.shape, device=lf.state.device_of(ctx)) for _ in kinds]
            for path, piece in mine.get(part.key, ()):
                for full, kind in zip(whole, kinds):
                    full[box.slices(piece.box, box.whole(piece.shape))] = piece.view(tree.get(trees[kind], path))
            out[names[part.key]] = tuple(ctx.axes.world.sum(full).cpu() for full in whole)
    return out


def first_weights(config: Config, ctx: Any) -> dict[str, Tensor]:
    """Those that lf begins with, whole, by their names in the files of transformers, on the CPU."""
    model = lf.hf.model(config.model)
    alone, names = lf.layout(model, lf.Mesh(dp=1)), lf.models.families.of(model.config).names(model.config)
    one = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp32")
    params = lf.init(alone, one, seed=0)
    return {names[p.key]: p.view(tree.get(params, path)) for path, spec in alone.specs.items() for p in spec.pieces(one.axes.coords)}


def task(given: Mapping[str, Tensor], config: Config, ctx: Any) -> Task:
    """What a peer does, from lf's own first weights."""
    model, dp, where = lf.hf.model(config.model), ctx.axes["dp"], lf.state.device_of(ctx)
    words, n = rows_of(config, model.config.vocab), config.micro_batch
    parts = [torch.from_numpy(words[(i * dp.size + dp.index) * n :][:n]) for i in range(config.microbatches)]
    labels = len(words) * (config.seq_len - 1)
    return Task(theirs(model.config), given, parts, labels, config.precision == "bf16", where, LR, BETAS, DECAY, CLIP)


if __name__ == "__main__":
    lf.cli.run(main, Config)

"""Which layout? Memory, time and traffic of a training step on devices that are not here; the best layouts of all that there are.

    scripts/launch plan --model deepseek-v3 --ranks 5120 --device h200
    scripts/launch plan --model llama-3.1-405b --ranks 16384 --device h100 --seq-len 8192 --global-batch 2048 --out runs/plan
    scripts/launch plan --model qwen3-30b-a3b --ranks 16 --device h100 --mesh ep=16 --shard 1

Without --mesh all meshes, schedules, shardings and recomputes that divide are compared by formulas, and the best are planned: the step itself is run
on paper, each distinct layer once. With --mesh that one layout is planned. Times are of a model of the device, which docs/plan.md describes.
"""

import gc
import time
from pathlib import Path

import attrs
from rich.console import Console

import lf
from lf.config import ConfigError
from lf.devices.described import DESCRIBED, described, measured
from lf.mesh import Mesh
from lf.plan_layers import Layers
from lf.plan_search import Choice, Found, formulas, nearest, planned, search
from lf.plan_show import drawn, memory, ranking, rows_of, spent
from lf.plan_time import Achieved

RANKS = 1
GIB = 2**30
MOST_TOKENS = 2**26
REFUSED = 5  # that are told


@attrs.frozen
class Config:
    model: str = "qwen3-demo"  # a preset, a folder or a name on the hub: only its config is read
    ranks: int = 8
    device: str | None = None  # h100, h200, b200, a100, p800; or cpu, cuda: that of this machine, whose products and copies are measured first
    seq_len: int = 4096
    global_batch: int | None = None  # rows of a step; 3 for each rank without, from 1024 rows to 64 Mi tokens
    precision: str = "bf16"
    top: int = 10  # layouts that are shown
    lr: float = 3e-4
    mesh: str | None = None  # plan this one layout instead, with the flags below
    schedule: str = "1f1b"
    chunks: int = 1  # stages on each rank
    micro_batch: int = 1
    shard: str = "0"
    recompute: str = "none"  # none, half or full
    products: float | None = None  # share of the peak that products reach: 0.55 without, 1 of what was measured here
    memory: float | None = None  # share of the memory's bandwidth that all else reaches: likewise
    links: float | None = None  # share of links and network that collectives reach: 0.75 without
    out: str | None = None  # a folder for memory.svg, memory.png, timeline.svg and timeline.png of the best


def main(config: Config) -> None:
    lf.config.at_least(1, config, "ranks", "seq_len", "top", "micro_batch", "chunks")
    if config.device is None:
        raise ConfigError(f"no device named; there are {', '.join(DESCRIBED)}: add --device {next(iter(DESCRIBED))}")
    shares = {name: share for name in ("products", "memory", "links") if (share := getattr(config, name)) is not None}
    if not all(0 < share <= 1 for share in shares.values()):
        raise ConfigError(f"{' '.join(f'--{k} {v}' for k, v in shares.items())} cannot be: shares lie above 0, and are at most 1")
    screen, began, model = lf.console.console(), time.monotonic(), lf.hf.model(config.model)
    here = config.device in lf.devices.KNOWN
    device = measured(lf.devices.get(config.device)) if here else described(config.device)
    rows = config.global_batch or min(max(3 * config.ranks, 1024), max(MOST_TOKENS // config.seq_len, config.ranks))
    achieved, optimizer = attrs.evolve(Achieved(1.0, 1.0) if here else Achieved(), **shares), lf.optim.adamw(config.lr)
    about = f"{config.model} on {config.ranks} × {device.name}, {rows} rows of {config.seq_len} tokens, {config.precision}"
    if config.mesh is None:
        with screen.status("layers on paper") as status:
            found = search(
                model, config.ranks, device, optimizer, seq_len=config.seq_len, global_batch=rows, precision=config.precision, achieved=achieved,
                top=config.top, tell=status.update,
            )  # fmt: skip
        if not found.best:
            raise ConfigError("none of the layouts that looked best fits:\n" + "\n".join(f"  {c}: {why}" for c, why in found.refused))
        told(screen, found, about)
        choice, best = found.best[0]
    else:
        mesh = Mesh.parse(config.mesh).fill(config.ranks)
        choice = Choice(mesh, config.micro_batch, config.schedule, config.chunks, config.recompute, config.shard)
        layers = Layers(config.seq_len)
        best = planned(model, choice, device, optimizer, config.seq_len, rows, config.precision, achieved, layers, None)
        screen.print(f"{about}: {choice}", style="bold", soft_wrap=True)
        words = f"{best.seconds:.2f} s, {best.tokens_per_second:.0f} tokens/s a device, MFU {100 * best.mfu:.1f} %"
        screen.print(f"{words}, {best.peak / GIB:.1f} of {best.limit / GIB:.1f} GiB", soft_wrap=True)
        if not best.fits:
            rough = formulas(model, device, optimizer, config.seq_len, rows, config.precision, achieved, layers)
            near = nearest(rough, model, choice, best.limit)
            screen.print(f"it does not fit; the nearest that should: {f'{near}, on {near.mesh.size} ranks' if near else 'none'}", soft_wrap=True)
    screen.print(spent(best, "where the time goes, on the busiest row"))
    screen.print(rows_of(best, "memory at its most, and what a rank sends in a step"))
    if config.out:
        screen.print("written: " + ", ".join(map(str, drawn(choice, best, Path(config.out)))), soft_wrap=True)
    screen.print(f"{time.monotonic() - began:.0f} s; experts are taken to be loaded evenly, and a row to be one document", soft_wrap=True)


def told(screen: Console, found: Found, about: str) -> None:
    every, fitting, made = found.tried
    screen.print(ranking(found, f"{about}: the best of {every} layouts, {fitting} of which fit by the formulas; {made} were planned"))
    screen.print(memory(found, "memory of the fullest row, GiB"))
    for c, why in found.refused[:REFUSED]:
        screen.print(f"looked as good, and is not: {c}: {why}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    gc.disable()  # programs of a hundred thousand actions are looked through again and again: a fifth of the time, for half a GiB
    lf.cli.run(main, Config)

"""Where to put an encoder: the same step of an encoder, a decoder and a head with each placement in turn, in one run on the same ranks.

    OMP_NUM_THREADS=1 scripts/launch --nproc 2 bench_chains --device cpu
    OMP_NUM_THREADS=1 scripts/launch --nproc 3 bench_chains --device cpu --dedicated --vision-layers 4
    scripts/launch --nproc 2 bench_chains --device cuda --precision bf16 --dim 2048 --tokens 4096 --images 8 --patches 256

The decoder is a pipeline over all ranks (but one, with --dedicated), the encoder may run on any of them. A step is forward, backward and all sums.
The times predicted are those of `lf.schedule.cost`, for what each action was measured to take in the first placement; where that is `inline`, also
for the part of the encoder's time that does not shrink where ranks share its images. Where the stages are uneven, which is shown, `inline` hides the
encoder in what the others wait: even them out (--split) before placements are compared.
"""

import json
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

import lf
from lf.chain_context import chain_context
from lf.chain_layouts import Layouts, Place, chain_layouts
from lf.config import ConfigError, one_of
from lf.models.trio import Tower, TrioConfig, trio
from lf.models.trio_data import Amounts, sample
from lf.schedule import Action, Beside, Program, build_chains, cost
from lf.schedule.beside import KINDS
from lf.schedule.cost import held
from lf.schedule.ir import COMPUTE
from lf.schedule.measured import Clock
from lf.schedule.named import SCHEDULES
from lf.state import compute_copy, device_of

OUT = "runs/bench_chains"
RTOL = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 5e-2}  # of loss and gradient norm between placements


@attrs.frozen
class Config:
    device: str | None = None
    precision: str = "fp32"
    placements: tuple[str, ...] = ("inline", "decoupled", "nested")
    dedicated: bool = False  # the last rank is the encoder's alone, and all other placements are left out
    vision_tp: int = 1  # the encoder's tensor parallelism
    schedule: str = "1f1b"
    microbatches: int = 8
    in_flight: int | None = None  # of nested and dedicated
    layers: int = 8  # of the decoder
    split: str = "count"  # of them to stages: as many in each, or in words, as e+5,3+h
    vision_layers: int = 2  # of the encoder; what it takes of a stage of the decoder is measured and shown
    dim: int = 128
    tokens: int = 384  # of a microbatch, about
    images: int = 12  # of a document at most
    patches: int = 32  # of an image at most
    rounds: int = 7
    out: str = OUT  # where the launcher puts what the ranks say
    json: str | None = None
    picture: str | None = None  # a file for the measured step of each placement, as NAME.svg: KIND is added to its name


def main(config: Config) -> None:
    lf.config.at_least(1, config, "vision_layers", "vision_tp", "microbatches", "layers", "dim", "tokens", "images", "patches", "rounds")
    for kind in config.placements:
        one_of("placement", kind, KINDS)
    one_of("value for --schedule:", config.schedule, SCHEDULES)
    device = lf.devices.get(config.device)
    axes = lf.connect(lf.Mesh(), device)
    kinds = ("dedicated",) if config.dedicated else tuple(k for k in config.placements if k != "dedicated")
    screen, model = lf.console.console(axes.rank), shaped(config)
    layouts = laid(config, model, axes.mesh.size)
    ctx = chain_context(layouts, axes, device, config.precision)
    amounts = Amounts(config.tokens, 3, config.images, config.patches // 2, 4)
    data = [[sample(model.config, 0, m, 0, 2, amounts)] for m in range(config.microbatches)]
    params = compute_copy(layouts, lf.init(layouts, ctx, 0), ctx)
    programs = {kind: built(config, layouts, kind) for kind in kinds}
    steps = {kind: lf.train.gradients(layouts, program, ctx) for kind, program in programs.items()}
    took, fixed = measured(programs[kinds[0]], layouts, steps[kinds[0]], params, data, ctx)
    if "nested" in kinds:  # laid by what actions really take
        programs["nested"] = built(config, layouts, "nested", timer(took, programs[kinds[0]], config.microbatches, fixed), fixed)
        steps["nested"] = lf.train.gradients(layouts, programs["nested"], ctx)
    results = {kind: steps[kind](params, data)[1] for kind in kinds}
    same = agree(results, RTOL[config.precision])
    seconds = timed(steps, params, data, ctx, config.rounds, screen)
    rows, out, first = [], {}, 1.0
    for kind in kinds:
        times = timer(took, programs[kind], config.microbatches, fixed)
        timeline = cost(programs[kind], times, joints=layouts.joints, fixed={"vision": fixed / grown(config.microbatches, programs[kind], fixed)})
        each, total = held(timeline, "vision")
        row = max(each)
        median = statistics.median(seconds[kind])
        ratio = statistics.median(a / b for a, b in zip(seconds[kind], seconds[kinds[0]]))
        first = timeline.makespan if kind == kinds[0] else first
        out[kind] = {"ms": median * 1e3, "ratio": ratio, "predicted": timeline.makespan / first, "held": row, "held_in_all": total,
                     "bubble": sum(timeline.bubble(r) for r in range(len(timeline.rows))) / len(timeline.rows) / timeline.makespan}  # fmt: skip
        x = out[kind]
        evenness = " → ".join(f"{float(results[kind][f'vision_imbalance{end}']):.2f}" for end in ("_before", ""))
        rows.append((kind, f"{x['ms']:.1f}", f"{ratio:.3f}", f"{x['predicted']:.3f}", f"{x['bubble']:.1%}", f"{row:.3g}", f"{total:.3g}", evenness))
    of = defaultdict[tuple[str, int], float](float)
    for (chain, _, stage), t in took.items():
        of[chain, stage] += t
    stages = [of["decoder", s] for s in range(len(layouts.chains["decoder"].stages))]
    share = of["vision", 0] / statistics.mean(stages)
    title = f"{layouts}; {config.schedule}, {config.microbatches} microbatches, {config.precision}, {device.NAME}: encoder {share:.0%} of a stage"
    columns = ("encoder", "step, ms", f"/ {kinds[0]}", "predicted", "bubble", "held on a row", "in all", "imbalance")
    screen.print(lf.console.table(title, columns, rows))
    screen.print("held: units of the encoder at most · imbalance: of the ranks that share a unit, in the images' order → as dealt", style="dim")
    even = ", ".join(f"{t * 1e3:.1f}" for t in stages)
    busy = f", {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}" if device.NAME == "cpu" else ""
    screen.print(f"a microbatch, forward and backward: stages {even} ms, head {of['head', 0] * 1e3:.1f}, encoder {of['vision', 0] * 1e3:.1f}{busy}")
    screen.print(f"{fixed:.0%} of the encoder's time does not shrink where ranks share its images", style="dim")
    screen.print("loss and gradient norm are equal" if same else "loss or gradient norm DIFFER between placements", style=None if same else "red")
    if config.picture:
        pictures(config.picture, programs, steps, params, data, ctx, layouts)
    if config.json and not axes.rank:
        found = {"config": lf.config.to_dict(config), "placements": out, "equal": same, "share": share, "fixed": fixed, "stages": stages}
        Path(config.json).write_text(json.dumps(found, indent=1) + "\n")
    axes.world.barrier()
    if not same:
        raise SystemExit(1)


def shaped(config: Config) -> lf.Chains:
    depth = config.vision_layers
    whole = TrioConfig()
    heads = attrs.evolve(whole.decoder.mixer, heads=8, kv_heads=4, head_dim=config.dim // 8)
    tower = attrs.evolve(whole.decoder, dim=config.dim, layers=config.layers, mixer=heads, inner=3 * config.dim)
    seen = attrs.evolve(whole.vision.mixer, heads=8, kv_heads=8, head_dim=config.dim // 8)
    eyes: Tower = attrs.evolve(whole.vision, dim=config.dim, layers=depth, mixer=seen, inner=3 * config.dim)
    return trio(whole, decoder=tower, vision=eyes, vocab=1000, tap=min(whole.tap, depth - 1))


def laid(config: Config, model: lf.Chains, world: int) -> Layouts:
    own = 1 if config.dedicated else 0
    if world - own < 1:
        raise ConfigError(f"--dedicated: {world} ranks; start with --nproc 2 or more")
    pipeline, schedule = world - own, SCHEDULES[config.schedule]
    where = schedule.place(pipeline, schedule.chunks)
    eyes = Place(lf.Mesh(tp=config.vision_tp), (world - 1,) if own else range(world))
    split = None if config.split == "count" else config.split
    decoder = Place(lf.Mesh(pp=pipeline), range(pipeline), split=split, placement=where)
    places = {"vision": eyes, "decoder": decoder, "head": Place(lf.Mesh(dp=1), (0,))}
    first = chain_layouts(model, places)
    giver = next(j.source_stage for j in first.joints if j.name == "decoder.hidden")
    return chain_layouts(model, {**places, "head": Place(lf.Mesh(dp=1), (where[giver],))})


def built(config: Config, layouts: Layouts, kind: str, times: Callable[[Action], float] | None = None, fixed: float = 0.0) -> Program:
    limit = config.in_flight if kind in ("nested", "dedicated") else None
    chosen: dict[str, Beside | str] = {"vision": Beside(kind, in_flight=limit, fixed=fixed), "head": "inline"}
    return build_chains(layouts, config.microbatches, chosen, SCHEDULES[config.schedule].generate, times=times)


Took = dict[tuple[str, str, int], float]


def measured(program: Program, layouts: Layouts, step: Callable[..., Any], params: Any, data: Any, ctx: Any) -> tuple[Took, float]:
    """Seconds of (chain, op, stage) of one microbatch, on average of a step, the largest of the ranks that do it; and the part of the encoder's that
    does not depend on what it is given, 0 where its units are not those of one rank each."""
    runs = []
    for i in range(5):
        clock = Clock(ctx.axes, ctx.device)
        step(params, data, clock)
        if i > 1:
            runs.append({i: ctx.device.seconds(start, end) for i, (start, end, _) in clock.taken.items()})
    mine, stages = program[layouts.row(ctx.axes.rank)], {c: len(where.stages) for c, where in layouts.chains.items()}
    sums, units = Counter[tuple[str, str, int]](), dict[tuple[str, str, int], set[int | None]]()
    for i in runs[0]:
        a: Action = mine[i]
        sums[a.chain, a.op, a.stage] += statistics.median(run[i] for run in runs)
        units.setdefault((a.chain, a.op, a.stage), set()).add(a.microbatch)
    keys = [(c, op, s) for c, n in stages.items() for op in "FBIW" for s in range(n)]
    per = {c: lf.schedule.units(program, c) / len(data) for c in stages}  # a unit of several microbatches takes as many times as long
    rows = {c: max(len(layouts.homes(c, s)) for s in range(n)) if per[c] < 1 else 1 for c, n in stages.items()}  # and is shared by all rows
    own = torch.tensor([sums[k] / len(units[k]) * per[k[0]] * rows[k[0]] if k in units else 0.0 for k in keys], dtype=torch.float64)
    own = torch.cat([own, own.new_tensor([constant(mine, runs, layouts, data)])])
    *most, fixed = ctx.axes.world.max(own.to(device_of(ctx))).tolist()
    return {k: t for k, t in zip(keys, most) if t}, fixed


def constant(mine: Sequence[Action], runs: Sequence[Mapping[int, float]], layouts: Layouts, data: Any) -> float:
    """Of a rank that does each microbatch of the encoder alone: a / mean of t, where t = a + b · cost is the line through their times."""
    assert layouts.model is not None
    times = defaultdict[int, float](float)
    for i in runs[0]:
        if mine[i].chain == "vision" and mine[i].op in COMPUTE and (unit := mine[i].microbatch) is not None:
            times[unit] += statistics.median(run[i] for run in runs)
    costs = [sum(layouts.model.chains["vision"].items(batch[0]).cost) for batch in data]
    if len(times) < len(data) or len({*costs}) < 2:
        return 0.0
    slope, first = statistics.linear_regression(costs, [times[m] for m in range(len(data))])
    return min(max(first / statistics.mean(times.values()), 0.0), 1.0) if slope > 0 else 1.0


def timer(took: Took, program: Program, microbatches: int, fixed: float) -> Callable[[Action], float]:
    """What each action of a program takes: of a unit its microbatches, of a layer its part of the stage."""
    parts = Counter((a.chain, a.op, a.stage, a.microbatch, r) for r, row in enumerate(program) for a in row)
    most = Counter[tuple[str, str, int, int | None]]()
    for (*key, _), n in parts.items():
        most[tuple(key)] = max(most[tuple(key)], n)  # type: ignore[index]
    size = {"vision": grown(microbatches, program, fixed)}
    return lambda a: took.get((a.chain, a.op, a.stage), 0.0) * size.get(a.chain, 1.0) / max(most[a.chain, a.op, a.stage, a.microbatch], 1)


def grown(microbatches: int, program: Program, fixed: float) -> float:
    """How many times as long as one microbatch a unit of the encoder takes, which has several."""
    return fixed + (1 - fixed) * microbatches / lf.schedule.units(program, "vision")


def timed(steps: Mapping[str, Callable[..., Any]], params: Any, data: Any, ctx: Any, rounds: int, screen: Any) -> dict[str, list[float]]:
    """Seconds of a step of each, in turn; the first round warms up."""
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    with lf.console.Bar(screen, "rounds", rounds + 1) as bar:
        for i in range(rounds + 1):
            for kind in list(steps)[:: 1 if i % 2 else -1]:
                ctx.axes.world.barrier()
                began = time.perf_counter()
                steps[kind](params, data)
                if ctx.device.NAME == "cuda":
                    torch.cuda.synchronize()
                ctx.axes.world.barrier()
                if i:
                    seconds[kind].append(time.perf_counter() - began)
            bar.at(i + 1)
    return seconds


def agree(results: Mapping[str, Mapping[str, Any]], rtol: float) -> bool:
    first = next(iter(results.values()))
    return all(abs(float(r[k]) - float(first[k])) <= rtol * abs(float(first[k])) for r in results.values() for k in ("loss", "grad_norm"))


def pictures(file: str, programs: Mapping[str, Program], steps: Mapping[str, Any], params: Any, data: Any, ctx: Any, layouts: Layouts) -> None:
    path = Path(file)
    for kind, program in programs.items():
        clock = Clock(ctx.axes, ctx.device)
        steps[kind](params, data, clock)
        timeline = clock.timeline(program, layouts.rows)
        if not ctx.axes.rank:
            out = path.with_name(f"{path.stem}-{kind}{path.suffix}")
            lf.schedule.picture(timeline, out, f"encoder {kind}, measured", main=layouts.main)


if __name__ == "__main__":
    lf.cli.run(main, Config)

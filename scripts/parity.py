"""Does this model give the same numbers on these meshes as on one rank? Law 1 in float64, on ranks simulated in one process; or in less, within what
rounding does to one rank, whose routers' choices all ranks then take.

    scripts/launch parity --device cpu --mesh tp=2,dp=2 --mesh tp=4
    scripts/launch parity --device cpu --model qwen3-0.6b --mesh tp=8 --json report.json
    scripts/launch parity --device cpu --model tiny-moe --mesh tp=2,ep=2 --precision bf16
    scripts/launch parity --device cpu --mesh pp=2,tp=2 --schedule 1f1b --schedule zb-v --microbatches 3 --recompute full --offload full

Exit code 0: all agree. 1: some quantity disagrees, or the ranks did not fit together. 2: it could not run, whatever the reason.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import attrs
import tyro
from rich.console import Console

import lf
from lf.models.small import shrunk, tiny, tiny_moe
from lf.schedule.compiled import refuse_compile

BUILT_IN = {"tiny": tiny, "tiny-moe": tiny_moe}
RANKS = 1  # the ranks of the mesh are simulated


@attrs.frozen
class Config:
    mesh: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # as tp=2,dp=2; may be given several times (default: four meshes)
    model: str = "tiny"  # a preset, a folder with a config.json, or built in: "tiny", in the shape of Qwen3; "tiny-moe", with experts
    full: bool = False  # the model as it is, not shrunk: float64, one copy for each rank of dp in one process
    tied: bool | None = None  # tie the embedding and the head, or not; as in the model when not given
    schedule: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # of a step on each mesh, as 1f1b; may be given several times, too
    chunks: int | None = None  # stages on each rank of pp; those of the schedule without
    split: str = "count"  # layers to stages; or cost; or in words: e+1,1+h
    recompute: str = "none"  # full, full:K, segments=attn,mlp, ops=swiglu
    offload: str = "none"  # full, full:K, layers=layers.0, and ;distance=N
    freeze: tuple[str, ...] = ()  # not trained, on one rank neither: names or patterns of parameters, segments or layers
    shard: str = "0"  # of state over dp, as 3 or 3,ranks=2; those of the one rank are whole
    dispatch: str = "exchange"  # how tokens travel to experts, or gather
    precision: str = "fp64"  # of the meshes: or fp32, bf16, against one rank in float64
    compile: bool = False  # layers by torch.compile; those of the one rank are not
    microbatches: int = 2  # of each rank and step
    tokens: int = 24  # about, in a microbatch
    padding: int = 3  # invalid tokens at the end of each
    seed: int = 0
    device: str | None = None
    json: str | None = None  # write the report to this file, or to standard output: -


def build(config: Config, say: Any) -> lf.segment.Model:
    model = BUILT_IN[config.model]() if config.model in BUILT_IN else lf.hf.model(config.model)
    small = model.config if config.full or config.model in BUILT_IN else shrunk(model.config)
    if small != model.config:
        say(f"{config.model} is shrunk: {shape(model.config)} → {shape(small)}; --full runs it as it is")
    if config.tied is not None:
        small = attrs.evolve(small, tied=config.tied)
    return lf.models.decoder.decoder(small)


def shape(c: Any) -> str:
    a, experts = c.layers[0].mixer, max(getattr(getattr(layer.ffn, "router", None), "experts", 0) for layer in c.layers)
    heads = f"{a.heads} heads ({a.kv_heads} kv)" if hasattr(a, "kv_heads") else f"{a.heads} heads"
    return f"{len(c.layers)} layers, width {c.dim}, {heads}, {f'{experts} experts, ' if experts else ''}{c.vocab} words"


def main(config: Config) -> None:
    # with --json - standard output belongs to the report
    screen = Console(stderr=True, highlight=False) if config.json == "-" else lf.console.console()
    refuse(config)
    device = lf.devices.get(config.device)
    model = build(config, screen.print)
    routed = any("expert" in param.axes for param in model.params().values())
    default = ("tp=2,dp=2,ep=4", "dp=3,ep=3", "tp=2,dp=2,ep=2,etp=2", "pp=2,dp=2,ep=2") if routed else ("tp=2,dp=2", "tp=4", "dp=3", "pp=2,tp=2")
    meshes = [lf.Mesh.parse(text).fill() for text in config.mesh or default]
    flags = (config.chunks, config.split, config.recompute, config.offload, config.freeze, config.shard)
    pipelines = [lf.pipeline.Pipeline(name, *flags) for name in config.schedule or ("1f1b",)]
    runs = [(mesh, pipeline) for mesh in meshes for pipeline in pipelines]
    for mesh, pipeline in runs:  # refused before anything runs
        pipeline.program(pipeline.layout(model, mesh, config.tokens), config.microbatches)
        if config.compile:
            refuse_compile(mesh, device, segments=model.segments)
    writable(config.json)

    results = []
    for i, (mesh, pipeline) in enumerate(runs, 1):
        about = told(mesh, pipeline)
        with screen.status(f"mesh {mesh} {about} ({i} of {len(runs)}): {mesh.size} ranks"):
            results.append(measured(config, model, mesh, pipeline))
        result = results[-1]
        passed = isinstance(result, lf.parity.Report) and result.ok
        words = result if isinstance(result, lf.parity.Report) else " ".join(filter(None, ("mesh", str(mesh), about))) + f": {result}"
        screen.print(f"{'ok' if passed else 'DISAGREES'}: {words}", style=None if passed else "red", markup=False, soft_wrap=True)
    reports = [r for r in results if isinstance(r, lf.parity.Report)]
    if reports:
        screen.print(lf.parity.table(reports))
    ok = len(reports) == len(results) and all(r.ok for r in reports)
    if config.json:
        reported = [
            r.to_dict() if isinstance(r, lf.parity.Report) else {"mesh": str(m), "about": told(m, p), "ok": False, "error": r}
            for (m, p), r in zip(runs, results)
        ]
        text = json.dumps({"model": config.model, "config": lf.config.to_dict(model.config), "ok": ok, "reports": reported}, indent=1) + "\n"
        sys.stdout.write(text) if config.json == "-" else Path(config.json).write_text(text)
    if not ok:
        sys.exit(1)


def told(mesh: lf.Mesh, p: lf.pipeline.Pipeline) -> str:
    """The schedule, where there is one to speak of, and what was asked for besides."""
    given = {"chunks": p.chunks, "split": p.split, "recompute": p.recompute, "offload": p.offload, "freeze": ",".join(p.freeze)}
    given["shard"] = p.shard if p.shard != "0" else None
    schedule = [p.schedule] if mesh.pp > 1 or p.schedule != "1f1b" else []
    return " ".join([*schedule, *(f"{name} {value}" for name, value in given.items() if value not in (None, "", "none", "count"))])


def measured(config: Config, model: lf.segment.Model, mesh: lf.Mesh, pipeline: lf.pipeline.Pipeline) -> "lf.parity.Report | str":
    """The report, or why the ranks did not fit together."""
    layout = pipeline.layout(model, mesh, config.tokens)
    asked = {name: getattr(config, name) for name in ("microbatches", "seed", "tokens", "padding", "device", "compile", "dispatch", "precision")}
    asked |= {"split": tuple(map(len, map(layout.layers, range(len(layout.stages))))), "placement": layout.placement, "frozen": config.freeze}
    asked["sharding"] = config.shard
    try:
        return attrs.evolve(lf.parity.compare(model, mesh, program=pipeline.program, **asked), about=told(mesh, pipeline))
    except (lf.sim.CollectiveMismatch, lf.sim.Deadlock) as error:
        return f"{type(error).__name__}: {error}"


def refuse(config: Config) -> None:
    lf.context.precision_of(config.precision)
    for name, least in (("microbatches", 1), ("tokens", 4), ("padding", 0)):
        if getattr(config, name) < least:
            raise lf.config.ConfigError(f"--{name} {getattr(config, name)}: at least {least}")


def writable(file: str | None) -> None:
    """Measuring takes a while: that the report has a place is tried before."""
    if file in (None, "-"):
        return
    try:
        open(str(file), "a").close()
    except OSError as error:
        raise lf.config.ConfigError(f"--json {file}: {error.strerror}; name a file that can be written, or - for standard output") from None


if __name__ == "__main__":
    lf.cli.judge(main, Config)  # exit code 1 is what it found; 2: it could not run

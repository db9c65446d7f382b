"""A checkpoint of a run → a Hugging Face folder that everybody else's tools open. One rank does it, whatever mesh the run was trained on.

    scripts/launch export --device cpu --run runs/pretrain --out exports/mine --dtype bf16
    scripts/launch export --device cpu --run runs/pretrain --step 2000 --out exports/step-2000
    scripts/launch export --device cpu --run runs/pretrain --out exports/small --dtype bf16 --fp8

Parameters are read one after another, and the optimizer's state not at all: what is held at a time is one file of at most --max-shard-gb.
"""

import json
from pathlib import Path
from typing import Any

import attrs
from safetensors import safe_open

import lf
from lf.config import ConfigError

RANKS = 1
LOGS = "runs/export"


@attrs.frozen
class Config:
    run: str  # the folder of a run
    out: str  # the folder to write; one that is there is replaced if it is an export
    step: int | None = None  # whose checkpoint; the newest without
    dtype: str | None = None  # fp32, bf16, fp16 or fp64; as in the checkpoint without
    ema: bool = False  # the average of the weights that a run with --ema has kept
    fp8: bool = False  # matrices in 8 bits with a scale for each block of 128 × 128; the rest in --dtype
    tokenizer: str | None = None  # a folder or a repository with a tokenizer, or "none"; the run's own without
    max_shard_gb: float = 5.0
    device: str | None = None


def main(config: Config) -> None:
    screen, dtype = lf.console.console(), lf.hf.float_dtype("--dtype", config.dtype)
    ctx = lf.Context(lf.solo(), lf.devices.get(config.device))
    source = checkpoint(Path(config.run), config.step)
    tokenizer = tokenizer_of(Path(config.run), config.tokenizer)
    layout = lf.layout(lf.checkpoint.model(source), ctx.axes.mesh)
    place = {path: i + 1 for i, path in enumerate(layout.specs)}
    with lf.checkpoint.masters(source, layout, ctx, config.ema) as read, lf.console.Bar(screen, "parameter", len(place)) as bar:

        def one(path: str) -> Any:
            bar.at(place[path])
            return read(path)

        out = lf.hf.save(config.out, layout, one, ctx, tokenizer, dtype, max_shard_bytes=int(config.max_shard_gb * 1e9), fp8=config.fp8)
    about = lf.checkpoint.manifest(source)
    screen.print(f"step {about.step} of {config.run}, trained on {about.mesh}, is in {out}; tokenizer: {tokenizer or 'none'}", soft_wrap=True)
    files = [(p.name, tensors(p), f"{p.stat().st_size:,}") for p in sorted(out.iterdir())]
    screen.print(lf.console.table("", ("file", "tensors", "bytes"), files))


def tensors(file: Path) -> int:
    if file.suffix != ".safetensors":
        return 0
    with safe_open(file, framework="pt") as held:
        return len(held.keys())


def checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of this step, or the newest. Raises ConfigError that tells which there are."""
    folder = run / "checkpoints"
    there = sorted(int(number) for p in folder.glob("step-*") if (number := p.name.removeprefix("step-")).isdigit())
    if not there:
        raise ConfigError(f"{run} has no checkpoints; --run is the folder that training had as --out")
    if step is None:
        newest = lf.checkpoint.latest(folder)
        assert newest is not None
        return newest
    if step not in there:
        raise ConfigError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, there))}")
    return folder / f"step-{step:08d}"


def tokenizer_of(run: Path, given: str | None) -> Path | None:
    """The folder of the tokenizer that the run has read its data with. Raises ConfigError when that cannot be told."""
    if given == "none":
        return None
    if given is None:
        try:
            asked = json.loads((run / "config.json").read_text(encoding="utf-8"))
            given = asked.get("tokenizer") or asked.get("weights")  # as scripts/pretrain.py decides it
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {run / 'config.json'} ({error}); is {run} the folder of a run?") from None
    if given is not None:
        return lf.hf.folder(given, weights=False)
    made = sorted(p.parent for p in (run / "tokenizer").glob("**/tokenizer.json"))
    if len(made) == 1:
        return made[0]
    found = f"{len(made)}: {', '.join(map(str, made))}" if made else "none"
    raise ConfigError(f"of the tokenizers in {run / 'tokenizer'} one should be the run's, there are {found}; say --tokenizer FOLDER, or none")


if __name__ == "__main__":
    lf.cli.run(main, Config)

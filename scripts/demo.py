"""A small Qwen3-shaped model learns Python from the source of the standard library: tp=2 × dp=2 on CPU, a few minutes, nothing to download.

    scripts/launch demo
    scripts/launch demo --model moe-tiny --mesh ep=2,dp=4    # the same with a mixture of experts in each layer

It runs scripts/pretrain.py with the settings below, opens the Hugging Face folder that comes out, and lets the model go on with some Python.
"""

import math
import sysconfig
from pathlib import Path
from typing import Any

import attrs
import pretrain
import torch
from rich.text import Text

import lf
from lf.console import table

MESH = "tp=2,dp=2"
OUT = "runs/demo"
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):"


@attrs.frozen
class Config(pretrain.Config):
    data: tuple[str, ...] = (f"{sysconfig.get_path('stdlib')}/*.py",)
    model: str = "qwen3-demo"
    match: str = "*.py"
    mesh: str = MESH
    device: str = "cpu"
    precision: str = "fp32"
    seq_len: int = 256
    global_batch: int = 8
    steps: int | None = 500
    lr: float = 6e-3
    warmup: int = 20
    save_every: int = 50
    out: str = OUT
    temperature: float = 0.7  # of the sampled continuation
    sample: int = 120  # tokens


def main(config: Config) -> None:
    if config.micro_batch is None and config.microbatches is None:  # several microbatches fill a pipeline; without one, few are quicker
        mesh = lf.Mesh.parse(config.mesh)
        rows = config.global_batch // (mesh.dp or 1)  # of each rank, where the mesh says how many there are
        config = attrs.evolve(config, micro_batch=math.gcd(rows, 4) if rows and mesh.pp == 1 else 1)
    _, ctx = pretrain.main(config)
    screen, out = lf.console.console(), Path(config.out)
    if ctx.axes.rank or not (out / "hf").is_dir():  # rank 0 speaks, and only of a run that has come to its end
        return
    records = lf.runs.read_metrics(out / "metrics.jsonl")
    lf.show(lf.pipeline.Pipeline.of(config).layout(lf.hf.model(config.model), ctx.axes.mesh, config.seq_len), png=out / "layout.png")
    first, last = records[0]["loss"], records[-1]["loss"]
    tokens = f"{records[-1]['tokens']:,}"
    screen.print(f"\nloss {first:.2f} → {last:.2f} nats per token over {tokens} tokens. The model goes on after the first two lines:\n")
    screen.print(Text(PROMPT, style="bold") + Text(continuation(out / "hf", config)), soft_wrap=True)
    experts = [("how evenly the experts are loaded", f"{out}/experts.png")] * (out / "experts.png").is_file()
    parity = "--model tiny-moe --mesh dp=4,ep=2" if experts else "--mesh tp=4"
    screen.print(table("", ("what", "where"), [
        ("the loss, and who holds what", f"{out}/loss.png, {out}/layout.png"),
        *experts,
        ("a line a step", f"{out}/metrics.jsonl"),
        ("a folder that transformers opens", f"{out}/hf"),
        ("next: your own texts", f"scripts/launch pretrain --device cpu --model {config.model} --data FOLDER"),
        ("next: is a layout right?", f"scripts/launch parity --device cpu {parity}"),
        ("next: ten minutes of reading", "notebooks/first.ipynb, scripts/pretrain.py"),
    ]))  # fmt: skip


def continuation(folder: Path, config: Config) -> str:
    """What the exported model writes after PROMPT, sampled on one rank from the files alone."""
    ctx = lf.Context(lf.solo(), lf.devices.get(config.device), config.precision)
    model = lf.hf.model(folder)
    params = lf.hf.load(folder, lf.layout(model, ctx.axes.mesh), ctx)
    tokenizer = lf.data.load_tokenizer(folder)
    ids = tokenizer.encode([PROMPT])[0]
    start, dice = len(ids), torch.Generator().manual_seed(config.seed)
    while len(ids) < start + config.sample and ids[-1] != tokenizer.eos:
        n = len(ids)
        plan = {"tokens": torch.tensor(ids), "positions": torch.arange(n), "cu_seqlens": torch.tensor([0] + [n] * n, dtype=torch.int32)}
        logits: Any = lf.forward(model, params, lf.Batch(plan), ctx)  # (tokens, vocabulary)
        ids.append(int(torch.multinomial((logits[-1] / config.temperature).softmax(-1), 1, generator=dice)))
    return tokenizer.decode(ids[start:])


if __name__ == "__main__":
    lf.cli.run(main, Config)

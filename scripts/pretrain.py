"""Pretrain a language model on text files. Copy this script and change it: everything that happens stands here.

scripts/launch pretrain --device cpu --model qwen3-0.6b --data my/texts --mesh tp=2,dp=2
"""

import math
from pathlib import Path

import attrs
from rich.console import Console

import lf


@attrs.frozen
class Config:
    data: tuple[str, ...]  # text files, folders or globs; one document a file
    model: str = "qwen3-0.6b"  # a preset, or a folder with a config.json
    weights: str | None = None  # a Hugging Face folder to start from; random without
    tokenizer: str | None = None  # a Hugging Face tokenizer folder; without one a BPE is trained on the data
    match: str = "*.txt"  # which files of a folder
    mesh: str = ""  # as tp=2,dp=2; dp fills what is left of the ranks
    device: str | None = None
    precision: str = "bf16"
    seq_len: int = 1024
    micro_batch: int = 1  # rows of seq_len in one microbatch
    global_batch: int = 16  # rows in one step, over all ranks
    steps: int = 1000
    lr: float = 3e-4
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100  # steps
    out: str = "runs/pretrain"


def main(config: Config) -> tuple[lf.State, lf.context.Context]:
    device = lf.devices.get(config.device)
    axes = lf.connect(lf.Mesh.parse(config.mesh), device)
    ctx = lf.Context(axes, device, config.precision)
    model = lf.hf.model(config.model)
    layout = lf.layout(model, axes.mesh)
    microbatches = lf.data.microbatches(config.global_batch, config.micro_batch, axes.mesh["dp"])
    program = lf.schedule.one_f_one_b(microbatches)
    rate = lf.optim.warmup_cosine(config.lr, config.warmup, config.steps)
    init, step = lf.train.make(layout, lf.optim.adamw(rate, weight_decay=config.weight_decay), program, ctx, config.clip)

    screen = lf.console.console(axes.rank)
    run = lf.runs.open_run(config.out, config, axes)  # the same command goes on with an unfinished run
    size = sum(math.prod(p.shape) for p in model.params().values())
    batch = f"{config.global_batch} rows of {config.seq_len} = {config.micro_batch} × {microbatches} microbatches × dp={axes.mesh['dp']}"
    screen.print(f"{config.model}: {size:,} parameters in {config.precision} on {axes.mesh} ({device.NAME}); a step is {batch}", soft_wrap=True)
    ready = lf.runs.on_first_rank(lambda: prepare(config, model.config.vocab, screen), axes)
    documents = lf.data.open_documents(ready["documents"])
    rows = lf.data.rows(documents, config.seq_len, config.seed)

    def batches(i: int) -> list[lf.Batch]:
        dp, multiple = axes["dp"], 2 * axes.mesh["cp"] * axes.mesh["tp"]
        return lf.data.step_batches(rows, i * config.global_batch, config.global_batch, config.micro_batch, dp.size, dp.index, multiple)

    data = {"documents": documents.fingerprint, "seq_len": config.seq_len, "seed": config.seed}
    if last := lf.checkpoint.latest(run.checkpoints):
        state, saved = lf.checkpoint.load(last, layout, ctx)
        lf.runs.same_data(saved, data)
        screen.print(f"{config.out} goes on after step {int(state.step)} of {config.steps}")
    else:
        state = init(lf.hf.load(config.weights, layout, ctx) if config.weights else lf.init(layout, ctx, config.seed))
    state = lf.train.loop(run, layout, step, state, batches, config.steps, ctx, config.save_every, data)
    lf.hf.save(run.folder / "hf", layout, state, ctx, tokenizer=ready["tokenizer"])
    if axes.rank == 0:
        lf.pictures.loss_curve(lf.runs.read_metrics(run.metrics), run.folder / "loss.png", f"{config.model} on {axes.mesh}")
    return state, ctx


def prepare(config: Config, vocab: int, screen: Console) -> dict[str, str]:
    """Texts → token files, once, on rank 0."""
    folder = Path(config.out)
    texts = lf.data.read_text(config.data, folder / "cache", config.match, say=screen.print)
    tokenizer = config.tokenizer or str(folder / "tokenizer")
    if not Path(tokenizer).exists():
        with lf.console.Bar(screen, f"training a BPE of {vocab}", vocab) as bar:
            lf.data.train_bpe(texts, vocab, tokenizer, bar.at)
    with lf.console.Bar(screen, "tokenizing", len(texts)) as bar:
        documents = lf.data.tokenize(texts, lf.data.load_tokenizer(tokenizer), folder / "tokens", bar.at, screen.print)
    if documents.vocab_size > vocab:
        raise lf.config.ConfigError(f"tokenizer {tokenizer} has ids up to {documents.vocab_size - 1}, the model's vocabulary is {vocab}")
    return {"tokenizer": tokenizer, "documents": str(documents.folder)}


if __name__ == "__main__":
    lf.cli.run(main, Config)

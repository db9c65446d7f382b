"""Pretrain a language model on text, JSONL, Parquet or indexed tokens. Copy this script and change it: everything that happens stands here.

scripts/launch pretrain --device cpu --model qwen3-0.6b --data my/texts --mesh tp=2,dp=2
"""

import attrs

import lf


@attrs.frozen
class Config:
    data: tuple[str, ...]  # files, folders or globs of text, JSONL, Parquet or indexed tokens; all or none with a weight, as 0.7:my/texts
    model: str = "qwen3-0.6b"  # a preset, or a folder with a config.json
    weights: str | None = None  # a Hugging Face folder to start from; random without
    tokenizer: str | None = None  # a Hugging Face tokenizer folder; without one a BPE is trained on the data
    bpe_vocab: int | None = None  # its tokens at most; None: the model's vocabulary, up to 32768
    match: str | None = None  # which files of a folder; without it text, JSONL, Parquet or indexed tokens
    text_column: str = "text"  # of JSONL and Parquet; a column input_ids is tokens already
    on_bad: str = "stop"  # at a bad record; skip: leave it out, and count it
    eod: str = "auto"  # end of document: behind texts, not behind input_ids; append: behind both; keep: behind none
    mesh: str = ""  # as tp=2,dp=2; dp fills what is left of the ranks
    device: str | None = None
    precision: str = "bf16"
    seq_len: int = 1024
    joined: bool = False  # attention and labels run on from one document into the next
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
    lf.config.at_least(1, config, "seq_len", "micro_batch", "global_batch", "steps", "save_every")
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
    last = lf.checkpoint.latest(run.checkpoints)
    screen.print(lf.runs.summary(config.model, layout, ctx, config.seq_len, config.micro_batch, microbatches), soft_wrap=True)
    corpora, tokenizer = lf.data.prepare(
        config.data, run.folder, model.config.vocab, axes, config.tokenizer, config.bpe_vocab, config.match, config.text_column, config.on_bad,
        config.eod,
    )  # fmt: skip
    rows = lf.data.blend([(c.weight, lf.data.rows(c.documents, config.seq_len, config.seed, config.joined)) for c in corpora], config.seed)

    def batches(i: int) -> list[lf.Batch]:
        dp, multiple = axes["dp"], 2 * axes.mesh["cp"] * axes.mesh["tp"]
        return lf.data.step_batches(rows, i * config.global_batch, config.global_batch, config.micro_batch, dp.size, dp.index, multiple)

    data = {"documents": [[c.weight, c.documents.fingerprint] for c in corpora], "seq_len": config.seq_len, "seed": config.seed}
    if last:
        state, saved = lf.checkpoint.load(last, layout, ctx)
        lf.runs.same_data(saved, data)
        screen.print(f"{config.out} goes on after step {int(state.step)} of {config.steps}")
    else:
        state = init(lf.hf.load(config.weights, layout, ctx) if config.weights else lf.init(layout, ctx, config.seed))
    state = lf.train.loop(run, layout, step, state, batches, config.steps, ctx, config.save_every, data)
    lf.hf.save(run.folder / "hf", layout, state, ctx, tokenizer=tokenizer)
    if axes.rank == 0:
        lf.pictures.loss_curve(lf.runs.read_metrics(run.metrics), run.folder / "loss.png", f"{config.model} on {axes.mesh}")
    return state, ctx


if __name__ == "__main__":
    lf.cli.run(main, Config)

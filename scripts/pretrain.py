"""Pretrain a language model on text, JSONL, Parquet or indexed tokens. Copy this script and change it: everything that happens stands here.

scripts/launch pretrain --device cpu --model qwen3-0.6b --data my/texts --mesh tp=2,dp=2
scripts/launch pretrain --device cuda --model qwen3-0.6b --data my/texts --mesh pp=4 --schedule zb-h1 --microbatches 16 --recompute ops=swiglu
"""

import math

import attrs

import lf

# What may be another when a run goes on: none of it changes which rows a step takes, or what it makes of them but for rounding (docs/moe.md: what of
# a mixture goes by the microbatch).
FREE = (
    *("out", "mesh", "device", "schedule", "chunks", "split", "recompute", "offload", "shard", "dispatch", "compile", "draw_step", "micro_batch"),
    *("muon_way", "optimizer_offload"),
    *("microbatches", "save_every", "keep", "eval", "eval_every", "drift_every", "on_nonfinite", "log", "export_dtype"),
)


@attrs.frozen
class Config:
    data: tuple[str, ...]  # files, folders or globs of text, JSONL, Parquet or indexed tokens; all or none with a weight, as 0.7:my/texts
    model: str = "qwen3-0.6b"  # a preset, a folder with a config.json, or a repository on the hub: org/name[@revision]
    weights: str | None = None  # a Hugging Face folder or a repository to start from; random without
    weights_dtype: str | None = None  # fp32, bf16, fp16, fp64: rounds the weights to it on the way; without one nothing is rounded
    tokenizer: str | None = None  # a folder or a repository; without one that of the weights, and without weights a BPE is trained on the data
    bpe_vocab: int | None = None  # its tokens at most; None: the model's vocabulary, up to 32768
    match: str | None = None  # which files of a folder; without it text, JSONL, Parquet or indexed tokens
    text_column: str = "text"  # of JSONL and Parquet; a column input_ids is tokens already
    on_bad: str = "stop"  # at a bad record; skip: leave it out, and count it
    eod: str = "auto"  # end of document: behind texts, not behind input_ids; append: behind both; keep: behind none
    mesh: str = ""  # as pp=2,tp=2,dp=2; dp fills what is left of the ranks
    schedule: str = "1f1b"  # in which order a step goes through the stages of pp: a name, a function as my.py:fn, a program in a .txt or .csv
    chunks: int | None = None  # stages on each rank of pp; those of the schedule without
    split: str = "count"  # layers to stages; or cost: by their operations; or in words, e and h the first and the last: e,4,4,h
    recompute: str = "none"  # instead of kept for the backward: full, full:K, segments=attn,mlp, ops=swiglu
    offload: str = "none"  # kept in the host's memory: full, full:K, layers=layers.0,layers.1, and ;distance=N
    freeze: tuple[str, ...] = ()  # not trained: names or patterns of parameters, segments or layers, as embed 'layers.0.*'
    shard: str = "0"  # state over dp: 1: optimizer, 2: and gradients, 3: and parameters; and ,ranks=N ,reduce=step ,keep ,ahead=N ,transport=bf16
    dispatch: str = "exchange"  # how tokens travel to experts: exchange, or gather, which is less where a token goes to as many as there are ranks
    compile: bool = False  # each distinct layer by torch.compile
    draw_step: int | None = None  # what each rank of the pipeline does in this step, and when, is drawn
    device: str | None = None
    precision: str = "bf16"
    seq_len: int = 1024
    joined: bool = False  # attention and labels run on from one document into the next
    micro_batch: int | None = None  # rows of seq_len in one microbatch (default: 1)
    microbatches: int | None = None  # or instead how many of them a rank has in a step
    global_batch: int = 16  # rows in one step, over all ranks
    batch_ramp: str | None = None  # start:increment:rows, fewer rows a step at first
    steps: int | None = None  # 1000, unless tokens are given
    tokens: int | None = None  # instead of steps: as many as it takes to consume so many
    lr: float = 3e-4
    lr_schedule: str = "cosine"  # or linear, wsd, constant
    warmup: int = 100  # steps
    final: float = 0.1  # of lr, at the last step
    decay: float = 0.1  # how long wsd falls: a share of the steps, or from 1 on their number
    weight_decay: float = 0.1
    optimizer: str = "adamw"  # or muon, sgd
    muon_way: str | None = None  # who makes Muon's products: owner, one rank of each matrix, or gathered, every rank that has a share of it
    moments: str = "fp32"  # what the optimizer's moments are kept in; or bf16, rounded by chance
    ema: float | None = None  # keep an average of the weights with this decay, as 0.999; export and evaluate take it with --ema
    optimizer_offload: float | None = None  # the share of layers whose moments lie in the host's memory, as 1.0
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100  # steps
    keep: int = 2  # checkpoints
    eval: tuple[str, ...] = ()  # held-out data, as NAME=path
    validation: float | None = None  # the share of each source's documents, its last ones, that is held out as a set of its own
    eval_every: int = 100  # steps
    drift_every: int | None = None  # steps between two checks that replicas are equal
    on_nonfinite: str = "stop"  # or skip:N, at most N steps in a row
    log: str = "jsonl"  # and tensorboard, wandb, with commas
    export_dtype: str | None = None  # of the Hugging Face folder that is written at the end; as in training without
    out: str = "runs/pretrain"


def main(config: Config) -> tuple[lf.State, lf.context.Context]:
    lf.config.at_least(1, config, "seq_len", "global_batch")
    ramp = lf.ramp.Ramp.parse(config.batch_ramp, config.global_batch)
    steps = lf.ramp.length(config.steps, config.tokens, config.seq_len, ramp, default=1000)
    lf.config.between(0, 1, config, "validation")
    evals = lf.evaluate.named(config.eval, taken=["validation"] if config.validation else [])
    if config.weights_dtype and not config.weights:
        raise lf.config.ConfigError(f"--weights-dtype {config.weights_dtype} is of weights that are loaded; give --weights, or leave it out")
    weights_dtype, export_dtype = lf.hf.float_dtype("--weights-dtype", config.weights_dtype), lf.hf.float_dtype("--export-dtype", config.export_dtype)
    pipeline = lf.pipeline.Pipeline.of(config)
    device = lf.devices.get(config.device)
    axes = lf.connect(lf.Mesh.parse(config.mesh), device)
    ctx = lf.Context(axes, device, config.precision, dispatch=config.dispatch)
    model = lf.hf.model(config.model, axes)
    layout = pipeline.layout(model, axes.mesh, config.seq_len)  # who holds what
    policy = lf.loop.Policy(
        steps, config.save_every, config.keep, config.eval_every, config.drift_every, config.on_nonfinite, config.log,
        first_loss=None if config.weights else math.log(model.config.vocab), draw_step=config.draw_step,
    )  # fmt: skip
    micro_batch = lf.pipeline.micro_batch(config.micro_batch, config.microbatches, config.global_batch, axes.mesh["dp"])
    counts = ramp.microbatches(micro_batch, axes.mesh["dp"])
    programs = pipeline.programs(layout, counts)  # what a step does, for each number of microbatches
    rate = lf.optim.schedule(config.lr_schedule, config.lr, config.warmup, steps, config.final, config.decay)
    optimizer = lf.optim.named(
        config.optimizer, rate, config.weight_decay, config.moments, config.ema, config.optimizer_offload, config.muon_way, config.seed
    )
    init, step = lf.train.make(layout, optimizer, programs, ctx, config.clip, config.compile)

    screen = lf.console.console(axes.rank)
    lf.data.look(config.data, evals, config.match, axes)
    longer = ("steps", "tokens") if config.lr_schedule in ("constant", "wsd") else ()  # of which the rate at a step does not depend, till it falls
    run = lf.runs.open_run(config.out, config, axes, (*FREE, *longer))  # the same command goes on with an unfinished run
    last = lf.checkpoint.latest(run.checkpoints)
    told = pipeline.told(programs[-1], len(layout.stages))
    screen.print(lf.runs.summary(config.model, layout, ctx, config.seq_len, micro_batch, counts[-1], told), soft_wrap=True)
    if config.batch_ramp:
        screen.print(f"at first fewer: {ramp}", soft_wrap=True)
    if config.weights and not last:
        lf.hf.check(config.weights, layout, ctx, weights_dtype)  # before hours go into the data
    source = config.tokenizer or config.weights
    given = str(lf.hf.folder(source, axes, weights=False)) if source else None
    how = (config.match, config.text_column, config.on_bad, config.eod)
    corpora, tokenizer = lf.data.prepare(config.data, run.folder, model.config.vocab, axes, given, config.bpe_vocab, *how)
    held_out = {}
    for name, path in evals.items():
        found, _ = lf.data.prepare((path,), run.folder, model.config.vocab, axes, str(tokenizer) if tokenizer else None, None, *how, may_train=False)
        held_out[name] = [c.documents for c in found]
    if config.validation is not None:
        parts = [lf.data.split(c.documents, config.validation) for c in corpora]
        corpora = [attrs.evolve(c, documents=train) for c, (train, _) in zip(corpora, parts)]
        held_out["validation"] = [last for _, last in parts]
    sets = {name: lf.evaluate.HeldOut(*lf.data.in_order(documents, config.seq_len, config.joined)) for name, documents in held_out.items()}
    evaluate = lf.evaluate.make(layout, sets, micro_batch, ctx) if sets else None
    rows = lf.data.blend([(c.weight, lf.data.rows(c.documents, config.seq_len, config.seed, config.joined)) for c in corpora], config.seed)

    def batches(i: int) -> list[lf.Batch]:
        dp, multiple = axes["dp"], 2 * axes.mesh["cp"] * axes.mesh["tp"]
        return lf.data.step_batches(rows, ramp.consumed(i), ramp.at(i), micro_batch, dp.size, dp.index, multiple)

    data = {"documents": [[c.weight, c.documents.fingerprint] for c in corpora], "seq_len": config.seq_len, "seed": config.seed}
    if last:
        state, saved = lf.checkpoint.load(last, layout, ctx, optimizer.hosted)
        lf.runs.same_data(saved, data)
        lf.runs.same_rate(run, int(state.step), rate, axes)
        screen.print(f"{config.out} goes on after step {int(state.step)} of {steps}")
    else:
        state = init(lf.hf.load(config.weights, layout, ctx, weights_dtype) if config.weights else lf.init(layout, ctx, config.seed))
    feed = lf.loop.Feed(batches, ramp.consumed, config.seq_len, data)
    state = lf.loop.run(run, layout, step, state, feed, ctx, policy, evaluate, programs)
    if int(state.step) < steps:  # a signal has asked it to end; all is saved
        return state, ctx
    lf.hf.save(run.folder / "hf", layout, state, ctx, tokenizer, export_dtype)
    if axes.rank == 0:
        lf.pictures.loss_curve(lf.runs.read_metrics(run.metrics), run.folder / "loss.png", f"{config.model} on {axes.mesh}")
        lf.expert_picture.expert_loads(lf.runs.read_metrics(run.metrics), run.folder / "experts.png", f"{config.model} on {axes.mesh}")
    return state, ctx


if __name__ == "__main__":
    lf.cli.run(main, Config)

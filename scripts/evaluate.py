"""The loss and the perplexity of a model on held-out data: a Hugging Face folder, a repository on the hub, or a checkpoint of a run.

    scripts/launch evaluate --device cpu --model Qwen/Qwen3-0.6B --data held=texts/held code=code.jsonl
    scripts/launch evaluate --device cpu --run runs/pretrain --step 2000 --data held=texts/held --mesh tp=2,dp=2

Every token is read once, and the sums over all of them are divided once: no layout and no size of a microbatch changes the result.
"""

import json
from pathlib import Path
from typing import Any

import attrs
import export

import lf
from lf.config import ConfigError


@attrs.frozen
class Config:
    data: tuple[str, ...]  # as NAME=path: text, JSONL, Parquet or indexed tokens, each a set of its own
    model: str | None = None  # a folder with config.json and weights, or a repository on the hub: org/name[@revision]
    run: str | None = None  # or the folder of a run
    step: int | None = None  # of the run's checkpoints; the newest without
    ema: bool = False  # the average of the weights that the run has kept with --ema
    tokenizer: str | None = None  # a folder or a repository, or "none" where all is tokens already; that of the model without
    match: str | None = None  # which files of a folder; without it text, JSONL, Parquet or indexed tokens
    on_bad: str = "stop"  # at a bad record; skip: leave it out, and count it
    text_column: str | None = None  # this and the next three: without one as the run has it, with --model text, auto, 1024 and no
    eod: str | None = None  # end of document
    seq_len: int | None = None  # the tokens at the beginning of a row have little before them
    joined: bool | None = None  # attention and labels run on from one document into the next
    micro_batch: int = 1  # rows at a time
    mesh: str = ""
    dispatch: str = "exchange"  # how tokens travel to experts, or gather
    device: str | None = None
    precision: str = "bf16"
    json: str | None = None  # write the numbers to this file, too
    out: str = "runs/evaluate"  # where logs and the tokens of the data are kept


DEFAULTS = {"text_column": "text", "eod": "auto", "seq_len": 1024, "joined": False}


def main(config: Config) -> dict[str, float]:
    sets = lf.evaluate.named(config.data, "--data")
    if (config.model is None) == (config.run is None) or ((config.step is not None or config.ema) and config.run is None):
        raise ConfigError("give --model, a folder or a repository on the hub, or --run, the folder of a run, with --step and --ema to say what of it")
    axes = lf.connect(lf.Mesh.parse(config.mesh), lf.devices.get(config.device))
    config = attrs.evolve(config, **lf.runs.on_first_rank(lambda: rows_as_trained(config), axes))
    lf.config.at_least(1, config, "seq_len", "micro_batch")
    assert config.seq_len is not None
    ctx = lf.Context(axes, lf.devices.get(config.device), config.precision, dispatch=config.dispatch)
    lf.runs.on_first_rank(lambda: refuse(config, sets), axes)

    where, tokenizer = found(config, axes)
    model = lf.hf.model(where, axes) if config.run is None else lf.checkpoint.model(where)
    layout = lf.layout(model, axes.mesh)
    held, rows = {}, []
    for name, path in sets.items():
        how = (config.match, str(config.text_column), config.on_bad, str(config.eod))
        corpora, _ = lf.data.prepare((path,), config.out, model.config.vocab, axes, tokenizer, None, *how)
        documents = [c.documents for c in corpora]
        held[name] = lf.evaluate.HeldOut(*lf.data.in_order(documents, config.seq_len, bool(config.joined)))
        rows.append([name, f"{sum(map(len, documents)):,}", f"{sum(len(d.tokens) for d in documents):,}"])
    evaluate = lf.evaluate.make(layout, held, config.micro_batch, ctx)
    values = evaluate(params(config, where, layout, ctx))

    if axes.rank == 0:
        shown = [(*row, *(f"{values[f'eval/{row[0]}/{key}']:.4f}" for key in ("loss", "perplexity"))) for row in rows]
        screen = lf.console.console()
        kind = "rows, documents joined," if config.joined else "rows"
        screen.print(f"{config.model or where} on {axes.mesh}, {config.precision}, {kind} of {config.seq_len} tokens", soft_wrap=True)
        screen.print(lf.console.table("", ("set", "documents", "tokens", "loss", "perplexity"), shown))
        if config.json:
            Path(config.json).write_text(json.dumps({"config": lf.config.to_dict(config), "model": str(where), **values}, indent=1) + "\n")
    return values


def rows_as_trained(config: Config) -> dict[str, Any]:
    """How rows are made: as --run makes them where nothing else is said, so that the numbers are those of its own evaluation."""
    file = Path(config.run or "") / "config.json"
    run = lf.config.parse(file.read_text(encoding="utf-8")) if config.run and file.is_file() else {}
    given = {name: getattr(config, name) for name in DEFAULTS}
    return {name: run.get(name, DEFAULTS[name]) if value is None else value for name, value in given.items()}


def refuse(config: Config, sets: dict[str, str]) -> None:
    """What the words alone say already, and that the report has a place."""
    for name, path in sets.items():
        sources = lf.data.find_sources((path,), config.match)
        if any(source.weight is not None for source in sources):
            raise ConfigError(f"--data {name}={path}: a set has no weight, every token of it is read once; give each source a name of its own")
        if config.tokenizer == "none" and any(source.files and not lf.data.has_ids(source.files) for source in sources):
            raise ConfigError(f"--data {name}={path} is text, and --tokenizer is none; give one")
    try:
        if config.json:
            open(config.json, "a").close()
    except OSError as error:
        raise ConfigError(f"--json {config.json}: {error.strerror}; name a file that can be written") from None


def found(config: Config, axes: Any) -> tuple[Path, str | None]:
    """The folder with the weights, and that of the tokenizer."""
    if config.run is not None:
        run, step = Path(config.run), config.step
        where = Path(lf.runs.on_first_rank(lambda: str(export.checkpoint(run, step)), axes))
        tokenizer = lf.runs.on_first_rank(lambda: (given := export.tokenizer_of(run, config.tokenizer)) and str(given), axes)
        return where, tokenizer
    where = lf.hf.folder(str(config.model), axes)
    if not where.is_dir():
        raise ConfigError(f"there is no folder {where}; --model is a folder with weights, or a repository on the hub: org/name[@revision]")
    if config.tokenizer is None:
        return where, str(where)
    return where, None if config.tokenizer == "none" else str(lf.hf.folder(config.tokenizer, axes, weights=False))


def params(config: Config, where: Path, layout: Any, ctx: lf.Context) -> lf.tree.Tree:
    """The parameters in the compute dtype; of a run neither the moments nor more than one master at a time."""
    if config.run is None:
        return lf.tree.map(lambda w: w.to(ctx.precision.compute), lf.hf.load(where, layout, ctx))
    with lf.checkpoint.masters(where, layout, ctx, config.ema) as read:
        return lf.tree.build([(path, read(path).to(ctx.precision.compute)) for path in layout.held(ctx.axes.coords)])


if __name__ == "__main__":
    lf.cli.run(main, Config)

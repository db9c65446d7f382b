"""Tokenize text, JSONL or Parquet into OUT.bin and OUT.idx, which a run maps and Megatron-LM reads, too.

scripts/launch tokenize --data my/texts 'crawl/*.jsonl.gz' --tokenizer ./my/model --out tokens/all --workers 16
"""

import os
import sys

RANKS = 1
LOGS = "runs/tokenize"

if __name__ == "tokenize":
    # `python scripts/pretrain.py` looks into this folder first, also when linecache wants Python's own tokenize to print a traceback
    from importlib import machinery, util

    spec = machinery.PathFinder.find_spec("tokenize", [os.path.dirname(os.__file__)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tokenize"] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    import signal
    import time

    import attrs

    import lf

    @attrs.frozen
    class Config:
        data: tuple[str, ...]  # files, folders or globs of text (one document a file), JSONL or Parquet; datasets saved with save_to_disk
        out: str  # of OUT.bin, OUT.idx and OUT.json; nothing is overwritten
        tokenizer: str | None = None  # a folder or a repository on the hub: org/name[@revision]; not needed for records with input_ids
        workers: int = os.cpu_count() or 1  # processes; the result is the same for any number of them
        match: str | None = None  # which files of a folder; without it text, JSONL or Parquet
        text_column: str = "text"
        on_bad: str = "stop"  # at a bad record; skip: leave it out, and count it
        eod: str = "auto"  # end of document: behind texts, not behind input_ids; append: behind both; keep: behind none
        vocab: int | None = None  # input_ids must be below it; without it and a tokenizer they take four bytes each

    def main(config: Config) -> None:
        lf.config.at_least(1, config, "workers")
        data, screen = lf.data, lf.console.console()
        sources = data.find_sources(config.data, config.match)
        if len(sources) > 1 or sources[0].weight is not None or sources[0].prefixes:
            raise data.DataError("--data takes no weights and no indexed tokens here: they are for training")
        files = sources[0].files
        how = data.Reading("input_ids" if data.has_ids(files) else config.text_column, config.on_bad, config.vocab)
        tokenizer = None if config.tokenizer is None else str(lf.hf.folder(config.tokenizer, weights=False))
        recipe = data.Recipe(how, tokenizer, config.eod)
        began = time.monotonic()
        with data.new_files(config.out, data.SUFFIXES) as prefix, data.percent(screen, "tokenizing") as bar:
            counts = data.tokenize(files, recipe, prefix, config.workers, bar)
        seconds = time.monotonic() - began
        screen.print(lf.console.table(config.out, ("what", "number"), [
            ("files", f"{len(files):,}"),
            ("documents", f"{counts.documents:,}"),
            ("tokens", f"{counts.tokens:,}"),
            ("without a token, left out", f"{counts.empty:,}"),
            ("bad records, skipped", f"{counts.bad:,}"),
            ("MB read", f"{counts.read / 1e6:,.1f}"),
            ("seconds", f"{seconds:,.1f}"),
            ("MB/s", f"{counts.read / 1e6 / seconds:,.1f}"),
        ]))  # fmt: skip

    if __name__ == "__main__":
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what torchrun sends: the same way out as Ctrl-C
        try:
            lf.cli.run(main, Config)
        except KeyboardInterrupt:
            print("interrupted: nothing was written", file=sys.stderr)
            sys.exit(130)

"""Documents of text or of ids → indexed tokens on disk, in one process or with several at work: the bytes are the same."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from lf.data.files import DataError
from lf.data.indexed import LONGEST, Writer, token_type
from lf.data.reading import IDS, PIECE, Piece, Reading
from lf.data.records import pieces, read
from lf.data.tokenizer import Tokenizer, load_tokenizer

EODS = ("auto", "append", "keep")


def known_eod(eod: str) -> None:
    if eod not in EODS:
        raise DataError(f"eod={eod!r}: there is {', '.join(EODS)}")


@attrs.frozen
class Tokens:
    """Documents one after another."""

    ids: np.ndarray  # (n,)
    lengths: np.ndarray  # (d,) int32
    empty: int  # documents without a token: left out
    bad: int  # records that were skipped
    read: int  # bytes


@attrs.frozen
class Counts:
    """What was made of how much."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    read: int = 0  # bytes
    total: int = 0  # bytes


@attrs.frozen
class Recipe:
    """All that tokens follow from, besides what is read. `eod`: whether the end-of-document token is put behind a document: behind texts alone
    ("auto"), behind all that do not end with it ("append"), or behind none ("keep")."""

    how: Reading
    tokenizer: str | None = None  # a folder
    eod: str = "auto"

    def __attrs_post_init__(self) -> None:
        known_eod(self.eod)
        if self.tokenizer is None and (self.how.column != IDS or self.eod == "append"):
            what = "texts need a tokenizer" if self.how.column != IDS else "eod='append' needs a tokenizer, which says what ends a document"
            raise DataError(f"{what}; give one with --tokenizer")


def tokenize(
    files: Sequence[str],
    recipe: Recipe,
    prefix: str | os.PathLike[str],
    workers: int = 0,
    progress: Callable[[Counts], object] | None = None,
) -> Counts:
    """Writes the documents of `files`, in their order, to PREFIX.bin, .idx and .json. Put `new_files` or `new_folder` round it.

    workers: processes that read and tokenize, each on one core; 0: this process alone, with the tokenizer's threads. The bytes are the same.
    `progress(counts so far)` is called after each batch. Raises DataError at a bad record, or when no token is left."""
    if workers < 0:
        raise DataError(f"workers={workers} must be at least 0")
    work = pieces(files)
    tokenizer = None if recipe.tokenizer is None else load_tokenizer(recipe.tokenizer)
    vocab = recipe.how.vocab if tokenizer is None else tokenizer.vocab_size
    counts = Counts(total=sum(p.size for p in work))
    if recipe.how.column == IDS:
        recipe = attrs.evolve(recipe, how=attrs.evolve(recipe.how, vocab=vocab))
    with Writer(prefix, vocab, tokenizer.eos if tokenizer else None) as writer, _encoded(work, recipe, tokenizer, workers) as parts:
        for part in parts:
            writer.add(part.ids, part.lengths)
            counts = Counts(
                counts.documents + len(part.lengths), counts.tokens + len(part.ids), counts.empty + part.empty, counts.bad + part.bad,
                counts.read + part.read, counts.total,
            )  # fmt: skip
            if progress:
                progress(counts)
        if not counts.documents:
            where = files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")
            skipped = f", and {counts.bad} bad records were skipped" * bool(counts.bad)
            raise DataError(f"{where}: none of the {counts.empty} documents has a token{skipped}")
        writer.finish(tokenizer=tokenizer.fingerprint if tokenizer else None, empty=counts.empty, bad=counts.bad)
    return counts


def left_out(prefix: str | os.PathLike[str]) -> str:
    """What is not in the documents that `tokenize` wrote there, in words; '' where nothing is missing."""
    about = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    total = sum(about[name] for name in ("documents", "empty", "bad"))
    words = [f"{about[name]} of {total} documents {why}" for name, why in (("empty", "have no token"), ("bad", "are bad records")) if about[name]]
    return " and ".join(words) + " and were left out" if words else ""


def encode(piece: Piece, recipe: Recipe, tokenizer: Tokenizer | None) -> Iterator[Tokens]:
    """The tokens of a piece, some documents at a time."""
    dtype = token_type(recipe.how.vocab if tokenizer is None else tokenizer.vocab_size)
    for part in read(piece, recipe.how):
        ids: list[Any] = part.documents
        if recipe.how.column != IDS:
            assert tokenizer  # a recipe without one has ids
            ids = [np.array(found, dtype) for found in tokenizer.encode(part.documents)]
        full = [found for found in ids if len(found)]
        if tokenizer and (recipe.eod == "append" or (recipe.eod == "auto" and recipe.how.column != IDS)):
            always = recipe.eod == "auto"
            full = [np.append(found, dtype(tokenizer.eos)) if always or found[-1] != tokenizer.eos else found for found in full]
        if full and (longest := max(map(len, full))) > LONGEST:
            raise DataError(f"{piece.file} has a document of {longest} tokens; the index holds up to {LONGEST}")
        flat = np.concatenate(full).astype(dtype) if full else np.empty(0, dtype)
        yield Tokens(flat, np.array([len(found) for found in full], np.int32), len(ids) - len(full), part.bad, part.read)


# several processes


@contextmanager
def _encoded(work: list[Piece], recipe: Recipe, tokenizer: Tokenizer | None, workers: int) -> Iterator[Iterator[Tokens]]:
    """The tokens of all pieces, in order."""
    if not workers:
        yield (part for piece in work for part in encode(piece, recipe, tokenizer))
        return
    jobs = _jobs(work)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for i in range(min(workers, len(jobs))):
            processes.append(_started())
            _give(processes[-1], (recipe, jobs[i::workers]))
        yield (part for i in range(len(jobs)) for part in _answers(processes[i % workers]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # what was to be written is for nobody now
                    pipe.close()  # type: ignore[union-attr]


def _jobs(work: list[Piece]) -> list[list[Piece]]:
    """Consecutive pieces that are enough work to be worth a message: files may be small and many."""
    jobs: list[list[Piece]] = []
    size = PIECE
    for piece in work:
        if size >= PIECE // 2:
            jobs.append([])
            size = 0
        jobs[-1].append(piece)
        size += piece.size
    return jobs


def _started() -> subprocess.Popen[bytes]:
    """A worker. It is in a session of its own: a Ctrl-C is for this process, which ends the others."""
    home = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH")))), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", "from lf.data.tokenizing import worker; worker()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True)


def _give(process: subprocess.Popen[bytes], task: tuple[Recipe, list[list[Piece]]]) -> None:
    assert process.stdin
    with suppress(BrokenPipeError):  # it died: its missing answer says so
        pickle.dump(task, process.stdin)
        process.stdin.flush()


def _answers(process: subprocess.Popen[bytes]) -> Iterator[Tokens]:
    """What a process says of its next job. Raises what it raised."""
    assert process.stdout
    while True:
        try:
            answer = pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = process.wait()
            raise DataError(f"a worker ended with code {code}" + (", as when memory is short; give fewer --workers" * (code == -9))) from None
        if answer is None:
            return
        if isinstance(answer, BaseException):
            raise answer
        yield answer


def worker() -> None:
    """The whole of a worker process: its task comes in on standard input, its answers go out on standard output, a None behind each job."""
    from lf.worker import die_with_parent

    die_with_parent()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not print into the answers
    try:
        recipe, jobs = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        os._exit(1)  # whoever was to ask is gone
    try:
        tokenizer = None if recipe.tokenizer is None else load_tokenizer(recipe.tokenizer)
        for job in jobs:
            for piece in job:
                for part in encode(piece, recipe, tokenizer):
                    pickle.dump(part, out, pickle.HIGHEST_PROTOCOL)
            pickle.dump(None, out)
            out.flush()
    except BrokenPipeError:
        os._exit(1)  # whoever asked is gone
    except BaseException as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(error, out)
        out.flush()

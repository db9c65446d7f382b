"""A run folder: what was asked for, what happened, and where to go on.

    config.json      the settings; the same command goes on with an unfinished run, others are refused once it has trained
    metrics.jsonl    one line a step; a run that was killed and goes on writes the same losses as one that was not
    checkpoints/     step-00000050, …   (lf.checkpoint)
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

import attrs
import torch

from lf.config import ConfigError, differing, to_dict
from lf.console import console


class RunError(ValueError):
    """A run folder that is in use or holds something else, or work that failed on another rank."""


RENAMED = {"schedule": "lr_schedule"}
"""What fields of a config were called by earlier versions."""

_KINDS: dict[str, type[Exception]] = {"ConfigError": ConfigError}


@attrs.frozen
class Run:
    """`lock` is held by rank 0 for as long as the process lives, so two commands never write one folder."""

    folder: Path
    lock: TextIO | None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"


def open_run(folder: str | Path, config: Any, axes: Any, free: Collection[str] = ()) -> Run:
    """The run in `folder` for these settings (an attrs config): a new one, or the same one again.

    free: fields that may be another when a run goes on; config.json then says the new ones. Raises ConfigError with the differing fields when the
    folder holds a run with other settings that has trained at least one step, RunError when another command is using it. Every rank raises alike.
    """
    if not os.fspath(folder).strip() or "\0" in os.fspath(folder):
        raise RunError(f"{os.fspath(folder)!r} is no name of a folder; give another --out")
    folder = Path(folder)
    wanted = json.loads(json.dumps(to_dict(config)))
    held: list[TextIO] = []

    def claim() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "a+")  # noqa: SIM115 — held until the process ends
        except OSError as error:
            raise RunError(f"cannot write into {folder} ({error.strerror}: {error.filename}); give another --out") from None
        try:
            _locked(lock, folder)
            _agree(folder, wanted, free)
        except BaseException:
            lock.close()
            raise
        held.append(lock)

    on_first_rank(claim, axes)
    return Run(folder, held[0] if held else None)


def on_first_rank(work: Callable[[], Any], axes: Any) -> Any:
    """Rank 0 runs `work`; every rank returns its answer (JSON), or raises what it raised, be it SystemExit."""
    return _answers(work if axes.rank == 0 else None, axes)[0]


def once_per_node(work: Callable[[], Any], axes: Any) -> list[Any]:
    """One rank of each node runs `work`; every rank returns the answers (JSON) of all nodes, or raises what the first that failed has raised."""
    return _answers(work if axes.first_of_node else None, axes)


def on_every_rank(work: Callable[[], Any], axes: Any) -> list[Any]:
    """Every rank runs `work` and returns the answers (JSON) of all, or raises what the first that failed has raised."""
    return _answers(work, axes)


def _answers(work: Callable[[], Any] | None, axes: Any) -> list[Any]:
    """What those ranks answer that have work, in their order. Collective.

    However long it takes: the others do not sit in one collective until it times out, they meet the workers a few times a second. One that
    fails ends the waiting for all.
    """
    world = axes.world
    if world.size == 1:
        return [work()] if work else []
    future = _started(work) if work else None
    at_work, failed = True, False
    while at_work and not failed:
        done = future is None or bool(wait([future], timeout=0.2).done)
        lost = future is not None and done and future.exception() is not None
        at_work, failed = map(bool, world.sum(torch.tensor([not done, lost], dtype=torch.int64)))
    problem: BaseException | None = None
    words = b""
    if future is not None and future.done():
        try:
            words = json.dumps({"answer": future.result()}).encode()
        except BaseException as error:  # whatever ends this rank must reach the others: they are waiting for it
            problem, kind = error, type(error).__name__
            by = f"rank {axes.rank}: " if axes.rank else ""
            text = f"{by}{error}" if isinstance(error, Exception) else f"rank {axes.rank}: {kind} {error}"
            words = json.dumps({"error": text, "kind": kind}).encode()
    said = _exchanged(words, world)
    if problem is not None:
        raise problem
    for answer in said:
        if "error" in answer:
            raise _KINDS.get(answer["kind"], RunError)(answer["error"])
    return [answer["answer"] for answer in said]


def _started(work: Callable[[], Any]) -> Future[Any]:
    """`work` in a daemon thread: a process that is interrupted meanwhile ends at once and does not wait for it."""
    future: Future[Any] = Future()

    def body() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=body, daemon=True).start()
    return future


def _exchanged(words: bytes, world: Any) -> list[Any]:
    """The JSON of every rank that has said something, in the order of the ranks."""
    mine = torch.zeros(world.size, dtype=torch.int64)
    mine[world.index] = len(words)
    lengths = world.sum(mine).tolist()
    start = sum(lengths[: world.index])
    letters = torch.zeros(sum(lengths), dtype=torch.int64)
    letters[start : start + len(words)] = torch.tensor(list(words), dtype=torch.int64)
    text = bytes(world.sum(letters).tolist())
    ends = list(itertools.accumulate(lengths))
    return [json.loads(text[end - n : end]) for end, n in zip(ends, lengths) if n]


def _locked(lock: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise RunError(f"{folder} is in use by process {owner}; wait for it, or give another --out") from None
        # some shared file systems of clusters have no locks: training there is right, only this guard is missing
        console().print(f"{folder} cannot be locked ({error.strerror}): take care that no other command writes there", soft_wrap=True)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _agree(folder: Path, wanted: dict[str, Any], free: Collection[str]) -> None:
    """Writes config.json, or compares it. Settings with which nothing was trained bind nobody: a typo in them can be put right in place."""
    path = folder / "config.json"
    if path.exists():
        try:
            have = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path} is not JSON ({error}); remove {folder} or give another --out") from None
        if not isinstance(have, dict):
            raise RunError(f"{path} is no config of a run; give another --out")
        changed = differing(have, wanted)
        if not changed:
            return
        # other fields are another script's, or no run's at all: that file is not ours to replace
        bound = {k: v for k, v in changed.items() if k not in free}
        if (bound and _trained(folder)) or have.keys() != wanted.keys():
            changed = bound or changed
            lines = "\n".join(f"  {k}: the run has {old!r}, this command {new!r}" for k, (old, new) in changed.items())
            lines += "".join(f"\n  what was {old} is {new} now" for old, new in RENAMED.items() if new in wanted and new not in have)
            raise ConfigError(f"{folder} holds a run with other settings:\n{lines}\nGive these back, or another --out, or remove the folder")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted, indent=2) + "\n")
    temporary.replace(path)


def _trained(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return any((folder / "checkpoints").glob("step-*")) or (metrics.exists() and metrics.stat().st_size > 0)


def summary(name: str, layout: Any, ctx: Any, seq_len: int, micro_batch: int, microbatches: int, pipeline: str) -> str:
    """One line: the model, where it runs, what a step is made of, and in which order: `pipeline`, as lf.pipeline tells it."""
    size, dp = sum(math.prod(p.shape) for p in layout.model.params().values()), layout.mesh["dp"]
    rows = f"{micro_batch * microbatches * dp} rows of {seq_len} = {micro_batch} × {microbatches} microbatches × dp={dp}"
    precision = str(ctx.precision.compute).removeprefix("torch.")
    return f"{name}: {size:,} parameters in {precision} on {layout.mesh} ({ctx.device.NAME}); a step is {rows}; {pipeline}"


def same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError when a checkpoint's data is not what would be read now: its place in the stream would mean nothing."""
    if changed := differing(saved, now):
        lines = "; ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in changed.items())
        raise ConfigError(f"the data is not what this run began with: {lines}. Give the old data back, or another --out")


def same_rate(run: Run, step: int, rate: Callable[[torch.Tensor], torch.Tensor], axes: Any) -> None:
    """Raises ConfigError when the last of `step` steps was made at another learning rate than this command's. So a run of a wsd rate can be
    lengthened until it falls, and not after: its rate would jump up again. Collective."""

    def compare() -> None:
        made = next((r["lr"] for r in cut_metrics(run.metrics, step) if r["step"] == step), None)
        now = rate(torch.tensor(step - 1)).item()
        if made is not None and not math.isclose(made, now, rel_tol=1e-5):
            raise ConfigError(f"step {step} was made at a learning rate of {made:.4g}, this command has {now:.4g} there: give the old length back")

    on_first_rank(compare, axes)


def cut_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines after `step` (they were not saved and will be made again) and a torn last one; returns those that stay.

    Raises RunError for any other line that is no record: what stands behind it would be lost."""
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
            number = record["step"]
        except (ValueError, TypeError, KeyError):
            if i + 1 == len(lines):
                break  # killed while writing
            raise RunError(f"{path}, line {i + 1} is no record of a step; mend it, or remove it") from None
        if number > step:
            break
        kept.append(record)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
    temporary.replace(path)
    return kept


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

"""A run folder: what was asked for, what happened, and where to go on.

    config.json      the settings; the same command goes on with an unfinished run, others are refused once it has trained
    metrics.jsonl    one line a step; a run that was killed and goes on writes the same losses as one that was not
    checkpoints/     step-00000050, …   (lf.checkpoint)
"""

from __future__ import annotations

import errno
import fcntl
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


def open_run(folder: str | Path, config: Any, axes: Any) -> Run:
    """The run in `folder` for these settings (an attrs config): a new one, or the same one again.

    Raises ConfigError with the differing fields when the folder holds a run with other settings that has trained at least one step, RunError when
    another command is using it. Every rank raises alike.
    """
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
            _agree(folder, wanted)
        except BaseException:
            lock.close()
            raise
        held.append(lock)

    on_first_rank(claim, axes)
    return Run(folder, held[0] if held else None)


def on_first_rank(work: Callable[[], Any], axes: Any) -> Any:
    """Rank 0 runs `work`; every rank returns its answer (JSON), or raises what it raised, be it SystemExit.

    However long it takes: the others do not sit in one collective until it times out, they meet rank 0 a few times a second.
    """
    world = axes.world
    if world.size == 1:
        return work()
    problem: BaseException | None = None
    words = b""
    if axes.rank == 0:
        future = _started(work)
        while not _met(wait([future], timeout=0.2).done, world):
            pass
        try:
            words = json.dumps({"answer": future.result()}).encode()
        except BaseException as error:  # whatever ends rank 0 must reach the others: they are waiting for it
            problem, kind = error, type(error).__name__
            words = json.dumps({"error": str(error) if isinstance(error, Exception) else f"rank 0: {kind} {error}", "kind": kind}).encode()
    else:
        while not _met((), world):
            pass
    said = json.loads(_from_first(words, world))
    if problem is not None:
        raise problem
    if "error" in said:
        raise _KINDS.get(said["kind"], RunError)(said["error"])
    return said["answer"]


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


def _met(done: Collection[Any], world: Any) -> bool:
    """Whether rank 0 is done: the same answer on every rank."""
    return bool(world.sum(torch.tensor([len(done)])))


def _from_first(words: bytes, world: Any) -> bytes:
    length = int(world.sum(torch.tensor([len(words)])))
    padded = torch.zeros(length, dtype=torch.int64)
    padded[: len(words)] = torch.tensor(list(words), dtype=torch.int64)
    return bytes(world.sum(padded).tolist())


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


def _agree(folder: Path, wanted: dict[str, Any]) -> None:
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
        if _trained(folder) or have.keys() != wanted.keys():
            lines = "\n".join(f"  {k}: the run has {old!r}, this command {new!r}" for k, (old, new) in changed.items())
            raise ConfigError(f"{folder} holds a run with other settings:\n{lines}\nGive these back, or another --out, or remove the folder")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted, indent=2) + "\n")
    temporary.replace(path)


def _trained(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return any((folder / "checkpoints").glob("step-*")) or (metrics.exists() and metrics.stat().st_size > 0)


def summary(name: str, layout: Any, ctx: Any, seq_len: int, micro_batch: int, microbatches: int) -> str:
    """One line: the model, where it runs, and what a step is made of."""
    size, dp = sum(math.prod(p.shape) for p in layout.model.params().values()), layout.mesh["dp"]
    rows = f"{micro_batch * microbatches * dp} rows of {seq_len} = {micro_batch} × {microbatches} microbatches × dp={dp}"
    precision = str(ctx.precision.compute).removeprefix("torch.")
    return f"{name}: {size:,} parameters in {precision} on {layout.mesh} ({ctx.device.NAME}); a step is {rows}"


def same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError when a checkpoint's data is not what would be read now: its place in the stream would mean nothing."""
    if changed := differing(saved, now):
        lines = "; ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in changed.items())
        raise ConfigError(f"the data is not what this run began with: {lines}. Give the old data back, or another --out")


def cut_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines after `step` (they were not saved and will be made again) and a torn last one; returns those that stay."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break  # killed while writing
            if record["step"] > step:
                break
            kept.append(record)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
    temporary.replace(path)
    return kept


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

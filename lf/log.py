"""Where the record of a step goes: a line of metrics.jsonl, always, and TensorBoard or Weights & Biases if asked for. The same keys in all.

A sink is a context manager over (run, first step of this process) that yields a function of a record. A run that goes on writes on in the same
files: what was logged after the checkpoint is logged again, and stands there once.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from lf.config import ConfigError, one_of
from lf.runs import Run, RunError, on_first_rank

Record = dict[str, Any]
Write = Callable[[Record], object]


def chosen(text: str) -> tuple[str, ...]:
    """'jsonl,tensorboard' → its names, jsonl always among them. Raises ConfigError for an unknown one, and for a package that is missing."""
    names = dict.fromkeys(["jsonl", *(word.strip() for word in text.split(",") if word.strip())])
    for name in names:
        one_of("log", name, SINKS)
        if name != "jsonl" and find_spec(name) is None:
            raise ConfigError(f"--log {name} needs the package {name}, which is not installed: pip install {name}; or leave {name} out of --log")
    return tuple(names)


@contextmanager
def opened(names: tuple[str, ...], run: Run, first: int, axes: Any) -> Iterator[Write]:
    """A function that writes a record to all of these on rank 0, and does nothing on the others. Every rank raises when a sink cannot be opened."""
    writes: list[Write] = []
    with ExitStack() as stack:
        on_first_rank(lambda: writes.extend(stack.enter_context(SINKS[name](run, first)) for name in names), axes)

        def write(record: Record) -> None:
            for one in writes:
                one(record)

        yield write


@contextmanager
def _jsonl(run: Run, first: int) -> Iterator[Write]:
    with open(run.metrics, "a", encoding="utf-8") as out:

        def write(record: Record) -> None:
            out.write(json.dumps({k: None if _no_number(v) else v for k, v in record.items()}, allow_nan=False) + "\n")
            out.flush()

        yield write


@contextmanager
def _tensorboard(run: Run, first: int) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    # what was written after the checkpoint is dropped by whoever reads it
    with SummaryWriter(str(run.folder / "tensorboard"), purge_step=first + 1) as out:

        def write(record: Record) -> None:
            for name, value in record.items():
                if name not in ("step", "counted"):
                    out.add_scalar(name, value, record["step"])
            out.flush()

        yield write


@contextmanager
def _wandb(run: Run, first: int) -> Iterator[Write]:
    import wandb

    name = run.folder / "wandb-id"
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:8])
    config = run.folder / "config.json"
    try:
        out = wandb.init(
            project="lf",
            name=run.folder.name,
            id=name.read_text(),
            resume="allow",
            dir=str(run.folder),
            config=json.loads(config.read_text()) if config.exists() else None,
            settings=wandb.Settings(console="off", quiet=True),
        )
    except Exception as error:
        way_out = "run `wandb login`, or set WANDB_MODE=offline, or leave wandb out of --log"
        raise RunError(f"cannot start Weights & Biases ({type(error).__name__}: {error}); {way_out}") from error
    code = 1
    try:
        yield lambda record: out.log({k: v for k, v in record.items() if k not in ("step", "counted")}, step=record["step"], commit=True)
        code = 0
    finally:
        out.finish(exit_code=code)


def _no_number(value: Any) -> bool:
    """JSON has neither NaN nor infinity."""
    return isinstance(value, float) and not math.isfinite(value)


SINKS: dict[str, Callable[[Run, int], AbstractContextManager[Write]]] = {"jsonl": _jsonl, "tensorboard": _tensorboard, "wandb": _wandb}

"""What a checkpoint says about itself, and which of a run's checkpoints are complete."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from lf.box import Box
from lf.checkpoint.atomic import OLD, PARTIAL, CheckpointError, agree, attempt
from lf.config import ConfigError, from_dict

FORMAT, VERSION = "lf checkpoint", 1
MANIFEST = "manifest.json"
FOLDER = re.compile(r"step-\d{8,}")


@attrs.frozen
class Held:
    """A box of a logical tensor, and the file that holds it."""

    file: str
    box: Box


@attrs.frozen
class Stored:
    """A logical tensor: `dtype` as safetensors writes it."""

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[Held, ...]


@attrs.frozen
class Manifest:
    """`leaves`: the paths of the optimizer's state, in order. `tensors`: by tree and key of the piece, as master/layers.0.attn/qkv/q."""

    format: str
    version: int
    mesh: str
    step: int
    kind: str
    config: dict[str, Any]
    extra: dict[str, Any]
    leaves: tuple[str, ...]
    files: dict[str, int]
    tensors: dict[str, Stored]


def manifest(folder: str | os.PathLike[str]) -> Manifest:
    """What a checkpoint says about itself. Raises CheckpointError when it cannot be read or is of a later version."""
    path = Path(folder).expanduser() / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = (values["format"], values["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no manifest of a checkpoint ({type(error).__name__}: {error})") from None
    if kind != (FORMAT, VERSION):
        raise CheckpointError(f"{path} has format {kind[0]!r} version {kind[1]!r}; this version of lf reads {FORMAT!r} version {VERSION}")
    try:
        return from_dict(Manifest, values, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint step-NNNNNNNN in `root`, or None. What a killed run or a broken copy left is passed over."""
    return next(iter(_complete(Path(root).expanduser())), None)


def prune(root: str | os.PathLike[str], keep: int, ctx: Any) -> None:
    """Removes all but the `keep` newest complete checkpoints, and what killed saves left behind. Collective."""
    if keep < 1:
        raise CheckpointError(f"keep={keep} must be at least 1")
    errors: list[Exception] = []
    if ctx.axes.rank == 0:
        attempt(errors, _prune, Path(root).expanduser(), keep)
    agree(errors, f"removing old checkpoints from {root}", ctx)


def _prune(root: Path, keep: int) -> None:
    for folder in list(_complete(root))[keep:]:
        folder.rename(folder.with_name(f".{folder.name}{OLD}"))  # so that no half-removed one stands under a name
    for leftover in root.glob(".step-*"):
        if leftover.name.endswith((PARTIAL, OLD)):
            shutil.rmtree(leftover)


def _complete(root: Path) -> Iterator[Path]:
    """Newest first."""
    found = [p for p in root.iterdir() if FOLDER.fullmatch(p.name)] if root.is_dir() else []
    for folder in sorted(found, key=lambda p: int(p.name.partition("-")[2]), reverse=True):
        try:
            if all((folder / name).stat().st_size == size for name, size in manifest(folder).files.items()):
                yield folder
        except (CheckpointError, OSError):
            continue

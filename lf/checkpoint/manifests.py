"""What a checkpoint says about itself, and which of a run's checkpoints is the newest."""

from __future__ import annotations

import json
import os
import re
import shutil
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
    """`leaves`: the paths of the optimizer's state over all ranks, in order. `tensors`: by tree and key of the piece, as master/layers.0.attn/qkv/q.
    `frozen`: the parameters that were not trained, and have nothing but a master."""

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
    frozen: tuple[str, ...] = ()


def manifest(folder: str | os.PathLike[str]) -> Manifest:
    """What a checkpoint says about itself. Raises CheckpointError when it cannot be read or is of a later version."""
    path = Path(folder).expanduser() / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = (values["format"], values["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no manifest of a checkpoint ({type(error).__name__}: {error})") from None
    if kind != (FORMAT, VERSION):
        reads = f"this version of lf reads {FORMAT!r} version {VERSION}: use the one that wrote it"
        raise CheckpointError(f"{path} has format {kind[0]!r} version {kind[1]!r}; {reads}")
    try:
        return from_dict(Manifest, values, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint step-NNNNNNNN in `root`, or None when there is none. What a killed save left (`atomic`) is no checkpoint.

    A checkpoint appears by one rename, so one that is not whole was damaged afterwards. It is refused and never passed over: to go on from an
    older one, or anew, would write over what may still be mended. Raises CheckpointError that names the folder, what is wrong and the way out.
    """
    root = Path(root).expanduser()
    folders = _newest_first(root)
    if not folders:
        return None
    newest, *older = folders
    if fault := _fault(newest):
        before = next((p.name for p in older if not _fault(p)), None)
        way_out = f"{newest} to go on from {before}" if before else f"{root}, where no checkpoint is whole, to begin at step 0"
        raise CheckpointError(f"cannot go on from {newest}: {fault}. Mend that, or remove {way_out}")
    return newest


def prune(root: str | os.PathLike[str], keep: int, ctx: Any) -> None:
    """Removes all but the `keep` newest whole checkpoints, and what killed saves left behind; damaged ones stay. Collective."""
    if keep < 1:
        raise CheckpointError(f"keep={keep} must be at least 1")
    errors: list[Exception] = []
    if ctx.axes.rank == 0:
        attempt(errors, _prune, Path(root).expanduser(), keep)
    agree(errors, f"removing old checkpoints from {root}", ctx)


def _prune(root: Path, keep: int) -> None:
    for folder in [p for p in _newest_first(root) if not _fault(p)][keep:]:
        folder.rename(folder.with_name(f".{folder.name}{OLD}"))  # so that no half-removed one stands under a name
    for leftover in root.glob(".step-*"):
        if leftover.name.endswith((PARTIAL, OLD)):
            shutil.rmtree(leftover)


def _newest_first(root: Path) -> list[Path]:
    found = [p for p in root.iterdir() if FOLDER.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]), reverse=True)


def _fault(folder: Path) -> str:
    """What is wrong with a checkpoint, as far as its manifest and the sizes of its files say, or ''."""
    try:
        for name, size in manifest(folder).files.items():
            if (have := (folder / name).stat().st_size) != size:
                return f"{name} has {have} bytes, {MANIFEST} says {size}"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""

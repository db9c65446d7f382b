"""A folder that all ranks write together, and that is there whole or not at all.

    .NAME.partial   being written; what a killed run left of it is removed by the next save
    .NAME.old       the one before, between two renames; put back by the next save if the run was killed just there

Collectives stand outside of everything that may fail: a rank whose disk is full remembers its error, goes on meeting the others, and at the
next `agree` all of them raise.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lf.state import device_of

T = TypeVar("T")
PARTIAL, OLD = ".partial", ".old"
SHOWN = 20  # problems in one error


class CheckpointError(ValueError):
    """A checkpoint or an export that cannot be read or written."""


def listing(what: str, problems: list[str]) -> None:
    """Raises CheckpointError with all the problems, if there are any."""
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise CheckpointError(f"{what}: {count}\n" + "\n".join(f"  {p}" for p in problems[:SHOWN] + more))


def attempt(errors: list[Exception], work: Callable[..., T], *args: Any) -> T | None:
    """work(*args), unless something has failed before; an exception goes to `errors`. No collective may stand in `work`."""
    if not errors:
        try:
            return work(*args)
        except Exception as error:
            errors.append(error)
    return None


def agree(errors: list[Exception], doing: str, ctx: Any) -> None:
    """Every rank raises when any rank has an error: that rank its own, the others CheckpointError with its words."""
    world, device = ctx.axes.world, device_of(ctx)
    words = f"{errors[0]}".encode() if errors else b""
    said = torch.zeros(world.size, dtype=torch.int64, device=device)
    said[world.index] = len(words) + bool(errors)  # an error without words counts too
    lengths = world.sum(said).tolist()
    if not any(lengths):
        return
    speaker = next(i for i, n in enumerate(lengths) if n)
    letters = torch.zeros(lengths[speaker], dtype=torch.int64, device=device)
    if world.index == speaker:
        letters[: len(words)] = torch.tensor(list(words), dtype=torch.int64)
    told = bytes(world.sum(letters).tolist()).rstrip(b"\0").decode(errors="replace")
    if not errors:
        raise CheckpointError(f"{doing} failed on rank {speaker}: {told}")
    if isinstance(errors[0], (OSError, SafetensorError)):  # the disk, not a bug: one sentence says it
        raise CheckpointError(f"{doing} failed on rank {world.index}: {errors[0]}") from errors[0]
    raise errors[0]


def publish(
    folder: str | os.PathLike[str],
    ctx: Any,
    ours: Callable[[str], bool],
    write: Callable[[Path, list[Exception]], None],
    finish: Callable[[Path], None],
) -> Path:
    """Makes `folder` of what the ranks write; returns its full path. Collective.

    write(partial, errors)  on every rank, into the folder `partial`; collectives are allowed, disk work goes through `attempt(errors, …)`
    finish(partial)         on rank 0 when all have written, for what needs the others' files
    ours(name)              whether a save could have written a file of this name: a folder with any other file in it is not replaced

    A folder that is there is replaced by two renames. On any failure all ranks raise, and what stood under the name still does.
    """
    final = Path(folder).expanduser().resolve()
    partial, old = final.with_name(f".{final.name}{PARTIAL}"), final.with_name(f".{final.name}{OLD}")
    doing, first = f"saving {final}", ctx.axes.rank == 0
    errors: list[Exception] = []

    def on_first(work: Callable[..., object], *args: Any) -> None:
        if first:
            attempt(errors, work, *args)
        agree(errors, doing, ctx)

    on_first(_begin, final, partial, old, ours)
    try:
        write(partial, errors)
        agree(errors, doing, ctx)
        on_first(finish, partial)
        on_first(_swap, final, partial, old)
    except BaseException:  # all ranks have failed, or this one is being ended: nobody will finish it
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """A safetensors file, on the disk when this returns. Equal tensors and metadata give equal bytes."""
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    if metadata:
        _sort_metadata(path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # some versions of safetensors let only the owner read
    sync(path)


def _sort_metadata(path: Path) -> None:
    """In the header of a safetensors file, in place: safetensors writes the metadata in an order that changes from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(words) > size:
            raise OSError(f"the header of {path.name} is not written as expected: {len(words)} bytes do not fit its {size}")
        file.seek(8)
        file.write(words.ljust(size))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _begin(final: Path, partial: Path, old: Path, ours: Callable[[str], bool]) -> None:
    if final.exists() and not final.is_dir():
        raise CheckpointError(f"cannot save to {final}: it is a file; give the name of a folder")
    if final.is_dir() and (foreign := sorted(p.name for p in final.iterdir() if p.is_dir() or not ours(p.name))):
        shown = ", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else "")
        raise CheckpointError(f"cannot save to {final}: it holds what no save has written ({shown}); move that away, or give another folder")
    if old.exists() and not final.exists():
        old.rename(final)  # killed between the two renames
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _swap(final: Path, partial: Path, old: Path) -> None:
    sync(partial)
    replaced = final.exists()
    if replaced:
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        if replaced:
            old.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)  # the next save tries again

"""Hugging Face folders: a model from its config.json, parameters from its safetensors, and back (`save`, in lf/checkpoint/export.py).

Every rank opens the headers of all shards and finds every problem before it reads a byte of data; then it reads the slices that it holds.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import torch

from lf import box as boxes
from lf import tree
from lf.checkpoint.atomic import CheckpointError, agree, attempt, listing
from lf.checkpoint.export import INDEX, SINGLE, save
from lf.checkpoint.files import DTYPES, dtype_of, flat, opened, read_box, shape_of
from lf.config import ConfigError, differing, one_of, to_dict
from lf.layouts import Layout
from lf.models import families
from lf.models.decoder import decoder
from lf.models.presets import PRESETS
from lf.segment import Model
from lf.spec import Piece
from lf.state import device_of
from lf.tree import Tree

__all__ = ["CheckpointError", "load", "model", "read_config", "save"]

FREE = {"init_std": 0.02, "embed_std": 0.02, "max_len": 40960, "family": ""}  # fields that change nothing about what the weights mean


def model(source: str | os.PathLike[str]) -> Model:
    """A model by the name of a preset ("qwen3-0.6b") or from a folder with a config.json. Reads no weights.

    Raises ConfigError for a name that is neither, with the near one, and for everything in config.json that is not supported.
    """
    if str(source) in PRESETS:
        return decoder(PRESETS[str(source)])
    folder = Path(source).expanduser()
    if folder.is_dir():
        return decoder(read_config(folder))
    try:
        one_of("model", str(source), PRESETS)
    except ConfigError as error:
        raise ConfigError(f"{error}; or a folder with a config.json (nothing is fetched from a hub: download it and give the folder)") from None
    raise AssertionError(source)


def read_config(folder: str | os.PathLike[str]) -> Any:
    """The config in `folder`/config.json. Raises ConfigError that names what is wrong with it."""
    path = Path(folder).expanduser() / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should be a JSON object, is a {type(values).__name__}")
    try:
        return families.read(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load(folder: str | os.PathLike[str], layout: Layout, ctx: Any) -> Tree:
    """This rank's parameters from a Hugging Face folder: {segment: {name: Tensor}} in the master dtype on the device, like `lf.init`. Collective.

    Raises CheckpointError that lists everything that is wrong with the folder: another config than the layout's model, tensors that are missing,
    too many, of another shape or dtype, shards that are missing or cut short. A tied tensor that is on disk twice must be the same both times.
    """
    folder, errors = Path(folder).expanduser(), list[Exception]()
    with ExitStack() as stack:
        found = attempt(errors, _inspect, folder, layout, ctx, stack)
        agree(errors, f"loading {folder}", ctx)
        params = attempt(errors, _read, folder, layout, ctx, found)
        agree(errors, f"loading {folder}", ctx)
    assert params is not None
    return params


def _inspect(folder: Path, layout: Layout, ctx: Any, stack: ExitStack) -> dict[str, Any]:
    """{tensor: open file}; raises CheckpointError with all problems."""
    problems: list[str] = []
    config = layout.model.config
    try:
        have, want = (dict(flat(to_dict(attrs.evolve(c, **FREE)))) for c in (read_config(folder), config))
        for field, (theirs, ours) in differing(have, want).items():
            problems.append(f"config.json has {field}={theirs!r}, the layout's model {ours!r}; build it with lf.hf.model({str(folder)!r})")
    except ConfigError as error:
        problems.append(str(error))
    found, lost = _tensors(folder, stack, problems)
    family = families.of(config)
    names, copies, wanted = family.names(config), family.copies(config), dict[str, tuple[int, ...]]()
    for spec in layout.specs.values():
        for piece in spec.pieces(ctx.axes.coords):
            name = names[piece.key]
            wanted[name] = piece.shape
            if name in found:
                problems += _misfit(name, found[name], piece.shape, ctx.precision.master)
            elif not lost(name):
                problems.append(f"{name} {list(piece.shape)} is missing")
    for name in found.keys() - wanted.keys():
        if name in copies:
            problems += _misfit(name, found[name], wanted[copies[name]], ctx.precision.master)
        elif not family.derived(name):
            problems.append(f"{name} {list(shape_of(found[name], name))} is no tensor of this model")
    listing(f"cannot load {folder}", sorted(problems))
    return found


def _misfit(name: str, file: Any, shape: tuple[int, ...], master: torch.dtype) -> list[str]:
    out, have, code = [], shape_of(file, name), dtype_of(file, name)
    if have != shape:
        out.append(f"{name} has shape {list(have)}, the model {list(shape)}")
    if code not in DTYPES or not DTYPES[code].is_floating_point:
        out.append(f"{name} has dtype {code}; F32, BF16, F16 and F64 can be loaded, no quantised weights")
    elif torch.promote_types(DTYPES[code], master) != master:
        out.append(f"{name} has dtype {code}, which {master} cannot hold exactly; use precision='fp64', or convert the file")
    return out


def _tensors(folder: Path, stack: ExitStack, problems: list[str]) -> tuple[dict[str, Any], Any]:
    """({tensor: open file}, whether a name's absence is explained by a file that could not be opened)."""
    files, index = _shards(folder, problems)
    found: dict[str, Any] = {}
    broken = set()
    for file in files:
        handle = opened(folder / file, stack, problems)
        if handle is None:
            broken.add(file)
            continue
        for name in handle.keys():  # noqa: SIM118 — a file, not a dict
            if name in found:
                problems.append(f"{name} stands in two shards, {file} is the second")
            elif index is not None and index.get(name) != file:
                problems.append(f"{name} is in {file}; {INDEX} has it in {index.get(name, 'no file')}")
            found[name] = handle
    if index is None:
        return found, lambda name: not files or bool(broken)
    return found, lambda name: not files or index.get(name) in broken


def _shards(folder: Path, problems: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """The files with weights, and the index ({tensor: file}) if there is one."""
    if (folder / SINGLE).exists() and (folder / INDEX).exists():
        problems.append(f"{SINGLE} and {INDEX} are both there; remove the one that is out of date")
        return [], None
    if (folder / SINGLE).exists():
        return [SINGLE], None
    if not (folder / INDEX).exists():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors" if pickled else ""
        problems.append(f"there is no {SINGLE} and no {INDEX}{hint}")
        return [], None
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in index.values()):
            raise ValueError("a file in it is no plain file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{INDEX} is no JSON object with a weight_map ({type(error).__name__}: {error})")
        return [], None
    return sorted(set(index.values())), index


def _read(folder: Path, layout: Layout, ctx: Any, found: dict[str, Any]) -> Tree:
    config, pairs = layout.model.config, []
    family = families.of(config)
    names, copies = family.names(config), [(copy, name) for copy, name in family.copies(config).items() if copy in found]
    for path, spec in layout.specs.items():
        local = torch.empty(spec.local_shape(ctx.axes.coords), dtype=ctx.precision.master)
        for piece in spec.pieces(ctx.axes.coords):
            if boxes.volume(piece.box):
                piece.view(local).copy_(_slice(found, names[piece.key], piece))
                for copy, name in copies:
                    if name == names[piece.key]:
                        _check_copy(folder, found, copy, name, piece)
        pairs.append((path, local.to(device_of(ctx))))
    return tree.build(pairs)


def _slice(found: dict[str, Any], name: str, piece: Piece) -> torch.Tensor:
    return read_box(found[name], name, piece.box, boxes.whole(piece.shape))


def _check_copy(folder: Path, found: dict[str, Any], copy: str, name: str, piece: Piece) -> None:
    if not torch.equal(_slice(found, copy, piece), _slice(found, name, piece)):
        raise CheckpointError(
            f"cannot load {folder}: its config.json ties them (tie_word_embeddings), but {copy} differs from {name}; "
            f"set tie_word_embeddings to false to train both, or remove {copy} to use {name}"
        )

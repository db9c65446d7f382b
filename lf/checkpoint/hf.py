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
from lf.box import Box
from lf.checkpoint.atomic import CheckpointError, agree, attempt, listing
from lf.checkpoint.export import INDEX, SINGLE, refuse_several, save
from lf.checkpoint.files import DTYPES, FLOATS, dtype_of, flat, float_dtype, opened, read_box, shape_of
from lf.checkpoint.sources import Source, folder, meaning
from lf.config import ConfigError, differing, one_of, parse, to_dict
from lf.console import console
from lf.layouts import Layout
from lf.models import families
from lf.models.decoder import decoder
from lf.models.families.place import places
from lf.models.presets import PRESETS
from lf.segment import Model
from lf.state import device_of
from lf.tree import Tree

__all__ = ["CheckpointError", "check", "float_dtype", "folder", "load", "model", "read_config", "save"]

FREE = {"init_std": 0.02, "embed_std": 0.02, "max_len": 40960, "family": ""}  # fields that change nothing about what the weights mean


def model(source: Source, axes: Any = None) -> Model:
    """A model by the name of a preset ("qwen3-0.6b"), or from the config.json of a folder or of a repository on the hub ("org/name[@revision]").

    Reads no weights. axes: of the ranks that call, so that the hub is asked once on each node (None: this process alone). Raises ConfigError for
    a name that is none of these, with the near one, or two of them, and for everything in config.json that is not supported.
    """
    meant = meaning(source)
    if isinstance(meant, str):
        return decoder(PRESETS[meant])
    where = folder(source, axes, weights=False, tokenizer=False)
    if where.is_dir():
        return decoder(read_config(where))
    try:
        one_of("model", str(source), PRESETS)
    except ConfigError as error:
        raise ConfigError(f"{error}; or a folder with a config.json, or a repository on the hub: org/name[@revision]") from None
    raise ConfigError(f"there is no folder {where}")


def read_config(folder: str | os.PathLike[str]) -> Any:
    """The config in `folder`/config.json. Raises ConfigError that names what is wrong with it."""
    path = Path(folder).expanduser() / "config.json"
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should be a JSON object, is a {type(values).__name__}")
    try:
        return families.read(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load(source: Source, layout: Layout, ctx: Any, dtype: str | torch.dtype | None = None) -> Tree:
    """This rank's parameters, {segment: {name: Tensor}} in the master dtype on the device, like `lf.init`. Collective.

    source: a Hugging Face folder, or a repository on the hub ("org/name[@revision]"), which is fetched once on each node. dtype: what the values
    on disk are rounded to on the way ("bf16", torch.float32, …). None: nothing is rounded, and a file that the masters cannot hold exactly is
    refused.

    Raises ConfigError for what the hub does not give, and CheckpointError that lists everything that is wrong with the folder: another config
    than the layout's model, tensors that are missing, too many, of another shape or dtype, shards that are missing or cut short. A tied tensor
    that is on disk twice must be the same both times.
    """
    refuse_several(layout)
    dtype, where, errors = _rounded(dtype, ctx), folder(source, ctx.axes), list[Exception]()
    with ExitStack() as stack:
        found = attempt(errors, _inspect, where, layout, ctx, dtype, stack)
        agree(errors, f"loading {where}", ctx)
        assert found is not None
        params = attempt(errors, _read, where, layout, ctx, dtype, found[0])
        agree(errors, f"loading {where}", ctx)
    assert params is not None
    for why, n in sorted(found[1].items()):
        console(ctx.axes.rank).print(f"{where}: {n} tensors are left alone: {why}", soft_wrap=True)
    return params


def check(source: Source, layout: Layout, ctx: Any, dtype: str | torch.dtype | None = None) -> None:
    """Raises what `load` would find in the config and in the headers of the files, and reads no weights. Collective."""
    refuse_several(layout)
    dtype, where, errors = _rounded(dtype, ctx), folder(source, ctx.axes), list[Exception]()
    with ExitStack() as stack:
        attempt(errors, _inspect, where, layout, ctx, dtype, stack)
        agree(errors, f"loading {where}", ctx)


def _rounded(dtype: str | torch.dtype | None, ctx: Any) -> torch.dtype | None:
    dtype, master = float_dtype("dtype", dtype), ctx.precision.master
    if dtype is not None and torch.promote_types(dtype, master) != master:
        raise ConfigError(f"dtype={dtype} cannot be held by masters of {master}; use precision='fp64', or a dtype that {master} holds exactly")
    return dtype


def _inspect(folder: Path, layout: Layout, ctx: Any, dtype: torch.dtype | None, stack: ExitStack) -> tuple[dict[str, Any], dict[str, int]]:
    """({tensor: open file}, {why tensors are left alone: how many}); raises CheckpointError with all problems."""
    problems: list[str] = []
    config = stored = layout.model.config
    try:
        stored = read_config(folder)
        have, want = (dict(flat(to_dict(attrs.evolve(c, **FREE)))) for c in (stored, config))
        for field, (theirs, ours) in differing(have, want).items():
            problems.append(f"config.json has {field}={theirs!r}, the layout's model {ours!r}; build it with lf.hf.model({str(folder)!r})")
    except ConfigError as error:
        problems.append(str(error))
    found, lost = _tensors(folder, stack, problems)
    family = families.of(stored)
    at, copies, unused = places(family.names(config)), family.copies(config), getattr(family, "unused", lambda name: "")
    pieces = [piece for spec in layout.specs.values() for piece in spec.pieces(ctx.axes.coords)]
    wanted = {name: at[piece.key].shape(piece.shape) for piece in pieces for name in at[piece.key].names}
    for name, shape in wanted.items():
        if name in found:
            problems += _misfit(name, found[name], shape, dtype, ctx.precision.master)
        elif not lost(name):
            problems.append(f"{name} {list(shape)} is missing")
    alone: dict[str, int] = {}
    for name in found.keys() - wanted.keys():
        if name in copies:
            problems += _misfit(name, found[name], wanted[copies[name]], dtype, ctx.precision.master)
        elif why := unused(name):
            alone[why] = alone.get(why, 0) + 1
        elif not family.derived(name):
            problems.append(f"{name} {list(shape_of(found[name], name))} is no tensor of this model")
    listing(f"cannot load {folder}", sorted(problems))
    return found, alone


def _misfit(name: str, file: Any, shape: tuple[int, ...], dtype: torch.dtype | None, master: torch.dtype) -> list[str]:
    out, have, code = [], shape_of(file, name), dtype_of(file, name)
    if have != shape:
        out.append(f"{name} has shape {list(have)}, the model {list(shape)}")
    if code not in DTYPES or not DTYPES[code].is_floating_point:
        out.append(f"{name} has dtype {code}; F32, BF16, F16 and F64 can be loaded, no quantised weights")
    elif dtype is None and torch.promote_types(DTYPES[code], master) != master:
        rounded = next(k for k, v in FLOATS.items() if v == master)
        out.append(f"{name} has dtype {code}, which {master} cannot hold exactly; use precision='fp64', or ask for dtype={rounded!r} to round it")
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
    single = (folder / SINGLE).exists() or (folder / SINGLE).is_symlink()
    if single and (folder / INDEX).exists():
        problems.append(f"{SINGLE} and {INDEX} are both there; remove the one that is out of date")
        return [], None
    if single:
        return [SINGLE], None
    if not (folder / INDEX).exists():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors" if pickled else ""
        problems.append(f"there is no {SINGLE} and no {INDEX}{hint}")
        return [], None
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not index:
            raise ValueError("it is empty")
        if odd := [f for f in index.values() if not (isinstance(f, str) and Path(f).name == f and f.endswith(".safetensors"))]:
            raise ValueError(f"{odd[0]!r} in it is no plain name of a .safetensors file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{INDEX} is no JSON object with a weight_map ({type(error).__name__}: {error})")
        return [], None
    return sorted(set(index.values())), index


def _read(folder: Path, layout: Layout, ctx: Any, dtype: torch.dtype | None, found: dict[str, Any]) -> Tree:
    config, pairs = layout.model.config, []
    family = families.of(read_config(folder))
    at, copies = places(family.names(config)), [(copy, name) for copy, name in family.copies(config).items() if copy in found]
    for path, spec in layout.held(ctx.axes.coords).items():
        local = torch.empty(spec.local_shape(ctx.axes.coords), dtype=ctx.precision.master)
        for piece in spec.pieces(ctx.axes.coords):
            place, target = at[piece.key], piece.view(local)
            for cut in place.cuts(piece.box) if boxes.volume(piece.box) else ():
                part = place.logical(_box(found, cut.name, cut.disk))
                target[boxes.slices(cut.part, piece.box)].copy_(part if dtype is None else part.to(dtype))
                for copy, name in copies:
                    if name == cut.name and not torch.equal(place.logical(_box(found, copy, cut.disk)), part):
                        raise CheckpointError(
                            f"cannot load {folder}: its config.json ties them (tie_word_embeddings), but {copy} differs from {name}; "
                            f"set tie_word_embeddings to false to train both, or remove {copy} to use {name}"
                        )
        pairs.append((path, local.to(device_of(ctx))))
    return tree.build(pairs)


def _box(found: dict[str, Any], name: str, box: Box) -> torch.Tensor:
    """A box of a tensor, in its own dims and dtype; only these bytes are read."""
    return read_box(found[name], name, box, tuple((0, 0) for _ in box))

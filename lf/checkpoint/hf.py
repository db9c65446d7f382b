"""Hugging Face folders: a model from its config.json, parameters from its safetensors, and back (`save`, in lf/checkpoint/export.py).

Every rank opens the headers of all shards and finds every problem before it reads a byte of data; then it reads the slices that it holds.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import torch

from lf import box as boxes
from lf import rng, tree
from lf.checkpoint import fp8
from lf.checkpoint.atomic import CheckpointError, agree, attempt, listing
from lf.checkpoint.export import refuse_several, save
from lf.checkpoint.files import flat, float_dtype
from lf.checkpoint.sources import Source, folder, meaning
from lf.checkpoint.weights import Weights, inspect
from lf.config import ConfigError, differing, one_of, parse, to_dict
from lf.console import console
from lf.layouts import Layout
from lf.models import families
from lf.models.decoder import decoder
from lf.models.presets import PRESETS
from lf.segment import Model
from lf.state import device_of
from lf.tree import Tree

__all__ = ["CheckpointError", "check", "float_dtype", "folder", "load", "model", "read_config", "save"]

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
    return _stored(folder)[0]


def _stored(folder: str | os.PathLike[str]) -> tuple[Any, fp8.Scheme | None]:
    """The config in a folder's config.json, and how its weights are in 8 bits, if they are."""
    path = Path(folder).expanduser() / "config.json"
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should be a JSON object, is a {type(values).__name__}")
    try:
        scheme = fp8.scheme(values)
        return families.read({k: v for k, v in values.items() if k != fp8.FIELD} if scheme else values), scheme
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load(source: Source, layout: Layout, ctx: Any, dtype: str | torch.dtype | None = None) -> Tree:
    """This rank's parameters, {segment: {name: Tensor}} in the master dtype on the device, like `lf.init`. Collective.

    source: a Hugging Face folder, or a repository on the hub ("org/name[@revision]"), which is fetched once on each node. dtype: what the values
    on disk are rounded to on the way ("bf16", torch.float32, …; what is not learned, to float32 at least). None: nothing is rounded, and a file
    that the masters cannot hold exactly is refused. Weights in 8 bits with block scales are float32 values here (`lf.checkpoint.fp8`).

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
        params = attempt(errors, _read, where, layout, ctx, dtype, found)
        agree(errors, f"loading {where}", ctx)
    assert params is not None
    for why, n in sorted(found.alone.items()):
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


def _inspect(folder: Path, layout: Layout, ctx: Any, dtype: torch.dtype | None, stack: ExitStack) -> Weights:
    """What is in the files; raises CheckpointError with all problems."""
    problems: list[str] = []
    config, scheme = layout.model.config, None
    stored = config
    try:
        stored, scheme = _stored(folder)
        alike = stored if config.mtp else attrs.evolve(stored, mtp=None)  # heads that predict further ahead may be left out
        have, want = (dict(flat(to_dict(families.bare(c)))) for c in (alike, config))
        for field, (theirs, ours) in differing(have, want).items():
            problems.append(f"config.json has {field}={theirs!r}, the layout's model {ours!r}; build it with lf.hf.model({str(folder)!r})")
    except ConfigError as error:
        problems.append(str(error))
    pieces = [piece for spec in layout.specs.values() for piece in spec.state_pieces(ctx.axes.coords)]
    found = inspect(folder, families.of(stored), config, scheme, pieces, dtype, ctx.precision.master, stack, problems)
    listing(f"cannot load {folder}", sorted(problems))
    return found


def _read(folder: Path, layout: Layout, ctx: Any, dtype: torch.dtype | None, found: Weights) -> Tree:
    pairs = []
    for path, spec in layout.held(ctx.axes.coords).items():
        local = torch.empty(spec.state_shape(ctx.axes.coords), dtype=ctx.precision.master)
        rounded = dtype and spec.param.used_in(dtype)
        for piece in spec.state_pieces(ctx.axes.coords):
            place, target = found.at[piece.key], piece.view(local)
            if not place.names:
                target.copy_(rng.draw(0, piece.key, piece.shape, spec.param.init, piece.box, local.dtype))
            for cut in place.cuts(piece.box) if boxes.volume(piece.box) else ():
                part = place.logical(found.read(cut.name, cut.disk))
                target[boxes.slices(cut.part, piece.box)].copy_(part if rounded is None else part.to(rounded))
                for copy, name in found.copies.items():
                    if name == cut.name and not torch.equal(place.logical(found.read(copy, cut.disk)), part):
                        raise CheckpointError(
                            f"cannot load {folder}: they are one in the model, but {copy} differs from {name}; "
                            f"{'set tie_word_embeddings to false to train both, or ' if layout.model.config.tied else ''}remove {copy} to use {name}"
                        )
        pairs.append((path, local.to(device_of(ctx))))
    return tree.build(pairs)

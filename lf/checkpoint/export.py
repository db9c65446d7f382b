"""Parameters → a Hugging Face folder that everybody else's tools open; the same bytes whatever mesh saves it.

Tensors are dealt out to shards by their logical sizes alone. Shard f is assembled and written by data-parallel coordinate f mod dp, one tensor
at a time: every rank along the axes that split it gives the rows that it owns, so overlapping kv heads come together exactly once. Of a
parameter of another pipeline rank they come together there, and travel to the one that writes, rank 0 of the pipeline.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from lf import tree
from lf.box import shape
from lf.chain_layouts import Layouts
from lf.checkpoint.atomic import CheckpointError, agree, attempt, publish, sync, write_json, write_tensors
from lf.checkpoint.files import FLOATS, float_dtype
from lf.layouts import Layout
from lf.models import families
from lf.models.families.place import Place, places
from lf.spec import Piece, Spec
from lf.state import State, device_of
from lf.tree import Tree

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
HEADER = 256  # bytes that a tensor takes in the header of its file, at most
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


@attrs.frozen
class Source:
    """Part `index` of `spec`, and where on disk it goes."""

    spec: Spec
    index: int
    place: Place


@attrs.frozen
class Entry:
    """A tensor of a shard: its name and shape on disk, and the parts that it is made of."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]


def save(
    folder: str | os.PathLike[str],
    layout: Layout,
    state: State | Tree | Callable[[str], Tensor],
    ctx: Any,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a Hugging Face folder from a State (its masters), a tree of parameters, or a function that gives the one at a path when it is needed.

    Collective; returns the path of the folder. tokenizer: a folder whose tokenizer files are copied along. dtype: of the tensors on disk, as
    "bf16" (None: as they are). No file is larger than `max_shard_bytes`, unless one tensor is. An export that is there is replaced, once the new
    one is complete; a folder with anything else in it is refused. Raises CheckpointError or ConfigError on every rank, and leaves nothing
    half-written under the name.
    """
    refuse_several(layout)
    params = state.optimizer["master"] if isinstance(state, State) else state
    get = params if callable(params) else partial(tree.get, params)
    asked = float_dtype("dtype", dtype)
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    family, errors = families.of(layout.model.config), list[Exception]()
    copied = attempt(errors, _tokenizer_files, tokenizer) if ctx.axes.rank == 0 else []
    held = layout.held(ctx.axes.coords)
    code = attempt(errors, lambda: _code(get(next(iter(held))).dtype if asked is None else asked)) if asked or held else 0
    agree(errors, f"saving {folder}", ctx)
    assert code is not None
    # a rank whose stages are empty learns from the others what they have
    on_disk = [*FLOATS.values()][int(ctx.axes.world.max(torch.tensor(code, device=device_of(ctx)))) - 1]
    shards = deal(layout, family.names(layout.model.config), on_disk, max_shard_bytes)
    name_of = {f: SINGLE if len(shards) == 1 else f"model-{f + 1:05d}-of-{len(shards):05d}.safetensors" for f in range(len(shards))}
    axes = ctx.axes
    # torch numbers the groups that a rank is in, and members must agree: so all make them here, in one order, before their ways part
    for axis in sorted({axis for spec in layout.specs.values() for axis in spec.names if axis}):
        _ = axes[axis]
    _ = axes.pipe()

    def write(partial: Path, errors: list[Exception]) -> None:
        writer = not any(at for axis, at in axes.coords.items() if axis in ("pp", "cp", "tp"))

        @lru_cache(maxsize=1)  # the parts of one parameter follow one another
        def local(path: str) -> Tensor:
            found = attempt(errors, get, path)  # one that cannot be read must not keep the others waiting
            return torch.zeros(layout.specs[path].local_shape(axes.coords), device=device_of(ctx)) if found is None else found

        for f, entries in enumerate(shards):
            if axes.coords["dp"] != f % axes.mesh["dp"]:
                continue
            held: dict[str, Tensor] = {}
            for entry in entries:
                whole = assemble(entry, local, on_disk, layout, ctx)
                if writer and whole is not None:
                    held[entry.name] = whole
            if writer:
                attempt(errors, write_tensors, partial / name_of[f], held)

    def finish(partial: Path) -> None:
        short = str(on_disk).removeprefix("torch.")
        config = {**family.write(layout.model.config), "dtype": short, "torch_dtype": short}
        if tokenizer is not None and (eos := _eos(Path(tokenizer))) is not None:
            config["eos_token_id"] = eos  # where `generate` stops
        write_json(partial / "config.json", config)
        if len(shards) > 1:
            total = sum(math.prod(e.shape) for entries in shards for e in entries) * on_disk.itemsize
            where = {e.name: name_of[f] for f, entries in enumerate(shards) for e in entries}
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
        for path in copied or []:
            shutil.copyfile(path, partial / path.name)
            sync(partial / path.name)

    return publish(folder, ctx, _ours, write, finish)


def refuse_several(layout: Layout | Layouts) -> None:
    """Raises CheckpointError for the layouts of several chains: a Hugging Face folder is laid out for one."""
    if isinstance(layout, Layouts):
        raise CheckpointError(
            f"a Hugging Face folder is of one chain, and there are {', '.join(layout.chains)}: take one of them, as layouts.chains[NAME] "
            "with ctx.of(NAME) on its ranks; lf.checkpoint.save and load keep all of them"
        )


def deal(layout: Layout, names: dict[str, str | Place], dtype: torch.dtype, limit: int) -> list[list[Entry]]:
    """The tensors of each shard, in the order of the model, none larger than `limit` bytes unless one tensor is: the same on every rank."""
    shards: list[list[Entry]] = [[]]
    room = limit
    for entry in _entries(layout, names):
        size = math.prod(entry.shape) * dtype.itemsize + HEADER
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= size
    return shards


def assemble(entry: Entry, local: Callable[[str], Tensor], dtype: torch.dtype, layout: Layout, ctx: Any) -> Tensor | None:
    """The tensor on disk, in the host's memory, of its parts; None on pipeline ranks other than 0. local(path): what this rank holds.

    Collective over the axes of the parts' specs; a part of another pipeline rank is sent to rank 0 of the pipeline.
    """
    axes, out = ctx.axes, None
    pp, speaks = axes.coords["pp"], not (axes.coords["cp"] or axes.coords["tp"])  # the others gather, and neither send nor write
    for source in entry.sources:
        path, shape = source.spec.path, source.spec.pieces(axes.coords)[source.index].shape
        owner = layout.holders(path)[0]
        found = gather(source, local(path), dtype, axes) if pp == owner else None
        if owner and speaks:
            pipe = axes.pipe()
            if pp == owner:
                pipe.send(found, 0, path)()  # waits until it has left: no rank holds more than one
            elif pp == 0:
                found = pipe.recv(shape, dtype, device_of(ctx), owner, path)()
        if pp or found is None:
            continue
        part = found.cpu()
        if not source.place.runs:
            return part
        out = torch.empty(entry.shape, dtype=dtype) if out is None else out
        for at, there, n in source.place.runs:
            out.narrow(source.place.dim, there, n).copy_(part.narrow(source.place.dim, at, n))
    return out


def gather(source: Source, local: Tensor, dtype: torch.dtype, axes: Any) -> Tensor:
    """A logical part, from the rows that each rank along the axes of its spec owns. Collective over these axes."""
    spec, i = source.spec, source.index
    mine = spec.pieces(axes.coords)[i]
    owned = _owned(spec, i, axes.coords)
    out = (owned.view(local) if owned else mine.view(local).narrow(mine.dim, 0, 0)).to(dtype)
    for dim, axis in enumerate(spec.names):
        if axis and axes.mesh[axis] > 1:
            each = [_owned(spec, i, {**axes.coords, axis: j}) for j in range(axes.mesh[axis])]
            out = axes[axis].all_gather(out, [shape(p.box)[dim] if p else 0 for p in each], dim)
    return out.contiguous()


def _owned(spec: Spec, index: int, coords: dict[str, int]) -> Piece | None:
    """What the rank at `coords` owns of a part when all copies of it are one: coordinates along which it is the same count as 0."""
    first = {**coords, **dict.fromkeys(spec.sum_axes, 0)}
    key = spec.pieces(first)[index].key
    return next((p for p in spec.owned(first) if p.key == key), None)


def _entries(layout: Layout, names: dict[str, str | Place]) -> list[Entry]:
    """The tensors on disk, in the order in which the model first has a part of them."""
    at, out = places(names), dict[str, Entry]()
    for spec in layout.specs.values():
        for i, piece in enumerate(spec.pieces(layout.mesh.coords(0))):
            place = at[piece.key]
            entry = out.get(place.name) or Entry(place.name, place.shape(piece.shape), ())
            out[place.name] = attrs.evolve(entry, sources=(*entry.sources, Source(spec, i, place)))
    return list(out.values())


def _code(dtype: torch.dtype) -> int:
    """The number of a dtype among FLOATS, from 1. Raises CheckpointError for another."""
    if dtype not in FLOATS.values():
        raise CheckpointError(f"the parameters have dtype {dtype}; give dtype=, one of {', '.join(FLOATS)}")
    return [*FLOATS.values()].index(dtype) + 1


def _ours(name: str) -> bool:
    return name in (SINGLE, INDEX, "config.json", *TOKENIZER) or bool(SHARD.fullmatch(name))


def _tokenizer_files(folder: str | os.PathLike[str] | None) -> list[Path]:
    if folder is None:
        return []
    files = [p for name in TOKENIZER if (p := Path(folder).expanduser() / name).is_file()]
    if not any(p.name.startswith(("tokenizer", "vocab")) for p in files):
        raise CheckpointError(f"tokenizer={str(folder)!r} holds no tokenizer.json or the like; give the folder that does, or None")
    return files


def _eos(folder: Path) -> int | None:
    """The id of the token that ends a text, when the tokenizer's files say which it is."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        token = token["content"] if isinstance(token, dict) else token
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        return next((t["id"] for t in added if t["content"] == token), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None

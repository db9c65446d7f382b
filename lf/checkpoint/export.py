"""Parameters → a Hugging Face folder that everybody else's tools open; the same bytes whatever mesh saves it.

Tensors are dealt out to shards by their logical sizes alone. Shard f is written by data-parallel coordinate f mod dp (0 on all other axes): as many
shards as there are such ranks at a time, each of which gets one tensor after another (`lf.checkpoint.shards`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lf import tree
from lf.chain_layouts import Layouts
from lf.checkpoint import fp8 as scaling
from lf.checkpoint.atomic import CheckpointError, agree, attempt, publish, sync, write_json, write_tensors
from lf.checkpoint.files import FLOATS, TAG, float_dtype
from lf.checkpoint.shards import Entry, assembler, deal, entries
from lf.layouts import Layout
from lf.models import families
from lf.models.families.place import forms
from lf.state import State, device_of
from lf.tree import Tree

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


def save(
    folder: str | os.PathLike[str],
    layout: Layout,
    state: State | Tree | Callable[[str], Tensor],
    ctx: Any,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    fp8: bool = False,
) -> Path:
    """Writes a Hugging Face folder from a State (its masters), a tree of parameters, or a function that gives the one at a path when it is needed.

    Collective; returns the path of the folder. tokenizer: a folder whose tokenizer files are copied along. dtype: of the tensors on disk, as
    "bf16" (None: as they are); what is not learned, as the bias of a router, keeps at least float32. fp8: matrices are written in 8 bits with a
    scale for each block (`lf.checkpoint.fp8`), from float32, and the rest in `dtype`. No file is larger than `max_shard_bytes`, unless one tensor
    is. An export that is there is replaced, once the new one is complete; a folder with anything else in it is refused. Raises CheckpointError or
    ConfigError on every rank, and leaves nothing half-written under the name.
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
    layouts = forms(family, layout.model.config)
    tensors = entries(layout, next(iter(layouts.values())), on_disk, fp8)
    shards = deal(tensors, max_shard_bytes)
    name_of = {f: SINGLE if len(shards) == 1 else f"model-{f + 1:05d}-of-{len(shards):05d}.safetensors" for f in range(len(shards))}
    axes, assemble = ctx.axes, assembler(layout, ctx)
    dp = axes.mesh["dp"]
    writer = axes.rank == axes.mesh.rank(dp=axes.coords["dp"])
    tag = {TAG: next(iter(layouts))} if len(layouts) > 1 else {}

    def write(partial: Path, errors: list[Exception]) -> None:
        @lru_cache(maxsize=dp)  # the tensors of one parameter follow one another
        def local(path: str) -> Tensor:
            found = attempt(errors, get, path)  # one that cannot be read must not keep the others waiting
            return torch.zeros(layout.specs[path].state_shape(axes.coords), device=device_of(ctx)) if found is None else found

        for first in range(0, len(shards), dp):
            held: dict[str, Tensor] = {}
            for each in zip_longest(*shards[first : first + dp]):
                whole = assemble(each, local)
                if whole is not None:
                    attempt(errors, _put, held, each[axes.coords["dp"]], whole)
            if writer and (f := first + axes.coords["dp"]) < len(shards):
                attempt(errors, write_tensors, partial / name_of[f], held, tag)

    def finish(partial: Path) -> None:
        short = str(on_disk).removeprefix("torch.")
        config = {**family.write(layout.model.config), "dtype": short, "torch_dtype": short}
        if tokenizer is not None and (eos := _eos(Path(tokenizer))) is not None:
            config["eos_token_id"] = eos  # where `generate` stops
        if fp8:
            config[scaling.FIELD] = scaling.described(sorted(e.name.removesuffix(".weight") for e in tensors if e.matrix and not e.scaled))
        write_json(partial / "config.json", config)
        if len(shards) > 1:
            total = sum(e.size for e in tensors)
            where = {name: name_of[f] for f, each in enumerate(shards) for e in each for name in (e.name, *[e.name + scaling.SCALE] * e.scaled)}
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


def _put(held: dict[str, Tensor], entry: Entry, whole: Tensor) -> None:
    """Adds a tensor to those of a shard, in 8 bits with its scales where it is to be."""
    if not entry.scaled:
        held[entry.name] = whole
        return
    try:
        held[entry.name], held[entry.name + scaling.SCALE] = scaling.quantise(whole.to(torch.float32))
    except ValueError as error:
        raise CheckpointError(f"{entry.name} cannot be written in 8 bits: {error}") from None


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

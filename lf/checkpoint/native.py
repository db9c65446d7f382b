"""The checkpoint of a run: every shard of everything is a box of a logical tensor, so any layout loads any checkpoint, exact to the bit.

    step-00000050/
        manifest.json             format, mesh, config of the model, step, extra; for every tensor its shape, dtype and boxes; sizes of the files
        rank-00000.safetensors    the boxes that this rank owns: of masters and moments, and (rank 0) of the scalars
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from lf import box as boxes
from lf import tree
from lf.box import Box
from lf.chain_layouts import Layouts, joined, runs
from lf.chains import Chains
from lf.checkpoint.atomic import CheckpointError, agree, attempt, listing, publish, write_json, write_tensors
from lf.checkpoint.files import CODES, DTYPES, dtype_of, flat, opened, read_box, shape_of
from lf.checkpoint.manifests import FORMAT, MANIFEST, VERSION, Manifest, Stored, manifest
from lf.config import differing, from_dict, to_dict
from lf.layouts import Layout
from lf.models.decoder import DecoderConfig, decoder
from lf.optim.ema import EMA
from lf.segment import Model
from lf.spec import Piece, Spec
from lf.state import State, compute_copy, device_of

STEP = "step"
RANK = re.compile(r"rank-\d{5,}\.safetensors")


def save(folder: str | os.PathLike[str], layout: Layout | Layouts, state: State, ctx: Any, extra: dict[str, Any]) -> Path:
    """Writes the state and `extra` (JSON: the position in the data, …; rank 0's counts) and returns the full path. Collective.

    Raises CheckpointError on every rank, and leaves nothing half-written under the name.
    """
    layouts, rank = joined(layout), ctx.axes.rank
    leaves = {**dict(tree.items(state.optimizer)), STEP: state.step}
    errors: list[Exception] = []
    attempt(errors, _refuse, leaves, layouts, rank, extra)
    agree(errors, f"saving {folder}", ctx)
    dtypes = _all_leaves(layouts, state, ctx)

    def write(partial: Path, errors: list[Exception]) -> None:
        owned = _owned(layouts, rank)
        pieces = [(p, x) for leaf, x in leaves.items() for p in _written(layouts, leaf, owned, rank)]
        mine = {p.key: p.view(x).contiguous().cpu() if p.shape else x.cpu() for p, x in pieces}
        if mine:
            attempt(errors, write_tensors, partial / _file(rank), mine)

    def finish(partial: Path) -> None:
        tensors: dict[str, dict[str, Any]] = {}
        for r in range(layouts.world):
            owned = _owned(layouts, r)
            for leaf, dtype in dtypes.items() if owned or not r else ():  # there may be many ranks, and most own nothing
                for p in _written(layouts, leaf, owned, r):
                    entry = tensors.setdefault(p.key, {"shape": p.shape, "dtype": CODES[dtype], "boxes": []})
                    entry["boxes"].append({"file": _file(r), "box": p.box})
        about = {"format": FORMAT, "version": VERSION, "mesh": str(layouts), "step": int(state.step)}
        about |= {**_ours(layouts), "extra": extra, "leaves": [k for k in dtypes if k != STEP]}
        about["frozen"] = [path for path in layouts.specs if path in layouts.frozen]
        sizes = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
        write_json(partial / MANIFEST, {**about, "files": sizes, "tensors": tensors})

    return publish(folder, ctx, lambda name: name == MANIFEST or bool(RANK.fullmatch(name)), write, finish)


def load(
    folder: str | os.PathLike[str], layout: Layout | Layouts, ctx: Any, hosted: Callable[[Sequence[str], Layouts], Collection[str]] | None = None
) -> tuple[State, dict[str, Any]]:
    """(state, extra) as they were saved, laid out anew: any meshes, splits and placements load what any others have saved. Collective.
    `hosted`: that of the optimizer, where some of its state lies in the host's memory (`lf.optim.Optimizer`).

    Of a parameter that is frozen now and was not then, the moments are left alone. Raises CheckpointError that lists everything that is wrong:
    another model, tensors that are missing or not covered, a parameter that was frozen and now is not, files that are missing or cut short.
    """
    folder, errors, layouts = Path(folder).expanduser(), list[Exception](), joined(layout)
    away = hosted([*layouts.trained(ctx.axes.rank)], layouts) if hosted else ()
    doing = f"loading {folder}"
    with ExitStack() as stack:
        about = attempt(errors, manifest, folder)
        found = attempt(errors, lambda: _inspect(folder, about, layouts, ctx, stack, None, ctx.precision.master))  # type: ignore[arg-type]
        agree(errors, doing, ctx)
        assert about is not None
        assert found is not None
        # Ranks that see a shared disk differently might each have chosen another "latest".
        span = ctx.axes.world.max(torch.tensor([about.step, -about.step], device=device_of(ctx))).tolist()
        if span != [about.step, -about.step]:
            raise CheckpointError(f"{doing}: this rank reads step {about.step}, others read {-span[1]} to {span[0]}; give all ranks one folder")
        values = attempt(errors, lambda: {leaf: _leaf(found, leaf, layouts, ctx, away) for leaf in found[1]})
        agree(errors, doing, ctx)
    assert values is not None
    step = values.pop(STEP)
    built = tree.build(list(values.items()))
    # a rank that holds nothing of a kind has it all the same, empty
    optimizer = {kind: built.get(kind, {}) for kind in dict.fromkeys(leaf.partition("/")[0] for leaf in about.leaves)}
    return State(compute_copy(layouts, optimizer["master"], ctx), optimizer, step), about.extra


def model(folder: str | os.PathLike[str]) -> Model:
    """The model that a checkpoint is of, from what it says about itself. Raises CheckpointError when it is of a kind that is not known."""
    about = manifest(folder)
    if about.kind != DecoderConfig.__name__:
        raise CheckpointError(f"{folder} is of a model of kind {about.kind!r}; known: {DecoderConfig.__name__}")
    return decoder(from_dict(DecoderConfig, about.config, f"{folder}/{MANIFEST}: config"))


@contextmanager
def masters(
    folder: str | os.PathLike[str], layout: Layout | Layouts, ctx: Any, averaged: bool = False
) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads what this rank holds of the parameter at a path, in the dtype that was saved, each time it is asked. Collective.

    `averaged`: of what was trained the average that `lf.optim.ema` has kept instead. The moments of the optimizer are neither needed nor read, and no
    more than one parameter is held here: `lf.hf.save` takes the function. Raises CheckpointError as `load` does, and where no average was kept.
    """
    folder, errors, layouts = Path(folder).expanduser(), list[Exception](), joined(layout)
    with ExitStack() as stack:
        about = attempt(errors, manifest, folder)
        leaf = attempt(errors, _kept_as, about, averaged, folder) or "master/{}".format
        wanted = [leaf(path) for path in layouts.held(ctx.axes.rank)]
        found = attempt(errors, lambda: _inspect(folder, about, layouts, ctx, stack, wanted, None))  # type: ignore[arg-type]
        agree(errors, f"loading {folder}", ctx)
        assert found is not None
        yield lambda path: _leaf(found, leaf(path), layouts, ctx)


def _kept_as(about: Manifest | None, averaged: bool, folder: Path) -> Callable[[str], str]:
    """The name under which the weights of a path are kept."""
    kept = {leaf for leaf in about.leaves if leaf.startswith(f"{EMA}/")} if about and averaged else set()
    if averaged and not kept:
        raise CheckpointError(f"{folder} has no average of the weights: its run was made without --ema")
    return lambda path: f"{EMA}/{path}" if f"{EMA}/{path}" in kept else f"master/{path}"


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _described(model: Model | Chains) -> dict[str, Any]:
    """What a manifest says of a model: the kind of its config and the config. Chains without a config of their own are described one by one."""
    if isinstance(model, Chains) and model.config is None:
        return {"kind": Chains.__name__, "config": {name: _described(chain.model) for name, chain in model.chains.items()}}
    config = {} if model.config is None else to_dict(model.config)
    return json.loads(json.dumps({"kind": type(model.config).__name__, "config": config}))


def _ours(layouts: Layouts) -> dict[str, Any]:
    return _described(layouts.model or layouts.chains[layouts.main].model)


def _spec(layouts: Layouts, leaf: str) -> Spec | None:
    """The spec of a leaf that is shaped like a parameter (master/PATH, m/PATH); None for the others, which are scalars, the same on all ranks."""
    return layouts.specs.get(leaf.partition("/")[2])


def _pieces(layouts: Layouts, leaf: str, rank: int) -> tuple[Piece, ...]:
    spec = _spec(layouts, leaf)
    return _keyed(leaf, layouts.state_pieces(spec.path, rank)) if spec else (Piece(leaf, (), (), 0, 0),)


def _owned(layouts: Layouts, rank: int) -> dict[str, tuple[Piece, ...]]:
    """By path what a rank owns: worked out once for masters and moments."""
    owned: dict[str, tuple[Piece, ...]] = {}
    for path, piece in layouts.state_owned(rank):
        owned[path] = (*owned.get(path, ()), piece)
    return owned


def _written(layouts: Layouts, leaf: str, owned: dict[str, tuple[Piece, ...]], rank: int) -> tuple[Piece, ...]:
    """What a rank that owns `owned` writes of a leaf, any leaf of the state."""
    if _spec(layouts, leaf) is None:
        return (Piece(leaf, (), (), 0, 0),) if rank == 0 else ()
    return _keyed(leaf, owned.get(leaf.partition("/")[2], ()))


def _all_leaves(layouts: Layouts, state: State, ctx: Any) -> dict[str, torch.dtype]:
    """The leaves of the state over all ranks with their dtypes, in the order that one rank has. Collective: a rank holds those of its stages only."""
    codes, paths = [*CODES], [*layouts.specs]
    table = torch.zeros(len(state.optimizer), len(paths), dtype=torch.int64)
    for row, branch in zip(table, state.optimizer.values()):
        mine = dict(tree.items(branch))
        row.copy_(torch.tensor([codes.index(mine[path].dtype) + 1 if path in mine else 0 for path in paths]))
    table = ctx.axes.world.max(table.to(device_of(ctx))).cpu()
    out = {}
    for kind, row in zip(state.optimizer, table.tolist()):
        out.update({f"{kind}/{path}": codes[code - 1] for path, code in zip(paths, row) if code})
        out.update({f"{kind}/{path}": x.dtype for path, x in tree.items(state.optimizer[kind]) if path not in layouts.specs})
    return {**out, STEP: state.step.dtype}


def _keyed(leaf: str, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    kind = leaf.partition("/")[0]
    return tuple(attrs.evolve(p, key=f"{kind}/{p.key}") for p in pieces)


def _refuse(leaves: dict[str, Tensor], layouts: Layouts, rank: int, extra: dict[str, Any]) -> None:
    problems, held = [], layouts.held(rank)
    for leaf, x in leaves.items():
        spec = _spec(layouts, leaf)
        if spec and spec.path not in held:
            problems.append(f"{leaf} {_elsewhere(layouts, spec.path, rank)}")
            continue
        want = layouts.state_shape(spec.path, rank) if spec else ()
        if tuple(x.shape) != want:
            what = "the shape of its parameter" if spec else "a scalar, because no parameter has its path"
            problems.append(f"{leaf} has shape {list(x.shape)} and should have {list(want)}: {what}")
        if x.dtype not in CODES:
            problems.append(f"{leaf} has dtype {x.dtype}; known: {', '.join(map(str, CODES))}")
    try:
        same = json.loads(json.dumps(extra, allow_nan=False)) == extra
    except (TypeError, ValueError) as error:
        same = False
        problems.append(f"extra is no JSON: {error}")
    else:
        if not same or not isinstance(extra, dict):
            problems.append("extra would not come back from JSON as it is: use a dict with string keys, and lists instead of tuples")
    listing("the state cannot be saved", problems)


def _elsewhere(layouts: Layouts, path: str, rank: int) -> str:
    """Where a parameter lies that this rank does not hold."""
    chain = layouts.chain_of[path]
    coords, of = layouts.coords(chain, rank), f" of chain {chain!r}" if chain else ""
    if coords is None:
        return f"is{of}, which lies on ranks {runs(layouts.ranks[chain])}, not on {rank}"
    return f"is of a stage{of} on pipeline rank {layouts.chains[chain].holders(path)[0]}, not on {coords['pp']}"


Reads = dict[str, list[tuple[Any, str, Box, Box, Piece]]]


def _inspect(
    folder: Path, about: Manifest, layouts: Layouts, ctx: Any, stack: ExitStack, wanted: list[str] | None, master: torch.dtype | None
) -> tuple[Manifest, Reads]:
    """What to read for each leaf (None: all): (file, tensor, box to read, box that the file has, the piece it goes to).

    Raises with all problems. `master`: the dtype that masters must have (None: any).
    """
    ours, problems = _ours(layouts), list[str]()
    changed = differing(dict(flat({"kind": about.kind, "config": about.config})), dict(flat(ours)))
    problems += [f"the model differs: {k} was {old!r}, is {new!r}" for k, (old, new) in changed.items()]
    if not changed:
        problems += [f"master/{path} is missing" for path in layouts.specs if f"master/{path}" not in about.leaves]
        problems += _thawed(about, layouts) if wanted is None else []
    files: dict[str, Any] = {}
    reads: Reads = {}
    mine = layouts.held(ctx.axes.rank)
    for leaf in ((*about.leaves, STEP) if wanted is None else wanted) if not changed else ():
        spec = _spec(layouts, leaf)
        if spec and (spec.path not in mine or (spec.path in layouts.frozen and not leaf.startswith("master/"))):
            continue
        reads[leaf] = []
        for piece in _pieces(layouts, leaf, ctx.axes.rank):
            if (stored := about.tensors.get(piece.key)) is None:
                problems.append(f"{piece.key} is missing")
                continue
            problems += _misfit(piece, stored, leaf, master)
            if stored.shape != piece.shape or stored.dtype not in DTYPES:
                continue
            covered = 0
            for held in stored.boxes:
                common = boxes.intersect(held.box, piece.box)
                if not boxes.volume(common):
                    continue
                covered += boxes.volume(common)
                if held.file not in files:
                    files[held.file] = opened(folder / held.file, stack, problems)
                if (file := files[held.file]) is None:
                    continue
                if wrong := _other(file, piece.key, held.box, stored.dtype):
                    problems.append(f"{held.file}: {wrong}")
                reads[leaf].append((file, piece.key, common, held.box, piece))
            if covered != boxes.volume(piece.box):
                problems.append(f"{piece.key}: the boxes in {MANIFEST} have {covered} of the {boxes.volume(piece.box)} elements of {piece.box}")
    listing(f"cannot load {folder}", problems)
    return about, reads


def _thawed(about: Manifest, layouts: Layouts) -> Iterator[str]:
    """Parameters that have no moments because they were not trained."""
    kinds = {leaf.partition("/")[0] for leaf in about.leaves if _spec(layouts, leaf)} - {"master"}
    for path in about.frozen if kinds else ():
        if path not in layouts.frozen:
            yield f"{path} was frozen and has no {', '.join(sorted(kinds))}; freeze it again, or begin a run from an export of these weights"


def _misfit(piece: Piece, stored: Stored, leaf: str, master: torch.dtype | None) -> Iterator[str]:
    if stored.shape != piece.shape:
        yield f"{piece.key} has shape {list(stored.shape)}, the model {list(piece.shape)}"
    if stored.dtype not in DTYPES:
        yield f"{piece.key} has dtype {stored.dtype}; known: {', '.join(DTYPES)}"
    elif leaf.startswith("master/") and master not in (None, DTYPES[stored.dtype]):
        yield f"{piece.key} has dtype {stored.dtype}; this run's masters are {master}: use the precision that it was saved with"


def _other(file: Any, key: str, box: Box, dtype: str) -> str:
    """What is wrong with a tensor in a file, or ''."""
    if key not in file.keys():  # noqa: SIM118 — a file, not a dict
        return f"{key} is missing"
    have = (shape_of(file, key), dtype_of(file, key))
    return "" if have == (boxes.shape(box), dtype) else f"{key} is {have[1]} {list(have[0])}, {MANIFEST} has {dtype} {list(boxes.shape(box))}"


def _leaf(found: tuple[Manifest, Reads], leaf: str, layouts: Layouts, ctx: Any, away: Collection[str] = ()) -> Tensor:
    """What this rank holds of a leaf, on its device; of the paths that are `away` only the masters, the rest in the host's memory, pinned."""
    about, reads = found
    spec, rank = _spec(layouts, leaf), ctx.axes.rank
    dtype = DTYPES[about.tensors[_pieces(layouts, leaf, rank)[0].key].dtype]
    local = torch.empty(layouts.state_shape(spec.path, rank) if spec else (), dtype=dtype)
    for file, key, common, origin, piece in reads[leaf]:
        target = piece.view(local)[boxes.slices(common, piece.box)] if piece.shape else local
        target.copy_(read_box(file, key, common, origin))
    device, (kind, _, path) = device_of(ctx), leaf.partition("/")
    if path not in away or kind == "master":
        return local.to(device)
    return local if device.type == "cpu" else local.pin_memory()

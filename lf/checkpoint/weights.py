"""What a folder of safetensors holds for a model, found before a byte of data is read; and how boxes of it are read.

Which of a family's forms the files have, where it has several, is decided by the names and the shapes of their tensors; where two forms fit, by the
tag that an export of lf leaves in the files' metadata; and without one the folder is refused: a square matrix does not tell which way it lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import torch
from torch import Tensor

from lf.box import Box
from lf.checkpoint import fp8
from lf.checkpoint.export import INDEX, SINGLE
from lf.checkpoint.files import DTYPES, FLOATS, TAG, dtype_of, opened, read_box, shape_of
from lf.checkpoint.fp8 import Scheme
from lf.models.families.place import Place, forms
from lf.spec import Piece

Shapes = dict[str, tuple[int, ...]]


@attrs.frozen
class Weights:
    """`files`: the open file of each tensor · `at`: where each piece lies · `copies`: tensors that must equal another · `scheme`: of those in 8
    bits · `alone`: why tensors are left alone, and how many."""

    files: dict[str, Any]
    at: dict[str, Place]
    copies: dict[str, str]
    scheme: Scheme | None
    alone: dict[str, int]

    def read(self, name: str, held: Box) -> Tensor:
        """A box of a tensor in its dims on disk, as it is, or in float32 where it is in 8 bits; only these bytes are read."""
        w = self._box(name, held)
        if self.scheme is None or dtype_of(self.files[name], name) != fp8.CODE:
            return w
        scales = self._box(name + fp8.SCALE, fp8.scales_box(held, self.scheme.block))
        return fp8.dequantise(w, scales, held, self.scheme.block)

    def _box(self, name: str, held: Box) -> Tensor:
        return read_box(self.files[name], name, held, tuple((0, 0) for _ in held))


def inspect(
    folder: Path, family: ModuleType, config: Any, scheme: Scheme | None, pieces: Iterable[Piece], dtype: torch.dtype | None, master: torch.dtype,
    stack: ExitStack, problems: list[str],
) -> Weights:  # fmt: skip
    """What the folder holds for `pieces`, the parts of all parameters; what is wrong with it goes to `problems`. dtype, master: what values are
    rounded to, and then held in."""
    files, lost = _tensors(folder, stack, problems)
    ways, pieces = forms(family, config), [*pieces]
    if homeless := [piece.key for piece in pieces if any(piece.key not in at for at in ways.values())]:  # the folder's family is another
        problems.append(f"such files have no place for {homeless[0]}" + (f" and {len(homeless) - 1} more" if homeless[1:] else ""))
        pieces = [piece for piece in pieces if piece.key not in homeless]
    wanted = {form: _wanted(at, pieces) for form, at in ways.items()}
    form = _form(ways, wanted, files, problems)
    copies, unused = family.copies(config), getattr(family, "unused", lambda name, config: "")
    known, absent = dict(wanted[form]), _absent(family, config, wanted[form], files, lost, problems)
    for name, shape in wanted[form].items():
        if name in files:
            problems += _misfit(name, files[name], shape, dtype, master, scheme)
            if scheme and dtype_of(files[name], name) == fp8.CODE:
                scales = name + fp8.SCALE
                known[scales] = fp8.scales_shape(shape, scheme.block)
                problems += _scales(scales, files.get(scales), known[scales], lost)
        elif not lost(name) and name not in absent:
            problems.append(f"{name} {list(shape)} is missing")
    alone: dict[str, int] = {}
    for name in files.keys() - known.keys():
        if name in copies:
            problems += _misfit(name, files[name], known[copies[name]], dtype, master, None, copies[name])
        elif why := unused(name, config):
            alone[why] = alone.get(why, 0) + 1
        elif not family.derived(name):
            problems.append(f"{name} {list(shape_of(files[name], name))} is no tensor of this model")
    return Weights(files, ways[form], {copy: name for copy, name in copies.items() if copy in files}, scheme, alone)


def _wanted(at: Mapping[str, Place], pieces: Iterable[Piece]) -> Shapes:
    return {name: at[piece.key].shape(piece.shape) for piece in pieces for name in at[piece.key].names}


def _absent(family: ModuleType, config: Any, wanted: Shapes, files: dict[str, Any], lost: Any, problems: list[str]) -> set[str]:
    """The tensors of the parts of a model that files may lack as a whole, where these do: one problem for all of a part."""
    out: set[str] = set()
    for start, why in getattr(family, "separable", lambda config: {})(config).items():
        part = {name for name in wanted if name.startswith(start)}
        if part and not any(name in files or lost(name) for name in part):
            problems.append(f"all {len(part)} tensors {start}* are missing: {why}")
            out |= part
    return out


def _form(ways: dict[str, dict[str, Place]], wanted: dict[str, Shapes], files: dict[str, Any], problems: list[str]) -> str:
    """The form that the files have, or the one that they come nearest to."""
    if len(ways) == 1:
        return next(iter(ways))
    have = {name: shape_of(files[name], name) for name in {name for shapes in wanted.values() for name in shapes} & files.keys()}
    right = {form: sum(have.get(name) == shape for name, shape in shapes.items()) for form, shapes in wanted.items()}
    fits = [form for form, shapes in wanted.items() if right[form] == len(shapes)]
    best = fits[0] if fits else max(ways, key=lambda form: right[form])  # what is missing says nothing: one form has fewer tensors than another
    if all(ways[form] == ways[best] for form in fits):
        return best
    tags = {tag for file in {id(f): f for f in files.values()}.values() if (tag := (file.metadata() or {}).get(TAG))}
    if len(tags) == 1 and tags <= {*fits}:
        return tags.pop()
    place = next(place for key, place in ways[best].items() if any(ways[form][key] != place for form in fits))
    say, told = " or ".join(map(repr, fits)), f", not {' and '.join(map(repr, sorted(tags)))}" if tags else ""
    problems.append(
        f"{place.names[0]} {list(have[place.names[0]])} may be in the form {say}, which here have the same names and shapes: in the other one "
        f"the weights would be wrong; say which it is in the metadata of the .safetensors files, as {TAG}={best!r}{told}"
    )
    return best


def _misfit(
    name: str, file: Any, shape: tuple[int, ...], dtype: torch.dtype | None, master: torch.dtype, scheme: Scheme | None, copy_of: str = ""
) -> list[str]:
    """What is wrong with a tensor, of the weights or a copy of one of them, which cannot be in 8 bits."""
    out, have, code = [], shape_of(file, name), dtype_of(file, name)
    if have != shape:
        out.append(f"{name} has shape {list(have)}, the model {list(shape)}")
    if scheme and code == fp8.CODE:
        if scheme.keeps(name):
            out.append(f"{name} is {code}, and modules_to_not_convert in config.json says that it is not in 8 bits; correct one of them")
        if len(shape) < 2:
            out.append(f"{name} {list(have)} is {code}: in 8 bits are matrices only")
        code = "F32"  # what they are read as
    if code not in DTYPES or not DTYPES[code].is_floating_point:
        needs = f"{code} needs a {fp8.FIELD} in config.json, with quant_method 'fp8'"
        of_copy = f"a copy is not read in {code}; remove it and its scales to use {copy_of}"
        hint = f": {of_copy if copy_of else needs}" if code == fp8.CODE else ""
        out.append(f"{name} has dtype {code}; F32, BF16, F16 and F64 can be loaded, no quantised weights{hint}")
    elif dtype is None and torch.promote_types(DTYPES[code], master) != master:
        rounded = next(k for k, v in FLOATS.items() if v == master)
        out.append(f"{name} has dtype {code}, which {master} cannot hold exactly; use precision='fp64', or ask for dtype={rounded!r} to round it")
    return out


def _scales(name: str, file: Any, shape: tuple[int, ...], lost: Any) -> list[str]:
    """What is wrong with the scales of a tensor in 8 bits."""
    if file is None:
        return [] if lost(name) else [f"{name} {list(shape)} is missing: {name.removesuffix(fp8.SCALE)} is {fp8.CODE} and needs its scales"]
    out, have, code = [], shape_of(file, name), dtype_of(file, name)
    if have != shape:
        out.append(f"{name} has shape {list(have)}, the weights need {list(shape)}")
    if fp8.SCALES.get(code) is None:
        out.append(f"{name} has dtype {code}; scales are {', '.join(k for k, v in fp8.SCALES.items() if v is not None)} with this torch")
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

"""Reading safetensors: what is in which file, and boxes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lf import box as boxes
from lf.box import Box
from lf.config import one_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
"""A dtype as a safetensors file writes it → torch's."""

TAG = "lf.layout"
"""In the metadata of a file: which of its family's forms it has, where there are several."""

CODES = {dtype: code for code, dtype in DTYPES.items()}

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""What the weights of a model may be read or written as, by the names that a user gives."""


def float_dtype(what: str, value: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype of weights from its name or itself; None stays None. Raises ConfigError, with the near name, for everything else."""
    if value is None or value in FLOATS.values():
        return value  # type: ignore[return-value]
    return FLOATS[one_of(what, str(value).removeprefix("torch."), FLOATS)]


def opened(path: Path, stack: ExitStack, problems: list[str]) -> Any:
    """An open safetensors file, closed with `stack`; None and a line in `problems` when it is not there, cut short or something else."""
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except FileNotFoundError:
        link = f" a link to {path.readlink()}, which is" if path.is_symlink() else ""
        problems.append(f"{path.name} is{link} not there")
    except (OSError, SafetensorError) as error:
        problems.append(f"{path.name} is cut short, or no safetensors file ({error})")
    return None


def shape_of(file: Any, name: str) -> tuple[int, ...]:
    return tuple(file.get_slice(name).get_shape())


def dtype_of(file: Any, name: str) -> str:
    """As the file writes it: "F32"."""
    return file.get_slice(name).get_dtype()


def read_box(file: Any, name: str, box: Box, origin: Box) -> Tensor:
    """`box` of the logical tensor of which the file's `name` holds `origin`; only these bytes are read."""
    if not box:
        return file.get_tensor(name)
    return file.get_slice(name)[boxes.slices(box, origin)]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of what JSON can hold, as layers.0.mixer.heads."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, (list, tuple)):
        pairs = list(enumerate(value))
    else:
        yield path, value
        return
    for key, inner in pairs:
        yield from flat(inner, f"{path}.{key}" if path else str(key))

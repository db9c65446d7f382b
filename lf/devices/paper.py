"""No device: tensors without data ("meta"), for `lf.sim.trace`. Its kernels are those of the CPU, with the memory and the operations that they have
there. Nothing is ever too much for it. What goes to the host's memory is gone from here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.devices import cpu

NAME = "paper"
BACKEND = ""  # between processes there is none
FLOAT64 = True
OPS = cpu.OPS


def found() -> str:
    return ""


def missing() -> str:
    return "it computes nothing; lf.sim.trace runs on it"


def no_compiler() -> str:
    return "there is nothing to compile on paper: trace the step without compile"


def torch_device(local_rank: int) -> torch.device:
    return torch.device("meta")


def select(local_rank: int) -> None:
    pass


def peak_flops(dtype: torch.dtype) -> float | None:
    return None


def memory_peak() -> int:
    return 0


def memory_total() -> int:
    """As much as one likes."""
    return sys.maxsize


def memory_now() -> int | None:
    return None


def moment() -> Any:
    return 0.0


def seconds(start: Any, end: Any) -> float:
    """No time passes."""
    return 0.0


def copy_streams() -> Any:
    return None


def copy_out(sources: Sequence[Tensor], chunk: int, streams: Any) -> tuple[list[list[Tensor]], Callable[[], None]]:
    """Pieces that are as long, and take up nothing."""
    byte = torch.empty((), dtype=torch.uint8)
    return [[byte.expand(len(piece)) for piece in source.split(chunk)] for source in sources], _nothing


def copy_in(pieces: Sequence[Tensor], to: torch.device, after: Callable[[], None], streams: Any) -> tuple[Tensor, Callable[[], None]]:
    return torch.empty(sum(len(piece) for piece in pieces), dtype=torch.uint8, device=to), _nothing


def copy_beside(pairs: Sequence[tuple[Tensor, Tensor]], way: int, after: Callable[[], None], streams: Any) -> Callable[[], None]:
    return _nothing


def _nothing() -> None:
    pass


def _in_place(*args: Any, **more: Any) -> None:
    """What an operator that writes where its arguments are does with tensors without data."""


_LIBRARY = torch.library.Library("aten", "IMPL")
for _name in ("_fused_adamw_.tensor_lr",):  # which torch does not have on paper (2.13)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
        _LIBRARY.impl(_name, _in_place, "Meta")

"""The most memory that a function holds at a time, counted where everything is taken: tensors, buckets, what a backend copies to send."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lf.config import ConfigError


class _Heap(ctypes.Structure):
    """struct mallinfo2 of the C library (glibc 2.33 and newer)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


@functools.cache
def _heap() -> Callable[[], _Heap]:
    look = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if look is None:
        raise ConfigError("peak memory on a CPU is read from glibc, 2.33 or newer, and there is none here; use --device cuda")
    look.restype = _Heap
    return look


def live(device: str) -> int:
    """Bytes that are taken now: on a CPU all that this process has from its C library, on CUDA its tensors."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    now = _heap()()
    return now.uordblks + now.hblkhd


class _Watch(TorchDispatchMode):
    """Looks before and after every operation, those of backwards too. What one takes and gives back inside itself is not seen."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch loads its compiler at the first operation, which takes seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.most = live("cpu")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.most = max(self.most, live("cpu"))
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, live("cpu"))
        return out


def peak(fn: Callable[[], Any], device: str) -> int:
    """The most that is taken at a time while fn runs, in bytes, what is there already included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with _Watch() as watch:
        fn()
    return watch.most

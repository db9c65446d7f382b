"""The CPU: runs everything, gloo between processes."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "cpu"
BACKEND = "gloo"
FLOAT64 = True
OPS = {
    "adamw_update": "lf.kernels.adamw.adamw_update",
    "attention": "lf.kernels.sdpa.attention",
    "grouped_linear": "lf.kernels.grouped.grouped_linear",
    "momentum_update": "lf.ops.muon.momentum_update",
    "permute": "lf.kernels.permute.permute",
    "rms_norm": "lf.kernels.norm.rms_norm",
    "rope": "lf.kernels.rope.rope",
    "swiglu": "lf.kernels.swiglu.swiglu",
    "unpermute": "lf.kernels.permute.unpermute",
}


def found() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores"


def missing() -> str:
    return ""


def no_compiler() -> str:
    """torch's compiler for it writes C++."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return "" if any(map(shutil.which, compilers)) else f"torch.compile needs a C++ compiler, and there is no {' or '.join(compilers)}"


def torch_device(local_rank: int) -> torch.device:
    return torch.device("cpu")


def select(local_rank: int) -> None:
    pass


def peak_flops(dtype: torch.dtype) -> float | None:
    """Not known: it depends on the clock, the vector units and how many of the cores are ours."""
    return None


def memory_peak() -> int:
    """Bytes of memory that this process has taken up at most so far, libraries and all."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_total() -> int:
    """Bytes of memory for this process: those of this machine, or fewer where it or its container has been given a limit, shared among the
    ranks that run here."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # 'max', and no such file, are no limit
            there = min(there, int(Path(limit).read_text()))
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    share = there // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return share if own == resource.RLIM_INFINITY else min(own, share)


def moment() -> Any:
    """Now, on a clock of this machine."""
    return time.perf_counter()


def seconds(start: Any, end: Any) -> float:
    """Between two moments."""
    return end - start


def memory_now() -> int | None:
    """Not known: what tensors take up is not counted apart from the rest of the process."""
    return None


def copy_streams() -> Any:
    """Nothing runs beside the computation here."""
    return None


def copy_out(sources: Sequence[Tensor], chunk: int, streams: Any) -> tuple[list[list[Tensor]], Callable[[], None]]:
    """Copies of the bytes, in pieces; they are there when this returns."""
    return [[piece.clone() for piece in source.split(chunk)] for source in sources], _nothing


def copy_in(pieces: Sequence[Tensor], to: torch.device, after: Callable[[], None], streams: Any) -> tuple[Tensor, Callable[[], None]]:
    """The pieces joined; they are there when this returns."""
    return torch.cat(list(pieces)), _nothing


def copy_beside(pairs: Sequence[tuple[Tensor, Tensor]], way: int, after: Callable[[], None], streams: Any) -> Callable[[], None]:
    """Copies; they are there when this returns."""
    for to, source in pairs:
        to.copy_(source)
    return _nothing


def _nothing() -> None:
    pass

"""The CPU: runs everything, gloo between processes."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from pathlib import Path

import torch

NAME = "cpu"
BACKEND = "gloo"
FLOAT64 = True
OPS = {
    "adamw_update": "lf.kernels.adamw.adamw_update",
    "attention": "lf.kernels.sdpa.attention",
    "rms_norm": "lf.kernels.norm.rms_norm",
    "rope": "lf.kernels.rope.rope",
    "swiglu": "lf.kernels.swiglu.swiglu",
}


def found() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores"


def missing() -> str:
    return ""


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


def moment() -> float:
    """Now, on a clock of this machine."""
    return time.perf_counter()


def seconds(start: float, end: float) -> float:
    """Between two moments."""
    return end - start


def memory_now() -> None:
    """Not known: what tensors take up is not counted apart from the rest of the process."""

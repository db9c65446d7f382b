"""The CPU: runs everything, gloo between processes."""

import os
import resource
import sys

import torch

NAME = "cpu"
BACKEND = "gloo"
FLOAT64 = True
OPS = {
    "attention": "lf.kernels.sdpa.attention",
    "rms_norm": "lf.ops.norm.rms_norm",
    "rope": "lf.ops.rope.rope",
    "swiglu": "lf.ops.swiglu.swiglu",
}


def found() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores"


def torch_device(local_rank: int) -> torch.device:
    return torch.device("cpu")


def peak_flops(dtype: torch.dtype) -> float | None:
    """Floating-point operations a second at most: not known for a CPU."""
    return None


def memory_peak() -> int:
    """Bytes that this process has held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_limit() -> int:
    """Bytes that this process may hold: the machine's memory, or less where the process has been given a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return there if limit == resource.RLIM_INFINITY else min(limit, there)

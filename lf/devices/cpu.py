"""The CPU: runs everything, gloo between processes."""

import os

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

"""NVIDIA GPUs through torch.cuda; NCCL between them, and gloo for the few words that ranks exchange on the host."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAME = "cuda"
BACKEND = "cpu:gloo,cuda:nccl"
FLOAT64 = True
OPS = {
    "adamw_update": "lf.kernels.bf16_moments.adamw_update",
    "attention": "lf.kernels.varlen.attention",
    "grouped_linear": "lf.kernels.grouped.grouped_linear",
    "momentum_update": "lf.kernels.bf16_moments.momentum_update",
    "permute": "lf.kernels.permute.permute",
    "rms_norm": "lf.kernels.fused_norm.rms_norm",
    "rope": "lf.kernels.rope.rope",
    "swiglu": "lf.kernels.swiglu.swiglu",
    "unpermute": "lf.kernels.permute.unpermute",
}

PEAKS = {
    # NVIDIA's datasheets, dense bfloat16 and float16 tensor-core FLOP/s (half of what they give "with sparsity"), SXM unless named
    "B200": 2.25e15,  # Blackwell architecture technical brief (2024)
    "H200": 989.4e12,  # H200 datasheet (2024)
    "H100 PCIe": 756e12,  # H100 datasheet (2023)
    "H100 NVL": 835e12,  # H100 NVL product brief (2024)
    "H100": 989.4e12,  # H100 datasheet (2023)
    "A100": 312e12,  # A100 datasheet (2021)
}
"""Part of a card's name → its peak; the first that fits counts."""


def found() -> str:
    if not torch.cuda.is_available():
        return ""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(n)} × {n}" for n in dict.fromkeys(names))


def missing() -> str:
    """Why it cannot be used here, or ''."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no CUDA device that it can use (is there one, is its driver new enough, is CUDA_VISIBLE_DEVICES empty?)"


def no_compiler() -> str:
    """torch's compiler for it writes Triton."""
    return "" if importlib.util.find_spec("triton") else "torch.compile needs the package triton, which is not installed"


def torch_device(local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank)


def select(local_rank: int) -> None:
    """Makes the rank's card the one that this process works on: NCCL takes the current one."""
    torch.cuda.set_device(local_rank)


def peak_flops(dtype: torch.dtype) -> float | None:
    """Floating-point operations a second at most, of products in this dtype; None where it is not known."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if all(word in name for word in part.split())), None)


def memory_peak() -> int:
    """Bytes that tensors have taken up at most so far on this process's card."""
    return torch.cuda.max_memory_allocated()


def memory_total() -> int:
    """Bytes of this process's card."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def moment() -> Any:
    """When the work that the current stream has been given so far will be done: the host does not wait for it."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Any, end: Any) -> float:
    """Between two moments; the host waits until both have come."""
    start.synchronize()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def memory_now() -> int | None:
    """Bytes that tensors take up on this process's card, in the order of the host's calls."""
    return torch.cuda.memory_allocated()


def copy_streams() -> Any:
    """(to the host's memory, from it): the card has an engine for each way."""
    return torch.cuda.Stream(), torch.cuda.Stream()


def copy_out(sources: Sequence[Tensor], chunk: int, streams: Any) -> tuple[list[list[Tensor]], Callable[[], None]]:
    """Into pinned memory, which torch keeps and gives out again; the first time it is given out, the host waits for the driver."""
    out, _ = streams
    out.wait_stream(torch.cuda.current_stream())  # the sources are being computed there
    hosts = []
    with torch.cuda.stream(out):
        for source in sources:
            pieces = source.split(chunk)
            hosts.append([torch.empty(len(p), dtype=torch.uint8, pin_memory=True).copy_(p, non_blocking=True) for p in pieces])
            source.record_stream(out)  # dropped now, it is given to others only after the copy
        copied = out.record_event()
    return hosts, lambda: torch.cuda.current_stream().wait_event(copied)


def copy_in(pieces: Sequence[Tensor], to: torch.device, after: Callable[[], None], streams: Any) -> tuple[Tensor, Callable[[], None]]:
    """From pinned memory, on a stream of its own; the memory there is the computing stream's."""
    _, back = streams
    flat = torch.empty(sum(len(piece) for piece in pieces), dtype=torch.uint8, device=to)
    back.wait_stream(torch.cuda.current_stream())  # whoever had this memory last has done with it
    with torch.cuda.stream(back):
        after()
        for part, piece in zip(flat.split([len(piece) for piece in pieces]), pieces):
            part.copy_(piece, non_blocking=True)
        flat.record_stream(back)  # even if nobody waits for it
        fetched = back.record_event()
    return flat, lambda: torch.cuda.current_stream().wait_event(fetched)


def copy_beside(pairs: Sequence[tuple[Tensor, Tensor]], way: int, after: Callable[[], None], streams: Any) -> Callable[[], None]:
    """On the stream of its way. The tensors must live until somebody has waited."""
    stream = streams[way]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        after()
        for to, source in pairs:
            to.copy_(source, non_blocking=True)
        copied = stream.record_event()
    return lambda: torch.cuda.current_stream().wait_event(copied)

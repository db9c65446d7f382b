"""Rows → the batches of a step. With b rows of seq_len tokens a batch is one packed row of T = b·seq_len tokens, padded once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lf.batch import IGNORE, Batch
from lf.data.files import DataError
from lf.data.stream import Row, Rows


def pack(parts: Sequence[Row], multiple: int = 1) -> Batch:
    """Rows as further documents of one packed row whose length is the next multiple of `multiple`.

    Padding is documents of its own, none longer than a row, so no attention reaches into it and the longest document stays a constant. cu_seqlens
    has as many entries as the smallest power of two, at least 16, that holds all starts and the end."""
    if not parts or multiple < 1:
        raise DataError(f"pack needs at least one row and multiple ≥ 1; got {len(parts)} rows, multiple={multiple}")
    firsts = np.cumsum([0] + [len(p.tokens) for p in parts])
    used, longest = int(firsts[-1]), max(len(p.tokens) for p in parts)
    length = -(-used // multiple) * multiple

    starts = np.concatenate([p.starts + first for p, first in zip(parts, firsts)] + [np.arange(used, length, longest)])
    cu_seqlens = np.full(max(1 << len(starts).bit_length(), 16), length, np.int32)
    cu_seqlens[: len(starts)] = starts
    sizes = np.diff(starts, append=length)
    plan = {
        "tokens": _padded([p.tokens for p in parts], length, 0),
        "labels": _padded([p.labels for p in parts], length, IGNORE),
        "positions": torch.from_numpy(np.arange(length, dtype=np.int64) - np.repeat(starts, sizes)),
        "cu_seqlens": torch.from_numpy(cu_seqlens),
    }
    return Batch(plan)


def microbatch(rows: Rows, first: int, micro_batch: int, multiple: int = 1) -> Batch:
    """Rows first … first + micro_batch - 1 as one batch."""
    return pack([rows(k) for k in range(first, first + micro_batch)], multiple)


def step_batches(
    rows: Rows, consumed: int, global_batch: int, micro_batch: int, dp: int = 1, dp_index: int = 0, multiple: int = 1
) -> list[Batch]:
    """The microbatches of one step on data-parallel coordinate `dp_index`, after `consumed` rows of the run.

    A step takes rows consumed … consumed + global_batch - 1 on any number of ranks; microbatch i of coordinate d holds the step's rows from
    (i·dp + d)·micro_batch. The data position after the step is consumed + global_batch."""
    count = microbatches(global_batch, micro_batch, dp)
    if not 0 <= dp_index < dp:
        raise DataError(f"dp_index={dp_index} is outside 0 … {dp - 1}, the coordinates of dp={dp}")
    if consumed < 0:
        raise DataError(f"consumed={consumed} rows: a run starts at 0")
    return [microbatch(rows, consumed + (i * dp + dp_index) * micro_batch, micro_batch, multiple) for i in range(count)]


def microbatches(global_batch: int, micro_batch: int, dp: int) -> int:
    """Microbatches of a rank in a step: global_batch / (micro_batch·dp). Raises DataError naming the global batches that would do."""
    if min(global_batch, micro_batch, dp) < 1:
        raise DataError(f"global_batch={global_batch}, micro_batch={micro_batch} and dp={dp} must each be at least 1")
    unit = micro_batch * dp
    if global_batch % unit:
        below = global_batch // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        raise DataError(
            f"global_batch={global_batch} must be a multiple of micro_batch*dp = {micro_batch}*{dp} = {unit}; the nearest that work: {near}"
        )
    return global_batch // unit


def _padded(parts: list[np.ndarray], length: int, fill: int) -> torch.Tensor:
    out = np.full(length, fill, np.int64)
    np.concatenate(parts, out=out[: sum(map(len, parts))])
    return torch.from_numpy(out)

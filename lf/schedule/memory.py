"""Where memory ran out: an allocation that failed becomes an error that knows its action, its layer and what there was by then."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class OutOfMemory(ValueError):
    """The device's memory was full. `where`: the action and the layer, in words.

    `forward`: the share of the stage's layers whose forward had begun · `gradients`: bytes of gradients that there were ·
    `wanted`: bytes that were asked for and not there, 0 where that is not known.
    """

    def __init__(self, words: str, where: str = "", forward: float = 1.0, gradients: int = 0, wanted: int = 0):
        super().__init__(words)
        self.where, self.forward, self.gradients, self.wanted = where, forward, gradients, wanted


def memory_is_full(error: BaseException) -> bool:
    """Whether an accelerator's allocator or the CPU's says so."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


@contextmanager
def memory_at(where: str, forward: float, grads: Mapping[str, Tensor]) -> Iterator[None]:
    """Turns an allocation that failed into OutOfMemory."""
    try:
        yield
    except RuntimeError as error:
        if not memory_is_full(error):
            raise
        raise out_of_memory(error, where, forward, grads) from error


def out_of_memory(error: BaseException, where: str, forward: float, grads: Mapping[str, Tensor]) -> OutOfMemory:
    gradients = sum(g.numel() * g.element_size() for g in grads.values())
    return OutOfMemory(f"out of memory in {where}: {error}", where, forward, gradients, _wanted(str(error)))


def _wanted(words: str) -> int:
    """The bytes that were asked for, as torch says it: 'tried to allocate 2.50 GiB', 'tried to allocate 512 bytes'."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)", words)
    return int(float(found[1]) * 1024 ** ("bytes", "KiB", "MiB", "GiB", "TiB").index(found[2])) if found else 0

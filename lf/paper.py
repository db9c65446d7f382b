"""One rank on paper: what is known there although tensors have no data, and what is taken for granted.

    with Paper() as paper:
        step(…)                  on meta tensors, over the axes of lf/axes_meta.py, with lf/devices/paper.py as the device
    paper.assumed

A tensor that came from the host can be read again on the host (`tolist`): kernels cut a row by its documents. What the device alone would know has
to be assumed where it is read, and whoever does so says it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.weak import WeakIdKeyDictionary


class Paper(TorchFunctionMode):
    """`assumed`: in words, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.assumed: tuple[str, ...] = ()
        self._values = WeakIdKeyDictionary()  # tensor on paper → the same on the host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist and args[0] in self._values:
            return self._values[args[0]].tolist()
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and isinstance(out, Tensor) and out.is_meta and not args[0].is_meta:
            self._values[out] = args[0]
        return out


def assume(words: str) -> None:
    """Notes what is taken for granted, where this thread is on paper."""
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, Paper):
            mode.assumed = tuple(dict.fromkeys((*mode.assumed, words)))

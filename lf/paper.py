"""One rank on paper: what is known there although tensors have no data, and what is taken for granted.

    with Paper() as paper:
        step(…)                  on meta tensors, over the axes of lf/axes_meta.py, with lf/devices/paper.py as the device
    paper.assumed

A tensor that came from the host can be read again on the host (`tolist`): kernels cut a row by its documents. What the device alone would know has
to be assumed where it is read, and whoever does so says it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack


class Paper(TorchFunctionMode):
    """`assumed`: in words, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.assumed: tuple[str, ...] = ()
        self._values = dict[int, tuple[Any, Tensor]]()  # of a storage on paper: it, weakly, and the tensor on the host that it has come from

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return self.read(args[0])
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and isinstance(out, Tensor) and out.is_meta and not args[0].is_meta:
            storage = out.untyped_storage()
            self._values[storage._cdata] = weakref.ref(storage), args[0]
        return out

    def read(self, x: Tensor) -> Any:
        """`x.tolist()`. Raises NotImplementedError, torch's own, for what has not come from the host as it is."""
        storage = x.untyped_storage()
        ref, value = self._values.get(storage._cdata, (None, x))
        same = ref is not None and ref() is storage and (x.shape, x.dtype) == (value.shape, value.dtype)
        return (value if same else x).tolist()


def assume(words: str) -> None:
    """Notes what is taken for granted, where this thread is on paper."""
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, Paper):
            mode.assumed = tuple(dict.fromkeys((*mode.assumed, words)))

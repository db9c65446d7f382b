"""What a model function needs besides its arguments, and nothing hidden: live axes, device, op table, precision."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import attrs
import torch

from lf import devices
from lf.config import one_of


@attrs.frozen
class Precision:
    """`compute`: parameters and activations. `master`: the truth that is updated and saved, and what gradients are summed in."""

    compute: torch.dtype
    master: torch.dtype


PRECISIONS = {
    "bf16": Precision(torch.bfloat16, torch.float32),
    "fp32": Precision(torch.float32, torch.float32),
    "fp64": Precision(torch.float64, torch.float64),
}


DISPATCH = ("exchange", "gather")


def precision_of(value: str | Precision) -> Precision:
    """'bf16', or a Precision itself. Raises ConfigError for a name that is none."""
    return value if isinstance(value, Precision) else PRECISIONS[one_of("precision", value, PRECISIONS)]


@attrs.frozen
class Context:
    """`axes`: from `lf.connect`, `lf.sim.spmd` or `lf.solo`. `device`: from `lf.devices.get`. `ops`: the device's fast functions, by name.
    `dispatch`: how tokens travel to their experts, one of DISPATCH (`lf/parallel/expert.py`).

    `chains`: where a model has several, the context of each, whose axes are those of its own mesh, None on a rank that is not on it. The context
    that has them is that of the world: its axes are those of a mesh of dp alone, over all ranks."""

    axes: Any
    device: ModuleType
    precision: Precision = attrs.field(default=PRECISIONS["fp32"], converter=precision_of)
    dispatch: str = attrs.field(default="exchange", kw_only=True)
    chains: Mapping[str, Context] = attrs.field(factory=dict, kw_only=True)
    ops: SimpleNamespace = attrs.field(kw_only=True)

    def of(self, chain: str) -> Context:
        """The context of a chain; a model of one chain, which has no name, has this one."""
        return self.chains[chain] if self.chains else self

    @dispatch.validator
    def _known(self, field: Any, value: str) -> None:
        one_of("dispatch", value, DISPATCH)

    @ops.default
    def _table(self) -> SimpleNamespace:
        return devices.op_table(self.device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what norms, softmax, RoPE tables and losses are computed in. float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)

"""What moments are kept in. `moments`: "fp32", the dtype of the masters, at least float32, or "bf16", half of it. `rounding`, of bf16: "stochastic",
so that an average moves even where the nearest value would not, or "nearest". `seed`: of the noise, the same numbers under any layout."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from lf.chain_layouts import Layouts
from lf.config import one_of
from lf.ops.rounding import Noise

MOMENTS, ROUNDING = ("fp32", "bf16"), ("stochastic", "nearest")


@attrs.frozen
class Moments:
    """Raises ConfigError for names that are none."""

    dtype: str = "fp32"
    rounding: str = "stochastic"
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        one_of("moments", self.dtype, MOMENTS)
        one_of("rounding", self.rounding, ROUNDING)

    @property
    def by_chance(self) -> bool:
        return self.dtype == "bf16" and self.rounding == "stochastic"

    def zeros(self, w: Tensor) -> Tensor:
        """The moment of a master before the first update."""
        return torch.zeros_like(w, dtype=torch.bfloat16 if self.dtype == "bf16" else w.dtype)

    def noise(self, path: str, step: Tensor, ctx: Any, layouts: Layouts) -> Noise:
        """What the moments at a path are rounded by, in this step and on this rank."""
        return Noise(self.seed, layouts.state_pieces(path, ctx.axes.rank), step)

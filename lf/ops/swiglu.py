"""The gate of a gated feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, element by element."""
    return F.silu(gate) * up

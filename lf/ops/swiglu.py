"""The gate of a gated feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (t, 2F): F columns of the gate, then F of what it gates → silu(gate) · up (t, F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up

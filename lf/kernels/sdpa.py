"""Packed causal attention through torch's fused scaled_dot_product_attention."""

import torch.nn.functional as F
from torch import Tensor

from lf.ops.attention import causal_mask


def attention(q_thd: Tensor, k_tkd: Tensor, v_tkd: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same as `lf.ops.attention.attention`. Holds a (t, t) boolean mask, but no scores."""
    group = q_thd.shape[1] // max(k_tkd.shape[1], 1)  # a rank may have no heads at all
    # A copy per query head instead of enable_gqa: with a mask torch's CPU and CUDA flash paths take equal heads only.
    k_thd, v_thd = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k_tkd, v_tkd))
    q, k, v = (x.transpose(0, 1)[None] for x in (q_thd, k_thd, v_thd))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(cu_seqlens, q_thd.shape[0]))
    return out[0].transpose(0, 1)

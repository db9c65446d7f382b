"""Packed causal attention on CUDA without a look at cu_seqlens on the host: flash attention over documents of any length.

Flash attention takes bfloat16 and float16, and head dims that are multiples of 8 up to 256. Anything else goes through torch's
scaled_dot_product_attention with the mask written out, t² booleans: for checks in float32 and float64, not for training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lf.ops.attention import causal_mask


def attention(q_thd: Tensor, k_tkd: Tensor, v_tkd: Tensor, cu_seqlens: Tensor, window: int | None = None) -> Tensor:
    """The same as `lf.ops.attention.attention`. t, a Python int, is taken for the longest document: a bound that costs a few empty blocks."""
    tokens, heads, dim = q_thd.shape
    if not heads or not tokens:  # a rank may have no heads at all; the output still depends on q, so that its backward runs
        return q_thd * 1
    if q_thd.dtype not in (torch.bfloat16, torch.float16) or dim % 8 or dim > 256:
        group = heads // k_tkd.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q_thd, k_tkd.repeat_interleave(group, 1), v_tkd.repeat_interleave(group, 1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(cu_seqlens, tokens, window))[0].transpose(0, 1)
    # The op behind torch.nn.attention.varlen, which exists only since torch 2.10; this one is the same, with its backward, since 2.4.
    back = -1 if window is None else window - 1
    return torch.ops.aten._flash_attention_forward(
        q_thd.contiguous(), k_tkd.contiguous(), v_tkd.contiguous(), cu_seqlens, cu_seqlens, tokens, tokens, 0.0, True, False,
        window_size_left=back, window_size_right=0,
    )[0]  # fmt: skip

"""Packed causal attention on CUDA without a look at cu_seqlens on the host: flash attention over documents of any length.

Flash attention takes bfloat16 and float16, and one width of queries, keys and values, a multiple of 8 up to 256: the narrower get zeros. Anything
else goes through torch's scaled_dot_product_attention with the mask written out, t² booleans, and with sinks through the readable twin, h·t² scores:
for checks in float32 and float64, not for training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lf.kernels.sdpa import _sunk
from lf.ops import attention as plain
from lf.ops.attention import causal_mask, document_of, of_no_heads


def attention(
    q_thd: Tensor,
    k_tkd: Tensor,
    v_tke: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    scale: float | None = None,
    sinks_h: Tensor | None = None,
) -> Tensor:
    """The same as `lf.ops.attention.attention`. t, a Python int, is taken for the longest document: a bound that costs a few empty blocks. Sinks
    go in by the log-sum-exp that flash attention gives (`_Sunk`)."""
    tokens, heads, dim = q_thd.shape
    if not heads:
        return of_no_heads(q_thd, k_tkd, v_tke, sinks_h)
    wide, scale = max(dim, v_tke.shape[2]), dim**-0.5 if scale is None else scale
    flash = q_thd.dtype in (torch.bfloat16, torch.float16) and wide % 8 == 0 and wide <= 256
    if not tokens or (sinks_h is not None and not flash):
        return plain.attention(q_thd, k_tkd, v_tke, cu_seqlens, window, scale, sinks_h)
    if not flash:
        group = heads // k_tkd.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q_thd, k_tkd.repeat_interleave(group, 1), v_tke.repeat_interleave(group, 1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(cu_seqlens, tokens, window), scale=scale)[0].transpose(0, 1)
    q_thw, k_tkw, v_tkw = ((F.pad(x, (0, wide - x.shape[2])) if x.shape[2] < wide else x).contiguous() for x in (q_thd, k_tkd, v_tke))
    back = -1 if window is None else window - 1
    if sinks_h is None:
        o_thw = _forward(q_thw, k_tkw, v_tkw, cu_seqlens, back, scale)[0]
    else:
        o_thw = _Sunk.apply(q_thw, k_tkw, v_tkw, sinks_h, cu_seqlens, back, scale)
    return o_thw[..., : v_tke.shape[2]]


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, back: int, scale: float) -> tuple[Tensor, ...]:
    """The op behind torch.nn.attention.varlen, which exists only since torch 2.10; this one is the same, with its backward, since 2.4."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, len(q), len(q), 0.0, True, False, scale=scale, window_size_left=back, window_size_right=0
    )


class _Sunk(torch.autograd.Function):
    """As in `lf/kernels/sdpa.py`: the kernel, its backward, and between them z, the log-sum-exp, which the sinks join."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, cu_seqlens: Tensor, back: int, scale: float) -> Tensor:
        y, before, *random, _ = _forward(q, k, v, cu_seqlens, back, scale)
        z = torch.logaddexp(before, sinks.to(before.dtype)[:, None])  # (h, t), or (documents, h, longest)
        y = (y * _by_token(before - z, cu_seqlens, len(q)).exp().T[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, cu_seqlens, y, z, *random)
        ctx.back, ctx.scale = back, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, cu_seqlens, y, z, *random = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dy.contiguous(), q, k, v, y, z, cu_seqlens, cu_seqlens, len(q), len(q), 0.0, True, *random,
            scale=ctx.scale, window_size_left=ctx.back, window_size_right=0,
        )  # fmt: skip
        dot_ht = (dy.to(z.dtype) * y.to(z.dtype)).sum(-1).T
        return dq, dk, dv, _sunk(sinks, _by_token(z, cu_seqlens, len(q))[None], dot_ht[None]), None, None, None


def _by_token(z: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(h, t) of what flash attention has for each head and query: that already, or, before torch 2.7, (documents, h, longest)."""
    if z.dim() == 2:
        return z
    document = document_of(cu_seqlens, tokens) - 1
    return z[document, :, torch.arange(tokens, device=z.device) - cu_seqlens[document]].T

"""Packed causal attention through torch's fused scaled_dot_product_attention, for devices whose host can read cu_seqlens freely (the CPU)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from lf.ops import attention as plain
from lf.ops.attention import causal_mask, of_no_heads

BLOCK = 128  # tokens: shorter documents share a call, so that hundreds of tiny ones do not mean hundreds of calls


def attention(
    q_thd: Tensor,
    k_tkd: Tensor,
    v_tke: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    scale: float | None = None,
    sinks_h: Tensor | None = None,
) -> Tensor:
    """The same as `lf.ops.attention.attention`, in time and memory that grow with the squares of the documents, not of the row, and beyond a
    window with their lengths alone.

    The row is cut between documents into blocks. A block of one document needs no mask; one of several short ones has a mask of at most
    BLOCK² booleans. Where values are not as wide as queries and keys, the narrower get zeros: the fused kernel knows one width. Sinks go in by the
    log-sum-exp that it gives (`_Sunk`). Where that is compiled, it is one op whose backward runs the forward again: cuts that follow the data are
    no graph.
    """
    tokens, heads, dim = q_thd.shape
    if not heads:
        return of_no_heads(q_thd, k_tkd, v_tke, sinks_h)
    if not tokens:
        return plain.attention(q_thd, k_tkd, v_tke, cu_seqlens, window, scale, sinks_h)
    scale = dim**-0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        return _Opaque.apply(q_thd, k_tkd, v_tke, cu_seqlens, window, scale, sinks_h)
    return _attention(q_thd, k_tkd, v_tke, cu_seqlens, window, scale, sinks_h)


def _attention(
    q_thd: Tensor, k_tkd: Tensor, v_tke: Tensor, cu_seqlens: Tensor, window: int | None, scale: float, sinks_h: Tensor | None
) -> Tensor:
    tokens, wide = len(q_thd), max(q_thd.shape[2], v_tke.shape[2])
    fused = partial(_fused, scale, sinks_h)
    q_thw, k_tkw, v_tkw = (F.pad(x, (0, wide - x.shape[2])) if x.shape[2] < wide else x for x in (q_thd, k_tkd, v_tke))
    edges = sorted({0, tokens, *cu_seqlens.tolist()})
    n = edges[1]
    if len(edges) > 2 and (window is None or n <= window) and edges == list(range(0, tokens + 1, n)):  # documents of one length: one call
        q, k, v = (x.unflatten(0, (-1, n)).transpose(1, 2) for x in (q_thw, k_tkw, v_tkw))
        o_thw = fused(q, k, v).transpose(1, 2).flatten(0, 1)
    else:
        blocks = _blocks(edges)
        sizes = [starts[-1] - starts[0] for starts in blocks]
        pieces = zip(*(x.transpose(0, 1)[None].split(sizes, 2) for x in (q_thw, k_tkw, v_tkw)))
        out = [_block(fused, q, k, v, starts, window)[0].transpose(0, 1) for (q, k, v), starts in zip(pieces, blocks)]
        o_thw = torch.cat(out) if len(out) > 1 else out[0]
    return o_thw[..., : v_tke.shape[2]]


def _block(fused: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, starts: list[int], window: int | None) -> Tensor:
    tokens = q.shape[2]
    longest = max(b - a for a, b in itertools.pairwise(starts))
    if window is not None and longest <= window:
        window = None
    if len(starts) == 2:
        if window is None:
            return fused(q, k, v)
        if tokens > BLOCK:
            return _windowed(fused, q, k, v, window)
    edges = torch.tensor(starts, device=q.device) - starts[0]
    return fused(q, k, v, causal_mask(edges, tokens, window))


def _windowed(fused: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One document, longer than its window: queries in runs, each with the keys that it can see."""
    tokens, step, out = q.shape[2], max(window, BLOCK), []
    for at in range(0, tokens, step):
        stop, first = min(at + step, tokens), max(at - window + 1, 0)
        place = torch.arange(first, stop, device=q.device)
        back = torch.arange(at, stop, device=q.device)[:, None] - place[None, :]  # how far behind its query each key lies
        mask = (back >= 0) & (back < window)
        out.append(fused(q[:, :, at:stop], k[:, :, first:stop], v[:, :, first:stop], mask))
    return torch.cat(out, 2)


def _fused(scale: float, sinks_h: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(batch, heads, tokens, head dim), fewer heads in k and v than in q; causal where no mask is given."""
    causal, group = mask is None, q.shape[1] // k.shape[1]
    if q.is_meta and sinks_h is None:  # what torch chooses where there is data; on paper it would take a path that keeps all scores
        bias = None if mask is None else torch.empty_like(mask, dtype=q.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)[0]
    # asked, because torch before 2.9 takes groups by a path that keeps all scores: there each query head gets its own copy
    if group > 1 and (
        sinks_h is not None or torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=True) != SDPBackend.FLASH_ATTENTION.value
    ):
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    if sinks_h is not None:
        return _Sunk.apply(q, k, v, sinks_h, mask, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=group > 1)


class _Sunk(torch.autograd.Function):
    """The fused kernel and its backward, and between them a sink for each head: z, the log-sum-exp of a query's scores, becomes
    log(exp z + exp sink).

    With it the kernel's backward is the right one, because all that it knows of the softmax is exp(score - z) and the product of dy and y. What is
    left is the sink's own: its weight exp(sink - z) times 0, its value, less that product."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        bias = None if mask is None else q.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        y, before = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=bias, scale=scale)
        z = torch.logaddexp(before, sinks.to(before.dtype)[:, None])
        y = (y * (before - z).exp()[..., None]).to(y.dtype)
        ctx.save_for_backward(q, k, v, sinks, bias, y, z)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, bias, y, z = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, z, 0.0, bias is None, attn_mask=bias, scale=ctx.scale
        )
        return dq, dk, dv, _sunk(sinks, z, (dy.to(z.dtype) * y.to(z.dtype)).sum(-1)), None, None


def _sunk(sinks_h: Tensor, z_bht: Tensor, dot_bht: Tensor) -> Tensor:
    """The gradient of sinks. z: log-sum-exp of the scores, the sink's among them. dot: of each query the product of its output and the gradient."""
    return -((sinks_h.to(z_bht.dtype)[:, None] - z_bht).exp() * dot_bht).sum((0, 2)).to(sinks_h.dtype)


def _blocks(edges: list[int]) -> list[list[int]]:
    """Runs of whole documents: the edges of each, first to last. A run is closed before it would pass BLOCK, unless it is one document."""
    runs = [[edges[0]]]
    for edge in edges[1:]:
        run = runs[-1]
        if len(run) > 1 and edge - run[0] > BLOCK:
            run = [run[-1]]
            runs.append(run)
        run.append(edge)
    return runs


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, scale: float, sinks: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, cu_seqlens, sinks)
        ctx.window, ctx.scale = window, scale
        return torch.ops.lf.packed_attention(q, k, v, cu_seqlens, window, scale, sinks)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *saved, sinks = ctx.saved_tensors
        dq, dk, dv, dsinks = torch.ops.lf.packed_attention_backward(dy, *saved, ctx.window, ctx.scale, sinks)
        return dq, dk, dv, None, None, None, None if sinks is None else dsinks


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, scale: float, sinks: Tensor | None) -> Tensor:
    return _attention(q, k, v, cu_seqlens, window, scale, sinks).contiguous()


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, scale: float, sinks: Tensor | None
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        sinks = None if sinks is None else sinks.detach().requires_grad_()
        y = _attention(q, k, v, cu_seqlens, window, scale, sinks)
        found = [g.contiguous() for g in torch.autograd.grad((y * dy).sum(), [x for x in (q, k, v, sinks) if x is not None])]
    return (*found, q.new_empty(0)) if sinks is None else tuple(found)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward_like(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])


def _backward_like(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, scale: float, sinks: Tensor | None
) -> tuple[Tensor, ...]:
    return _like(q), _like(k), _like(v), q.new_empty(0) if sinks is None else _like(sinks)


_ARGS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int? window, float scale, Tensor? sinks"
_LIBRARY = torch.library.Library("lf", "FRAGMENT")
_LIBRARY.define(f"packed_attention({_ARGS}) -> Tensor")
_LIBRARY.define(f"packed_attention_backward(Tensor dy, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.impl("packed_attention", _forward, "CPU")
_LIBRARY.impl("packed_attention_backward", _backward, "CPU")
_LIBRARY.impl("packed_attention", _forward_like, "Meta")
_LIBRARY.impl("packed_attention_backward", _backward_like, "Meta")

"""Packed causal attention through torch's fused scaled_dot_product_attention, for devices whose host can read cu_seqlens freely (the CPU)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from lf.ops.attention import causal_mask

BLOCK = 128  # tokens: shorter documents share a call, so that hundreds of tiny ones do not mean hundreds of calls


def attention(q_thd: Tensor, k_tkd: Tensor, v_tkd: Tensor, cu_seqlens: Tensor, window: int | None = None) -> Tensor:
    """The same as `lf.ops.attention.attention`, in time and memory that grow with the squares of the documents, not of the row, and beyond a
    window with their lengths alone.

    The row is cut between documents into blocks. A block of one document needs no mask; one of several short ones has a mask of at most
    BLOCK² booleans. Where that is compiled, it is one op whose backward runs the forward again: cuts that follow the data are no graph.
    """
    tokens, heads, _ = q_thd.shape
    if not heads or not tokens:  # a rank may have no heads at all; the output still depends on q, so that its backward runs
        return q_thd * 1
    if torch.compiler.is_compiling():
        return _Opaque.apply(q_thd, k_tkd, v_tkd, cu_seqlens, window)
    return _attention(q_thd, k_tkd, v_tkd, cu_seqlens, window)


def _attention(q_thd: Tensor, k_tkd: Tensor, v_tkd: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    tokens = len(q_thd)
    edges = sorted({0, tokens, *cu_seqlens.tolist()})
    n = edges[1]
    if len(edges) > 2 and (window is None or n <= window) and edges == list(range(0, tokens + 1, n)):  # documents of one length: one call
        q, k, v = (x.unflatten(0, (-1, n)).transpose(1, 2) for x in (q_thd, k_tkd, v_tkd))
        return _fused(q, k, v).transpose(1, 2).flatten(0, 1)
    blocks = _blocks(edges)
    sizes = [starts[-1] - starts[0] for starts in blocks]
    pieces = zip(*(x.transpose(0, 1)[None].split(sizes, 2) for x in (q_thd, k_tkd, v_tkd)))
    out = [_block(q, k, v, starts, window)[0].transpose(0, 1) for (q, k, v), starts in zip(pieces, blocks)]
    return torch.cat(out) if len(out) > 1 else out[0]


def _block(q: Tensor, k: Tensor, v: Tensor, starts: list[int], window: int | None) -> Tensor:
    tokens = q.shape[2]
    longest = max(b - a for a, b in itertools.pairwise(starts))
    if window is not None and longest <= window:
        window = None
    if len(starts) == 2:
        if window is None:
            return _fused(q, k, v)
        if tokens > BLOCK:
            return _windowed(q, k, v, window)
    edges = torch.tensor(starts, device=q.device) - starts[0]
    return _fused(q, k, v, causal_mask(edges, tokens, window))


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One document, longer than its window: queries in runs, each with the keys that it can see."""
    tokens, step, out = q.shape[2], max(window, BLOCK), []
    for at in range(0, tokens, step):
        stop, first = min(at + step, tokens), max(at - window + 1, 0)
        place = torch.arange(first, stop, device=q.device)
        back = torch.arange(at, stop, device=q.device)[:, None] - place[None, :]  # how far behind its query each key lies
        mask = (back >= 0) & (back < window)
        out.append(_fused(q[:, :, at:stop], k[:, :, first:stop], v[:, :, first:stop], mask))
    return torch.cat(out, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(batch, heads, tokens, head dim), fewer heads in k and v than in q; causal where no mask is given."""
    causal, group = mask is None, q.shape[1] // k.shape[1]
    # asked, because torch before 2.9 takes groups by a path that keeps all scores: there each query head gets its own copy
    if group > 1 and torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=True) != SDPBackend.FLASH_ATTENTION.value:
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=group > 1)


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
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
        ctx.save_for_backward(q, k, v, cu_seqlens)
        ctx.window = window
        return torch.ops.lf.packed_attention(q, k, v, cu_seqlens, window)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *torch.ops.lf.packed_attention_backward(dy, *ctx.saved_tensors, ctx.window), None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    return _attention(q, k, v, cu_seqlens, window).contiguous()


def _backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        dq, dk, dv = torch.autograd.grad((_attention(q, k, v, cu_seqlens, window) * dy).sum(), (q, k, v))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LIBRARY = torch.library.Library("lf", "FRAGMENT")
_LIBRARY.define("packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int? window) -> Tensor")
_LIBRARY.define("packed_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int? window) -> (Tensor, Tensor, Tensor)")
_LIBRARY.impl("packed_attention", _forward, "CPU")
_LIBRARY.impl("packed_attention_backward", _backward, "CPU")
_LIBRARY.impl("packed_attention", lambda q, *_: _like(q), "Meta")
_LIBRARY.impl("packed_attention_backward", lambda dy, q, k, v, *_: (_like(q), _like(k), _like(v)), "Meta")

"""Grouped-query attention: a mixer of a decoder's layer.

T all tokens of the tp group · t this rank's tokens · D width · h query heads of this rank · k kv heads of this rank · d head dim
Matrices are (out, in), as on disk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from lf.batch import Batch
from lf.config import ConfigError
from lf.context import wide
from lf.models.block import Block
from lf.models.tokens import token_shares
from lf.ops.rope import Rope
from lf.parallel.linear import column_linear, row_linear
from lf.parallel.redistribute import P, R, redistribute
from lf.segment import Terms
from lf.spec import Init, Param, Part, Tied, constant


@attrs.frozen
class Attention:
    """Grouped-query attention with rotary positions.

    qk_norm: an RMS norm over each head of q and k before they turn (Qwen3); qk_norm_all: it is over all heads of q, and of k, together
    (MiniMax-M2). qkv_bias (Qwen2), out_bias: of the matrices in and out. window: a query sees itself and the window - 1 tokens before it, None all
    of them. sinks: each head has one learned score more, which takes part in the softmax and gives nothing (GPT-OSS). There may be several mixers
    in a model (sliding windows in some layers).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope = attrs.field(factory=Rope)
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None
    qk_norm_all: bool = False
    sinks: bool = False

    @property
    def turned(self) -> int:
        """The width of what rotary positions turn, or turn a part of."""
        return self.head_dim

    def __attrs_post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1:
            raise ConfigError(f"heads={self.heads}, kv_heads={self.kv_heads} and head_dim={self.head_dim} must each be at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}: each kv head serves as many query heads")
        if (self.rope.dim or self.head_dim) % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if (self.rope.dim or 0) > self.head_dim:
            raise ConfigError(f"rotary positions cannot turn dim={self.rope.dim} dims of a head of head_dim={self.head_dim}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window} must be at least 1: a token sees itself; None for no window")
        if self.qk_norm_all and not self.qk_norm:
            raise ConfigError("qk_norm_all=True says how q and k are normalised, and qk_norm=False that they are not; give qk_norm=True as well")


def attention(a: Attention, dim: int, rope: int, eps: float, matrix: Init, added: Init) -> Block:
    """The mixer as a segment. `rope`: the number of its table in the batch. eps: of the norm. matrix, added: how matrices in and out start."""
    params = {"norm": Param((dim,), ("embed",), constant(1.0)), **attention_params(a, dim, matrix, added)}
    return Block(params, partial(attention_block, a, qkv_parts(a), rope, eps), ("qkv", "out"), partial(attention_flops, a, dim))


def attention_params(a: Attention, dim: int, matrix: Init, added: Init) -> dict[str, Param | Tied]:
    """The parameters of the mixer; a bias is cut like the rows that it is added to."""
    q, k, v = qkv_parts(a)
    rows = q.rows + k.rows + v.rows
    out: dict[str, Param | Tied] = {"qkv": Param((rows, dim), ("heads", "embed"), matrix, (q, k, v))}
    if a.qkv_bias:
        out["qkv_bias"] = Param((rows,), ("heads",), constant(0.0), (q, k, v))
    if a.qk_norm_all:
        out["q_norm"], out["k_norm"] = (Param((part.rows,), ("heads",), constant(1.0), (attrs.evolve(part, name=""),)) for part in (q, k))
    elif a.qk_norm:
        out["q_norm"] = out["k_norm"] = Param((a.head_dim,), (None,), constant(1.0))
    if a.sinks:
        out["sinks"] = Param((a.heads,), ("heads",), constant(0.0))
    out["out"] = Param((dim, q.rows), ("embed", "heads"), added, (attrs.evolve(q, name=""),), part_dim=1)
    if a.out_bias:
        out["out_bias"] = Param((dim,), ("embed",), constant(0.0))
    return out


def qkv_parts(a: Attention) -> tuple[Part, Part, Part]:
    """Whole heads; kv heads go where their query heads go, so that any number of ranks works."""
    return Part("q", a.heads, a.head_dim), Part("k", a.kv_heads, a.head_dim, of=a.heads), Part("v", a.kv_heads, a.head_dim, of=a.heads)


def attention_block(
    a: Attention, parts: tuple[Part, Part, Part], rope: int, eps: float, p: dict[str, Tensor], x_tD: Tensor, batch: Batch, ctx: Any
) -> tuple[Tensor, Terms]:
    tp, ops = ctx.axes["tp"], ctx.ops
    seq = token_shares(batch, tp)
    q_part, k_part, _ = parts
    (q0, q1), (k0, k1) = q_part.units(tp.index, tp.size), k_part.units(tp.index, tp.size)

    qkv = column_linear(ops.rms_norm(x_tD, p["norm"], eps), p["qkv"], tp, seq)
    if a.qkv_bias:
        qkv = qkv + p["qkv_bias"]
    q_Thd, k_Tkd, v_Tkd = rearrange(qkv, "T (h d) -> T h d", d=a.head_dim).split([q1 - q0, k1 - k0, k1 - k0], 1)
    if a.qk_norm_all:
        q_Thd, k_Tkd = norm_all(parts, p, q_Thd, k_Tkd, eps, tp)
    elif a.qk_norm:
        q_Thd, k_Tkd = ops.rms_norm(q_Thd, p["q_norm"], eps), ops.rms_norm(k_Tkd, p["k_norm"], eps)
    cos, sin = batch.derived["rope", rope]
    q_Thd, k_Tkd = ops.rope(q_Thd, cos, sin), ops.rope(k_Tkd, cos, sin)

    group = a.heads // a.kv_heads
    if q0 % group or q1 % group:  # a share that starts or ends inside a group: give each query head its own copy
        index = torch.arange(q0, q1, device=x_tD.device) // group - k0
        k_Tkd, v_Tkd = k_Tkd[:, index], v_Tkd[:, index]
    o_Thd = ops.attention(q_Thd, k_Tkd, v_Tkd, batch.plan["cu_seqlens"], a.window, None, p["sinks"] if a.sinks else None)
    y_tD = row_linear(rearrange(o_Thd, "T h d -> T (h d)"), p["out"], tp, seq)
    if a.out_bias:  # each token lies on one rank by now, so it is added once
        y_tD = y_tD + p["out_bias"]
    return x_tD + y_tD, {}


def norm_all(parts: tuple[Part, ...], p: dict[str, Tensor], q_Thd: Tensor, k_Tkd: Tensor, eps: float, tp: Any) -> tuple[Tensor, Tensor]:
    """q and k, each over the root of the mean square of all its heads, those of the other ranks among them. A kv head that several ranks hold counts
    on the first. Squares in at least float32."""
    q_part, k_part, _ = parts
    held, before = k_part.units(tp.index, tp.size), k_part.units(tp.index - 1, tp.size)[1] if tp.index else 0
    own = min(max(held[0], before), held[1]) - held[0]
    wider = wide(q_Thd.dtype)
    q_wide, k_wide = q_Thd.to(wider), k_Tkd.to(wider)
    shares_T2 = torch.stack([q_wide.square().sum((1, 2)) / q_part.rows, k_wide[:, own:].square().sum((1, 2)) / k_part.rows], 1)
    # P → R: one all-reduce of two numbers a token. Each rank divides its own heads by the root, so the gradient is summed as well.
    r_T2 = torch.rsqrt(redistribute(shares_T2, tp, P, R) + eps)
    q_hd, k_kd = (rearrange(p[name], "(h d) -> h d", d=q_Thd.shape[2]) for name in ("q_norm", "k_norm"))
    return q_hd * (q_wide * r_T2[:, 0, None, None]).to(q_Thd.dtype), k_kd * (k_wide * r_T2[:, 1, None, None]).to(k_Tkd.dtype)


def attention_flops(a: Attention, dim: int, batch: Batch) -> float:
    tokens, pairs = int(batch.plan["cu_seqlens"][-1]), pairs_seen(batch, a.window)
    return float(3 * (2 * tokens * (2 * a.heads + 2 * a.kv_heads) * a.head_dim * dim + 4 * pairs * a.heads * a.head_dim))


def pairs_seen(batch: Batch, window: int | None) -> float:
    """How many pairs of a query and a key that it sees there are."""
    edges = batch.plan["cu_seqlens"].numpy().astype(np.float64)
    lengths = np.diff(edges, append=edges[-1:])
    seen = np.minimum(lengths, window or np.inf)
    return float((seen * (seen + 1) / 2 + (lengths - seen) * seen).sum())

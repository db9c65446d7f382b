"""Multi-head latent attention: a mixer of a decoder's layer (DeepSeek-V2 §2.1, arXiv 2405.04434).

    q           = q_up · norm(q_down · x), or q · x                   of each head: [nope | rope]
    latent, k_r = kv_down · x                                         k_r: one key that turns, shared by all heads
    k, v        = kv_up · norm(latent)                                of each head: [nope | value]

A score is q_nope·k_nope + turned(q_rope)·turned(k_r). What is small and shared, q_down and kv_down, every rank of tp has whole and applies to its own
tokens; the latents are normalised there, and then gathered as the input of a column product is. Heads are split over tp.

T all tokens of the tp group · t this rank's tokens · D width · h heads of this rank · c width of the latent of k and v · n, r nope and rope dims of a
head · e its value dims. Matrices are (out, in), as on disk.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import attrs
import torch
from einops import rearrange
from torch import Tensor

from lf.batch import Batch
from lf.config import ConfigError
from lf.models.attention import pairs_seen
from lf.models.block import Block
from lf.models.tokens import matrix_flops, token_shares
from lf.ops.rope import Rope
from lf.parallel.linear import column_linear, row_linear
from lf.parallel.product import product
from lf.parallel.redistribute import R, redistribute
from lf.segment import Terms
from lf.spec import Init, Param, Part, Tied, constant

EPS = 1e-6  # of the norms of the latents, whatever that of the others is


@attrs.frozen
class Latent:
    """Attention whose keys and values, and with q_rank queries, are made from a latent of a few hundred numbers a token.

    nope_dim, rope_dim: dims of a head's query and key that stay, and that positions turn. value_dim: of a head's value. interleaved: positions turn
    the pairs (2i, 2i+1), as in DeepSeek's files; otherwise (i, i + rope_dim/2). bias: in q_down, kv_down and the product out.
    """

    heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    kv_rank: int
    q_rank: int | None = None
    rope: Rope = attrs.field(factory=Rope)
    interleaved: bool = True
    bias: bool = False

    @property
    def turned(self) -> int:
        """The width of what rotary positions turn."""
        return self.rope_dim

    @property
    def scale(self) -> float:
        """Of the scores: 1/√(nope + rope), and with yarn times (0.1·mscale_all_dim·ln(factor) + 1)². On the dims that turn, cos and sin have been
        divided by the latter (`lf.ops.rope.magnitude`); so the others get yarn's temperature as well."""
        r = self.rope
        mscale = 0.1 * r.mscale_all_dim * math.log(r.factor) + 1 if r.kind == "yarn" and r.mscale_all_dim else 1.0
        return (self.nope_dim + self.rope_dim) ** -0.5 * mscale**2

    def __attrs_post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("heads", "nope_dim", "rope_dim", "value_dim", "kv_rank")}
        if min(*sizes.values(), 1 if self.q_rank is None else self.q_rank) < 1:
            raise ConfigError(f"{', '.join(f'{k}={v}' for k, v in sizes.items())} and q_rank={self.q_rank} must each be at least 1 (q_rank: or None)")
        if self.rope_dim % 2:
            raise ConfigError(f"rope_dim={self.rope_dim} must be even: rotary positions turn pairs")
        if self.rope.dim not in (None, self.rope_dim):
            raise ConfigError(f"rotary positions of dim={self.rope.dim}: here they turn all of rope_dim={self.rope_dim}; leave dim out")


def latent(a: Latent, dim: int, rope: int, eps: float, matrix: Init, added: Init) -> Block:
    """The mixer as a segment. `rope`: the number of its table in the batch. eps: of the norm. matrix, added: how matrices in and out start."""
    wide, own = a.nope_dim + a.rope_dim, a.nope_dim + a.value_dim
    q, kv, value = Part("", a.heads, wide), Part("", a.heads, own), Part("", a.heads, a.value_dim)
    both = Part("latent", a.kv_rank), Part("rope", a.rope_dim)
    p: dict[str, Param | Tied] = {"norm": Param((dim,), ("embed",), constant(1.0))}
    if a.q_rank is None:
        p["q"] = Param((q.rows, dim), ("heads", "embed"), matrix, (q,))
    else:
        p["q_down"] = Param((a.q_rank, dim), (None, "embed"), matrix)
        if a.bias:
            p["q_down_bias"] = Param((a.q_rank,), (None,), constant(0.0))
        p["q_norm"] = Param((a.q_rank,), (None,), constant(1.0))
        p["q_up"] = Param((q.rows, a.q_rank), ("heads", None), matrix, (q,))
    p["kv_down"] = Param((a.kv_rank + a.rope_dim, dim), (None, "embed"), matrix, both)
    if a.bias:
        p["kv_down_bias"] = Param((a.kv_rank + a.rope_dim,), (None,), constant(0.0), both)
    p["kv_norm"] = Param((a.kv_rank,), (None,), constant(1.0))
    p["kv_up"] = Param((kv.rows, a.kv_rank), ("heads", None), matrix, (kv,))
    p["out"] = Param((dim, value.rows), ("embed", "heads"), added, (value,), part_dim=1)
    if a.bias:
        p["out_bias"] = Param((dim,), ("embed",), constant(0.0))
    products = tuple(name for name in ("q", "q_down", "q_up", "kv_down", "kv_up", "out") if name in p)
    return Block(p, partial(latent_block, a, rope, eps), products, partial(latent_flops, a, dim))


def latent_block(a: Latent, rope: int, eps: float, p: dict[str, Tensor], x_tD: Tensor, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    tp, ops = ctx.axes["tp"], ctx.ops
    seq = token_shares(batch, tp)
    h_tD = ops.rms_norm(x_tD, p["norm"], eps)
    if a.q_rank is None:
        q = column_linear(h_tD, p["q"], tp, seq)
    else:
        q_latent = product(h_tD, p["q_down"])
        if a.bias:
            q_latent = q_latent + p["q_down_bias"]
        q = column_linear(ops.rms_norm(q_latent, p["q_norm"], EPS), p["q_up"], tp, seq)
    kv_down = product(h_tD, p["kv_down"])
    if a.bias:
        kv_down = kv_down + p["kv_down_bias"]
    latent_tc, k_rope_tr = kv_down.split([a.kv_rank, a.rope_dim], -1)
    kv = column_linear(ops.rms_norm(latent_tc, p["kv_norm"], EPS), p["kv_up"], tp, seq)
    k_rope_T1r = redistribute(k_rope_tr, tp, seq, R)[:, None]  # R: each rank's heads use it in their own way, so its gradient is their sum

    cos, sin = batch.derived["rope", rope]
    q_nope_Thn, q_rope_Thr = rearrange(q, "T (h d) -> T h d", d=a.nope_dim + a.rope_dim).split([a.nope_dim, a.rope_dim], -1)
    k_nope_Thn, v_The = rearrange(kv, "T (h d) -> T h d", d=a.nope_dim + a.value_dim).split([a.nope_dim, a.value_dim], -1)
    if a.interleaved:
        q_rope_Thr, k_rope_T1r = halves(q_rope_Thr), halves(k_rope_T1r)
    q_Thd = torch.cat([q_nope_Thn, ops.rope(q_rope_Thr, cos, sin)], -1)
    k_Thd = torch.cat([k_nope_Thn, ops.rope(k_rope_T1r, cos, sin).expand(-1, k_nope_Thn.shape[1], -1)], -1)
    o_The = ops.attention(q_Thd, k_Thd, v_The, batch.plan["cu_seqlens"], None, a.scale)
    y_tD = row_linear(rearrange(o_The, "T h e -> T (h e)"), p["out"], tp, seq)
    if a.bias:  # each token lies on one rank by now, so it is added once
        y_tD = y_tD + p["out_bias"]
    return x_tD + y_tD, {}


def halves(x: Tensor) -> Tensor:
    """Pairs (2i, 2i+1) of the last dim become (i, i + r/2), which `ops.rope` turns. Of q and k alike, so that their product stays what it is."""
    return rearrange(x, "... (i two) -> ... (two i)", two=2)


def latent_flops(a: Latent, dim: int, batch: Batch) -> float:
    """A query that sees c keys makes 2·c·heads·(nope + rope + value)."""
    wide, own = a.nope_dim + a.rope_dim, a.nope_dim + a.value_dim
    q = a.heads * wide * dim if a.q_rank is None else a.q_rank * (dim + a.heads * wide)
    elements = q + (a.kv_rank + a.rope_dim) * dim + a.heads * own * a.kv_rank + a.heads * a.value_dim * dim
    return matrix_flops(elements, batch) + 3 * 2 * pairs_seen(batch, None) * a.heads * (wide + a.value_dim)

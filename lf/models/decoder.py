"""Most language models: a pre-norm decoder whose config lists each layer's mixer and each layer's feed-forward.

T all tokens of the tp group · t this rank's tokens · D width · h query heads of this rank · k kv heads of this rank · d head dim
F feed-forward columns of this rank · V vocabulary rows of this rank. Matrices are (out, in), as on disk.

Between segments the residual stream is x_tD, S(0) over tp. Every layer is two segments with parameters of their own; there is no stacked axis.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from lf.batch import IGNORE, Batch, BatchError
from lf.config import ConfigError
from lf.layouts import RULES
from lf.mesh import shares
from lf.ops.attention import document_of
from lf.ops.rope import Rope, rope_table
from lf.parallel.linear import column_linear, row_linear
from lf.parallel.redistribute import I, S, Type, redistribute
from lf.parallel.vocab import vocab_cross_entropy, vocab_embedding
from lf.segment import Model, Objective, Segment, Terms
from lf.spec import Init, Param, Part, Tied, constant, normal


@attrs.frozen
class Attention:
    """Grouped-query attention with rotary positions.

    qk_norm: an RMS norm over each head of q and k before they turn (Qwen3). qkv_bias (Qwen2), out_bias: of the matrices in and out. window: a
    query sees itself and the window - 1 tokens before it, None all of them. There may be several mixers in a model (sliding windows in some
    layers).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope = attrs.field(factory=Rope)
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None

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


@attrs.frozen
class GatedMLP:
    """down(silu(gate(x)) · up(x)) of inner width `dim`."""

    dim: int


@attrs.frozen
class Layer:
    mixer: Attention
    ffn: GatedMLP


@attrs.frozen
class DecoderConfig:
    """`tied`: the head is the embedding table. Matrices start as N(0, init_std²), the embedding as N(0, embed_std²), biases as 0.

    Two fields are only passed on to files: `max_len`, the longest text that the model is meant for (the mathematics has no limit), and `family`,
    whose format they are written in (see lf.models.families; "": the first that can say it).
    """

    vocab: int
    dim: int
    layers: tuple[Layer, ...]
    norm_eps: float = 1e-6
    tied: bool = True
    init_std: float = 0.02
    embed_std: float = 0.02
    max_len: int = 40960
    family: str = ""


def decoder(config: DecoderConfig) -> Model:
    """The model as segments: embed, layers.i.attn and layers.i.mlp, head. Its one objective is cross_entropy."""
    matrix, gain = normal(config.init_std), constant(1.0)
    # Two products a layer are added to the residual stream, 2L in all; each 1/√(2L) as large keeps the sum's variance (GPT-2 §2.3, Megatron-LM).
    added = normal(config.init_std / math.sqrt(2 * max(len(config.layers), 1)))
    words = vocab_part(config.vocab)
    table = Param((config.vocab, config.dim), ("vocab", "embed"), normal(config.embed_std), (words,))
    norm = Param((config.dim,), ("embed",), gain)
    ropes = tuple(dict.fromkeys((layer.mixer.rope, layer.mixer.head_dim) for layer in config.layers))
    # One function object for all layers that are alike: that is what "each distinct segment compiles once" hangs on. It is given the parts, and the
    # number of its tables: Dynamo reads frozen attrs objects but can neither make nor hash them.
    mixers = dict.fromkeys(layer.mixer for layer in config.layers)
    attn = {a: partial(attention_block, a, qkv_parts(a), ropes.index((a.rope, a.head_dim)), config.norm_eps) for a in mixers}
    mlp = partial(mlp_block, config.norm_eps)
    attn_flops = {a: partial(attention_flops, a, config.dim) for a in attn}
    mlp_flops = {n: partial(matrix_flops, 3 * n * config.dim) for n in {layer.ffn.dim for layer in config.layers}}
    segments = [Segment("embed", "embed", {"weight": table}, partial(embed, words), (), embed_flops)]
    for i, layer in enumerate(config.layers):
        name, a, inner = f"layers.{i}", layer.mixer, layer.ffn.dim
        down = Param((config.dim, inner), ("embed", "mlp"), added, part_dim=1)
        gate_up = Param((2 * inner, config.dim), ("mlp", "embed"), matrix, (Part("gate", inner), Part("up", inner)))
        mixer = {"norm": norm, **attention_params(a, config.dim, matrix, added)}
        segments.append(Segment(f"{name}.attn", name, mixer, attn[a], ("qkv", "out"), attn_flops[a]))
        segments.append(Segment(f"{name}.mlp", name, {"norm": norm, "gate_up": gate_up, "down": down}, mlp, ("gate_up", "down"), mlp_flops[inner]))
    weight = Tied("embed/weight") if config.tied else attrs.evolve(table, init=matrix)
    logits = partial(matrix_flops, config.dim * config.vocab)
    segments.append(Segment("head", "head", {"norm": norm, "weight": weight}, partial(head, words, config.norm_eps), ("weight",), logits))
    objectives = {"cross_entropy": Objective(1.0, valid_labels)}
    return Model(config, tuple(segments), objectives, RULES, partial(accepts, config), partial(tables, ropes))


def vocab_part(vocab: int) -> Part:
    """Shares of a large vocabulary are whole blocks of 64 rows, which matrix units like; the rows of a tiny one are dealt out singly."""
    unit = 64 if vocab >= 4096 else 1
    return Part("", -(-vocab // unit), unit, rows=vocab)


def attention_params(a: Attention, dim: int, matrix: Init, added: Init) -> dict[str, Param | Tied]:
    """The parameters of the mixer; a bias is cut like the rows that it is added to."""
    q, k, v = qkv_parts(a)
    rows = q.rows + k.rows + v.rows
    out: dict[str, Param | Tied] = {"qkv": Param((rows, dim), ("heads", "embed"), matrix, (q, k, v))}
    if a.qkv_bias:
        out["qkv_bias"] = Param((rows,), ("heads",), constant(0.0), (q, k, v))
    if a.qk_norm:
        out["q_norm"] = out["k_norm"] = Param((a.head_dim,), (None,), constant(1.0))
    out["out"] = Param((dim, q.rows), ("embed", "heads"), added, (attrs.evolve(q, name=""),), part_dim=1)
    if a.out_bias:
        out["out_bias"] = Param((dim,), ("embed",), constant(0.0))
    return out


def qkv_parts(a: Attention) -> tuple[Part, Part, Part]:
    """Whole heads; kv heads go where their query heads go, so that any number of ranks works."""
    return Part("q", a.heads, a.head_dim), Part("k", a.kv_heads, a.head_dim, of=a.heads), Part("v", a.kv_heads, a.head_dim, of=a.heads)


def accepts(config: DecoderConfig, batch: Batch) -> None:
    """Raises BatchError when a token or label is outside the vocabulary: split over ranks, no rank would have it and none would notice."""
    plan = {name: values.numpy() for name, values in batch.plan.items() if values.device.type == "cpu"}  # numpy: the device is not asked
    for name in ("tokens", "labels"):
        ids = plan.get(name, np.empty(0, np.int64))
        wrong = (ids < 0) | (ids >= config.vocab)
        if name == "labels":
            wrong &= ids != IGNORE
        if wrong.any():
            at = int(wrong.argmax())
            raise BatchError(f"{name}[{at}] = {ids[at]} is outside the vocabulary of {config.vocab} (an ignored label is {IGNORE})")


def valid_labels(batch: Batch) -> Tensor:
    """How many tokens have a label."""
    if "labels" not in batch.plan:
        raise BatchError(f"a batch to learn from needs labels in its plan; it has {', '.join(batch.plan)}")
    return (batch.plan["labels"] != IGNORE).sum()


def token_shares(batch: Batch, axis: Any) -> Type:
    """How the tokens of a packed row lie over tp."""
    return S(0, shares(batch.plan["tokens"].shape[0], axis.size))


def embed(words: Part, p: dict[str, Tensor], x: Any, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    tp = ctx.axes["tp"]
    first, _ = words.bounds(tp.index, tp.size)
    return vocab_embedding(batch.plan["tokens"], p["weight"], first, tp, token_shares(batch, tp)), {}


def tables(ropes: tuple[tuple[Rope, int], ...], batch: Batch, ctx: Any) -> Batch:
    """The batch with cos and sin of its positions for each kind of rotary position in the model, under ("rope", its number)."""
    positions, edges = batch.plan["positions"], batch.plan["cu_seqlens"]
    lengths = edges.diff()[document_of(edges, positions.shape[0]) - 1]
    found = {("rope", i): rope_table(positions, lengths, d, r, ctx.precision.compute) for i, (r, d) in enumerate(ropes)}
    return attrs.evolve(batch, derived={**batch.derived, **found})


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
    if a.qk_norm:
        q_Thd, k_Tkd = ops.rms_norm(q_Thd, p["q_norm"], eps), ops.rms_norm(k_Tkd, p["k_norm"], eps)
    cos, sin = batch.derived["rope", rope]
    q_Thd, k_Tkd = ops.rope(q_Thd, cos, sin), ops.rope(k_Tkd, cos, sin)

    group = a.heads // a.kv_heads
    if q0 % group or q1 % group:  # a share that starts or ends inside a group: give each query head its own copy
        index = torch.arange(q0, q1, device=x_tD.device) // group - k0
        k_Tkd, v_Tkd = k_Tkd[:, index], v_Tkd[:, index]
    o_Thd = ops.attention(q_Thd, k_Tkd, v_Tkd, batch.plan["cu_seqlens"], a.window)
    y_tD = row_linear(rearrange(o_Thd, "T h d -> T (h d)"), p["out"], tp, seq)
    if a.out_bias:  # each token lies on one rank by now, so it is added once
        y_tD = y_tD + p["out_bias"]
    return x_tD + y_tD, {}


def mlp_block(eps: float, p: dict[str, Tensor], x_tD: Tensor, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    tp, ops = ctx.axes["tp"], ctx.ops
    seq = token_shares(batch, tp)
    gate_up = column_linear(ops.rms_norm(x_tD, p["norm"], eps), p["gate_up"], tp, seq)  # F columns of each
    return x_tD + row_linear(ops.swiglu(gate_up), p["down"], tp, seq), {}


def head(words: Part, eps: float, p: dict[str, Tensor], x_tD: Tensor, batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    """The sum of the cross-entropy where the batch has labels; the logits (T, vocabulary), the same on every rank of tp, where it has none."""
    tp = ctx.axes["tp"]
    seq = token_shares(batch, tp)
    z_TV = column_linear(ctx.ops.rms_norm(x_tD, p["norm"], eps), p["weight"], tp, seq)
    if "labels" not in batch.plan:
        return redistribute(z_TV, tp, S(1, words.sizes(tp.size)), I), {}
    first, _ = words.bounds(tp.index, tp.size)
    return {}, {"losses": {"cross_entropy": vocab_cross_entropy(z_TV, batch.plan["labels"], first, tp, seq)}}


# Floating-point operations of one microbatch, forward and backward; they read the plan on the host. A product of n tokens with a matrix of a·b
# elements is 2·n·a·b operations, and its backward twice that; the embedding is a lookup. A query that sees c keys makes 2·2·c·heads·head_dim
# (scores, weighted values); a causal document of n tokens has n(n+1)/2 such pairs, within a window fewer. As in PaLM (Chowdhery et al. 2022,
# appendix B), but with the lengths of the documents; nothing recomputed counts.


def embed_flops(batch: Batch) -> float:
    return 0.0


def attention_flops(a: Attention, dim: int, batch: Batch) -> float:
    edges = batch.plan["cu_seqlens"].numpy().astype(np.float64)
    lengths = np.diff(edges, append=edges[-1:])
    seen = np.minimum(lengths, a.window or np.inf)
    pairs = (seen * (seen + 1) / 2 + (lengths - seen) * seen).sum()
    return float(3 * (2 * edges[-1] * (2 * a.heads + 2 * a.kv_heads) * a.head_dim * dim + 4 * pairs * a.heads * a.head_dim))


def matrix_flops(elements: int, batch: Batch) -> float:
    """Of products with matrices of so many elements in all."""
    return float(3 * 2 * int(batch.plan["cu_seqlens"][-1]) * elements)

"""A model of three chains, small and awkward to split, to find out about chains: it learns nothing that anybody wants.

    vision    an encoder of images, each a document of patches that all see each other; `merge` patches make one row of `visual`, and after layer
              `tap` one row of `deep` (DeepStack, Meng et al. 2024, arXiv 2406.04334)
    decoder   a causal decoder; `visual` takes the places of its placeholder tokens, `deep` is added there before layer `deep`, as in Qwen3-VL;
              `hidden` is what its last layer leaves
    head      actions that see, in every layer, the `hidden` rows of their document; it tells noise from them: squared error against `targets`

R rows of the tp group · r this rank's rows · D width · h query heads of this rank · k kv heads of this rank · d head dim · F columns of this rank.
Between segments x is S(0) over tp, in every chain. What the batches of each are: lf/models/trio_data.py.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lf.batch import Batch, BatchError
from lf.chains import Chain, Chains, Edge
from lf.config import ConfigError
from lf.context import wide
from lf.layouts import RULES
from lf.mesh import shares
from lf.models import trio_data as data
from lf.models import trio_flops as flops
from lf.models.attention import Attention, attention_params, qkv_parts
from lf.models.decoder import DecoderConfig, Layer, decoder
from lf.models.mlp import GatedMLP
from lf.models.tokens import matrix_flops, tables, token_shares
from lf.ops.cross_attention import cross_attention
from lf.parallel.linear import column_linear, row_linear
from lf.parallel.product import product
from lf.parallel.redistribute import I, S, Type, redistribute
from lf.segment import Model, Objective, Segment, Terms
from lf.spec import Param, Part, Tied, constant, normal


@attrs.frozen
class Tower:
    """The size of a chain: `inner` is the width of its feed-forward layers."""

    dim: int
    layers: int
    mixer: Attention
    inner: int


@attrs.frozen
class TrioConfig:
    """`features`: of a patch · `action_dim`: of an action · `tap`: the layer of vision after which `deep` is taken · `deep`: the layer of the decoder
    that takes it · `action_weight`: of the head's loss, beside 1 for cross-entropy."""

    vision: Tower = Tower(9, 3, Attention(3, 1, 4), 7)
    decoder: Tower = Tower(15, 4, Attention(6, 3, 4, qk_norm=True), 10)
    head: Tower = Tower(11, 2, Attention(9, 3, 2), 5)
    vocab: int = 37
    features: int = 5
    action_dim: int = 3
    merge: int = 2
    tap: int = 1
    deep: int = 2
    action_weight: float = 0.5
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __attrs_post_init__(self) -> None:
        for name, chain in (("tap", "vision"), ("deep", "decoder")):
            if not 0 <= (at := getattr(self, name)) < (layers := getattr(self, chain).layers):
                raise ConfigError(f"{name}={at} is no layer of {chain!r}, which has {layers}: 0 to {layers - 1}")
        if min(self.merge, self.features, self.action_dim, self.head.layers) < 1 or self.vocab < 2:
            raise ConfigError(
                f"merge={self.merge}, features={self.features}, action_dim={self.action_dim} and head.layers={self.head.layers} must each be at "
                f"least 1, and vocab={self.vocab} at least 2: its last word is the placeholder"
            )

    @property
    def placeholder(self) -> int:
        """The token that stands for a row of an image."""
        return self.vocab - 1


def trio(config: TrioConfig | None = None, **changes: Any) -> Chains:
    """The three chains and their edges. `changes`: of the fields of the config. Objectives: cross_entropy of the decoder, action of the head."""
    c = attrs.evolve(config or TrioConfig(), **changes)
    takes = partial(takes_rows, c.placeholder)  # one object: edges of one output to one stage take the same rows
    chains = {
        "vision": Chain(
            vision(c), {"visual": c.decoder.dim, "deep": c.decoder.dim},
            partial(data.images, c.merge, partial(flops.image, c)), partial(data.collate_images, c.merge, c.features),
        ),
        "decoder": Chain(language(c), {"hidden": c.decoder.dim}, data.documents),
        "head": Chain(action_head(c), {}, partial(data.samples, partial(flops.sample, c)), partial(data.collate_samples, c.action_dim)),
    }  # fmt: skip
    edges = (
        Edge("vision", "visual", "decoder", "decoder.embed", "visual", takes),
        Edge("vision", "deep", "decoder", f"decoder.layers.{c.deep}.attn", "deep", takes),
        *(Edge("decoder", "hidden", "head", f"head.layers.{i}.cross", "context") for i in range(c.head.layers)),
    )
    return Chains(c, chains, edges, "decoder")


def takes_rows(placeholder: int, batch: Batch) -> np.ndarray:
    return batch.plan["tokens"].numpy() == placeholder


# Vision


def vision(c: TrioConfig) -> Model:
    t, matrix, norm = c.vision, normal(c.init_std), Param((c.vision.dim,), ("embed",), constant(1.0))
    added = normal(c.init_std / math.sqrt(2 * t.layers))
    pixels, wide_dim = Part("", c.features), c.merge * t.dim
    merger: dict[str, Param | Tied] = {
        "norm": norm,
        "up": Param((t.inner, wide_dim), ("mlp", "embed"), matrix),
        "down": Param((c.decoder.dim, t.inner), ("embed", "mlp"), matrix, part_dim=1),
    }
    attn = partial(encoder_attention, t.mixer, qkv_parts(t.mixer), c.merge, c.norm_eps)
    attn_params: dict[str, Param | Tied] = {"norm": norm, **attention_params(t.mixer, t.dim, matrix, added)}
    mlp, mlp_params = partial(mlp_block, c.merge, c.norm_eps), gated_params(t, norm, matrix, added)
    attn_flops = partial(flops.packed, t.mixer, t.dim)
    mlp_flops = partial(matrix_flops, 3 * t.inner * t.dim)
    merge_flops = partial(flops.merged, c.merge, (wide_dim + c.decoder.dim) * t.inner)
    weight = Param((t.dim, c.features), ("embed", "mlp"), matrix, (pixels,), part_dim=1)
    embed = partial(embed_payload, "pixels", pixels, c.merge)
    segments = [Segment("vision.embed", "vision.embed", {"weight": weight}, embed, ("weight",), partial(matrix_flops, t.dim * c.features))]
    for i in range(t.layers):
        name = f"vision.layers.{i}"
        segments.append(Segment(f"{name}.attn", name, attn_params, attn, ("qkv", "out"), attn_flops))
        segments.append(Segment(f"{name}.mlp", name, mlp_params, mlp, ("gate_up", "down"), mlp_flops))
        if i == c.tap:
            tap = partial(merge_rows, "deep", c.merge, c.norm_eps)
            segments.append(Segment(f"{name}.deep", name, merger, tap, ("up", "down"), merge_flops, outputs=("deep",)))
    last = partial(merge_rows, "visual", c.merge, c.norm_eps)
    segments.append(Segment("vision.merger", "vision.merger", merger, last, ("up", "down"), merge_flops, outputs=("visual",)))
    prepare = partial(prepare_rows, ((t.mixer.rope, t.mixer.head_dim),))
    return Model(c, tuple(segments), {}, RULES, prepare=prepare)


def gated_params(t: Tower, norm: Param, matrix: Any, added: Any) -> dict[str, Param | Tied]:
    gate_up = Param((2 * t.inner, t.dim), ("mlp", "embed"), matrix, (Part("gate", t.inner), Part("up", t.inner)))
    return {"norm": norm, "gate_up": gate_up, "down": Param((t.dim, t.inner), ("embed", "mlp"), added, part_dim=1)}


def row_shares(batch: Batch, axis: Any, merge: int = 1) -> Type:
    """How rows lie over tp: in whole groups of `merge`."""
    return S(0, tuple(merge * n for n in shares(batch.plan["positions"].shape[0] // merge, axis.size)))


def prepare_rows(ropes: Any, batch: Batch, ctx: Any) -> Batch:
    """The payload on the device, in the compute dtype, and the tables of positions."""
    to = {"device": batch.plan["positions"].device, "dtype": ctx.precision.compute}
    batch = attrs.evolve(batch, payload={name: values.to(**to) for name, values in batch.payload.items()})
    return tables(ropes, batch, ctx)


def embed_payload(name: str, part: Part, merge: int, p: dict[str, Any], x: Any, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    """A matrix times each row of the payload. Every rank of tp has read all of it, and multiplies its share of the columns."""
    tp = ctx.axes["tp"]
    lo, hi = part.bounds(tp.index, tp.size)
    return row_linear(batch.payload[name][:, lo:hi], p["weight"], tp, row_shares(batch, tp, merge)), {}


def encoder_attention(
    a: Attention, parts: tuple[Part, Part, Part], merge: int, eps: float, p: dict[str, Any], x_rD: Tensor, batch: Batch, ctx: Any
) -> tuple[Tensor, Terms]:
    tp, ops = ctx.axes["tp"], ctx.ops
    seq, q_part = row_shares(batch, tp, merge), parts[0]
    (q0, q1), (k0, k1) = q_part.units(tp.index, tp.size), parts[1].units(tp.index, tp.size)
    qkv = column_linear(ops.rms_norm(x_rD, p["norm"], eps), p["qkv"], tp, seq)
    q_Rhd, k_Rkd, v_Rkd = rearrange(qkv, "R (h d) -> R h d", d=a.head_dim).split([q1 - q0, k1 - k0, k1 - k0], 1)
    cos, sin = batch.derived["rope", 0]
    q_Rhd, k_Rkd = ops.rope(q_Rhd, cos, sin), ops.rope(k_Rkd, cos, sin)
    k_Rkd, v_Rkd = (own_heads(y, a, q0, q1, k0) for y in (k_Rkd, v_Rkd))
    o_Rhd = cross_attention(q_Rhd, k_Rkd, v_Rkd, batch.plan["slots"], batch.plan["slots"])
    return x_rD + row_linear(rearrange(o_Rhd, "R h d -> R (h d)"), p["out"], tp, seq), {}


def own_heads(x_Rkd: Tensor, a: Attention, q0: int, q1: int, k0: int) -> Tensor:
    """kv heads as the query heads q0 … q1 - 1 need them: where a share starts or ends inside a group, each query head gets its own copy."""
    group = a.heads // a.kv_heads
    if q0 % group or q1 % group:
        return x_Rkd[:, torch.arange(q0, q1, device=x_Rkd.device) // group - k0]
    return x_Rkd


def mlp_block(merge: int, eps: float, p: dict[str, Any], x_rD: Tensor, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    tp, ops = ctx.axes["tp"], ctx.ops
    seq = row_shares(batch, tp, merge)
    gate_up = column_linear(ops.rms_norm(x_rD, p["norm"], eps), p["gate_up"], tp, seq)  # F columns of each
    return x_rD + row_linear(ops.swiglu(gate_up), p["down"], tp, seq), {}


def merge_rows(output: str, merge: int, eps: float, p: dict[str, Any], x_rD: Tensor, batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    """`merge` rows side by side, of which two matrices make one row of the decoder's width. The stream goes on, for whom there is after it."""
    tp = ctx.axes["tp"]
    seq = S(0, shares(batch.plan["positions"].shape[0] // merge, tp.size))
    joined = rearrange(ctx.ops.rms_norm(x_rD, p["norm"], eps), "(r m) D -> r (m D)", m=merge)
    rows = row_linear(F.gelu(column_linear(joined, p["up"], tp, seq)), p["down"], tp, seq)
    return ({} if output == "visual" else x_rD), {"outputs": {output: rows}}


# Decoder


def language(c: TrioConfig) -> Model:
    t = c.decoder
    config = DecoderConfig(c.vocab, t.dim, (Layer(t.mixer, GatedMLP(t.inner)),) * t.layers, c.norm_eps, init_std=c.init_std, embed_std=c.init_std)
    plain = decoder(config)
    changed = {
        "embed": (embed_visual, ("visual",), ()),
        f"layers.{c.deep}.attn": (add_deep, ("deep",), ()),
        f"layers.{t.layers - 1}.mlp": (give_hidden, (), ("hidden",)),
    }
    segments = []
    for s in plain.segments:
        params = {n: Tied(f"decoder.{p.path}") if isinstance(p, Tied) else p for n, p in s.params.items()}
        named = attrs.evolve(s, name=f"decoder.{s.name}", layer=f"decoder.{s.layer}", params=params)
        if s.name in changed:
            fn, inputs, outputs = changed[s.name]
            named = attrs.evolve(named, apply=partial(fn, s.apply), inputs=inputs, outputs=outputs)
        segments.append(named)
    return Model(
        config, tuple(segments), plain.objectives, plain.rules,
        partial(accepts, c, plain.accepts), partial(prepare_tokens, c.placeholder, plain.prepare),
    )  # fmt: skip


def accepts(c: TrioConfig, words: Any, batch: Batch) -> None:
    """Raises BatchError for words that are none, and where images and placeholders are not as many rows."""
    words(batch)
    patches = data.lengths_of(batch, "patches")
    if (wrong := patches % c.merge).any():
        at = int(wrong.argmax())
        raise BatchError(f"image {at} has {patches[at]} patches, which is no multiple of merge={c.merge}")
    there, rows = int(takes_rows(c.placeholder, batch).sum()), int(patches.sum()) // c.merge
    if there != rows:
        raise BatchError(f"{there} tokens are the placeholder {c.placeholder}, and the {len(patches)} images make {rows} rows: each row needs one")


def prepare_tokens(placeholder: int, prepare: Any, batch: Batch, ctx: Any) -> Batch:
    """The decoder's own, and for each of this rank's tokens which of its rows of an edge it takes: -1, the zeros behind the last, for none."""
    tp = ctx.axes["tp"]
    mine = redistribute(batch.plan["tokens"] == placeholder, tp, I, token_shares(batch, tp))
    batch = prepare(batch, ctx)
    return attrs.evolve(batch, derived={**batch.derived, "takes": torch.where(mine, mine.cumsum(0) - 1, -1)})


def placed(rows: Tensor, batch: Batch) -> Tensor:
    """(this rank's tokens, width): rows at the placeholders, 0 elsewhere."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[batch.derived["takes"]]


def embed_visual(plain: Any, p: dict[str, Any], x: Any, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    x_tD, terms = plain(p, {}, batch, ctx)
    return torch.where(batch.derived["takes"][:, None] < 0, x_tD, placed(x["visual"], batch)), terms


def add_deep(plain: Any, p: dict[str, Any], x: Any, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    return plain(p, x["x"] + placed(x["deep"], batch), batch, ctx)


def give_hidden(plain: Any, p: dict[str, Any], x_tD: Tensor, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    y_tD, terms = plain(p, x_tD, batch, ctx)
    return y_tD, {**terms, "outputs": {"hidden": y_tD}}


# Head


def action_head(c: TrioConfig) -> Model:
    t, matrix, norm, width = c.head, normal(c.init_std), Param((c.head.dim,), ("embed",), constant(1.0)), c.decoder.dim
    a, added = t.mixer, normal(c.init_std / math.sqrt(2 * t.layers))
    q, k, v = qkv_parts(a)
    cross: dict[str, Param | Tied] = {
        "norm": norm,
        "context_norm": Param((width,), ("embed",), constant(1.0)),
        "q": Param((q.rows, t.dim), ("heads", "embed"), matrix, (attrs.evolve(q, name=""),)),
        "kv": Param((k.rows + v.rows, width), ("heads", "embed"), matrix, (k, v)),
        "out": Param((t.dim, q.rows), ("embed", "heads"), added, (attrs.evolve(q, name=""),), part_dim=1),
    }
    actions = Part("", c.action_dim)
    weight = Param((t.dim, c.action_dim), ("embed", "mlp"), matrix, (actions,), part_dim=1)
    embed, ends = partial(embed_payload, "noised", actions, 1), partial(matrix_flops, t.dim * c.action_dim)
    attend, attend_flops = partial(cross_block, a, (q, k), c.norm_eps), partial(flops.cross, a, t.dim, width)
    mlp, mlp_params = partial(mlp_block, 1, c.norm_eps), gated_params(t, norm, matrix, added)
    mlp_flops = partial(matrix_flops, 3 * t.inner * t.dim)
    segments = [Segment("head.embed", "head.embed", {"weight": weight}, embed, ("weight",), ends)]
    for i in range(t.layers):
        name = f"head.layers.{i}"
        segments.append(Segment(f"{name}.cross", name, cross, attend, ("q", "kv", "out"), attend_flops, inputs=("context",)))
        segments.append(Segment(f"{name}.mlp", name, mlp_params, mlp, ("gate_up", "down"), mlp_flops))
    out: dict[str, Param | Tied] = {"norm": norm, "weight": Param((c.action_dim, t.dim), (None, "embed"), matrix)}
    segments.append(Segment("head.out", "head.out", out, partial(squared_error, c.norm_eps), ("weight",), ends))
    objective = Objective(c.action_weight, partial(valid_elements, c.action_dim))
    return Model(c, tuple(segments), {"action": objective}, RULES, prepare=partial(prepare_rows, ()))


def valid_elements(action_dim: int, batch: Batch) -> Tensor:
    """How many numbers there are to tell, of a data batch and of a batch of the head alike."""
    return batch.plan["actions"].sum() * action_dim


def cross_block(a: Attention, parts: tuple[Part, Part], eps: float, p: dict[str, Any], x: Any, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    tp, ops, x_rD = ctx.axes["tp"], ctx.ops, x["x"]
    seq = row_shares(batch, tp)
    (q0, q1), (k0, k1) = parts[0].units(tp.index, tp.size), parts[1].units(tp.index, tp.size)
    q = column_linear(ops.rms_norm(x_rD, p["norm"], eps), p["q"], tp, seq)
    kv = column_linear(ops.rms_norm(x["context"], p["context_norm"], eps), p["kv"], tp, S(0))  # an edge brings equal shares
    k_Ckd, v_Ckd = rearrange(kv, "C (k d) -> C k d", d=a.head_dim).split([k1 - k0, k1 - k0], 1)
    k_Ckd, v_Ckd = (own_heads(y, a, q0, q1, k0) for y in (k_Ckd, v_Ckd))
    o_Rhd = cross_attention(rearrange(q, "R (h d) -> R h d", d=a.head_dim), k_Ckd, v_Ckd, batch.plan["slots"], batch.plan["slots_k"])
    return x_rD + row_linear(rearrange(o_Rhd, "R h d -> R (h d)"), p["out"], tp, seq), {}


def squared_error(eps: float, p: dict[str, Any], x_rD: Tensor, batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    """The sum over this rank's own actions; padding counts nothing. The matrix is whole on every rank: each uses it for its own rows."""
    tp = ctx.axes["tp"]
    seq = row_shares(batch, tp)
    told = product(ctx.ops.rms_norm(x_rD, p["norm"], eps), p["weight"])
    targets = batch.payload["targets"]
    valid = torch.arange(len(targets), device=targets.device) < batch.plan["actions"].sum()
    wanted, mine = redistribute(targets, tp, I, seq), redistribute(valid, tp, I, seq)
    return {}, {"losses": {"action": torch.where(mine[:, None], (told - wanted).to(wide(told.dtype)).square(), 0.0).sum()}}

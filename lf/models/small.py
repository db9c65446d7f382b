"""Small decoders, to find out about large ones: one that is awkward to split, and any model shrunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.models.latent import Latent
from lf.models.moe import MoE
from lf.models.router import Router
from lf.segment import Model


def tiny(tied: bool = True, **changes: Any) -> Model:
    """A decoder in the shape of Qwen3, small enough for a sweep and awkward to split: 3 kv heads, 37 words, odd widths."""
    layer = Layer(Attention(heads=6, kv_heads=3, head_dim=4, qk_norm=True), GatedMLP(10))
    return decoder(attrs.evolve(DecoderConfig(vocab=37, dim=15, layers=(layer, layer), tied=tied), **changes))


def tiny_moe(tied: bool = True) -> Model:
    """The same with a mixture of experts in the second layer: groups, a selection bias, a shared expert with a gate, all losses of the router."""
    router = Router(
        6, 2, "sigmoid", groups=3, top_groups=2, group_score="top2", bias=True, scale=1.5,
        balance=0.1, sequence_balance=0.05, global_balance=0.07, z=0.01,
    )  # fmt: skip
    a = Attention(heads=6, kv_heads=3, head_dim=4, qk_norm=True)
    layers = Layer(a, GatedMLP(10)), Layer(a, MoE(router, 6, shared=10, shared_gate=True, biases=True))
    return decoder(DecoderConfig(vocab=37, dim=15, layers=layers, tied=tied))


def shrunk(config: DecoderConfig) -> DecoderConfig:
    """The same shape in small: at most 2 layers of each kind, few heads and words, at most 8 experts, with the ratios of heads to kv heads and of
    widths kept, and that there are groups, shared experts and further heads."""
    heads, factor = _narrowing(config.layers[0].mixer)

    def narrow(n: int) -> int:
        return min(n, max(1, round(n * factor)))

    def small(layer: Layer) -> Layer:
        a, f = layer.mixer, layer.ffn
        mixer = _small_latent(a, heads, narrow) if isinstance(a, Latent) else _small_attention(a, heads)
        return Layer(mixer, _small_moe(f, narrow) if isinstance(f, MoE) else attrs.evolve(f, dim=narrow(f.dim)))

    keep = [i for i, layer in enumerate(config.layers) if config.layers[:i].count(layer) < 2]
    further = config.mtp and attrs.evolve(config.mtp, layers=tuple(map(small, config.mtp.layers)))
    layers = tuple(small(config.layers[i]) for i in keep)
    return attrs.evolve(config, vocab=min(config.vocab, 199), dim=narrow(config.dim), layers=layers, mtp=further)


def _narrowing(first: Attention | Latent) -> tuple[float, float]:
    """What the heads, and all widths, are multiplied by: to about 8 query heads of at most 8 dims."""
    if isinstance(first, Latent):
        heads = min(first.heads, 8) / first.heads
        return heads, heads * min(first.nope_dim, 8) / first.nope_dim
    heads = max(1, min(first.kv_heads, 8 // (first.heads // first.kv_heads))) / first.kv_heads
    return heads, heads * min(first.head_dim, 8) / first.head_dim


def _small_attention(a: Attention, heads: float) -> Attention:
    k = max(1, round(a.kv_heads * heads))
    d = min(a.head_dim, 8)
    rope = a.rope if a.rope.dim is None else attrs.evolve(a.rope, dim=max(2, a.rope.dim * d // a.head_dim // 2 * 2))
    window = None if a.window is None else min(a.window, 5)  # shorter than the documents of a test, or it would mean nothing
    return attrs.evolve(a, heads=k * (a.heads // a.kv_heads), kv_heads=k, head_dim=d, rope=rope, window=window)


def _small_latent(a: Latent, heads: float, narrow: Callable[[int], int]) -> Latent:
    def rank(n: int) -> int:
        return max(narrow(n), min(n, 4))  # a norm over fewer would hardly say anything

    d = min(a.nope_dim, 8)
    rope_dim, value_dim = max(2, a.rope_dim * d // a.nope_dim // 2 * 2), max(1, a.value_dim * d // a.nope_dim)
    q_rank, n = None if a.q_rank is None else rank(a.q_rank), max(1, round(a.heads * heads))
    return attrs.evolve(a, heads=n, nope_dim=d, rope_dim=rope_dim, value_dim=value_dim, kv_rank=rank(a.kv_rank), q_rank=q_rank)


def _small_moe(m: MoE, narrow: Callable[[int], int]) -> MoE:
    """8 experts at most, 2 of a token; half of the groups where half of them were open."""
    r, dim = m.router, narrow(m.dim)
    groups = min(r.groups, 4)
    open_groups = max(1, round(r.top_groups * groups / r.groups))
    experts = groups * max(1, min(r.experts // r.groups, 8 // groups))
    top = min(r.top, 2, experts // groups * open_groups)
    router = attrs.evolve(r, experts=experts, top=top, groups=groups, top_groups=open_groups)
    return attrs.evolve(m, router=router, dim=dim, shared=m.shared and max(1, round(m.shared * dim / m.dim)))

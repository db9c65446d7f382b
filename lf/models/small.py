"""Small decoders, to find out about large ones: one that is awkward to split, and any model shrunk."""

from __future__ import annotations

from typing import Any

import attrs

from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, attentions, decoder
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
    """The same shape in small: at most 2 layers of each kind, few heads and words, with the ratios of heads to kv heads and of widths kept."""
    first = attentions(config)[0]
    kv = max(1, min(first.kv_heads, 8 // (first.heads // first.kv_heads)))
    head_dim, factor = min(first.head_dim, 8), kv / first.kv_heads

    def narrow(n: int) -> int:
        return min(n, max(1, round(n * factor * head_dim / first.head_dim)))

    def small(layer: Layer, a: Attention) -> Layer:
        k = max(1, round(a.kv_heads * factor))
        d = min(a.head_dim, 8)
        rope = a.rope if a.rope.dim is None else attrs.evolve(a.rope, dim=max(2, a.rope.dim * d // a.head_dim // 2 * 2))
        window = None if a.window is None else min(a.window, 5)  # shorter than the documents of a test, or it would mean nothing
        mixer = attrs.evolve(a, heads=k * (a.heads // a.kv_heads), kv_heads=k, head_dim=d, rope=rope, window=window)
        return attrs.evolve(layer, mixer=mixer, ffn=attrs.evolve(layer.ffn, dim=narrow(layer.ffn.dim)))

    keep = [i for i, layer in enumerate(config.layers) if config.layers[:i].count(layer) < 2]
    layers = tuple(small(config.layers[i], attentions(config)[i]) for i in keep)
    return attrs.evolve(config, vocab=min(config.vocab, 199), dim=narrow(config.dim), layers=layers)

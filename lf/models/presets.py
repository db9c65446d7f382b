"""Models by name. Shapes as in the config.json of each release on the Hugging Face hub (Qwen/Qwen3-0.6B, …)."""

from __future__ import annotations

import attrs

from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer


def qwen3(
    dim: int, inner: int, layers: int, heads: int, kv_heads: int = 8, head_dim: int = 128, vocab: int = 151936, tied: bool = False
) -> DecoderConfig:
    layer = Layer(Attention(heads, kv_heads, head_dim, rope_theta=1e6), GatedMLP(inner))
    return DecoderConfig(vocab, dim, (layer,) * layers, tied=tied)


PRESETS = {
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": qwen3(4096, 12288, 36, 32),
    "qwen3-14b": qwen3(5120, 17408, 40, 40),
    "qwen3-32b": qwen3(5120, 25600, 64, 64),
    # Of no release: a CPU learns something with it in a few minutes. A wide embedding lets it see its tokens through fresh layers from the start.
    "qwen3-demo": attrs.evolve(qwen3(128, 384, 3, heads=4, kv_heads=2, head_dim=32, vocab=1024), embed_std=0.5),
}

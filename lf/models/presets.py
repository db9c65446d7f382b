"""Models by name. Shapes as in the config.json of each release on the Hugging Face hub (Qwen/Qwen3-0.6B, meta-llama/Llama-3.1-8B, …).

Routers have the losses that the release's files or paper name, as if they were to be trained from the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from lf.models.decoder import MTP, Attention, DecoderConfig, GatedMLP, Layer
from lf.models.latent import Latent
from lf.models.moe import MoE
from lf.models.router import Router
from lf.ops.rope import Rope


def _dense(
    family: str, dim: int, inner: int, layers: int, heads: int, kv: int, vocab: int, eps: float, max_len: int, theta: float, **more: Any
) -> DecoderConfig:
    """more: fields of Attention, `rope` (of Rope; theta is given) and `tied`, `embed_std` (of the model)."""
    model = {name: more.pop(name) for name in ("tied", "embed_std") if name in more}
    rope = Rope(theta, **more.pop("rope", {}))
    layer = Layer(Attention(heads, kv, more.pop("head_dim", dim // heads), rope, **more), GatedMLP(inner))
    return DecoderConfig(vocab, dim, (layer,) * layers, norm_eps=eps, max_len=max_len, family=family, **{"tied": False, **model})


def llama2(dim: int, inner: int, layers: int, heads: int, kv: int) -> DecoderConfig:
    return _dense("llama", dim, inner, layers, heads, kv, 32000, 1e-5, 4096, 10000.0)


def llama3(dim: int, inner: int, layers: int, heads: int, factor: float = 0, tied: bool = False) -> DecoderConfig:
    """factor: of the rotary positions from Llama 3.1 on; 0 for Llama 3."""
    scaled = {"kind": "llama3", "factor": factor, "low_freq": 1.0, "high_freq": 4.0, "original_len": 8192} if factor else {}
    return _dense("llama", dim, inner, layers, heads, 8, 128256, 1e-5, 131072 if factor else 8192, 500000.0, rope=scaled, tied=tied)


def qwen2(
    dim: int, inner: int, layers: int, heads: int, kv: int, vocab: int = 151936, eps: float = 1e-6, max_len: int = 32768, tied: bool = False,
    theta: float = 1e6,
) -> DecoderConfig:  # fmt: skip
    return _dense("qwen2", dim, inner, layers, heads, kv, vocab, eps, max_len, theta, qkv_bias=True, tied=tied)


def qwen3(
    dim: int, inner: int, layers: int, heads: int, kv: int = 8, head_dim: int = 128, vocab: int = 151936, tied: bool = False, **more: Any
) -> DecoderConfig:
    return _dense("qwen3", dim, inner, layers, heads, kv, vocab, 1e-6, 40960, 1e6, head_dim=head_dim, qk_norm=True, tied=tied, **more)


def mistral(
    dim: int, inner: int, layers: int, vocab: int, theta: float, max_len: int = 32768, window: int | None = None, head_dim: int = 128
) -> DecoderConfig:
    return _dense("mistral", dim, inner, layers, 32, 8, vocab, 1e-5, max_len, theta, head_dim=head_dim, window=window)


def internlm2(dim: int, inner: int, layers: int, heads: int, factor: float) -> DecoderConfig:
    rope = {"kind": "dynamic", "factor": factor, "original_len": 32768}
    return _dense("internlm2", dim, inner, layers, heads, 8, 92544, 1e-5, 32768, 1e6, rope=rope)


def _model(family: str, vocab: int, dim: int, layers: Sequence[Layer], **more: Any) -> DecoderConfig:
    return DecoderConfig(vocab, dim, tuple(layers), family=family, **{"tied": False, **more})


def qwen3_moe(dim: int, inner: int, layers: int, heads: int) -> DecoderConfig:
    """The coefficient of the router's loss is 0.001 (lf/models/families/ffn.py says what it means)."""
    mixture = MoE(Router(128, 8, balance=0.001 * 8 / layers), inner)
    layer = Layer(Attention(heads, 4, 128, Rope(1e6), qk_norm=True), mixture)
    return _model("qwen3_moe", 151936, dim, [layer] * layers, max_len=40960)


def moe_tiny() -> DecoderConfig:
    """Of the same width and as many layers as qwen3-demo, in the shape of Qwen3-MoE: two of eight experts, each a third as wide."""
    layer = Layer(Attention(4, 2, 32, Rope(1e6), qk_norm=True), MoE(Router(8, 2, balance=0.01), 128))
    return _model("qwen3_moe", 1024, 128, [layer] * 3, max_len=40960, embed_std=0.5)


def qwen2_moe(dim: int, inner: int, shared: int, layers: int, heads: int, kv: int, experts: int, top: int, max_len: int) -> DecoderConfig:
    """The coefficient of the router's loss is 0.001."""
    mixture = MoE(Router(experts, top, normalise=False, balance=0.001 * top / layers), inner, shared, shared_gate=True)
    layer = Layer(Attention(heads, kv, 128, Rope(1e6), qkv_bias=True), mixture)
    return _model("qwen2_moe", 151936, dim, [layer] * layers, max_len=max_len)


def mixtral(dim: int, inner: int, layers: int, heads: int, max_len: int, coefficient: float) -> DecoderConfig:
    mixture = MoE(Router(8, 2, balance=coefficient * 2 / layers), inner)
    return _model("mixtral", 32000, dim, [Layer(Attention(heads, 8, 128, Rope(1e6)), mixture)] * layers, norm_eps=1e-5, max_len=max_len)


def _mla(heads: int, q_rank: int | None, rope: Rope) -> Latent:
    return Latent(heads, nope_dim=128, rope_dim=64, value_dim=128, kv_rank=512, q_rank=q_rank, rope=rope)


def deepseek_v2(dim: int, inner: int, expert: int, layers: int, heads: int, q_rank: int | None, router: Router) -> DecoderConfig:
    """Two shared experts; the first layer is dense. The weight of the routers' loss is 0.001."""
    yarn = Rope(10000.0, "yarn", 40.0, original_len=4096, mscale=0.707, mscale_all_dim=0.707)
    a, mixture = _mla(heads, q_rank, yarn), MoE(router, expert, shared=2 * expert)
    return _model("deepseek_v2", 102400, dim, [Layer(a, GatedMLP(inner)), *[Layer(a, mixture)] * (layers - 1)], max_len=163840)


def deepseek_v3(vocab: int, heads: int, dense: int, router: Router, rope: Rope, max_len: int, further: bool) -> DecoderConfig:
    """dense: how many of the first layers are. further: a head that predicts further ahead."""
    a, mixture = _mla(heads, 1536, rope), MoE(router, 2048, shared=2048)
    layers = [Layer(a, GatedMLP(18432))] * dense + [Layer(a, mixture)] * (61 - dense)
    return _model("deepseek_v3", vocab, 7168, layers, max_len=max_len, mtp=MTP((layers[-1],)) if further else None)


def glm4_moe(dim: int, inner: int, expert: int, layers: int, dense: int, experts: int, scale: float, qk_norm: bool) -> DecoderConfig:
    """dense: how many of the first layers are."""
    a = Attention(96, 8, 128, Rope(1e6, dim=64), qk_norm=qk_norm, qkv_bias=True)
    mixture = MoE(Router(experts, 8, score="sigmoid", scale=scale, group_score="top2", bias=True), expert, shared=expert)
    kinds = [Layer(a, GatedMLP(inner))] * dense + [Layer(a, mixture)] * (layers - dense)
    return _model("glm4_moe", 151552, dim, kinds, norm_eps=1e-5, max_len=131072, mtp=MTP((kinds[-1],)))


def gpt_oss(layers: int, experts: int) -> DecoderConfig:
    rope = Rope(150000.0, "yarn", 32.0, original_len=4096, truncate=False)
    a = Attention(64, 8, 64, rope, qkv_bias=True, out_bias=True, sinks=True)
    mixture = MoE(Router(experts, 4, linear_bias=True), 2880, biases=True, limit=7.0)
    kinds = [Layer(attrs.evolve(a, window=128), mixture), Layer(a, mixture)] * (layers // 2)
    return _model("gpt_oss", 201088, 2880, kinds, norm_eps=1e-5, max_len=131072)


V2: dict[str, Any] = {"normalise": False, "sequence_balance": 0.001}
V3 = Router(256, 8, "sigmoid", scale=2.5, groups=8, top_groups=4, group_score="top2", bias=True, sequence_balance=1e-4)  # the loss: its paper, §4.2
K2 = Router(384, 8, "sigmoid", scale=2.827, group_score="top2", bias=True)
V3_ROPE = Rope(10000.0, "yarn", 40.0, original_len=4096, mscale=1.0, mscale_all_dim=1.0)
K2_ROPE = Rope(50000.0, "yarn", 32.0, original_len=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
M2 = Layer(Attention(48, 8, 128, Rope(5e6, dim=64), qk_norm=True, qk_norm_all=True), MoE(Router(256, 8, score="sigmoid", bias=True), 1536))

PRESETS = {
    "llama-2-7b": llama2(4096, 11008, 32, 32, 32),
    "llama-2-13b": llama2(5120, 13824, 40, 40, 40),
    "llama-2-70b": llama2(8192, 28672, 80, 64, 8),
    "llama-3-8b": llama3(4096, 14336, 32, 32),
    "llama-3-70b": llama3(8192, 28672, 80, 64),
    "llama-3.1-8b": llama3(4096, 14336, 32, 32, factor=8.0),
    "llama-3.1-70b": llama3(8192, 28672, 80, 64, factor=8.0),
    "llama-3.1-405b": llama3(16384, 53248, 126, 128, factor=8.0),
    "llama-3.2-1b": llama3(2048, 8192, 16, 32, factor=32.0, tied=True),
    "llama-3.2-3b": llama3(3072, 8192, 28, 24, factor=32.0, tied=True),
    "qwen1.5-0.5b": qwen2(1024, 2816, 24, 16, 16, tied=True),
    "qwen1.5-1.8b": qwen2(2048, 5504, 24, 16, 16),
    "qwen1.5-4b": qwen2(2560, 6912, 40, 20, 20, theta=5e6),
    "qwen1.5-7b": qwen2(4096, 11008, 32, 32, 32),
    "qwen1.5-14b": qwen2(5120, 13696, 40, 40, 40, vocab=152064),
    "qwen1.5-32b": qwen2(5120, 27392, 64, 40, 8, vocab=152064),
    "qwen1.5-72b": qwen2(8192, 24576, 80, 64, 64, vocab=152064),
    "qwen1.5-110b": qwen2(8192, 49152, 80, 64, 8, vocab=152064),
    "qwen2-0.5b": qwen2(896, 4864, 24, 14, 2, max_len=131072, tied=True),
    "qwen2-1.5b": qwen2(1536, 8960, 28, 12, 2, max_len=131072, tied=True),
    "qwen2-7b": qwen2(3584, 18944, 28, 28, 4, vocab=152064, max_len=131072),
    "qwen2-72b": qwen2(8192, 29568, 80, 64, 8, vocab=152064, eps=1e-5, max_len=131072),
    "qwen2.5-0.5b": qwen2(896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": qwen2(1536, 8960, 28, 12, 2, max_len=131072, tied=True),
    "qwen2.5-3b": qwen2(2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-7b": qwen2(3584, 18944, 28, 28, 4, vocab=152064, max_len=131072),
    "qwen2.5-14b": qwen2(5120, 13824, 48, 40, 8, vocab=152064, eps=1e-5, max_len=131072),
    "qwen2.5-32b": qwen2(5120, 27648, 64, 40, 8, vocab=152064, eps=1e-5, max_len=131072),
    "qwen2.5-72b": qwen2(8192, 29568, 80, 64, 8, vocab=152064, eps=1e-5, max_len=131072),
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": qwen3(4096, 12288, 36, 32),
    "qwen3-14b": qwen3(5120, 17408, 40, 40),
    "qwen3-32b": qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": qwen3_moe(2048, 768, 48, 32),
    "qwen3-235b-a22b": qwen3_moe(4096, 1536, 94, 64),
    "mistral-7b-v0.1": mistral(4096, 14336, 32, vocab=32000, theta=10000.0, window=4096),
    "mistral-7b-v0.2": mistral(4096, 14336, 32, vocab=32000, theta=1e6),
    "mistral-7b-v0.3": mistral(4096, 14336, 32, vocab=32768, theta=1e6),
    "mistral-nemo-12b": mistral(5120, 14336, 40, vocab=131072, theta=1e6, max_len=131072),
    "mistral-small-24b": mistral(5120, 32768, 40, vocab=131072, theta=1e8),
    "mimo-7b": _dense("mimo", 4096, 11008, 36, 32, 8, 151680, 1e-5, 32768, 640000.0, head_dim=128, qkv_bias=True),  # without its further heads
    "internlm2.5-1.8b": internlm2(2048, 8192, 24, 16, factor=2.0),
    "internlm2.5-7b": internlm2(4096, 14336, 32, 32, factor=2.0),
    "internlm2.5-20b": internlm2(6144, 16384, 48, 48, factor=2.0),
    "qwen1.5-moe-a2.7b": qwen2_moe(2048, 1408, 5632, 24, heads=16, kv=16, experts=60, top=4, max_len=8192),
    "qwen2-57b-a14b": qwen2_moe(3584, 2560, 20480, 28, heads=28, kv=4, experts=64, top=8, max_len=131072),
    "mixtral-8x7b": mixtral(4096, 14336, 32, 32, max_len=32768, coefficient=0.02),
    "mixtral-8x22b": mixtral(6144, 16384, 56, 48, max_len=65536, coefficient=0.001),
    "deepseek-v2": deepseek_v2(5120, 12288, 1536, 60, 128, 1536, Router(160, 6, scale=16.0, groups=8, top_groups=3, **V2)),
    "deepseek-v2-lite": deepseek_v2(2048, 10944, 1408, 27, 16, None, Router(64, 6, **V2)),
    "deepseek-v3": deepseek_v3(129280, 128, 3, V3, V3_ROPE, 163840, further=True),
    "kimi-k2": deepseek_v3(163840, 64, 1, K2, K2_ROPE, 131072, further=False),
    "minimax-m2": _model("minimax_m2", 200064, 3072, [M2] * 62, max_len=196608),
    "glm-4.5": glm4_moe(5120, 12288, 1536, 92, dense=3, experts=160, scale=2.5, qk_norm=True),
    "glm-4.5-air": glm4_moe(4096, 10944, 1408, 46, dense=1, experts=128, scale=1.0, qk_norm=False),
    "gpt-oss-20b": gpt_oss(24, 32),
    "gpt-oss-120b": gpt_oss(36, 128),
    # Of no release: a CPU learns something with it in a few minutes. A wide embedding lets it see its tokens through fresh layers from the start.
    "qwen3-demo": qwen3(128, 384, 3, heads=4, kv=2, head_dim=32, vocab=1024, embed_std=0.5),
    "moe-tiny": moe_tiny(),
}

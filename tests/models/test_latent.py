"""Latent attention, norms over all heads, sinks: law 1, and against transformers' attention layers with random weights, in float64."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from helpers import context, draw

import lf
from lf import parity
from lf.config import ConfigError
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Latent, Layer, decoder
from lf.ops.rope import Rope

os.environ["HF_HUB_OFFLINE"] = "1"

EPS = 1e-5  # of the model's norms: not that of the latents
YARN = Rope(50000.0, "yarn", 4.0, original_len=8, mscale=0.7, mscale_all_dim=0.9)
MIXERS = {
    "latent": Latent(3, 3, 4, 5, 7, q_rank=5, bias=True),
    "latent q": Latent(3, 3, 2, 2, 7, rope=YARN, interleaved=False),
    "norm of all, 3 kv": Attention(6, 3, 4, qk_norm=True, qk_norm_all=True),
    "norm of all, 2 kv": Attention(6, 2, 4, Rope(dim=2), qk_norm=True, qk_norm_all=True),
    "sinks": Attention(6, 3, 4, window=4, sinks=True),
}


def model_of(*mixers: Any) -> lf.Model:
    return decoder(DecoderConfig(37, 15, tuple(Layer(a, GatedMLP(10)) for a in mixers), norm_eps=EPS))


@pytest.mark.parametrize("mesh", ["tp=2", "tp=3", "tp=4", "dp=2,tp=2"])
@pytest.mark.parametrize("name", MIXERS)
def test_law_1(name: str, mesh: str) -> None:
    """Heads that do not divide, a rank without any, kv heads that several ranks hold."""
    report = parity.compare(model_of(MIXERS[name]), lf.Mesh.parse(mesh), steps=2, padding=1)
    assert report.ok, str(report)


@pytest.mark.parametrize("mesh", ["pp=2,tp=3", "pp=2,dp=2"])
def test_law_1_with_several_kinds_of_layers(mesh: str) -> None:
    model = model_of(MIXERS["latent"], MIXERS["sinks"], MIXERS["latent q"])
    report = parity.compare(model, lf.Mesh.parse(mesh), steps=2)
    assert report.ok, str(report)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """transformers asks for float32 by name, in norms, positions and the softmax."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


Names = dict[str, str | tuple[str, ...]]
LATENT: Names = {
    "kv_down": "kv_a_proj_with_mqa.weight",
    "kv_norm": "kv_a_layernorm.weight",
    "kv_up": "kv_b_proj.weight",
    "out": "o_proj.weight",
}
Q_DOWN: Names = {"q_down": "q_a_proj.weight", "q_norm": "q_a_layernorm.weight", "q_up": "q_b_proj.weight"}
LATENT_BIAS: Names = {"q_down_bias": "q_a_proj.bias", "kv_down_bias": "kv_a_proj_with_mqa.bias", "out_bias": "o_proj.bias"}
GROUPED: Names = {"qkv": ("q_proj.weight", "k_proj.weight", "v_proj.weight"), "out": "o_proj.weight"}
GROUPED_BIAS: Names = {"qkv_bias": ("q_proj.bias", "k_proj.bias", "v_proj.bias"), "out_bias": "o_proj.bias"}

YARN_THERE = {
    "rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 0.9,
}  # fmt: skip
SIZES = {"hidden_size": 15, "num_hidden_layers": 1, "rms_norm_eps": EPS, "max_position_embeddings": 32, "num_attention_heads": 6}
LATENT_SIZES = {
    **SIZES, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "n_routed_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
SINKS_ROPE = Rope(50000.0, "yarn", 4.0, original_len=8, truncate=False)

# what there is: model type, its config, our mixer, our parameters by their names
ORACLES: dict[str, tuple[str, dict[str, Any], Any, Names]] = {
    "deepseek_v3": (
        "deepseek_v3",
        {**LATENT_SIZES, "q_lora_rank": 5, "attention_bias": True, "rope_parameters": YARN_THERE},
        Latent(3, 3, 4, 5, 7, q_rank=5, rope=YARN, bias=True),
        {**LATENT, **Q_DOWN, **LATENT_BIAS},
    ),
    "deepseek_v3, half-split": (
        "deepseek_v3",
        {**LATENT_SIZES, "q_lora_rank": 5, "rope_interleave": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        Latent(3, 3, 4, 5, 7, q_rank=5, rope=Rope(500.0), interleaved=False),
        {**LATENT, **Q_DOWN},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**LATENT_SIZES, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "q_lora_rank": None, "rope_parameters": YARN_THERE},
        Latent(3, 4, 4, 5, 8, rope=YARN),
        {**LATENT, "q": "q_proj.weight"},
    ),
    "minimax_m2": (
        "minimax_m2",
        {**SIZES, "num_key_value_heads": 2, "head_dim": 4,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        Attention(6, 2, 4, Rope(500.0, dim=2), qk_norm=True, qk_norm_all=True),
        {**GROUPED, "q_norm": "q_norm.weight", "k_norm": "k_norm.weight"},
    ),
    **{
        f"gpt_oss, {kind}": (
            "gpt_oss",
            {**SIZES, "num_key_value_heads": 3, "head_dim": 4, "layer_types": [f"{kind}_attention"], "sliding_window": 3,
             "rope_parameters": {k: v for k, v in YARN_THERE.items() if "mscale" not in k} | {"truncate": False}},
            Attention(6, 3, 4, SINKS_ROPE, qkv_bias=True, out_bias=True, window=3 if kind == "sliding" else None, sinks=True),
            {**GROUPED, **GROUPED_BIAS, "sinks": "sinks"},
        )
        for kind in ("sliding", "full")
    },
}  # fmt: skip


def attention_of(kind: str, config: dict[str, Any]) -> tuple[Any, Callable[[torch.Tensor], Any]]:
    """transformers' attention layer with random weights, and what it makes of positions."""
    from transformers import AutoConfig, AutoModel

    made = AutoConfig.for_model(kind, **config, vocab_size=37, intermediate_size=10)
    made._attn_implementation = "eager"
    whole = AutoModel.from_config(made).double()
    module = whole.layers[0].self_attn
    for name, w in module.named_parameters():
        w.data = draw(name, shape=tuple(w.shape)) * (w.shape[-1] ** -0.5 if w.dim() > 1 else 0.5) + ("norm" in name)
    return module, lambda x: whole.rotary_emb(x, torch.arange(x.shape[1])[None])


@pytest.mark.parametrize("name", ORACLES)
def test_transformers(name: str) -> None:
    kind, config, mixer, names = ORACLES[name]
    model, ctx = model_of(mixer), context(lf.solo())
    (segment,) = (s for s in model.segments if s.name == "layers.0.attn")
    (batch,) = parity.random_batches(model, 0, 0, 1, 17)
    with in_float64():
        module, positions = attention_of(kind, config)
    theirs = dict(module.named_parameters())
    groups = {ours: [theirs.pop(n) for n in ((there,) if isinstance(there, str) else there)] for ours, there in names.items()}
    assert not theirs, "all that it has is one of ours"
    norm = 1 + draw("norm", shape=(15,)) / 2
    p = {"norm": norm, **{ours: torch.cat([w.detach() for w in group]) for ours, group in groups.items()}}
    assert {n: tuple(w.shape) for n, w in p.items()} == {n: param.shape for n, param in segment.params.items()}
    p = {n: w.requires_grad_() for n, w in p.items()}

    x = draw("x", shape=(len(batch.plan["tokens"]), 15)).requires_grad_()
    got, _ = segment.apply(p, x, lf.shard_batch(batch, model, ctx), ctx)
    edges = [int(n) for n in batch.plan["cu_seqlens"].unique()]
    h = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm
    want = torch.cat([said(module, positions, h[a:b], getattr(mixer, "window", None)) for a, b in itertools.pairwise(edges)]) + x
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)

    dy, found = draw("dy", shape=tuple(x.shape)), [n for n in names if n != "norm"]
    of_ours = torch.autograd.grad(got, [x, p["norm"], *(p[n] for n in found)], dy)
    of_x, of_norm, *rest = torch.autograd.grad(want, [x, norm, *(w for n in found for w in groups[n])], dy)
    of_theirs = [of_x, of_norm, *(torch.cat([rest.pop(0) for _ in groups[n]]) for n in found)]
    for n, a, b in zip(["x", "norm", *found], of_ours, of_theirs, strict=True):
        assert b.abs().max() > 1e-3, f"{n}: the comparison would say nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


def said(module: Any, positions: Callable[[torch.Tensor], Any], h: torch.Tensor, window: int | None) -> torch.Tensor:
    """Of one document (t, D)."""
    seen = torch.ones(len(h), len(h), dtype=torch.bool).tril().triu(-99 if window is None else 1 - window)
    mask = torch.zeros(seen.shape, dtype=h.dtype).masked_fill(~seen, -torch.inf)[None, None]
    with in_float64():
        return module(hidden_states=h[None], position_embeddings=positions(h[None]), attention_mask=mask)[0][0]


def test_operations_of_latent_attention() -> None:
    """Counted by hand: 6 an element of a matrix and token; scores of 7 dims and values of 5 for each head and each pair of a query and its key."""
    (batch,) = parity.random_batches(model_of(MIXERS["latent"]), 0, 0, 1, 17)
    lengths = batch.plan["cu_seqlens"].diff()
    pairs = int((lengths * (lengths + 1) // 2).sum())
    for name, q, width in (("latent", 5 * 15 + 3 * 7 * 5, 7 + 5), ("latent q", 3 * 5 * 15, 5 + 2)):
        a = MIXERS[name]
        (segment,) = (s for s in model_of(a).segments if s.name == "layers.0.attn")
        elements = q + (7 + a.rope_dim) * 15 + 3 * (3 + a.value_dim) * 7 + 15 * 3 * a.value_dim
        assert segment.flops is not None
        assert segment.flops(batch) == 6 * int(lengths.sum()) * elements + 6 * pairs * 3 * width


def test_what_cannot_be_is_refused() -> None:
    good = MIXERS["latent"]
    for changes, words in (
        ({"rope_dim": 3}, "rope_dim=3 must be even"),
        ({"kv_rank": 0}, "kv_rank=0 and q_rank=5 must each be at least 1"),
        ({"q_rank": 0}, "q_rank=0 must each be at least 1"),
        ({"rope": Rope(dim=2)}, "dim=2: here they turn all of rope_dim=4; leave dim out"),
    ):
        with pytest.raises(ConfigError) as caught:
            attrs.evolve(good, **changes)
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"qk_norm_all=True .* give qk_norm=True as well"):
        Attention(2, 1, 4, qk_norm_all=True)

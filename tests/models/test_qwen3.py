"""Qwen3 against transformers: logits, loss and every gradient, on one rank and on many; its config.json read and written."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
import torch
from helpers import context
from qwen3_oracle import assert_pieces, oracle, said, tensors

import lf
from lf.config import ConfigError
from lf.models import families
from lf.models.decoder import Attention, GatedMLP, Layer
from lf.models.families import qwen3
from lf.models.presets import PRESETS
from lf.ops.rope import Rope
from lf.parity import random_batches

MESHES = ["", "tp=2", "tp=4", "tp=3,dp=2", "tp=2,dp=2"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mesh", MESHES)
def test_logits_loss_and_every_gradient(tmp_path: Any, tied: bool, mesh: str) -> None:
    hf = oracle(tied)
    hf.save_pretrained(tmp_path)
    model = lf.hf.model(tmp_path)
    sizes = lf.Mesh.parse(mesh).fill()
    batches = random_batches(model, seed=1, step=0, count=2 * sizes["dp"], tokens=17)
    results = [said(hf, b) for b in batches]
    count = sum(int((b.plan["labels"] != lf.IGNORE).sum()) for b in batches)
    loss = torch.stack([s for _, s in results]).sum() / count
    loss.backward()
    whole = {name: p.grad for name, p in tensors(hf).items()}

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(model, axes.mesh)
        params = lf.hf.load(tmp_path, layout, ctx)
        mine = batches[axes.coords["dp"] :: sizes["dp"]]
        for batch, (want, _) in zip(mine, results[axes.coords["dp"] :: sizes["dp"]]):
            bare = lf.Batch({k: v for k, v in batch.plan.items() if k != "labels"})
            torch.testing.assert_close(lf.forward(model, params, bare, ctx), want.detach(), atol=1e-4, rtol=0)
        grads, metrics = lf.train.gradients(layout, lf.schedule.one_f_one_b(1, 2), ctx)(params, mine)
        torch.testing.assert_close(metrics["loss"], loss.detach(), atol=1e-5, rtol=1e-5)
        assert_pieces(grads, layout, axes.coords, whole, atol=1e-4 * max(1.0, max(g.abs().max().item() for g in whole.values())))

    lf.sim.spmd(sizes, rank)


def test_config_survives_both_ways(tmp_path: Any) -> None:
    from transformers import AutoConfig

    for tied in (True, False):
        config = attrs.evolve(oracle_config(), tied=tied, max_len=777, norm_eps=3e-5, init_std=0.05, embed_std=0.05)
        (tmp_path / "config.json").write_text(json.dumps(qwen3.write(config)))
        assert lf.hf.read_config(tmp_path) == config
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert (theirs.vocab_size, theirs.max_position_embeddings, theirs.tie_word_embeddings, theirs.rms_norm_eps) == (37, 777, tied, 3e-5)
        rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": theirs.rope_theta, "rope_type": "default"}
        assert rope == {"rope_theta": 50000.0, "rope_type": "default"}
        theirs.save_pretrained(tmp_path)
        assert lf.hf.read_config(tmp_path) == config


def test_old_keys_are_read() -> None:
    old = qwen3.write(oracle_config())
    del old["rope_parameters"]
    assert families.read({**old, "torch_dtype": "bfloat16", "head_mask": 3}) == oracle_config()
    new = qwen3.write(oracle_config())
    del new["rope_theta"], new["rope_scaling"]
    assert families.read({**new, "layer_types": ["full_attention"] * 2}) == oracle_config()
    assert families.read({**old, "rope_scaling": {"type": "default"}}) == oracle_config()


REFUSED = {
    "attention_dropout=0.1": {"attention_dropout": 0.1},
    "hidden_act='gelu'": {"hidden_act": "gelu"},
    "is_causal=False": {"is_causal": False},
    "quantization_config={'quant_method': 'fp8'}": {"quantization_config": {"quant_method": "fp8"}},
    "'sliding_attention'": {"layer_types": ["full_attention", "sliding_attention"]},
    "layer_types lists 3": {"layer_types": ["full_attention"] * 3},
    "rope_scaling='linear' should be an object": {"rope_scaling": "linear"},
    "these should be equal": {"rope_theta": 1e6},
    "architectures=['Qwen3ForSequenceClassification']": {"architectures": ["Qwen3ForSequenceClassification"]},
    "vocab_size='37' should be a whole number": {"vocab_size": "37"},
    "hidden_size=0 should": {"hidden_size": 0},
    "num_hidden_layers=2.5 should": {"num_hidden_layers": 2.5},
    "rms_norm_eps=-1 should": {"rms_norm_eps": -1},
    "tie_word_embeddings='yes'": {"tie_word_embeddings": "yes"},
    "head_dim=5 must be even": {"head_dim": 5},
    "heads=6 must be a multiple of kv_heads=4": {"num_key_value_heads": 4},
    "did you mean 'qwen3'": {"model_type": "qwen3_"},
    "unknown model_type 'gpt2'. Known: deepseek_v2, deepseek_v3, glm4_moe, gpt_oss, internlm2, llama, mimo, minimax_m2": {"model_type": "gpt2"},
    "rope_type='longrope' is not supported; default, linear, dynamic, llama3, yarn are": {"rope_parameters": {"rope_type": "longrope"}},
    "rotary positions of kind 'yarn' have no low_freq_factor=1": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "low_freq_factor": 1}},
    "kind 'llama3' need low_freq_factor": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
    "factor=0.5 at least 1": {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
    "partial_rotary_factor that turns 2 of head_dim=4 is not supported; Qwen3ForCausalLM turns whole heads": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor=1.5 should lie above 0": {"partial_rotary_factor": 1.5},
    "use_sliding_window=True, and sliding_window=None should be a whole number": {"use_sliding_window": True, "sliding_window": None},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_supported_is_refused_by_name(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        families.read({**qwen3.write(oracle_config()), **REFUSED[words]})
    assert words in str(caught.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        families.read({"model_type": "qwen3", "vocab_size": 37, "mlp_bias": True})
    for word in ("hidden_size is", "intermediate_size is", "num_hidden_layers is", "num_attention_heads is", "rms_norm_eps is", "mlp_bias=True"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match=r"no model_type; known: .*llama.*qwen3"):
        families.read({})


def test_a_model_that_no_family_has_cannot_be_written() -> None:
    config = oracle_config()
    odd = attrs.evolve(config, layers=(config.layers[0], Layer(Attention(2, 1, 4, qk_norm=True), GatedMLP(10))))
    with pytest.raises(ConfigError, match="qwen3: its layers must all be alike"):
        families.of(odd)
    with pytest.raises(ConfigError, match="is no DecoderConfig"):
        families.of(3)


def test_unknown_sources(tmp_path: Any) -> None:
    unknown = {"qwen3-06b": "did you mean 'qwen3-0.6b'", str(tmp_path / "no"): "or a folder with"}
    for source, words in unknown.items():
        with pytest.raises(ConfigError, match="unknown model") as caught:
            lf.hf.model(source)
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        lf.hf.model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="should be a JSON object, is a list"):
        lf.hf.model(tmp_path)


def oracle_config() -> Any:
    layer = Layer(Attention(6, 3, 4, Rope(50000.0), qk_norm=True), GatedMLP(10))
    return attrs.evolve(PRESETS["qwen3-demo"], vocab=37, dim=15, layers=(layer, layer), norm_eps=1e-5, embed_std=0.02)

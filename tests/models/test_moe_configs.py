"""Families with mixtures of experts: what their config.json may say and what it means, what cannot be written, presets and what is shrunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers import context
from safetensors.torch import load_file, save_file
from wide_oracle import built, values_of

import lf
from lf import parity
from lf.config import ConfigError
from lf.models import families
from lf.models.decoder import MTP, Layer, decoder
from lf.models.moe import MoE
from lf.models.presets import PRESETS
from lf.models.router import Router
from lf.models.small import shrunk
from lf.ops.rope import Rope


def test_kimi_is_read_as_what_it_is_and_written_so() -> None:
    """K2 says beta_fast=1, the same as beta_slow: the ramp is within one pair."""
    values = values_of("deepseek_v3 in halves, biases") | {"architectures": ["DeepseekV3ForCausalLM"]}
    config = families.read({**values, "model_type": "kimi_k2"})
    assert config == families.read(values)
    assert families.of(config).write(config)["model_type"] == "deepseek_v3"
    rope = PRESETS["kimi-k2"].layers[0].mixer.rope
    assert (rope.beta_fast, rope.beta_slow) == (1.0, 1.0)


REFUSED = {
    "model_type='deepseek_v32' is not supported: its sparse attention": ("deepseek_v3", {"model_type": "deepseek_v32"}),
    "model_type='glm_moe_dsa' is not supported: its sparse attention": ("deepseek_v3", {"model_type": "glm_moe_dsa"}),
    "scoring_func='softmax' is not supported; only 'sigmoid' is": ("deepseek_v3", {"scoring_func": "softmax"}),
    "topk_method='greedy' is not supported; only 'noaux_tc' is": ("deepseek_v3", {"topk_method": "greedy"}),
    "moe_layer_freq=2 is not supported": ("deepseek_v3", {"moe_layer_freq": 2}),
    "none of its 3 layers has experts": ("deepseek_v3", {"num_hidden_layers": 3, "first_k_dense_replace": 3}),
    "none of its 2 layers has experts": ("qwen3_moe", {"num_hidden_layers": 2, "mlp_only_layers": [0, 1]}),
    "num_key_value_heads=2 is not supported; keys are made for each of num_attention_heads=4": ("deepseek_v3", {"num_key_value_heads": 2}),
    "q_lora_rank=0 should be a whole number above 0": ("deepseek_v3", {"q_lora_rank": 0}),
    "first_k_dense_replace=-1 should be a whole number from 0": ("deepseek_v3", {"first_k_dense_replace": -1}),
    "n_shared_experts=0 should be a whole number above 0": ("deepseek_v3", {"n_shared_experts": 0}),
    "num_nextn_predict_layers='one' should be a whole number from 0": ("deepseek_v3", {"num_nextn_predict_layers": "one"}),
    "groups=3 must divide experts=8": ("deepseek_v3", {"n_group": 3}),
    "aux_loss_alpha=-1 should be a number, 0 or more": ("deepseek_v3", {"aux_loss_alpha": -1}),
    "a partial_rotary_factor that turns 2 dims is not supported": ("deepseek_v3", {"partial_rotary_factor": 0.5}),
    "topk_method='noaux_tc' is not supported; 'greedy' and 'group_limited_greedy' are": ("deepseek_v2", {"topk_method": "noaux_tc"}),
    "norm_topk_prob=True is not supported; only False is": ("deepseek_v2", {"norm_topk_prob": True}),
    "rope_interleave=False is not supported": ("deepseek_v2", {"rope_interleave": False}),
    "mlp_only_layers='all' should be a list": ("qwen3_moe", {"mlp_only_layers": "all"}),
    "num_experts_per_tok='2' should be a whole number": ("qwen3_moe", {"num_experts_per_tok": "2"}),
    "top=9 must be from 1 to the number of experts, 8": ("qwen3_moe", {"num_experts_per_tok": 9}),
    "norm_topk_prob='yes' should be true or false": ("qwen3_moe", {"norm_topk_prob": "yes"}),
    "shared_expert_intermediate_size=0 should": ("qwen2_moe", {"shared_expert_intermediate_size": 0}),
    "router_jitter_noise=0.1 is not supported; only 0 is": ("mixtral", {"router_jitter_noise": 0.1}),
    "use_routing_bias=False is not supported": ("minimax_m2", {"use_routing_bias": False}),
    "qk_norm_type='per_head' is not supported": ("minimax_m2", {"qk_norm_type": "per_head"}),
    "swiglu_alpha=1.5 is not supported; only 1.702 is": ("gpt_oss", {"swiglu_alpha": 1.5}),
    "quantization_config={'quant_method': 'awq'} is not supported": ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}),
    "layer_types lists 1 layers": ("gpt_oss", {"layer_types": ["full_attention"]}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_supported_is_refused_by_name(words: str) -> None:
    case, change = REFUSED[words]
    with pytest.raises(ConfigError) as caught:
        families.read(values_of(case) | change)
    assert words in str(caught.value)


def test_experts_in_4_bits_are_refused_with_the_way_out(tmp_path: Path) -> None:
    built("gpt_oss").save_pretrained(tmp_path)
    model, path = lf.hf.model(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({**tensors, name + "_blocks": torch.zeros(2, dtype=torch.uint8)}, path, metadata={"format": "pt"})

    def rank(axes: Any) -> None:
        with pytest.raises((ConfigError, lf.hf.CheckpointError), match=rf"{name}_blocks: experts in blocks of 4 bits.*dequantize=True"):
            lf.hf.load(tmp_path, lf.layout(model, axes.mesh), context(axes, "fp32"))

    lf.sim.spmd(lf.Mesh(dp=1), rank)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ConfigError, match=r"quant_method='mxfp4'.*dequantize=True"):
        lf.hf.model(tmp_path)


def changed(case: str, **changes: Any) -> Any:
    """The config of a case, with other fields in its mixtures: of the router, or of the mixture itself."""
    config = families.read(values_of(case))
    of = {a.name for a in attrs.fields(Router)}
    routed, own = ({k: v for k, v in changes.items() if (k in of) == yes} for yes in (True, False))

    def layer(x: Layer) -> Layer:
        return attrs.evolve(x, ffn=attrs.evolve(x.ffn, router=attrs.evolve(x.ffn.router, **routed), **own)) if isinstance(x.ffn, MoE) else x

    return attrs.evolve(config, layers=tuple(map(layer, config.layers)))


UNSAID: dict[str, tuple[str, dict[str, Any]]] = {
    "its layers have no router.score='sigmoid', as layers.1 of the model": ("qwen3_moe", {"score": "sigmoid"}),
    "its layers have no router.bias=True": ("qwen3_moe", {"bias": True}),
    "its layers have no shared=5": ("qwen3_moe", {"shared": 5}),
    "its mixtures have a shared expert; those of the model have none": ("qwen2_moe", {"shared": 0, "shared_gate": False}),
    "its layers have no router.scale=2.0": ("mixtral", {"scale": 2.0}),
    "its layers have no router.normalise=False": ("mixtral", {"normalise": False}),
    "its layers have no biases=True": ("deepseek_v3", {"biases": True}),
    "its shared expert is as wide as a whole number of experts, each 6; that of the model is 7 wide": ("deepseek_v3", {"shared": 7}),
    "its layers have no router.group_score='max'": ("deepseek_v3", {"group_score": "max"}),
    "its layers have no router.normalise=True": ("deepseek_v2", {"normalise": True}),
    "its layers have no router.groups=2": ("minimax_m2", {"groups": 2, "top_groups": 1}),
    "its experts have a clamped activation; those of the model have a plain one": ("gpt_oss", {"limit": None}),
}


@pytest.mark.parametrize("words", UNSAID)
def test_what_a_family_has_not_cannot_be_written(words: str) -> None:
    case, change = UNSAID[words]
    with pytest.raises(ConfigError) as caught:
        families.of(changed(case, **change))
    assert words in str(caught.value)


def test_which_layers_have_experts_is_written_where_the_family_can_say_it() -> None:
    qwen, v3 = families.read(values_of("qwen3_moe")), families.read(values_of("deepseek_v3"))
    for layers in ((0, 1), (1, 0), (1, 0, 0, 1), (1, 1)):
        config = attrs.evolve(qwen, layers=tuple(qwen.layers[i] for i in layers))
        assert families.read(families.of(config).write(config)) == config
    for layers in ((0, 0, 1, 1), (1, 1)):
        config = attrs.evolve(v3, layers=tuple(v3.layers[i] for i in layers))
        assert families.read(families.of(config).write(config)) == config
    with pytest.raises(ConfigError, match="its layers without experts are the first ones"):
        families.of(attrs.evolve(v3, layers=v3.layers[::-1]))
    with pytest.raises(ConfigError, match="has 0 kinds and 1"):
        families.of(attrs.evolve(qwen, layers=qwen.layers[:1]))
    with pytest.raises(ConfigError, match="heads that predict further ahead have a layer like the last of the model each"):
        families.of(attrs.evolve(v3, mtp=MTP(v3.layers[:1])))
    with pytest.raises(ConfigError, match="heads that predict further ahead have no place in its files"):
        families.of(attrs.evolve(qwen, mtp=MTP(qwen.layers[-1:])))
    with pytest.raises(ConfigError, match="it has grouped-query attention; that of the model is Latent"):
        families.of(attrs.evolve(v3, family="qwen3_moe"))
    assert families.of(attrs.evolve(v3, family="")).write(v3)["model_type"] == "deepseek_v3"


def test_what_a_missing_field_means() -> None:
    """As for the classes of transformers."""
    values = values_of("glm4_moe plain")
    del values["rope_parameters"]
    assert families.read(values).layers[0].mixer.rope == Rope(dim=4)
    whole = families.read({**values, "partial_rotary_factor": 1.0})
    assert whole.layers[0].mixer.rope.dim is None
    assert families.read(families.of(whole).write(whole)) == whole, "a file that says nothing means half"
    values = values_of("gpt_oss")
    for name in ("rope_parameters", "layer_types", "swiglu_limit", "sliding_window", "attention_bias"):
        del values[name]
    first, second = families.read(values).layers
    assert first.mixer.rope == Rope(150000.0, "yarn", 32.0, original_len=4096, truncate=False)
    assert (first.mixer.window, second.mixer.window, first.ffn.limit, first.mixer.out_bias) == (128, None, 7.0, True)
    values = values_of("mixtral")
    del values["rope_parameters"]
    assert families.read(values).layers[0].mixer.rope.theta == 1e6
    values = values_of("deepseek_v3")
    for name in ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "first_k_dense_replace"):
        del values[name]
    read = families.read({**values, "num_hidden_layers": 4, "n_routed_experts": 16, "aux_loss_alpha": 0.5, "seq_aux": False})
    assert [isinstance(layer.ffn, MoE) for layer in read.layers] == [False, False, False, True]
    r = read.layers[3].ffn.router
    assert (r.groups, r.top_groups, r.scale, r.normalise, r.balance, r.sequence_balance) == (8, 4, 2.5, True, 0.5, 0.0)


LARGE = [name for name, config in PRESETS.items() if any(isinstance(layer.ffn, MoE) for layer in config.layers)]


@pytest.mark.parametrize("name", LARGE)
def test_what_is_shrunk_is_of_the_same_kind(name: str) -> None:
    config, small = PRESETS[name], shrunk(PRESETS[name])
    assert shrunk(small) == small
    assert families.read(families.of(small).write(small)) == attrs.evolve(small, embed_std=small.init_std)
    assert (small.mtp is None, len(set(small.layers))) == (config.mtp is None, len(set(config.layers)))
    assert small.dim <= 64
    for a, b in zip(dict.fromkeys(small.layers), dict.fromkeys(config.layers)):
        assert (type(a.ffn), type(a.mixer)) == (type(b.ffn), type(b.mixer))
        if isinstance(a.ffn, MoE):
            r, s = a.ffn.router, b.ffn.router
            assert r.experts <= 8
            assert r.top == 2
            assert (r.groups > 1, r.groups > r.top_groups, r.bias) == (s.groups > 1, s.groups > s.top_groups, s.bias)
            assert a.ffn.shared / a.ffn.dim == b.ffn.shared / b.ffn.dim


@pytest.mark.parametrize("name", LARGE)
def test_law_1(name: str) -> None:
    report = parity.compare(decoder(shrunk(PRESETS[name])), lf.Mesh.parse("tp=3,dp=2,ep=3,etp=2"), microbatches=1, steps=1)
    assert report.ok, str(report)

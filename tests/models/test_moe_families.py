"""Families with mixtures of experts against transformers in float64: logits and every gradient, and their files both ways."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import context
from safetensors.torch import load_file, save_file
from wide_oracle import gradients, randomised, said, wide

import lf
from lf import parity, tree
from lf.config import ConfigError
from lf.models import families
from lf.models.decoder import MTP, Layer, decoder
from lf.models.families.place import places
from lf.models.moe import MoE
from lf.models.presets import PRESETS
from lf.models.router import Router
from lf.models.small import shrunk
from lf.ops.rope import Rope
from lf.parity import random_batches

os.environ["HF_HUB_OFFLINE"] = "1"

SHAPES: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 6, "num_experts": 8, "num_experts_per_tok": 2}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {"moe_intermediate_size": 6, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.7, "mscale_all_dim": 1.0,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3_moe not normalised, tied, slides": (
        "Qwen3Moe",
        {**QWEN, "head_dim": 8, "decoder_sparse_step": 2, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4},
    ),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 7}),
    "qwen2_moe slides": (
        "Qwen2Moe",
        {**QWEN, "shared_expert_intermediate_size": 7, "qkv_bias": False, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 4},
    ),
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral slides": ("Mixtral", {**MIXTRAL, "head_dim": 8, "sliding_window": 4}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, **SHARED, "n_group": 4, "topk_group": 2, "rope_parameters": YARN}),
    "deepseek_v3 in halves, biases": (
        "DeepseekV3",
        {
            **LATENT, **SHARED, "n_group": 1, "topk_group": 1, "rope_interleave": False, "attention_bias": True, "norm_topk_prob": False,
            "q_lora_rank": None, "routed_scaling_factor": 2.827,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **LATENT, **SHARED, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v2 lite": ("DeepseekV2", {**LATENT, **SHARED, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "minimax_m2": ("MiniMaxM2", {**MIXTRAL, "head_dim": 8, "rotary_dim": 4}),
    "glm4_moe": ("Glm4Moe", {**SHARED, "head_dim": 8, "use_qk_norm": True, "attention_bias": True, "n_group": 4, "topk_group": 2}),
    "glm4_moe plain": ("Glm4Moe", {**SHARED, "head_dim": 8, "n_shared_experts": 1, "routed_scaling_factor": 2.5}),
    "gpt_oss": ("GptOss", {**MIXTRAL, "head_dim": 8, "sliding_window": 4, "swiglu_limit": 0.5}),
}  # fmt: skip


def built(case: str, **more: Any) -> Any:
    """The tiny model of transformers in float64."""
    import transformers

    name, changes = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**SHAPES, **changes, **more})
    config._attn_implementation = config._experts_implementation = "eager"
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config))


def run(folder: Path, batches: list[lf.Batch]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """({name on disk: gradient}, metrics) of lf on one rank, of the weights in a folder."""
    model = lf.hf.model(folder)

    def rank(axes: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        ctx, layout = context(axes, "fp64"), lf.layout(model, axes.mesh)
        params = lf.hf.load(folder, layout, ctx)
        grads, metrics = lf.train.gradients(layout, lf.schedule.one_f_one_b(1, len(batches)), ctx)(params, batches)
        lf.hf.save(folder.with_name("again"), layout, params, ctx)
        frozen = {path: torch.zeros_like(tree.get(params, path)) for path in layout.specs.keys() - dict(tree.items(grads)).keys()}
        lf.hf.save(folder.with_name("grads"), layout, tree.build([*tree.items(grads), *frozen.items()]), ctx)
        return load_file(folder.with_name("grads") / "model.safetensors"), metrics

    (out,) = lf.sim.spmd(lf.Mesh(dp=1), rank)
    return out


def close(got: torch.Tensor, want: torch.Tensor, scale: float, what: str) -> None:
    assert got.shape == want.shape, what
    assert (got - want).abs().max() <= 1e-10 * scale, f"{what}: off by {(got - want).abs().max():.2e}, largest {scale:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_and_files_both_ways(tmp_path: Path, case: str) -> None:
    module = case.split()[0]
    with wide(module):
        hf = built(case)
        hf.save_pretrained(tmp_path / "a")
        trunk_alone(tmp_path / "a")
        model = lf.hf.model(tmp_path / "a")
        batches = random_batches(model, seed=1, step=0, count=2, tokens=23)
        results = [said(hf, b) for b in batches]
        count = sum(int((b.plan["labels"] != lf.IGNORE).sum()) for b in batches)
        (torch.stack([s for _, s in results]).sum() / count).backward()
    before, whole = load_file(tmp_path / "a" / "model.safetensors"), gradients(hf, tmp_path / "g")
    at, scale = places(families.of(model.config).names(model.config)), max(float(g.abs().max()) for g in whole.values())

    def rank(axes: Any) -> None:
        ctx, layout, dp = context(axes, "fp64"), lf.layout(model, axes.mesh), axes["dp"]
        params = lf.hf.load(tmp_path / "a", layout, ctx)
        for batch, (want, _) in zip(batches[dp.index :: dp.size], results[dp.index :: dp.size]):
            bare = lf.Batch({k: v for k, v in batch.plan.items() if k != "labels"})
            close(lf.forward(model, params, bare, ctx), want.detach(), float(want.abs().max()), "logits")
        grads, _ = lf.train.gradients(layout, lf.schedule.one_f_one_b(1, 2 // dp.size), ctx)(params, batches[dp.index :: dp.size])
        for path, spec in layout.specs.items():
            for piece in spec.pieces(axes.coords) if spec.param.learned else ():
                got = piece.view(tree.get(grads, path))
                for cut in at[piece.key].cuts(piece.box):
                    want = at[piece.key].logical(whole[cut.name][tuple(slice(*b) for b in cut.disk)])
                    here = tuple(slice(b[0] - o[0], b[1] - o[0]) for b, o in zip(cut.part, piece.box))
                    close(got[here], want, scale, piece.key)
        lf.hf.save(tmp_path / f"b{axes.mesh.size}", layout, params, ctx)

    for mesh in ("", "dp=2,ep=2"):
        lf.sim.spmd(lf.Mesh.parse(mesh).fill(), rank)
    for folder in ("b1", "b2"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], w) for name, w in before.items())
        assert lf.hf.read_config(tmp_path / folder) == model.config
    from transformers import AutoModelForCausalLM

    with wide(module):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b2", attn_implementation="eager", dtype=torch.float64).eval()
        theirs.config._experts_implementation = "eager"
        assert type(theirs) is type(hf)
        with torch.no_grad():
            close(said(theirs, batches[0])[0], results[0][0].detach(), float(results[0][0].abs().max()), "logits of what lf wrote")


def trunk_alone(folder: Path) -> None:
    """transformers says that there is a further head, and writes none."""
    values = json.loads((folder / "config.json").read_text())
    if "num_nextn_predict_layers" in values:
        (folder / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 0}))


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral slides"])
def test_the_loss_of_routers_is_that_of_transformers_for_one_layer(tmp_path: Path, case: str) -> None:
    """With several layers theirs pools tokens of all layers, and ours adds layers up (lf/models/families/ffn.py)."""
    module = case.split()[0]
    with wide(module):
        hf = built(case, num_hidden_layers=2 if module == "qwen3_moe" else 1, output_router_logits=True, router_aux_loss_coef=0.7)
        hf.save_pretrained(tmp_path / "a")
        words = torch.arange(29) * 7 % 37
        out = hf(words[None], labels=words[None], output_router_logits=True, use_cache=False)
        out.loss.backward()
    (layer,) = {layer.ffn for layer in lf.hf.model(tmp_path / "a").config.layers if isinstance(layer.ffn, MoE)}
    assert layer.router.balance == pytest.approx(0.7 * 2)
    labels = torch.cat([words[1:], torch.tensor([lf.IGNORE])])
    batch = lf.data.pack([lf.data.Row(words.numpy(), labels.numpy(), np.array([0]))])
    got, metrics = run(tmp_path / "a", [batch])
    assert float(out.aux_loss) > 1
    torch.testing.assert_close(metrics["balance"] * layer.router.balance, 0.7 * out.aux_loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics["loss"], out.loss.detach(), rtol=1e-10, atol=0)
    want = gradients(hf, tmp_path / "g")
    for name, g in want.items():
        close(got[name], g, max(float(g.abs().max()) for g in want.values()), name)
    assert lf.hf.read_config(tmp_path / "again") == lf.hf.read_config(tmp_path / "a")


def on_disk(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of transformers' further head under the names of the releases."""
    out = {}
    for name, w in tensors.items():
        where, block = prefix + name.removeprefix("mtp_block."), name.startswith("mtp_block.")
        if name.endswith("experts.gate_up_proj"):
            for k, (gate, up) in enumerate(e.chunk(2) for e in w):
                stem = f"{where.removesuffix('gate_up_proj')}{k}."
                out |= {f"{stem}gate_proj.weight": gate.contiguous(), f"{stem}up_proj.weight": up.contiguous()}
        elif name.endswith("experts.down_proj"):
            out |= {f"{where.removesuffix('down_proj')}{k}.down_proj.weight": e.contiguous() for k, e in enumerate(w)}
        else:
            out[where if block else prefix + name.replace("post_norm", "shared_head.norm")] = w.contiguous()
    return out


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe plain"])
def test_a_head_that_predicts_further_ahead(tmp_path: Path, case: str) -> None:
    """Against transformers' own, which drafts with it: its layer, its norms, which half of the product is which, and what it shares."""
    from transformers.modeling_layers import MtpModel

    with wide(case.split()[0]):
        hf = built(case)
        heads = MtpModel(hf, 1)
        randomised(heads.layers, seed=4)
        hf.save_pretrained(tmp_path / "a")
        path = tmp_path / "a" / "model.safetensors"
        prefix = f"model.layers.{hf.config.num_hidden_layers}."
        before = load_file(path)
        further = on_disk({**dict(heads.layers[0].named_parameters()), **dict(heads.layers[0].named_buffers())}, prefix)
        shared = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
        twice = {prefix + copy: before[name].clone() for copy, name in shared.items()}
        save_file({**before, **{k: w.detach().clone() for k, w in further.items()}, **twice}, path, metadata={"format": "pt"})
        model = lf.hf.model(tmp_path / "a")
        assert model.config.mtp == MTP((model.config.layers[-1],))
        batches = random_batches(model, seed=1, step=0, count=2, tokens=23)
        near, far, counts = [], [], [0, 0]
        for batch in batches:
            for a, b in itertools.pairwise(int(n) for n in batch.plan["cu_seqlens"].unique()):
                words, labels = batch.plan["tokens"][None, a:b], batch.plan["labels"][a:b]
                hidden = hf.model(words, use_cache=False).last_hidden_state
                near.append(F.cross_entropy(hf.lm_head(hidden)[0], labels, reduction="sum"))
                if b - a > 1:
                    later = heads.forward_layer(0, hidden[:, :-1], torch.arange(1, b - a)[None], None, input_ids=words[:, 1:])
                    far.append(F.cross_entropy(hf.lm_head(later)[0], labels[1:], reduction="sum"))
                counts = [counts[0] + int((labels != lf.IGNORE).sum()), counts[1] + int((labels[1:] != lf.IGNORE).sum())]
        losses = torch.stack(near).sum() / counts[0], torch.stack(far).sum() / counts[1]
        (losses[0] + model.config.mtp.weight * losses[1]).backward()
    got, metrics = run(tmp_path / "a", batches)
    torch.testing.assert_close(metrics["mtp_0"], losses[1].detach(), rtol=1e-10, atol=0)
    want = on_disk({name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in heads.layers[0].named_parameters()}, prefix)
    assert all(g.any() for name, g in want.items() if ".mlp.experts." not in name)
    want |= gradients(hf, tmp_path / "g")
    for name, g in want.items():
        close(got[name], g, max(float(g.abs().max()) for g in want.values()), name)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == {**before, **further}.keys(), "the copies are not written"
    assert all(torch.equal(again[name], w) for name, w in {**before, **further}.items())
    twice[prefix + "embed_tokens.weight"][0, 0] += 1
    save_file({**again, **twice}, path, metadata={"format": "pt"})
    with pytest.raises(lf.hf.CheckpointError, match=r"model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight"):
        run(tmp_path / "a", batches)


def test_what_steers_training_alone_need_not_be_in_the_files(tmp_path: Path) -> None:
    """Capacity, losses and what one of them counts: a folder without them is loaded, and an export of such a model is an ordinary one."""
    hf = built("qwen3_moe")
    hf.save_pretrained(tmp_path / "a")
    config = lf.hf.read_config(tmp_path / "a")
    dense, sparse = config.layers
    router = attrs.evolve(sparse.ffn.router, capacity=1.5, balance=0.1, global_balance=0.2, z=0.3)
    steered = attrs.evolve(config, layers=(dense, attrs.evolve(sparse, ffn=attrs.evolve(sparse.ffn, router=router))))
    model = decoder(steered)

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(model, axes.mesh)
        params = lf.hf.load(tmp_path / "a", layout, ctx)
        assert tree.get(params, "layers.1.route/fraction").tolist() == [1 / 8] * 8
        lf.hf.save(tmp_path / "b", layout, params, ctx)

    lf.sim.spmd(lf.Mesh.parse("dp=2,ep=2"), rank)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], w) for name, w in before.items())
    assert families.bare(lf.hf.read_config(tmp_path / "b")) == families.bare(steered)
    assert lf.hf.read_config(tmp_path / "b").layers[1].ffn.router.balance == 0.1


def values_of(case: str) -> dict[str, Any]:
    """A config.json as transformers writes it."""
    import transformers

    name, changes = CASES[case]
    return getattr(transformers, f"{name}Config")(**{**SHAPES, **changes}).to_dict() | {"num_nextn_predict_layers": 0}


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

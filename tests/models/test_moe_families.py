"""Families with mixtures of experts against transformers in float64: logits and every gradient, and their files both ways."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import context
from safetensors.torch import load_file
from wide_oracle import gradients, randomised, said, wide

import lf
from lf import tree
from lf.models import families
from lf.models.families.place import places
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


def built(case: str) -> Any:
    """The tiny model of transformers in float64."""
    import transformers

    name, changes = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**SHAPES, **changes})
    config._attn_implementation = config._experts_implementation = "eager"
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config))


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

"""Tiny models of transformers with mixtures of experts, in float64 throughout: what their code casts to float32 (norms, routers, softmax, rotary
tables) stays wide."""

from __future__ import annotations

import importlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import lf

os.environ["HF_HUB_OFFLINE"] = "1"

BIAS = "e_score_correction_bias"
WIDENED = ("modeling_rope_utils", "modeling_layers")


class Wide:
    """The module torch, in which float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def wide(name: str) -> Iterator[None]:
    """Within, the classes of transformers.models.`name` compute in float64."""
    modules: list[ModuleType] = [importlib.import_module(f"transformers.{shared}") for shared in WIDENED]
    modules.append(importlib.import_module(f"transformers.models.{name}.modeling_{name}"))
    narrow = torch.Tensor.float
    for module in modules:
        module.torch = Wide()  # type: ignore[attr-defined]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = narrow  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch  # type: ignore[attr-defined]


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


def values_of(case: str) -> dict[str, Any]:
    """A config.json as transformers writes it."""
    import transformers

    name, changes = CASES[case]
    return getattr(transformers, f"{name}Config")(**{**SHAPES, **changes}).to_dict() | {"num_nextn_predict_layers": 0}


def trunk_alone(folder: Path) -> None:
    """transformers says that there is a further head, and writes none."""
    values = json.loads((folder / "config.json").read_text())
    if "num_nextn_predict_layers" in values:
        (folder / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 0}))


def randomised(model: Any, seed: int = 3) -> Any:
    """No parameter and no selection bias is left at its initial value, and routers prefer some experts. bfloat16 holds each value exactly."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith(BIAS))]:
        scale = 1.5 if name.endswith(("gate.weight", "router.weight")) else 0.3 if p.ndim > 1 else 0.2
        new = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64) + (p.ndim == 1 and "norm" in name)
        p.data = new.to(torch.bfloat16).to(p.dtype)
    return model.eval()


def gradients(model: Any, folder: Any) -> dict[str, torch.Tensor]:
    """{name on disk: gradient}: they are saved in the place of the weights, so transformers says where each belongs."""
    for p in model.parameters():
        p.data, p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
    model.save_pretrained(folder)
    return {name: g for name, g in load_file(folder / "model.safetensors").items() if not name.endswith(BIAS)}


def said(model: Any, batch: lf.Batch, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of all tokens, sum of the cross-entropy), each document run by itself."""
    ends = [int(n) for n in batch.plan["cu_seqlens"].unique()]
    logits = torch.cat([model(batch.plan["tokens"][None, a:b], use_cache=False, **more).logits[0] for a, b in itertools.pairwise(ends)])
    return logits, F.cross_entropy(logits, batch.plan["labels"], reduction="sum")

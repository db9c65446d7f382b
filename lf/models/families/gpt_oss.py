"""GPT-OSS: sinks in every head, windows in every second layer, experts with biases and a clamped activation (OpenAI 2025, arXiv 2508.10925).

On disk the experts of a layer are one tensor, transposed, with rows of gate and up in turn. The releases hold them in blocks of 4 bits (MXFP4), which
are refused: transformers loads them dequantised and saves what lf reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lf.config import ConfigError
from lf.models.decoder import DecoderConfig
from lf.models.families import common, ffn, windows
from lf.models.families.fields import number, yes
from lf.models.families.place import Place
from lf.models.moe import MoE
from lf.models.router import Router

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096}
"""What a file means that says nothing of rotary positions."""
WAY_OUT = (
    "experts in blocks of 4 bits (MXFP4) are not read; load the model with transformers, quantization_config=Mxfp4Config(dequantize=True), save it "
    "with save_pretrained, and give that folder"
)


def mixtures(values: dict[str, Any], layers: int, bad: list[str]) -> ffn.FFNs:
    """The feed-forward part of each layer."""
    n, top, inner = (number(values, name, int, bad) for name in ("num_local_experts", "num_experts_per_tok", "intermediate_size"))
    limit, loss = number(values, "swiglu_limit", float, bad, 7.0), ffn.balance(values, top, layers, bad)
    return ffn.mixed(values, [True] * layers, lambda: MoE(Router(n, top, linear_bias=True, balance=loss), inner, biases=True, limit=limit), bad)


def write_mixtures(ffns: ffn.FFNs) -> dict[str, Any]:
    m = ffn.kinds(ffns)[0]
    if m.limit is None:
        raise ConfigError("its experts have a clamped activation; those of the model have a plain one")
    return {
        "intermediate_size": m.dim,
        "num_local_experts": m.router.experts,
        "num_experts_per_tok": m.router.top,
        "swiglu_limit": m.limit,
        **ffn.write_balance(ffns),
    }


def bias(values: dict[str, Any], bad: list[str]) -> common.Bias:
    """`attention_bias`: all four matrices, also where the file does not say."""
    return (yes(values, "attention_bias", bad, default=True),) * 2


def experts(m: MoE) -> dict[str, str | Place]:
    """Where a mixture lies within a layer."""
    out: dict[str, str | Place] = {"route/norm": "post_attention_layernorm.weight"}
    out |= {"route/weight": "mlp.router.weight", "route/linear_bias": "mlp.router.bias"}
    for first, part in enumerate(("gate", "up")):
        rows = ((0, first, m.dim),), 2 * m.dim, 1, 2
        out[f"experts/gate_up/{part}"] = Place("mlp.experts.gate_up_proj", *rows, transposed=True)
        out[f"experts/gate_up_bias/{part}"] = Place("mlp.experts.gate_up_proj_bias", *rows)
    return out | {"experts/down": Place("mlp.experts.down_proj", transposed=True), "experts/down_bias": "mlp.experts.down_proj_bias"}


DIALECT = common.Dialect(
    "gpt_oss",
    "GptOssForCausalLM",
    bias=bias,
    write_bias=common.write_one_bias,
    windows=windows.every_second_slides,
    write_windows=windows.write_listed,
    ffns=mixtures,
    write_ffns=write_mixtures,
    head_dim=64,
    kv_heads=8,
    max_len=131072,
    theta=150000.0,
    sinks=True,
    only={"swiglu_alpha": (1.702, None)},
    more={"swiglu_alpha": 1.702},
)


def read(values: dict[str, Any]) -> DecoderConfig:
    """The config in a parsed config.json."""
    quantised = values.get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4":
        raise ConfigError(f"quantization_config has quant_method='mxfp4': {WAY_OUT}")
    said = any(values.get(name) is not None for name in ("rope_parameters", "rope_scaling"))
    return common.read(DIALECT, values if said else {**values, "rope_parameters": YARN})


def unused(name: str) -> str:
    """Raises ConfigError for a tensor of experts in 4 bits."""
    if name.endswith(("_blocks", "_scales")):
        raise ConfigError(f"{name}: {WAY_OUT}")
    return ""


write, names = partial(common.write, DIALECT), partial(common.names, mixture=experts)
copies, derived = common.copies, common.derived

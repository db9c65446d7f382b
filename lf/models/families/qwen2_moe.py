"""Qwen1.5-MoE and Qwen2-57B-A14B: the attention of Qwen2, softmax over all experts, and a shared expert behind a gate of its own (Qwen team 2024,
arXiv 2407.10671)."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs

from lf.config import ConfigError
from lf.models.families import common, ffn, qwen3_moe, windows
from lf.models.families.fields import number, yes
from lf.models.families.place import Place
from lf.models.moe import MoE


def mixtures(values: dict[str, Any], layers: int, bad: list[str]) -> ffn.FFNs:
    """The feed-forward part of each layer."""
    shared = number(values, "shared_expert_intermediate_size", int, bad)
    return tuple(attrs.evolve(f, shared=shared, shared_gate=True) if isinstance(f, MoE) else f for f in qwen3_moe.mixtures(values, layers, bad))


def write_mixtures(ffns: ffn.FFNs) -> dict[str, Any]:
    if not (shared := ffn.kinds(ffns)[0].shared):
        raise ConfigError("its mixtures have a shared expert; those of the model have none")
    return {**qwen3_moe.write_mixtures(ffns), "shared_expert_intermediate_size": shared}


def bias(values: dict[str, Any], bad: list[str]) -> common.Bias:
    """`qkv_bias`: of q, k and v."""
    return yes(values, "qkv_bias", bad, default=True), False


def write_bias(bias: common.Bias) -> dict[str, Any]:
    return {**common.write_fixed_bias((False, bias[1])), "qkv_bias": bias[0]}


def experts(m: MoE) -> dict[str, str | Place]:
    """Where a mixture lies within a layer."""
    return ffn.experts(m, shared="shared_expert")


DIALECT = common.Dialect(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    bias=bias,
    write_bias=write_bias,
    windows=windows.every_second_slides_first,
    write_windows=windows.write_listed,
    ffns=mixtures,
    write_ffns=write_mixtures,
    kv_heads=16,
    max_len=32768,
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = partial(common.names, mixture=experts), common.copies, common.derived
forms = partial(common.forms, mixture=experts, fused=partial(ffn.fused, shared="shared_expert"))

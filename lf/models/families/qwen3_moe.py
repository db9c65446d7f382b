"""Qwen3 with mixtures of experts: the attention of Qwen3, softmax over all experts (Qwen team 2025, arXiv 2505.09388)."""

from __future__ import annotations

from functools import partial
from typing import Any

from lf.models.families import common, ffn, windows
from lf.models.families.fields import number, yes
from lf.models.moe import MoE
from lf.models.router import Router


def mixtures(values: dict[str, Any], layers: int, bad: list[str]) -> ffn.FFNs:
    """The feed-forward part of each layer."""
    sparse = ffn.by_step(values, layers, bad)
    n = number(values, "num_local_experts" if "num_local_experts" in values else "num_experts", int, bad)
    top, inner = (number(values, name, int, bad) for name in ("num_experts_per_tok", "moe_intermediate_size"))
    normalise, loss = yes(values, "norm_topk_prob", bad), ffn.balance(values, top, sum(sparse), bad)
    return ffn.mixed(values, sparse, lambda: MoE(Router(n, top, normalise=normalise, balance=loss), inner), bad)


def write_mixtures(ffns: ffn.FFNs) -> dict[str, Any]:
    m, inner = ffn.kinds(ffns)
    return {
        "intermediate_size": inner,
        "moe_intermediate_size": m.dim,
        "num_experts": m.router.experts,
        "num_experts_per_tok": m.router.top,
        "norm_topk_prob": m.router.normalise,
        **ffn.write_by_step(ffns),
        **ffn.write_balance(ffns),
    }


DIALECT = common.Dialect(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    qk_norm=True,
    bias=common.one_bias,
    write_bias=common.write_one_bias,
    windows=windows.all_layers_slide_if_used,
    write_windows=windows.write_all_layers_slide_if_used,
    ffns=mixtures,
    write_ffns=write_mixtures,
    kv_heads=4,
    max_len=32768,
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = partial(common.names, mixture=ffn.experts), common.copies, common.derived
forms = partial(common.forms, mixture=ffn.experts)

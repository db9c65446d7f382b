"""Mixtral: Mistral whose layers all are mixtures, the weights of a token a softmax over its experts alone (Jiang et al. 2024, arXiv 2401.04088)."""

from __future__ import annotations

from functools import partial
from typing import Any

from lf.models.families import common, ffn, windows
from lf.models.families.fields import number
from lf.models.families.place import Place
from lf.models.moe import MoE
from lf.models.router import Router


def mixtures(values: dict[str, Any], layers: int, bad: list[str]) -> ffn.FFNs:
    """The feed-forward part of each layer."""
    n, top, inner = (number(values, name, int, bad) for name in ("num_local_experts", "num_experts_per_tok", "intermediate_size"))
    loss = ffn.balance(values, top, layers, bad)
    return ffn.mixed(values, [True] * layers, lambda: MoE(Router(n, top, balance=loss), inner), bad)


def write_mixtures(ffns: ffn.FFNs) -> dict[str, Any]:
    m = ffn.kinds(ffns)[0]
    sizes = {"intermediate_size": m.dim, "num_local_experts": m.router.experts, "num_experts_per_tok": m.router.top}
    return {**sizes, **ffn.write_balance(ffns)}


def experts(m: MoE) -> dict[str, str | Place]:
    """Where a mixture lies within a layer."""
    return ffn.experts(m, "block_sparse_moe", ("w1", "w3", "w2"), "e_score_correction_bias")


def fused(m: MoE) -> dict[str, str | Place]:
    """The same in the form of transformers 5."""
    return ffn.fused(m, bias="e_score_correction_bias")


DIALECT = common.Dialect(
    "mixtral",
    "MixtralForCausalLM",
    windows=lambda values, layers: windows.all_layers_slide(values, layers, missing=None),
    write_windows=windows.write_all_layers_slide,
    ffns=mixtures,
    write_ffns=write_mixtures,
    kv_heads=8,
    max_len=131072,
    theta=1e6,
    only={"router_jitter_noise": (0, None)},
    more={"router_jitter_noise": 0.0},
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = partial(common.names, mixture=experts), common.copies, common.derived
forms = partial(common.forms, mixture=experts, fused=fused)

"""MiniMax-M2, 2.1 and 2.5: norms of q and k over all heads together, sigmoid scores with a selection bias, no shared expert (MiniMax 2025, its
release on the Hugging Face hub).

Its `router_aux_loss_coef` is left alone: the class of transformers works that loss out of a softmax that its routers do not have.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lf.models.decoder import DecoderConfig
from lf.models.families import common, ffn, mixtral
from lf.models.families.fields import number
from lf.models.moe import MoE
from lf.models.router import Router


def mixtures(values: dict[str, Any], layers: int, bad: list[str]) -> ffn.FFNs:
    """The feed-forward part of each layer."""
    n, top, inner = (number(values, name, int, bad) for name in ("num_local_experts", "num_experts_per_tok", "intermediate_size"))
    return ffn.mixed(values, [True] * layers, lambda: MoE(Router(n, top, score="sigmoid", bias=True), inner), bad)


def write_mixtures(ffns: ffn.FFNs) -> dict[str, Any]:
    m = ffn.kinds(ffns)[0]
    return {"intermediate_size": m.dim, "num_local_experts": m.router.experts, "num_experts_per_tok": m.router.top}


DIALECT = common.Dialect(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    qk_norm=True,
    qk_norm_all=True,
    ffns=mixtures,
    write_ffns=write_mixtures,
    head_dim=128,
    kv_heads=8,
    max_len=196608,
    theta=5e6,
    partial=True,
    only={
        "router_jitter_noise": (0, None),
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True, None),
        "use_qk_norm": (True, None),
        "qk_norm_type": ("per_layer", None),
        "shared_intermediate_size": (0, None),
    },
    more={"router_jitter_noise": 0.0, "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer"},
)


def read(values: dict[str, Any]) -> DecoderConfig:
    """The config in a parsed config.json. `rotary_dim` says how many dims of a head turn, where no partial_rotary_factor does."""
    bad: list[str] = []
    turned, head_dim = (number(values, name, int, bad, 128) for name in ("rotary_dim", "head_dim"))
    if values.get("rotary_dim") is None or bad:
        return common.read(DIALECT, values)
    return common.read(DIALECT, {"partial_rotary_factor": turned / head_dim, **values})


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a model."""
    fields = common.write(DIALECT, config)
    rope = config.layers[0].mixer.rope
    return {**fields, "rotary_dim": rope.dim or fields["head_dim"]}


names, copies, derived = partial(common.names, mixture=mixtral.experts), common.copies, common.derived
forms = partial(common.forms, mixture=mixtral.experts, fused=mixtral.fused)

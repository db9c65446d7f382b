"""The mixtures of DeepSeek's families and of those built like them, in a config.json: a shared expert, groups, and dense layers first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lf.config import ConfigError
from lf.models.families.ffn import FFNs, kinds, mixed
from lf.models.families.fields import number, weight, whole, yes
from lf.models.moe import MoE
from lf.models.router import Router

GREEDY, GROUPS = "greedy", "group_limited_greedy"
Choice = Callable[[dict[str, Any], list[str]], dict[str, Any]]


def read(values: dict[str, Any], layers: int, bad: list[str], choice: Choice, first: int) -> FFNs:
    """The feed-forward part of each layer. choice(values, bad) -> how experts are chosen: fields of Router. first: the layers without experts, where
    the file does not say."""
    first = whole(values, "first_k_dense_replace", bad, first)
    sparse = [i >= first for i in range(layers)] if first is not None else []
    n, top, inner, shared = (
        number(values, name, int, bad) for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    )
    by = choice(values, bad) | loss(values, bad)
    return mixed(values, sparse, lambda: MoE(Router(n, top, **by), inner, shared * inner), bad)


def write(ffns: FFNs) -> dict[str, Any]:
    (m, inner), first = kinds(ffns), next(i for i, f in enumerate(ffns) if isinstance(f, MoE))
    if not all(isinstance(f, MoE) for f in ffns[first:]):
        raise ConfigError("its layers without experts are the first ones; those of the model are others")
    if not m.shared or m.shared % m.dim:
        raise ConfigError(f"its shared expert is as wide as a whole number of experts, each {m.dim}; that of the model is {m.shared} wide")
    r = m.router
    losses = {"aux_loss_alpha": r.sequence_balance or r.balance, "seq_aux": bool(r.sequence_balance)}
    return {
        "intermediate_size": inner,
        "first_k_dense_replace": first,
        "moe_intermediate_size": m.dim,
        "n_routed_experts": r.experts,
        "num_experts_per_tok": r.top,
        "n_shared_experts": m.shared // m.dim,
        "routed_scaling_factor": r.scale,
        "norm_topk_prob": r.normalise,
        "n_group": r.groups,
        "topk_group": r.top_groups,
        **(losses if r.sequence_balance or r.balance else {}),
    }


def loss(values: dict[str, Any], bad: list[str]) -> dict[str, Any]:
    """The weight of the routers' loss, by document or by microbatch."""
    alpha, by_document = weight(values, "aux_loss_alpha", bad), yes(values, "seq_aux", bad, default=True)
    return {"sequence_balance" if by_document else "balance": alpha}


def by_sigmoid(values: dict[str, Any], bad: list[str], scale: float, groups: int, top_groups: int) -> dict[str, Any]:
    """DeepSeek-V3: sigmoids, a selection bias, groups by their two best. scale, groups, top_groups: where the file does not say."""
    return {
        "score": "sigmoid",
        "normalise": yes(values, "norm_topk_prob", bad, default=True),
        "scale": number(values, "routed_scaling_factor", float, bad, scale),
        "groups": number(values, "n_group", int, bad, groups),
        "top_groups": number(values, "topk_group", int, bad, top_groups),
        "group_score": "top2",
        "bias": True,
    }


def by_softmax(values: dict[str, Any], bad: list[str]) -> dict[str, Any]:
    """DeepSeek-V2: softmax, never normalised again, groups by their best. `greedy` looks at no groups."""
    method = values.get("topk_method") or GREEDY
    if method not in (GREEDY, GROUPS):
        bad.append(f"topk_method={method!r} is not supported; {GREEDY!r} and {GROUPS!r} are")
    limited = {"groups": number(values, "n_group", int, bad), "top_groups": number(values, "topk_group", int, bad)} if method == GROUPS else {}
    return {"normalise": False, "scale": number(values, "routed_scaling_factor", float, bad, 1.0), **limited}

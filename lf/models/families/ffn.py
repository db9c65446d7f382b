"""Feed-forward parts in a config.json and on disk: gated MLPs, mixtures of experts, and which layer has which.

    read(values, layers, bad) -> the part of each layer      write(those) -> fields, or ConfigError      names(mixture) -> {key: place} in a layer

Losses of the router. `router_aux_loss_coef` counts where `output_router_logits` is true, as in the classes of transformers. Their loss pools the
tokens of all L layers with experts and counts a token k times, once for each expert it goes to; lf's is a sum over the layers in which a token counts
once (lf/models/router.py). So balance = coefficient · k / L: the same for one layer, and for several that route alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs

from lf.config import ConfigError
from lf.models.families.fields import number, weight, yes
from lf.models.families.place import Place
from lf.models.mlp import GatedMLP
from lf.models.moe import MoE
from lf.models.router import LOSSES

FFN = GatedMLP | MoE
FFNs = tuple[FFN, ...]
STEERS = ("bias_rate", "capacity", "drop", *LOSSES)
"""Fields of a router that matter in training alone: no family has them all."""


def dense(values: dict[str, Any], layers: int, bad: list[str]) -> FFNs:
    """The same gated MLP in every layer."""
    return (GatedMLP(number(values, "intermediate_size", int, bad)),) * layers


def write_dense(ffns: FFNs) -> dict[str, Any]:
    if len(set(ffns)) != 1:
        raise ConfigError(f"its layers must all be alike but for their windows; of {len(ffns)} layers, {len(set(ffns))} kinds were given")
    if not isinstance(ffns[0], GatedMLP):
        raise ConfigError("its layers have gated MLPs; those of the model mixtures of experts")
    return {"intermediate_size": ffns[0].dim}


def mixed(values: dict[str, Any], sparse: list[bool], make: Callable[[], MoE], bad: list[str]) -> FFNs:
    """make() in the layers that are `sparse`, a gated MLP in the others; none where something is bad."""
    inner = 0 if all(sparse) else number(values, "intermediate_size", int, bad)
    if sparse and not any(sparse):  # it could be trained, and then not be written again
        bad.append(f"none of its {len(sparse)} layers has experts; give a config of a family without them")
    try:
        m = None if bad else make()
    except ConfigError as error:
        bad.append(str(error))
        return ()
    return () if m is None else tuple(m if has else GatedMLP(inner) for has in sparse)


def kinds(ffns: FFNs) -> tuple[MoE, int]:
    """(the mixture, the inner width of the gated MLPs). Raises ConfigError where there is none, or more than one kind of either.

    Without a gated MLP: as wide as the experts of a token together, for classes want the field.
    """
    mixtures, mlps = ([f for f in dict.fromkeys(ffns) if isinstance(f, kind)] for kind in (MoE, GatedMLP))
    if len(mixtures) != 1 or len(mlps) > 1:
        raise ConfigError(f"its mixtures of experts are all alike, and its gated MLPs; the model has {len(mixtures)} kinds and {len(mlps)}")
    (m,) = mixtures
    assert isinstance(m, MoE)
    return m, mlps[0].dim if mlps else m.router.top * m.dim


def refuse_unsaid(ffns: FFNs, read: Callable[[int, list[str]], FFNs]) -> None:
    """Raises ConfigError where what was written is read as something else: the family has no such mixture. read: of the written fields."""
    bad: list[str] = []
    again = read(len(ffns), bad)
    if bad:
        raise ConfigError("; ".join(bad))
    for i, (ours, theirs) in enumerate(zip(ffns, again)):
        have, want = _flat(ours), _flat(theirs)
        if unsaid := [f"{k}={v!r}" for k, v in have.items() if k not in want or want[k] != v]:
            raise ConfigError(f"its layers have no {', '.join(unsaid)}, as layers.{i} of the model")


def _flat(ffn: FFN) -> dict[str, Any]:
    values = attrs.asdict(ffn)
    router = values.pop("router", {})
    if router.get("groups") == 1:
        router["group_score"] = None  # there is nothing to compare
    return values | {f"router.{k}": v for k, v in router.items() if k not in STEERS}


def by_step(values: dict[str, Any], layers: int, bad: list[str]) -> list[bool]:
    """Qwen: each `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    step, alone = number(values, "decoder_sparse_step", int, bad, 1), values.get("mlp_only_layers") or []
    if not isinstance(alone, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in alone):
        bad.append(f"mlp_only_layers={alone!r} should be a list of numbers of layers")
    return [] if bad else [i not in alone and (i + 1) % step == 0 for i in range(layers)]


def write_by_step(ffns: FFNs) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, f in enumerate(ffns) if isinstance(f, GatedMLP)]}


# Losses.


def balance(values: dict[str, Any], top: int | None, layers: int, bad: list[str], missing: float = 0.001) -> float:
    """The weight of the router's loss. layers: with experts."""
    coefficient = weight(values, "router_aux_loss_coef", bad, missing)
    return (coefficient or 0.0) * (top or 0) / layers if yes(values, "output_router_logits", bad) and layers else 0.0


def write_balance(ffns: FFNs) -> dict[str, Any]:
    m, layers = kinds(ffns)[0], sum(isinstance(f, MoE) for f in ffns)
    if not m.router.balance:
        return {"output_router_logits": False, "router_aux_loss_coef": 0.001}
    near = m.router.balance * layers / m.router.top
    tries = [float(f"{near:.12g}"), near, math.nextafter(near, 0), math.nextafter(near, math.inf)]  # the one that is read as what it was
    back = partial(balance, {"output_router_logits": True}, m.router.top, layers, [])
    return {"output_router_logits": True, "router_aux_loss_coef": min(tries, key=lambda c: abs(back(missing=c) - m.router.balance))}


def experts(
    m: MoE,
    block: str = "mlp",
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    bias: str = "gate.e_score_correction_bias",
    shared: str = "shared_experts",
) -> dict[str, str | Place]:
    """Where a mixture lies within a layer, with a tensor for each matrix of each expert. matrices: gate, up and down. bias: the selection bias."""
    keys = ("gate_up/gate", "gate_up/up", "down")
    out: dict[str, str | Place] = {"route/norm": "post_attention_layernorm.weight", "route/weight": f"{block}.gate.weight"}
    out |= {f"experts/{key}": Place(f"{block}.experts.{{}}.{name}.weight", stack=m.router.experts) for key, name in zip(keys, matrices)}
    out |= {"route/bias": f"{block}.{bias}"} if m.router.bias else {}
    out |= {f"combine/{key}": f"{block}.{shared}.{name}.weight" for key, name in zip(keys, matrices)} if m.shared else {}
    return out | ({"combine/gate": f"{block}.{shared}_gate.weight"} if m.shared_gate else {})


def fused(m: MoE, bias: str = "gate.e_score_correction_bias", shared: str = "shared_experts") -> dict[str, str | Place]:
    """The same in the form that transformers 5 has in memory, and writes with save_original_format=False: two tensors for all experts."""
    rows = {part: Place("mlp.experts.gate_up_proj", ((0, first, m.dim),), 2 * m.dim, dim=1) for part, first in (("gate", 0), ("up", m.dim))}
    stacks: dict[str, str | Place] = {f"experts/gate_up/{part}": place for part, place in rows.items()}
    return experts(m, bias=bias, shared=shared) | stacks | {"experts/down": "mlp.experts.down_proj"}

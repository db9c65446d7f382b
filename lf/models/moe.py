"""A mixture of experts: the feed-forward part of a layer as four segments, so that a program can go into it.

    route      norm, the experts of each token and their weights                    lf/models/router.py
    dispatch   rows travel to the ranks of their experts                            lf/parallel/expert.py
    experts    each expert's gated MLP on its rows: grouped products
    combine    rows travel back, and meanwhile the shared expert runs; the weighted sum joins the residual stream

T all tokens of the tp group · t this rank's tokens · D width · E experts · e experts of this rank · k experts of a token · n rows here, one for each
token and expert of this rank · F columns of an expert on this rank · S those of the shared expert. Matrices are (out, in), as on disk.

Experts live in the expert mesh: `expert` over ep, their columns over etp, and gradients are summed over edp alone: a rank's experts have seen the
tokens of all ranks of their ep and etp group. Everything else here is dense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from lf.batch import Batch
from lf.config import ConfigError
from lf.models import router as routers
from lf.models.block import Block
from lf.models.router import Router
from lf.models.tokens import matrix_flops, token_shares
from lf.parallel import expert
from lf.parallel.linear import column_linear, row_linear
from lf.parallel.redistribute import P, R, redistribute
from lf.segment import Objective, Terms
from lf.spec import Init, Param, Part, Tied, constant

Carry = dict[str, Tensor]


@attrs.frozen
class MoE:
    """Experts of inner width `dim`. shared: the inner width of one more that takes every token, 0 for none; shared_gate: its output times
    σ(a product with the token), Qwen2-MoE. biases: in the experts' products. limit: of GPT-OSS, silu(g)·u becomes (u + 1)·g·σ(1.702·g) with g at
    most `limit` and u within ± limit; None: plain.
    """

    router: Router
    dim: int
    shared: int = 0
    shared_gate: bool = False
    biases: bool = False
    limit: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.dim < 1 or self.shared < 0:
            raise ConfigError(f"experts: dim={self.dim} must be at least 1, and shared={self.shared} not negative")
        if self.shared_gate and not self.shared:
            raise ConfigError("experts: shared_gate=True needs a shared expert; give shared, its inner width")
        if self.limit is not None and not self.limit > 0:
            raise ConfigError(f"experts: limit={self.limit} must be above 0, or None")


def moe(m: MoE, dim: int, eps: float, matrix: Init, added: Init) -> dict[str, Block]:
    """The segments of the part by name. eps: of the norm. matrix, added: how matrices in and out start."""
    r, n = m.router, m.router.experts
    route: dict[str, Param | Tied] = {
        "norm": Param((dim,), ("embed",), constant(1.0)),
        "weight": Param((n, dim), (None, "embed"), matrix),
    }
    if r.linear_bias:
        route["linear_bias"] = Param((n,), (None,), constant(0.0))
    if r.bias:
        route["bias"] = Param((n,), (None,), constant(0.0), learned=False)
    if r.global_balance:
        route["fraction"] = Param((n,), (None,), constant(1 / n), learned=False)
    gate_up = Part("gate", m.dim), Part("up", m.dim)
    experts: dict[str, Param | Tied] = {
        "gate_up": Param((n, 2 * m.dim, dim), ("expert", "expert_mlp", "embed"), matrix, gate_up, part_dim=1),
        "down": Param((n, dim, m.dim), ("expert", "embed", "expert_mlp"), added),
    }
    if m.biases:
        experts["gate_up_bias"] = Param((n, 2 * m.dim), ("expert", "expert_mlp"), constant(0.0), gate_up, part_dim=1)
        experts["down_bias"] = Param((n, dim), ("expert", "embed"), constant(0.0))
    combine: dict[str, Param | Tied] = {}
    if m.shared:
        combine["gate_up"] = Param((2 * m.shared, dim), ("mlp", "embed"), matrix, (Part("gate", m.shared), Part("up", m.shared)))
        combine["down"] = Param((dim, m.shared), ("embed", "mlp"), added, part_dim=1)
    if m.shared_gate:
        combine["gate"] = Param((1, dim), (None, "embed"), matrix)
    products = ("gate_up", "down") if m.shared else ()
    return {  # operations of all k experts of every token, dropped or not
        "route": Block(route, partial(route_block, r, eps), (), partial(matrix_flops, n * dim)),
        "dispatch": Block({}, partial(dispatch_block, n), (), no_flops, host=True),
        "experts": Block(experts, partial(experts_block, m), (), partial(matrix_flops, r.top * 3 * m.dim * dim)),
        "combine": Block(combine, partial(combine_block, m), products, partial(matrix_flops, (3 * m.shared + m.shared_gate) * dim)),
    }


def no_flops(batch: Batch) -> float:
    return 0.0


def route_block(r: Router, eps: float, p: dict[str, Tensor], x_tD: Tensor, batch: Batch, ctx: Any) -> tuple[Carry, Terms]:
    h_tD = ctx.ops.rms_norm(x_tD, p["norm"], eps)
    ids_tk, weights_tk, losses, sums = routers.route(r, p, h_tD, batch, ctx)
    return {"x": x_tD, "h": h_tD, "ids": ids_tk, "weights": weights_tk}, {"losses": losses, "sums": sums}


def dispatch_block(experts: int, p: dict[str, Tensor], c: Carry, batch: Batch, ctx: Any) -> tuple[Carry, Terms]:
    send = expert.STYLES[ctx.dispatch][0]
    ids_tk = c["ids"].masked_fill(c["ids"] < 0, experts)  # dropped
    return {"x": c["x"], "h": c["h"], **send(c["h"], ids_tk, c["weights"], experts, ctx)}, {}


def experts_block(m: MoE, p: dict[str, Tensor], c: Carry, batch: Batch, ctx: Any) -> tuple[Carry, Terms]:
    """rows (n, D) become what each row's expert makes of it, P over etp: each rank has the sum over its columns."""
    ops, counts = ctx.ops, c["counts"]
    gate_up = ops.grouped_linear(c["rows"], p["gate_up"], counts)
    if m.biases:
        gate_up = gate_up + expert.each(p["gate_up_bias"], counts, len(gate_up))
    y_nD = ops.grouped_linear(ops.swiglu(gate_up) if m.limit is None else clamped(gate_up, m.limit), p["down"], counts)
    if m.biases:  # once, though all ranks of etp have the row
        y_nD = y_nD + redistribute(expert.each(p["down_bias"], counts, len(y_nD)), ctx.axes["etp"], R, P)
    return {**c, "rows": y_nD}, {}


def clamped(gate_up: Tensor, limit: float) -> Tensor:
    """(n, 2F) → (n, F): (u + 1) · g · σ(1.702·g), g at most `limit`, u within ± limit; g·σ(1.702·g) is near the GELU (arXiv 1606.08415 §2)."""
    gate, up = gate_up.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def combine_block(m: MoE, p: dict[str, Tensor], c: Carry, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    done = expert.STYLES[ctx.dispatch][1](c, ctx)  # on their way
    y_tD = c["x"]
    if m.shared:
        tp, h_tD, ops = ctx.axes["tp"], c["h"], ctx.ops
        seq = token_shares(batch, tp)
        shared_tD = row_linear(ops.swiglu(column_linear(h_tD, p["gate_up"], tp, seq)), p["down"], tp, seq)
        if m.shared_gate:
            shared_tD = shared_tD * torch.nn.functional.linear(h_tD, p["gate"]).sigmoid()
        y_tD = y_tD + shared_tD
    return y_tD + done(), {}


# What the model knows of all its mixtures together. `layers`: {layer: its mixture}.


def moe_objectives(layers: Mapping[str, MoE]) -> dict[str, Objective]:
    """The losses of the routers. Raises ConfigError where they differ in a weight: an objective has one."""
    found = {tuple(getattr(m.router, name) for name in routers.LOSSES) for m in layers.values()}
    if len(found) > 1:
        raise ConfigError(f"the routers' weights of {', '.join(routers.LOSSES)} must be the same in all layers; there are {sorted(found)}")
    return routers.objectives(next(iter(layers.values())).router) if layers else {}


def moe_sums(layers: Mapping[str, MoE]) -> dict[str, tuple[int, ...]]:
    """What segments count in a step, with its shape: tokens of each expert, and those that were dropped."""
    out: dict[str, tuple[int, ...]] = {}
    for layer, m in layers.items():
        out[f"{layer}.route/load"] = (m.router.experts,)
        if m.router.capacity is not None:
            out[f"{layer}.route/dropped"] = ()
    return out


def moe_state(layers: Mapping[str, MoE], held: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is not learned, after a step: by path, of what this rank holds. sums: over the step and all ranks.

    bias: + rate · sign(mean - load) (Wang et al. 2024, algorithm 1) · fraction: load over all, as it was where nothing was counted.
    """
    out: dict[str, Tensor] = {}
    for layer, m in layers.items():
        load = sums[f"{layer}.route/load"]
        if (bias := held.get(f"{layer}.route/bias")) is not None:
            out[f"{layer}.route/bias"] = bias + m.router.bias_rate * (load.mean() - load).sign().to(bias.dtype)
        if (fraction := held.get(f"{layer}.route/fraction")) is not None:
            out[f"{layer}.route/fraction"] = torch.where(load.sum() > 0, load / load.sum().clamp_min(1), fraction).to(fraction.dtype)
    return out


def moe_report(layers: Mapping[str, MoE], sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Of a step, on the host. expert_load_max: tokens of the busiest expert over the mean, in the layer where that is largest; expert_entropy: of how
    tokens are spread, 1 when evenly, the mean over layers; experts_idle: share of experts without a token; dropped: share of choices that were."""
    if not layers:
        return {}
    busiest, entropy, idle, dropped, chosen = list[float](), list[float](), 0, 0.0, 0.0
    for layer, m in layers.items():
        load, n = sums[f"{layer}.route/load"].double(), m.router.experts
        share = load / load.sum().clamp_min(1)
        busiest.append(float(share.max() * n))
        entropy.append(float(torch.special.entr(share).sum()) / math.log(n) if n > 1 else 1.0)
        idle += int((load == 0).sum())
        chosen += float(load.sum())
        dropped += float(sums.get(f"{layer}.route/dropped", 0.0))
    out = {"expert_load_max": max(busiest), "expert_entropy": sum(entropy) / len(entropy)}
    out["experts_idle"] = idle / sum(m.router.experts for m in layers.values())
    limited = any(m.router.capacity is not None for m in layers.values())
    return out | ({"dropped": dropped / max(chosen, 1.0)} if limited else {})

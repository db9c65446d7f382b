"""Choices of routers that are recorded, and given back to another run.

Layouts round differently. Where two experts score the same but for that, a token goes to the one here and to the other there: what follows differs by
much, and says nothing of the layout. So where less than float64 is compared (`lf.parity`), all take the choices of one rank.

    plan["choices"]   (T, layers, k) int64, of each token of the row and each layer with a router its k experts, the best first; -1 - e where expert
                      e was full, and E where the token goes nowhere. The layers in the order of the model, and k the most of any: of a layer with
                      fewer the last columns are not read.

Weights are worked out from the scores of the experts that are given, so gradients flow, and losses and counts are of them.

T all tokens of the row · k experts of a token · E experts
"""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from lf.batch import Batch, BatchError
from lf.config import ConfigError
from lf.mesh import shares
from lf.models.decoder import DecoderConfig
from lf.models.moe import MoE
from lf.models.router import Router
from lf.segment import Apply, Model, Terms, path_of


def routers(model: Model) -> dict[str, Router]:
    """The router of each segment that has one, in the order of the model."""
    layers = model.config.all_layers if isinstance(model.config, DecoderConfig) else {}
    return {f"{name}.route": layer.ffn.router for name, layer in layers.items() if isinstance(layer.ffn, MoE)}


def recorded(model: Model, params: dict[str, dict[str, Tensor]], batch: Batch, ctx: Any) -> Tensor:
    """The choices of a forward, as they stand in a plan, on the host. Collective over the ranks of a microbatch; on a mesh without pp.

    params: the compute copy. batch: from `shard_batch`. Raises BatchError for one without labels where heads that predict further ahead would have
    none to predict, and ConfigError for a model without a router."""
    found, of, x = list[Tensor](), routers(model), dict[str, Tensor]()
    if not of:
        raise ConfigError("the model has no router, so there are no choices to record")
    k = max(r.top for r in of.values())
    with torch.no_grad():
        for segment in model.segments:
            paths = {name: path_of(segment, name).partition("/") for name in segment.params}
            x, _ = segment.apply({name: params[there][key] for name, (there, _, key) in paths.items()}, x, batch, ctx)
            if segment.name in of:
                if "ids" not in x:
                    raise BatchError(f"{segment.name} chooses nothing in a batch without labels; record the choices of one to learn from")
                found.append(F.pad(x["ids"], (0, k - x["ids"].shape[1])))
    group, tokens = ctx.axes["cp", "tp"], len(batch.plan["tokens"])
    return group.all_gather(torch.stack(found, 1), shares(tokens, group.size)).cpu()


def replaying(model: Model) -> Model:
    """The same model, whose routers take the choices in a batch's plan, which it needs. One without a router is as it was."""
    of = routers(model)
    if not of:
        return model
    at = {name: i for i, name in enumerate(of)}
    segments = [attrs.evolve(s, apply=partial(_chosen, at[s.name], s.apply)) if s.name in at else s for s in model.segments]
    return attrs.evolve(model, segments=tuple(segments), accepts=partial(_accepts, model, tuple(of.values())))


def _chosen(i: int, apply: Apply, p: dict[str, Tensor], x: Any, batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    choices_Tk = batch.plan["choices"][:, i]
    return apply(p, x, attrs.evolve(batch, derived={**batch.derived, "choices": choices_Tk}), ctx)


def _accepts(model: Model, of: tuple[Router, ...], batch: Batch) -> None:
    """Raises BatchError for a batch that `model` does not take, and for choices that are none of its routers'."""
    model.accepts(batch)
    if "choices" not in batch.plan:
        raise BatchError(f"routers that take recorded choices need them in the plan, as `choices`; it has {', '.join(batch.plan)}")
    choices = batch.plan["choices"]
    want = (len(batch.plan["tokens"]), len(of), max(r.top for r in of))
    if tuple(choices.shape) != want or choices.dtype != torch.int64:
        dims = "(tokens, layers with a router, experts of a token)"
        raise BatchError(f"choices {tuple(choices.shape)} of {choices.dtype} should be {dims} = {want}, int64")
    if choices.device.type != "cpu":
        return
    for i, r in enumerate(of):
        mine = choices[:, i, : r.top].numpy()
        if (wrong := (mine < -r.experts) | (mine > r.experts)).any():
            raise BatchError(f"choices of layer {i} with a router have {mine[wrong][0]}; there are {r.experts} experts")

"""Which experts each token goes to, with what weight; and the losses that keep the experts evenly loaded.

t this rank's tokens · E experts · k experts of a token · p_te the scores as shares of 1 (softmax, or sigmoid over their sum)

Scores are worked out in at least float32. A token goes to the k experts with the highest score; a selection bias is added for the choice alone
(Wang et al. 2024, arXiv 2408.15664), and a group limit leaves only the best groups (DeepSeek-V2, arXiv 2405.04434 §2.1.2; V3, 2412.19437 §2.1.2).

Losses, each a sum over own tokens, Σ_t Σ_e f_e · p_te, in which f is constant: so shards add up, and microbatches too. With c_e the tokens that
chose expert e among n tokens, f_e = E/(k·n) · c_e:

    balance            c, n of this microbatch, all its cp and tp shards                 divided by all tokens       Switch §2.2, arXiv 2101.03961
    sequence_balance   c, n of the token's document; each token weighs 1/n               divided by all documents    DeepSeek-V3 §2.1.2
    global_balance     c, n of the whole step before this one, of all ranks; at first even  divided by all tokens    Qwen, arXiv 2501.11873
    z                  instead Σ_t (log Σ_e exp(logit_te))²                              divided by all tokens       ST-MoE §3, arXiv 2202.08906

Each of them is summed over the layers. Only documents with a label count: padding is documents of its own, which have none (`lf.data.batches`).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from lf.batch import IGNORE, Batch, BatchError
from lf.config import ConfigError, one_of
from lf.context import wide
from lf.mesh import shares
from lf.models.tokens import own
from lf.ops.attention import document_of
from lf.segment import Objective

SCORES, GROUPS, DROPS = ("softmax", "sigmoid"), ("max", "top2"), ("probability", "position")
LOSSES = ("balance", "sequence_balance", "global_balance", "z")


@attrs.frozen
class Router:
    """`experts`: how many · `top`: how many a token goes to · `normalise`: the weights of a token add up to 1 (of softmax scores: a softmax over the
    chosen alone), then times `scale`.

    groups, top_groups: experts are in so many groups of neighbours, and the choice is among those of the best `top_groups`; a group scores as its
    best expert ("max") or the sum of its two best ("top2"). bias: a selection bias; after a step each expert's goes by `bias_rate` up where it had
    fewer tokens than the mean, down where more. linear_bias: of the scores' matrix, learned. capacity: an expert takes at most
    ⌈capacity · k · n / E⌉ of the n tokens of a microbatch, the ones with the highest weights ("probability"; of equal weights those that come
    first) or that come first ("position"); None: all. balance, sequence_balance, global_balance, z: weights of the losses, 0 for none.
    """

    experts: int
    top: int
    score: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    bias: bool = False
    bias_rate: float = 1e-3
    linear_bias: bool = False
    capacity: float | None = None
    drop: str = "probability"
    balance: float = 0.0
    sequence_balance: float = 0.0
    global_balance: float = 0.0
    z: float = 0.0

    def __attrs_post_init__(self) -> None:
        for what, value, among in (("score", self.score, SCORES), ("group_score", self.group_score, GROUPS), ("drop", self.drop, DROPS)):
            one_of(f"router {what}", value, among)
        if not 1 <= self.top <= self.experts:
            raise ConfigError(f"router: top={self.top} must be from 1 to the number of experts, {self.experts}")
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ConfigError(
                f"router: groups={self.groups} must divide experts={self.experts}, and top_groups={self.top_groups} be from 1 to groups"
            )
        each = self.experts // self.groups
        if self.top > self.top_groups * each:
            raise ConfigError(f"router: top={self.top} experts cannot be chosen from top_groups={self.top_groups} groups of {each}")
        if self.group_score == "top2" and self.groups > 1 and each < 2:
            raise ConfigError(f"router: group_score='top2' needs groups of at least 2 experts; {self.experts} in {self.groups} groups have {each}")
        if self.capacity is not None and not 1e-6 <= self.capacity <= 1e6:
            raise ConfigError(f"router: capacity={self.capacity} must be above 0, from 1e-6 to 1e6, or None for no limit")
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"router: scale={self.scale} must be a number above 0")
        if wrong := [f"{name}={getattr(self, name)}" for name in (*LOSSES, "bias_rate") if not 0 <= getattr(self, name) < math.inf]:
            raise ConfigError(f"router: {', '.join(wrong)} must not be negative, nor infinite")


def route(r: Router, p: dict[str, Tensor], h_tD: Tensor, batch: Batch, ctx: Any) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(experts (t, k) int64, weights (t, k) in at least float32, losses, sums of load and drops). Of tokens of documents without a label E stands for
    no expert, and -1 - e for expert e where it is full. p: weight (E, D), and those of bias (E,), linear_bias (E,), fraction (E,) that there are.
    Choices that the batch has, of each token of the row, are taken instead of its own (lf/models/replay.py)."""
    dtype = wide(h_tD.dtype)
    logits_tE = F.linear(h_tD.to(dtype), p["weight"].to(dtype), p["linear_bias"].to(dtype) if r.linear_bias else None)
    score_tE = logits_tE.softmax(-1) if r.score == "softmax" else logits_tE.sigmoid()
    given_tk = own(batch.derived["choices"], batch, ctx)[:, : r.top] if "choices" in batch.derived else None
    if given_tk is None:
        ids_tk = at_tk = choose(r, score_tE.detach(), p["bias"].to(dtype) if r.bias else None)
    else:
        ids_tk = torch.where(given_tk < 0, -1 - given_tk, given_tk)
        at_tk = ids_tk.clamp_max(r.experts - 1)  # what goes nowhere has some weight that is not used
    if r.score == "softmax" and r.normalise:
        weights_tk = logits_tE.gather(1, at_tk).softmax(-1)
    else:
        weights_tk = score_tE.gather(1, at_tk)
        if r.normalise:
            weights_tk = weights_tk / (weights_tk.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
    weights_tk = weights_tk * r.scale

    live_t = own(batch.derived["live"], batch, ctx)
    ids_tk = ids_tk.masked_fill(~live_t[:, None], r.experts)
    load_E = tally(ids_tk, r.experts)
    losses = _losses(r, p, logits_tE, score_tE, ids_tk, load_E, live_t, batch, ctx) if "labels" in batch.plan else {}
    sums = {"load": load_E.to(dtype)}
    if r.capacity is not None:
        full_tk = ~within_capacity(r, ids_tk, weights_tk.detach(), batch, ctx) if given_tk is None else given_tk < 0
        full_tk = full_tk & (ids_tk < r.experts)
        sums["dropped"] = full_tk.sum().to(dtype)
        ids_tk = torch.where(full_tk, -1 - ids_tk, ids_tk)
    return ids_tk, weights_tk, losses, sums


def choose(r: Router, score_tE: Tensor, bias_E: Tensor | None) -> Tensor:
    """(t, k): the chosen experts of each token, the best first."""
    by = score_tE if bias_E is None else score_tE + bias_E
    if r.groups > 1:
        by_tgm = by.unflatten(1, (r.groups, -1))
        best_tg = by_tgm.amax(-1) if r.group_score == "max" else by_tgm.topk(2, -1).values.sum(-1)
        out = torch.ones_like(best_tg, dtype=torch.bool).scatter(1, best_tg.topk(r.top_groups, -1).indices, False)
        by = by_tgm.masked_fill(out[..., None], -torch.inf).flatten(1)
    return by.topk(r.top, -1).indices


def tally(ids: Tensor, n: int) -> Tensor:
    """(n,) int64: how often each of 0 … n - 1 stands in `ids`. What is n or more does not count."""
    ids = ids.flatten().clamp_max(n)
    return ids.new_zeros(n + 1).scatter_add_(0, ids, torch.ones_like(ids))[:n]


def within_capacity(r: Router, ids_tk: Tensor, weights_tk: Tensor, batch: Batch, ctx: Any) -> Tensor:
    """(t, k) True where the expert takes the token. All shards of a microbatch are one queue, so that no layout changes who is dropped."""
    assert r.capacity is not None
    group = ctx.axes["cp", "tp"]
    sizes = [r.top * n for n in shares(len(batch.plan["tokens"]), group.size)]
    ids, weights = (group.all_gather(x.flatten(), sizes) for x in (ids_tk, weights_tk))
    # Tokens with the same past have the same weight, which each layout rounds in its own way: of float64 no more counts than float32 tells apart.
    first = weights.float().argsort(descending=True, stable=True) if r.drop == "probability" else torch.arange(len(ids), device=ids.device)
    order = first[ids[first].argsort(stable=True)]  # by expert, and in each the first come first
    counts = tally(ids, r.experts)
    starts = F.pad(counts.cumsum(0), (1, 0))  # the last: where those without an expert begin
    place = torch.arange(len(ids), device=ids.device) - starts[ids[order]]
    each = Fraction(r.capacity).limit_denominator(10**6) * r.top / r.experts  # a quotient in float32 may come out above a whole number
    limit = -(-batch.derived["live"].sum() * each.numerator // each.denominator)
    kept = torch.zeros_like(ids, dtype=torch.bool).scatter(0, order, (place < limit) & (ids[order] < r.experts))
    return kept.split(sizes)[group.index].view_as(ids_tk)


def _losses(
    r: Router, p: dict[str, Tensor], logits_tE: Tensor, score_tE: Tensor, ids_tk: Tensor, load_E: Tensor, live_t: Tensor, batch: Batch, ctx: Any
) -> dict[str, Tensor]:
    out, shards, dtype = dict[str, Tensor](), ctx.axes["cp", "tp"], score_tE.dtype
    share_tE = (score_tE if r.score == "softmax" else score_tE / (score_tE.sum(-1, keepdim=True) + 1e-20)) * live_t[:, None]
    if r.balance:
        tokens = batch.derived["live"].sum().clamp_min(1)
        f_E = shards.sum(load_E).to(dtype) * r.experts / (r.top * tokens)
        out["balance"] = (share_tE * f_E).sum()
    if r.sequence_balance:
        document_t, n = own(batch.derived["document"], batch, ctx), len(batch.plan["cu_seqlens"])
        pair = torch.where(ids_tk < r.experts, document_t[:, None] * r.experts + ids_tk, n * r.experts)
        counts_nE = shards.sum(tally(pair, n * r.experts)).view(n, r.experts).to(dtype)
        length_n = tally(batch.derived["document"], n).clamp_min(1).to(dtype)[:, None]
        f_nE = counts_nE * r.experts / (r.top * length_n)
        out["sequence_balance"] = (share_tE * (f_nE / length_n)[document_t]).sum()
    if r.global_balance:
        out["global_balance"] = (share_tE * p["fraction"].to(dtype) * r.experts).sum()
    if r.z:
        out["z"] = (logits_tE.logsumexp(-1).square() * live_t).sum()
    return out


def documents(batch: Batch) -> dict[str, Tensor]:
    """What routers know of the whole packed row: `document` (T,) int64, from 0, and `live` (T,) bool, whether it has a label; without labels in the
    batch all do."""
    edges = batch.plan["cu_seqlens"]
    document = document_of(edges, batch.plan["tokens"].shape[0]) - 1
    return {"document": document, "live": _labelled(batch, document)[document]}


def _labelled(batch: Batch, document: Tensor) -> Tensor:
    """(documents,) bool."""
    n = len(batch.plan["cu_seqlens"])
    if "labels" not in batch.plan:
        return document.new_ones(n, dtype=torch.bool)
    return document.new_zeros(n).scatter_add_(0, document, (batch.plan["labels"] != IGNORE).to(document.dtype)) > 0


def live_tokens(batch: Batch) -> Tensor:
    """How many tokens are of a document with a label."""
    return documents(_learning(batch))["live"].sum()


def live_documents(batch: Batch) -> Tensor:
    """How many documents have a label."""
    return _labelled(_learning(batch), documents(batch)["document"]).sum()


def _learning(batch: Batch) -> Batch:
    if "labels" not in batch.plan:
        raise BatchError(f"a batch to learn from needs labels in its plan; it has {', '.join(batch.plan)}")
    return batch


def objectives(r: Router) -> dict[str, Objective]:
    """The losses that the router gives."""
    counts = {"sequence_balance": live_documents}
    return {name: Objective(weight, counts.get(name, live_tokens)) for name in LOSSES if (weight := getattr(r, name))}

"""The router against definitions written out: choices, weights, capacity, losses, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED
from torch import Tensor

import lf
from lf.batch import IGNORE
from lf.config import ConfigError
from lf.data.batches import pack
from lf.data.stream import Row
from lf.models import router
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, MoE, decoder
from lf.models.moe import moe_report
from lf.models.router import Router, choose, documents, route, within_capacity

E, D = 6, 5
STARTS, LENGTH, PADDING = (0, 4, 5, 11), 17, 3


def batch(labels: bool = True) -> lf.Batch:
    """Documents of 4, 1, 6 and 6 tokens, the second without a label; then padding, which has none either."""
    import numpy as np

    tokens = np.arange(LENGTH) % 7
    goal = np.append(tokens[1:], IGNORE)
    goal[[s - 1 for s in STARTS[1:]]] = IGNORE
    made = pack([Row(tokens, goal, np.array(STARTS))], LENGTH + PADDING)
    plan = made.plan if labels else {k: v for k, v in made.plan.items() if k != "labels"}
    return attrs.evolve(lf.Batch(plan), derived=documents(lf.Batch(plan)))


def routed(r: Router, params: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float64, labels: bool = True) -> Any:
    """(h, params, what `route` gives)"""
    g = torch.Generator().manual_seed(SEED)
    h = torch.randn(LENGTH + PADDING, D, generator=g, dtype=torch.float64).to(dtype)
    p = {"weight": torch.randn(r.experts, D, generator=g, dtype=torch.float64).to(dtype)}
    for name in ("bias", "linear_bias"):
        p[name] = torch.randn(r.experts, generator=g, dtype=torch.float64).to(dtype)
    p["fraction"] = torch.rand(r.experts, generator=g, dtype=torch.float64).softmax(-1)
    p |= params or {}
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp64")
    return h, p, route(r, p, h, batch(labels), ctx)


LIVE = [*range(4), *range(5, LENGTH)]


def test_softmax_over_all_or_over_the_chosen() -> None:
    for normalise in (True, False):
        r = Router(E, 2, normalise=normalise, scale=1.7)
        h, p, (ids, weights, _, _) = routed(r)
        scores = (h @ p["weight"].T).softmax(-1)
        for t in LIVE:
            best = scores[t].argsort(descending=True)[:2]
            assert ids[t].tolist() == best.tolist()
            want = scores[t, best] / (scores[t, best].sum() if normalise else 1)
            assert torch.allclose(weights[t], 1.7 * want, rtol=1e-12)


def test_a_selection_bias_is_for_the_choice_alone() -> None:
    r = Router(E, 3, "sigmoid", normalise=True, bias=True)
    h, p, (ids, weights, _, _) = routed(r)
    scores = (h @ p["weight"].T).sigmoid()
    moved = 0
    for t in LIVE:
        assert set(ids[t].tolist()) == set((scores[t] + p["bias"]).topk(3).indices.tolist())
        moved += set(ids[t].tolist()) != set(scores[t].topk(3).indices.tolist())
        assert torch.allclose(weights[t], scores[t, ids[t]] / scores[t, ids[t]].sum(), rtol=1e-12)
    assert moved, "the bias changes no choice"
    r = Router(E, 3, "sigmoid", normalise=False, bias=True)
    h, p, (ids, weights, _, _) = routed(r)
    assert torch.allclose(weights[LIVE], (h @ p["weight"].T).sigmoid().gather(1, ids.clamp_max(E - 1))[LIVE], rtol=1e-12)


def test_a_bias_of_the_scores_is_part_of_them() -> None:
    h, p, (ids, _, _, _) = routed(Router(E, 1, linear_bias=True))
    want = (h @ p["weight"].T + p["linear_bias"]).argmax(-1)
    assert ids[LIVE, 0].tolist() == want[LIVE].tolist()


@pytest.mark.parametrize("score", ["max", "top2"])
def test_the_best_groups_are_chosen_from(score: str) -> None:
    g = torch.Generator().manual_seed(SEED)
    r = Router(12, 3, groups=4, top_groups=2, group_score=score)
    scores = torch.rand(40, 12, generator=g)
    differs = 0
    for row, ids in zip(scores, choose(r, scores, None)):
        each = row.view(4, 3)
        value = each.amax(1) if score == "max" else each.topk(2, 1).values.sum(1)
        groups = value.topk(2).indices.tolist()
        allowed = [e for e in range(12) if e // 3 in groups]
        assert ids.tolist() == sorted(allowed, key=lambda e: -row[e])[:3]
        differs += set(groups) != set(each.amax(1).topk(2).indices.tolist())
    assert (differs > 0) == (score == "top2"), "both scores would do"


def test_a_group_is_chosen_from_though_its_biased_scores_are_negative() -> None:
    """What is out of the choice is -∞, not 0: with a bias of -5 all that are in it are below 0."""
    r = Router(4, 2, "sigmoid", groups=2, top_groups=1, bias=True)
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2]])
    assert choose(r, scores, torch.full((4,), -5.0)).tolist() == [[0, 1]]


def test_tokens_of_documents_without_a_label_go_nowhere() -> None:
    _, _, (ids, _, _, sums) = routed(Router(E, 2))
    out = [t for t in range(LENGTH + PADDING) if t not in LIVE]
    assert (ids[out] == E).all()
    assert (ids[LIVE] < E).all()
    assert sums["load"].sum() == 2 * len(LIVE)
    _, _, (ids, _, losses, _) = routed(Router(E, 2, balance=1.0), labels=False)
    assert (ids < E).all(), "without labels all tokens count"
    assert losses == {}


def test_losses_as_they_are_defined() -> None:
    r = Router(E, 2, "sigmoid", balance=1.0, sequence_balance=1.0, global_balance=1.0, z=1.0)
    h, p, (ids, _, losses, sums) = routed(r)
    logits = h @ p["weight"].T
    share = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    chosen = torch.zeros(LENGTH + PADDING, E, dtype=torch.float64)
    for t in LIVE:
        chosen[t, ids[t]] = 1
    n = len(LIVE)
    # the usual form: E · Σ_e (share of choices that are e) · (mean score of e), times the tokens that a mean divides by
    assert torch.allclose(losses["balance"], n * E * (chosen.sum(0) / (2 * n) * share[LIVE].mean(0)).sum(), rtol=1e-12)
    documents = [range(4), range(5, 11), range(11, 17)]
    each = [E * (chosen[[*d]].sum(0) / (2 * len(d)) * share[[*d]].mean(0)).sum() for d in documents]
    assert torch.allclose(losses["sequence_balance"], torch.stack(each).sum(), rtol=1e-12)
    assert torch.allclose(losses["global_balance"], n * E * (p["fraction"] * share[LIVE].mean(0)).sum(), rtol=1e-12)
    assert torch.allclose(losses["z"], logits[LIVE].logsumexp(-1).square().sum(), rtol=1e-12)
    assert torch.equal(sums["load"], chosen.sum(0))
    assert int(router.live_tokens(batch())) == n
    assert int(router.live_documents(batch())) == 3


def test_even_routing_has_a_balance_of_one() -> None:
    """By the definition: with all shares 1/E it is 1 whatever is chosen, and each objective divides by what it counts."""
    r = Router(E, 2, balance=1.0, sequence_balance=1.0)
    _, _, (_, _, losses, _) = routed(r, {"weight": torch.zeros(E, D, dtype=torch.float64)})
    assert math.isclose(losses["balance"] / len(LIVE), 1.0)
    assert math.isclose(losses["sequence_balance"] / 3, 1.0)


def test_of_equal_weights_those_that_come_first_are_taken() -> None:
    """Equal but for rounding, too: tokens with the same past have the same weight, and each layout rounds it in its own way."""
    r = Router(E, 1, capacity=0.5 * E)  # half of all may go to one expert
    ids, made = torch.zeros(LENGTH + PADDING, 1, dtype=torch.int64), batch(labels=False)
    noise = torch.arange(len(ids), dtype=torch.float64)[:, None] * torch.finfo(torch.float64).eps
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp64")
    for weights in (0.3 + noise, 0.3 - noise, torch.full_like(noise, 0.3)):
        assert router.within_capacity(r, ids, weights, made, ctx).flatten().nonzero().flatten().tolist() == list(range(len(ids) // 2))
    more = 0.3 + 1e5 * torch.finfo(torch.float32).eps * noise.bool()  # what float32 tells apart is not equal
    assert not router.within_capacity(r, ids, more, made, ctx)[0]


@pytest.mark.parametrize("drop", ["probability", "position"])
def test_an_expert_takes_no_more_than_its_capacity(drop: str) -> None:
    r = Router(E, 2, "sigmoid", normalise=False, bias=True, capacity=0.8, drop=drop)
    params = {"bias": torch.tensor([3.0, 2.0, 0, 0, 0, 0], dtype=torch.float64)}
    _, _, (ids, weights, _, sums) = routed(r, params)
    free, *_ = routed(attrs.evolve(r, capacity=None), params)[2]
    limit = math.ceil(0.8 * 2 * len(LIVE) / E)
    for e in range(E):
        asked = [(t, float(weights[t, k])) for t in LIVE for k in range(2) if free[t, k] == e]
        want = sorted(asked, key=(lambda x: -x[1]) if drop == "probability" else (lambda x: x[0]))[:limit]
        assert {t for t in LIVE for k in range(2) if ids[t, k] == e} == {t for t, _ in want}
    assert torch.equal(torch.where(ids < 0, -1 - ids, ids), free), "what is dropped is known still"
    assert sums["dropped"] == (ids < 0).sum() > 0


def test_a_capacity_that_comes_out_whole_is_not_rounded_up() -> None:
    """1.2 · 25 / 5 is 6, and in float32 more."""
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp32")
    for capacity, top, n in ((1.2, 1, 25), (1.2, 2, 100), (0.7, 2, 50), (1.1, 1, 150)):
        limit = round(capacity * top * n / 5)
        assert limit == pytest.approx(capacity * top * n / 5, abs=1e-9)
        made = lf.Batch({"tokens": torch.zeros(n)}, derived={"live": torch.ones(n, dtype=torch.bool)})
        ids = torch.zeros(n, top, dtype=torch.int64)
        assert within_capacity(Router(5, top, capacity=capacity), ids, torch.rand(n, top), made, ctx).sum() == limit


def test_scores_are_worked_out_in_float32_at_least() -> None:
    _, _, (_, weights, _, _) = routed(Router(E, 2), dtype=torch.bfloat16)
    assert weights.dtype == torch.float32
    h, p, (ids, weights, _, _) = routed(Router(E, 2, normalise=False), dtype=torch.bfloat16)
    exact = (h.double() @ p["weight"].double().T).softmax(-1)
    assert torch.allclose(weights[LIVE].double(), exact.gather(1, ids.clamp_max(E - 1))[LIVE], rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"score": "softmx"}, "unknown router score 'softmx'; did you mean 'softmax'"),
        ({"top": 7}, "top=7 must be from 1 to the number of experts, 6"),
        ({"groups": 4}, "groups=4 must divide experts=6"),
        ({"groups": 6, "top_groups": 1}, "top=2 experts cannot be chosen from top_groups=1 groups of 1"),
        ({"groups": 6, "top_groups": 3, "group_score": "top2"}, "needs groups of at least 2 experts"),
        ({"capacity": 0.0}, "capacity=0.0 must be above 0"),
        ({"scale": 0.0}, "scale=0.0 must be a number above 0"),
        ({"scale": math.nan}, "scale=nan must be a number above 0"),
        ({"z": math.inf}, "z=inf must not be negative, nor infinite"),
        ({"capacity": math.inf}, "capacity=inf must be .*None for no limit"),
        ({"balance": -0.1}, "balance=-0.1 must not be negative"),
        ({"z": math.nan}, "z=nan must not be negative"),
        ({"drop": "last"}, "unknown router drop 'last'"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Router(**{"experts": E, "top": 2, **fields})


def test_mixtures_that_cannot_be_are_refused() -> None:
    r, a = Router(4, 2, balance=0.1), Attention(2, 1, 4)
    with pytest.raises(ConfigError, match="dim=0 must be at least 1"):
        MoE(r, 0)
    with pytest.raises(ConfigError, match="shared_gate=True needs a shared expert"):
        MoE(r, 4, shared_gate=True)
    with pytest.raises(ConfigError, match="limit=-1 must be above 0"):
        MoE(r, 4, limit=-1)
    layers = tuple(Layer(a, MoE(attrs.evolve(r, balance=b), 4)) for b in (0.1, 0.2))
    with pytest.raises(ConfigError, match="must be the same in all layers"):
        decoder(DecoderConfig(8, 8, layers))
    with pytest.raises(lf.layouts.LayoutError, match="the model has none"):
        lf.layout(decoder(DecoderConfig(8, 8, (Layer(a, GatedMLP(4)),))), lf.Mesh(dp=2, ep=2))
    with pytest.raises(ConfigError, match="unknown dispatch 'exchang'; did you mean 'exchange'"):
        lf.Context(lf.solo(), lf.devices.get("cpu"), dispatch="exchang")


def test_what_a_record_says() -> None:
    layers = {"a": MoE(Router(4, 2, capacity=1.0), 4), "b": MoE(Router(4, 2, capacity=1.0), 4)}
    even, one = torch.full((4,), 5.0), torch.tensor([20.0, 0.0, 0.0, 0.0])
    dropped = {"a.route/dropped": torch.tensor(4.0), "b.route/dropped": torch.tensor(0.0)}
    said = moe_report(layers, {"a.route/load": even, "b.route/load": one, **dropped})
    assert said == {"expert_load_max": 4.0, "expert_entropy": pytest.approx(0.5), "experts_idle": 3 / 8, "dropped": 0.1}
    assert moe_report({}, {}) == {}

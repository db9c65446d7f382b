"""A plan says what a step will take: memory as ranks with data have it, traffic as the trace counts it, times that add up."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from helpers import SEED, processes

import lf
from lf.config import ConfigError
from lf.data.batches import pack
from lf.devices import cpu, paper
from lf.devices.described import described
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, MoE, decoder
from lf.models.router import Router
from lf.models.small import tiny
from lf.pipeline import Pipeline
from lf.plan import plan, signatures
from lf.plan_layers import Layers
from lf.plan_time import Achieved, Rates, Work
from lf.sim import measured, spmd, trace

TOKENS, ROWS, COUNT = 16, 2, 4
KNOWN = Layers(TOKENS)


def even() -> lf.models.decoder.Model:
    """A mixture in which every token goes to every expert: a plan takes experts to be loaded evenly."""
    a = Attention(heads=4, kv_heads=2, head_dim=8, qk_norm=True)
    router = Router(4, 4, score="sigmoid", bias=True, balance=0.1, sequence_balance=0.1, global_balance=0.1, z=0.1)
    routed = Layer(a, MoE(router, 16, shared=24, shared_gate=True, biases=True))
    return decoder(DecoderConfig(vocab=37, dim=32, layers=(Layer(a, GatedMLP(24)), routed)))


MODELS = {"tiny": tiny(), "untied": tiny(False), "even": even()}
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {  # mesh, model, pipeline, precision
    "one rank": ("", "tiny", {}, "fp32"),
    "dp, bf16": ("dp=2", "tiny", {}, "bf16"),
    "dp, tp": ("dp=2,tp=2", "tiny", {}, "bf16"),
    "pp, run again": ("pp=2", "tiny", {"recompute": "full"}, "fp32"),
    "pp, half run again": ("pp=2,tp=2", "untied", {"recompute": "full:1"}, "bf16"),
    "pp, operations run again": ("pp=2", "tiny", {"recompute": "ops=swiglu,rms_norm"}, "fp32"),
    "pp, weight gradients apart": ("pp=2,dp=2", "tiny", {"schedule": "zb-h1"}, "bf16"),
    "pp, a vee": ("pp=2", "untied", {"schedule": "zb-v"}, "fp32"),
    "pp, two stages a rank": ("pp=2", "untied", {"schedule": "interleaved", "chunks": 2}, "bf16"),
    "stage 1": ("dp=4", "tiny", {"shard": "1"}, "bf16"),
    "stage 2, pp": ("pp=2,dp=2", "untied", {"shard": "2"}, "bf16"),
    "stage 3": ("dp=2", "untied", {"shard": "3"}, "fp32"),
    "stage 3, hybrid, run again": ("dp=4", "tiny", {"shard": "3,ranks=2", "recompute": "full"}, "bf16"),
    "experts": ("ep=2,dp=2", "even", {}, "bf16"),
    "experts, stage 1": ("ep=2,etp=2,tp=2,dp=2", "even", {"shard": "1"}, "bf16"),
}


def batches() -> list[lf.Batch]:
    """Microbatches of rows that are a document each, all of which are learned."""
    rows = np.random.default_rng(SEED).integers(0, 37, (COUNT, ROWS, TOKENS + 1))
    return [pack([lf.data.Row(row[:-1], row[1:], np.array([0])) for row in each], 2) for each in rows]


def step(axes: Any, device: Any, layout: Any, program: Any, precision: str) -> None:
    ctx = lf.Context(axes, device, precision)
    init, step = lf.train.make(layout, lf.optim.adamw(1e-2), program, ctx)
    step(init(lf.init(layout, ctx, SEED)), batches())


@pytest.mark.parametrize("name", CASES)
def test_memory_is_that_of_ranks_with_data_and_traffic_that_of_the_trace(name: str) -> None:
    mesh, model, flags, precision = CASES[name]
    pipeline = Pipeline(**flags)
    layout = pipeline.layout(MODELS[model], lf.Mesh.parse(mesh).fill(), TOKENS)
    program = pipeline.program(layout, COUNT)
    told = plan(layout, program, lf.optim.adamw(1e-2), "h100", seq_len=TOKENS, micro_batch=ROWS, precision=precision, layers=KNOWN, ops=cpu)
    real = (processes if "shard" in flags else spmd)(layout.mesh, measured, step, cpu, layout, program, precision)  # which pack what travels
    assert [row.row for row in told.rows] == [*range(layout.mesh.pp)]
    for row in told.rows:
        seen, paper_trace = real[row.rank], trace(layout.mesh, row.rank, step, paper, layout, program, precision)
        assert {key: n for key, n in row.sent.items() if n} == {key: c.sent for key, c in paper_trace.traffic.items() if c.sent}
        assert abs(row.peak - seen.peak) <= 0.03 * seen.peak, (row.memory, seen.peak_by_kind)
        assert row.peak == sum(row.memory.values())


def planned(mesh: str, device: Any = "h100", count: int = COUNT, model: str = "untied", **flags: Any) -> Any:
    of, rows = flags.pop("of", None), flags.pop("rows", None)
    pipeline = Pipeline(**flags)
    layout = pipeline.layout(MODELS[model], lf.Mesh.parse(mesh).fill(), TOKENS)
    program = pipeline.program(layout, count)
    return plan(layout, program, lf.optim.adamw(1e-2), device, seq_len=TOKENS, micro_batch=ROWS, layers=KNOWN, of=of, rows=rows, ops=cpu)


def test_rows_with_the_same_layers_need_not_all_be_run() -> None:
    """Of four rows with an embedding, a layer, a layer and a head each is another; of the mixture's pairs none is. Times are those of all rows."""
    every, some = (planned("pp=4", count=8, rows=rows) for rows in (None, ()))
    assert [row.row for row in every.rows] == [0, 1, 2, 3]
    signs = signatures(every.layout)
    assert signs[1] == signs[2] != signs[0]
    assert [row.row for row in some.rows] == [0, 1, 3]
    assert some.seconds == pytest.approx(every.seconds)
    assert some.rows[1] == every.rows[1]
    assert every.rows[2].peak < every.rows[1].peak  # of equal rows the first holds the most under 1F1B


def test_few_microbatches_speak_for_many() -> None:
    many, few = planned("pp=2,dp=2", count=16), planned("pp=2,dp=2", count=4, of=16)
    assert few.tokens == many.tokens
    assert few.model_flops == many.model_flops
    assert few.peak == pytest.approx(many.peak, rel=1e-3)  # but for a few scalars of each microbatch
    assert few.seconds == pytest.approx(many.seconds, rel=0.02)
    assert [row.sent for row in few.rows] == [row.sent for row in many.rows]
    assert [row.flops for row in few.rows] == [row.flops for row in many.rows]


def test_a_plan_adds_up() -> None:
    one, two = planned(""), planned("pp=2", schedule="zb-h1", recompute="full")
    assert one.bubble < 1e-3 < 0.1 < two.bubble
    assert sum(two.spent.values()) == pytest.approx(two.seconds)
    assert two.spent["made again"] > 0 == one.spent["made again"]
    assert one.mfu == pytest.approx(one.model_flops / one.seconds / 989.4e12)
    assert one.tokens == COUNT * ROWS * TOKENS
    made = sum(s.flops(b) * COUNT for b in batches()[:1] for s in one.layout.model.segments)
    assert one.model_flops == made
    assert made < one.rows[0].flops < 1.1 * made  # with the scores of attention once more in its backward
    assert one.fits
    assert not attrs.evolve(one, device=one.device.with_(memory=one.peak)).fits


def test_what_is_not_known_of_a_device_is_told_and_may_be_given() -> None:
    with pytest.raises(ConfigError, match="device p800: bf16 is not known"):
        planned("", described("p800").with_(bandwidth=1e12))
    known = described("p800").with_(bf16=1e14, bandwidth=1e12)
    assert planned("", known).seconds > planned("").seconds
    with pytest.raises(ConfigError, match="device p800: link is not known"):
        planned("tp=2", known)


def test_rates_of_axes_follow_from_where_their_ranks_lie() -> None:
    """Nodes of 8: tp=4 lies in one; dp=4 next to it has two ranks in each, and a message to the next stage leaves it."""
    rates = Rates(lf.Mesh(pp=2, dp=4, tp=4, ep=16), described("h100"), torch.bfloat16, Achieved(links=1.0))
    assert rates.group("tp") == (4, 4)
    assert rates.per_byte("tp") == pytest.approx(1 / 450e9)
    assert rates.group("dp·cp") == (4, 2)
    assert rates.per_byte("dp·cp") == pytest.approx(1 / 100e9)  # of two adapters
    assert rates.group("dp·cp/2") == (2, 2)
    assert rates.per_byte("dp·cp/2") == pytest.approx(1 / 450e9)
    assert rates.per_byte("dp·cp%2") == pytest.approx(1 / 50e9)
    assert rates.per_byte("pp") == pytest.approx(1 / 50e9)
    assert rates.per_byte("ep", "all_to_all") == pytest.approx(7 / 15 / 450e9 + 8 / 15 / 50e9)
    assert rates.per_byte("cp") == 0
    both = Work(10.0, 4.0, {("tp", "all_gather"): 3.0}) + Work(1.0, 0.0, {("pp", "send"): 2.0})
    assert both - Work(1.0, 0.0, {("pp", "send"): 2.0}) == Work(10.0, 4.0, {("tp", "all_gather"): 3.0})

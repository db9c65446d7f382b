"""Law 1 on many meshes, and that the measure itself can fail: NaN, one wrong copy, a gradient that is nothing."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED

import lf
from lf import parity
from lf.chain_layouts import joined
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.models.small import shrunk, tiny
from lf.parity import Quantity, Report, compare
from lf.schedule import one_f_one_b

FAST = ["tp=2,dp=2", "tp=4", "dp=3"]
FACTORINGS_OF_8 = ["dp=8", "dp=4,tp=2", "dp=2,tp=4", "tp=8"]
AWKWARD = ["tp=2", "tp=3", "tp=5", "tp=6", "tp=7", "dp=2,tp=3", "dp=3,tp=2", "dp=5"]


def shaped(heads: int, kv: int, dim: int = 12, vocab: int = 37, mlp: int = 10, layers: int = 1, tied: bool = True) -> lf.segment.Model:
    return decoder(DecoderConfig(vocab, dim, (Layer(Attention(heads, kv, 4, qk_norm=True), GatedMLP(mlp)),) * layers, tied=tied))


SHAPES = {
    "one kv head": shaped(4, 1),
    "as many kv heads": shaped(3, 3),
    "groups of 4": shaped(8, 2),
    "one head": shaped(1, 1),
    "two words": shaped(4, 2, vocab=2, tied=False),
    "one column": shaped(4, 2, mlp=1),
    "no layer": decoder(DecoderConfig(11, 6, ())),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mesh", FAST)
def test_law_1(mesh: str, tied: bool) -> None:
    report = compare(tiny(tied), lf.Mesh.parse(mesh))
    assert report.ok, str(report)
    assert all(q.size > 0 for q in report.rows if q.name != "skipped"), "a quantity that is 0 compares nothing"
    assert {f"{kind} {path}" for kind in ("gradient", "parameter") for path in tiny(tied).params()} < {q.name for q in report.rows}


@pytest.mark.parametrize("microbatches", [1, 4])
def test_law_1_with_accumulation(microbatches: int) -> None:
    for mesh in ("dp=2", "tp=2"):
        report = compare(tiny(), lf.Mesh.parse(mesh), microbatches=microbatches, steps=2, padding=3)
        assert report.ok, str(report)


def test_a_sample_of_the_sweep() -> None:
    random.seed(SEED)
    for case in random.sample(SWEEP, 4):
        sweep(*case)


SWEEP = [
    (mesh, shape, microbatches)
    for mesh in (*FACTORINGS_OF_8, *AWKWARD)
    for shape in ("tied", "untied", *SHAPES)
    for microbatches in (1, 2, 3, 4)
    if "untied" in shape or "tied" in shape or microbatches == 1
]


def sweep(mesh: str, shape: str, microbatches: int) -> None:
    model = SHAPES[shape] if shape in SHAPES else tiny(shape == "tied")
    for padding, tokens in ((0, 21), (5, 4)):  # some ranks without a token of their own in the second
        steps = 3 if tokens > 9 else 1
        report = compare(model, lf.Mesh.parse(mesh), microbatches=microbatches, seed=SEED, tokens=tokens, padding=padding, steps=steps)
        assert report.ok, f"{shape}, {tokens} tokens: {report}"


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "shape", "microbatches"), SWEEP)
def test_the_whole_sweep(mesh: str, shape: str, microbatches: int) -> None:
    sweep(mesh, shape, microbatches)


@pytest.mark.parametrize(
    ("mesh", "asked"),
    [
        ("pp=2,tp=2", {"split": "e+2,h"}),
        ("pp=2,dp=2", {"placement": (1, 0)}),
        ("pp=3", {"split": (0, 4, 0)}),
        ("pp=2,tp=3", {"frozen": ("embed", "layers.0.mlp")}),
        ("tp=2", {"frozen": ("layers.1", "*/q_norm")}),
    ],
)
def test_law_1_for_stages_and_frozen_parameters(mesh: str, asked: dict[str, Any]) -> None:
    report = compare(tiny(), lf.Mesh.parse(mesh), steps=2, **asked)
    assert report.ok, str(report)
    frozen = lf.layout(tiny(), lf.Mesh(dp=1), frozen=asked.get("frozen", ())).frozen
    assert {q.name.removeprefix("gradient ") for q in report.rows if q.name.startswith("gradient ")} == set(tiny().params()) - frozen
    assert all(q.size > 0 for q in report.rows if q.name != "skipped"), "a quantity that is 0 compares nothing"


def test_what_no_stage_holds_or_two_stages_count_is_seen() -> None:
    """Of pp=2 the first and the last stage hold the tied table of 37 x 15, and the first counts it; the second alone has the head's norm of 15."""
    layouts = joined(lf.layout(tiny(), lf.Mesh(pp=2)))

    def missed(**changed: Any) -> float:
        faces = {name: getattr(layouts, name) for name in ("world", "specs", "held", "state_owned", "state_pieces")}
        return parity._covered(SimpleNamespace(**{**faces, **changed})).error  # type: ignore[arg-type]

    def twice(rank: int) -> list[tuple[str, Any]]:
        return [(path, piece) for path, spec in layouts.held(rank).items() for piece in spec.owned(layouts.chains[""].mesh.coords(rank))]

    assert missed() == 0
    assert missed(state_owned=twice) == 37 * 15
    assert missed(held=lambda rank: {k: v for k, v in layouts.held(rank).items() if k != "head/norm"}) == 15


def test_without_clipping() -> None:
    assert compare(tiny(), lf.Mesh(tp=3, dp=1), clip=None, steps=2).ok


def test_rows_differ_and_some_have_hardly_a_label() -> None:
    batches = parity.random_batches(tiny(), 0, 0, 6, 21)
    labels = [int((b.plan["labels"] != lf.IGNORE).sum()) for b in batches]
    assert min(labels) >= 1
    assert max(labels) > 5 * min(labels), "a mean of means would hide"
    assert len({len(b.plan["tokens"]) for b in batches}) > 1
    assert all(len(set(b.plan["cu_seqlens"].tolist())) > 3 for b in batches)
    padded = parity.random_batches(tiny(), 0, 0, 6, 21, padding=4)
    for a, b in zip(batches, padded):
        assert len(b.plan["tokens"]) == len(a.plan["tokens"]) + 4
        assert (b.plan["labels"][-4:] == lf.IGNORE).all()


def test_nothing_stays_at_its_initial_value() -> None:
    def body(axes):
        ctx = lf.Context(axes, lf.devices.get("cpu"), "fp64")
        return parity.randomised(lf.layout(tiny(), axes.mesh), ctx, 0)

    (params,) = lf.sim.spmd(lf.Mesh(dp=1), body)
    for path, w in lf.tree.items(params):
        assert len(w.unique()) > w.numel() * 0.9, path


def _tampered(change):
    """`spmd` with one rank's trace changed afterwards."""

    def run(mesh, fn, *args):
        traces = lf.sim.spmd(mesh, fn, *args)
        change(traces[-1])
        return traces

    return run


def _spoil(kind: str, value: float):
    def change(trace) -> None:
        if kind == "metric":
            trace.metrics[1]["grad_norm"] = trace.metrics[1]["grad_norm"] * value
        elif kind == "gradient":
            trace.gradients[2]["head/norm"][0] *= value
        else:
            trace.params["layers.1.mlp/down"][0, 0] *= value

    return change


@pytest.mark.parametrize("value", [1 + 1e-6, math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "name"), [("metric", "grad_norm"), ("gradient", "gradient head/norm"), ("parameter", "parameter layers.1.mlp/down")]
)
def test_one_wrong_copy_on_one_rank_is_a_disagreement(kind: str, name: str, value: float) -> None:
    report = compare(tiny(), lf.Mesh(dp=2, tp=2), microbatches=1, spmd=_tampered(_spoil(kind, value)))
    assert not report.ok
    assert [q.name for q in report.bad] == [name]
    assert f"  {name}: error" in str(report)
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


@pytest.mark.parametrize(
    ("error", "tolerance", "ok"),
    [
        (0.0, 0.0, True),
        (1e-12, 1e-10, True),
        (1e-9, 1e-10, False),
        (math.nan, 1e-10, False),
        (math.nan, math.nan, False),
        (math.inf, math.inf, False),
        (1.0, math.inf, False),
    ],
)
def test_what_agrees(error: float, tolerance: float, ok: bool) -> None:
    assert Quantity("x", 1.0, error, tolerance).ok is ok


def test_a_report_without_rows_proves_nothing() -> None:
    assert not Report(lf.Mesh(dp=1), 1, 0, ()).ok


def test_a_worse_step_is_not_hidden_by_a_later_one() -> None:
    bad, fine = Quantity("x", 1.0, math.nan, 1e-10), Quantity("x", 1.0, 0.0, 1e-10)
    assert parity._worst([fine, bad, fine]) is bad


def test_the_report_in_words_table_and_json() -> None:
    report = compare(tiny(), lf.Mesh(tp=2, dp=1), microbatches=1, steps=1)
    assert str(report) == f"mesh tp=2, 1 microbatches a rank, seed 0: all {len(report.rows)} quantities agree with one rank"
    assert parity.table([report, report]).row_count == len(report.rows)
    assert len(parity.table([report, report]).columns) == 4
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["ok"] is True
    assert told["mesh"] == "tp=2"
    assert told["rows"][0].keys() == {"name", "size", "error", "tolerance", "ok"}


def test_a_shrunk_model_keeps_its_ratios() -> None:
    layer = Layer(Attention(32, 8, 128), GatedMLP(12288))
    big = DecoderConfig(151936, 4096, (layer,) * 36, tied=False, norm_eps=1e-5)
    small = shrunk(big)
    a, b = small.layers[0].mixer, big.layers[0].mixer
    assert a.heads / a.kv_heads == b.heads / b.kv_heads
    assert small.dim / (a.heads * a.head_dim) == big.dim / (b.heads * b.head_dim)
    assert small.layers[0].ffn.dim / small.dim == big.layers[0].ffn.dim / big.dim
    assert (len(small.layers), small.tied, small.norm_eps) == (2, False, 1e-5)
    assert small.dim <= 64
    assert shrunk(small) == small
    wide_layer = attrs.evolve(layer, ffn=GatedMLP(4096))
    assert len(shrunk(attrs.evolve(big, layers=(layer, wide_layer) * 3)).layers) == 4  # two of each kind


def test_two_models_with_two_layouts_in_one_process() -> None:
    """Law 6: nothing is global, so two meshes can be alive at once, inside one another."""
    inner: list[bool] = []

    def body(axes):
        if axes.rank == 0:
            inner.append(compare(tiny(False), lf.Mesh(tp=2, dp=1), steps=1).ok)
        trace = parity.trace(axes, lf.layout(tiny(), axes.mesh), one_f_one_b(1, 1), [parity.random_batches(tiny(), 0, 0, 2, 9)], 0, 0.1, None, "cpu")
        return torch.stack([trace.metrics[0]["loss"], axes["dp"].sum(trace.metrics[0]["loss"]) / 2])

    a, b = lf.sim.spmd(lf.Mesh(dp=2), body)
    assert inner == [True]
    assert torch.equal(a, b)

"""Muon against torch's in float64, on every kind of mesh: matrices are logical ones, wherever their rows lie."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from chained import at, laid_out
from helpers import SEED, draw, processes
from optim_reference import agree, torch_updated, updated

import lf
from lf import optim, parity
from lf.chain_layouts import joined
from lf.models.small import tiny, tiny_moe
from lf.ops.newton_schulz import newton_schulz
from lf.optim.matrices import hidden_matrix
from lf.optim.owners import _plans
from lf.spec import Init, Param

WAYS = ("owner", "gathered")
LR = 0.125  # float32 has it: a rate is computed there
LAYOUTS = [
    ("", "0"), ("tp=2,dp=2", "0"), ("tp=2,dp=2", "1"), ("tp=3,dp=2", "1"), ("ep=2,dp=2", "0"), ("ep=2,dp=4", "1"), ("ep=2,etp=2,tp=2,dp=2", "1"),
    ("tp=2,dp=4,ep=2", "3,ranks=2"), ("pp=2,dp=2", "1"), ("dp=5", "2"), ("tp=4", "0"),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("mesh", "sharding"), LAYOUTS)
def test_muon_is_torch_muon_under_any_layout(mesh: str, sharding: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = lf.layout(tiny_moe(), lf.Mesh.parse(mesh), sharding=sharding)
    states = lf.sim.spmd(layout.mesh, updated, layout, optim.muon(LR, weight_decay=0.3, way=way), 4)
    agree(layout, states, "master", torch_updated(layout, hidden_matrix, 4, LR, 0.3, monkeypatch), 1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_muon_of_several_chains(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = laid_out(at("tp=2,dp=2", "tp=3", "dp=2", ranks={"words": (1, 3, 0), "hand": (2, 3)}, eyes_sharding="1", hand_sharding="1"))
    states = lf.sim.spmd(lf.Mesh(dp=layouts.world), updated, layouts, optim.muon(LR, weight_decay=0.3, way=way), 3)
    agree(layouts, states, "master", torch_updated(layouts, hidden_matrix, 3, LR, 0.3, monkeypatch), 1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_muon_over_real_processes(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = lf.layout(tiny_moe(), lf.Mesh.parse("ep=2,dp=2,tp=2"), sharding="1")
    states = processes(layout.mesh, updated, layout, optim.muon(LR, weight_decay=0.3, way=way), 2)
    agree(layout, states, "master", torch_updated(layout, hidden_matrix, 2, LR, 0.3, monkeypatch), 1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_law_1_holds_under_muon(stage: str, way: str) -> None:
    """Of the whole step: losses, gradients, norms and parameters after updates that are no function of one element."""
    mesh = random.Random(f"{SEED} {stage} {way}").choice(["tp=2,dp=2", "tp=3,dp=2", "pp=2,dp=2", "dp=3"])
    asked = {"seed": SEED, "steps": 2, "sharding": stage}
    report = parity.compare(tiny(), lf.Mesh.parse(mesh), **asked, optimizer=lambda lr: optim.muon(lr, way=way, rest=optim.sgd(lr)))
    assert report.ok, str(report)


def test_products_are_in_the_compute_dtype_and_masters_in_theirs() -> None:
    """bf16 moves weights as float32 does, but for the 8 bits of the products."""
    layout = lf.layout(tiny(), lf.Mesh.parse("tp=2"))
    for way in WAYS:
        one, two = (lf.sim.spmd(layout.mesh, updated, layout, optim.muon(LR, way=way), 1, 0.5, precision) for precision in ("fp32", "bf16"))
        for a, b in zip(one, two):
            wide, narrow = (x["master"]["layers.0.attn"]["qkv"] for x in (a, b))
            assert narrow.dtype == torch.float32
            assert 1e-4 < (wide - narrow).abs().max() < 0.05 * LR


def test_singular_values_come_near_one() -> None:
    u, _, v = torch.linalg.svd(draw("svd", shape=(2, 6, 9)), full_matrices=False)
    s = torch.tensor([1.0, 0.5, 0.1, 0.03, 0.01, 0.003], dtype=torch.float64)
    for x in (u @ torch.diag(s) @ v, (u @ torch.diag(s) @ v).mT):
        out = torch.linalg.svdvals(newton_schulz(x / torch.linalg.vector_norm(s)))
        assert out.min() > 0.68
        assert out.max() < 1.21
    assert not newton_schulz(torch.zeros(1, 3, 4)).any()


def test_operations_are_dealt_evenly_and_each_matrix_has_one_owner() -> None:
    layouts = joined(lf.layout(tiny_moe(), lf.Mesh.parse("tp=2,dp=2,ep=2"), sharding="1"))
    paths = tuple(path for path, spec in layouts.specs.items() if hidden_matrix(spec.param) and path not in layouts.frozen)
    owner: dict[Any, int] = {}
    for rank in range(4):
        (plan,) = _plans(layouts, rank, paths)
        for unit, place in plan.units:
            assert place in unit.boxes
            assert owner.setdefault((unit.path, unit.part, unit.e), place) == place
    parts = sum(len(layouts.specs[path].parts()) * (6 if len(layouts.specs[path].param.shape) == 3 else 1) for path in paths)
    assert len(owner) == parts
    assert set(owner.values()) == {0, 1, 2, 3}


def test_which_matrices_are_hidden() -> None:
    params = lf.hf.model("moe-tiny").params() | tiny_moe().params()
    chosen = {path.partition("/")[2] for path, param in params.items() if hidden_matrix(param)}
    assert {"qkv", "out", "gate_up", "down"} <= chosen
    assert all("norm" not in name and "bias" not in name for name in chosen)
    assert not hidden_matrix(params["embed/weight"])
    assert not hidden_matrix(Param((1, 8), (None, "embed"), Init()))  # a gate of one row
    assert not hidden_matrix(Param((4, 8), ("expert", "expert_mlp"), Init()))  # a bias for each expert


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"momentum": 1.0}, "momentum=1.0 must lie between 0 and 1"),
        ({"rms": 0.0}, "rms=0.0 must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must not be negative"),
        ({"way": "gatherd"}, "unknown way of muon 'gatherd'; did you mean 'gathered'?"),
        ({"moments": "fp16"}, "unknown moments 'fp16'"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        optim.muon(0.1, **asked)


def test_what_is_no_matrix_is_refused_before_the_first_step() -> None:
    everything = optim.muon(0.1, chosen=lambda param: True)
    with pytest.raises(ValueError, match=r"muon is for matrices and stacks of them; \S+norm has shape \(15,\): let `chosen` leave it to `rest`"):
        parity.compare(tiny(), lf.Mesh(dp=1), steps=1, optimizer=lambda lr: everything)

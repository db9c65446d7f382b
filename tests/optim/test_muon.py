"""Muon against torch's in float64, on every kind of mesh: matrices are logical ones, wherever their rows lie."""

from __future__ import annotations

import pytest
from optim_reference import agree, torch_muon, updated

import lf
from lf import optim
from lf.models.small import tiny_moe
from lf.optim.matrices import hidden_matrix

MESHES = [
    ("", "0"), ("tp=2,dp=2", "0"), ("tp=2,dp=2", "1"), ("tp=3,dp=2", "1"), ("ep=2,dp=2", "0"), ("ep=2,dp=4", "1"), ("ep=2,etp=2,tp=2,dp=2", "1"),
    ("tp=2,dp=4,ep=2", "3,ranks=2"), ("pp=2,dp=2", "1"), ("dp=5", "2"),
]  # fmt: skip


@pytest.mark.parametrize("way", ["owner", "gathered"])
@pytest.mark.parametrize(("mesh", "sharding"), MESHES)
def test_muon_is_torch_muon_under_any_layout(mesh: str, sharding: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = lf.layout(tiny_moe(), lf.Mesh.parse(mesh), sharding=sharding)
    states = lf.sim.spmd(layout.mesh, updated, layout, optim.muon(0.125, weight_decay=0.3, way=way), 4)  # a rate that float32 has
    agree(layout, states, "master", torch_muon(layout, hidden_matrix, 4, 0.125, 0.3, monkeypatch), 1e-11)

"""Experts in files: one tensor each, fused, transposed or row by row in turn; read and written under any folding of the expert mesh."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import context
from safetensors.torch import save_file

import lf
from lf import box, tree
from lf.models import families
from lf.models.attention import Attention
from lf.models.decoder import DecoderConfig, GatedMLP, Layer, decoder
from lf.models.families.place import Place
from lf.models.moe import MoE
from lf.models.router import Router

E, I, H = 5, 6, 15
ROUTER = Router(E, 2, score="sigmoid", bias=True, balance=0.1, global_balance=0.1)
FFNS = GatedMLP(10), MoE(ROUTER, I, 10, shared_gate=True, biases=True)
MODEL = decoder(DecoderConfig(37, H, tuple(Layer(Attention(6, 3, 4, qk_norm=True), f) for f in FFNS), tied=False))
ONE = lf.layout(MODEL, lf.Mesh(dp=1))
AT, THERE = "layers.1.experts", "model.1.experts"
EIGHT = ["tp=2,dp=4,ep=4", "dp=8,ep=2,etp=2", "pp=2,tp=2,dp=2,ep=2,etp=2", "dp=2,tp=4,ep=8", "dp=2,tp=4,etp=8", "pp=4,dp=2,ep=2", "dp=4,tp=2,ep=2"]
MESHES = ["", *EIGHT, "tp=2,dp=2,ep=4", "dp=4,ep=2,etp=2", "dp=3,ep=3", "tp=3,dp=2,ep=3,etp=2"]


def names(form: str) -> dict[str, str | Place]:
    """Everything but the experts' matrices is a tensor of its own, as it is."""
    out: dict[str, str | Place] = {p.key: f"model.{p.key}" for spec in ONE.specs.values() for p in spec.pieces(ONE.mesh.coords(0))}
    for part, first in (("gate", 0), ("up", I)):
        if form == "each":
            out[f"{AT}/gate_up/{part}"] = Place(THERE + ".{}." + part, stack=E)
            out[f"{AT}/gate_up_bias/{part}"] = Place(THERE + ".{}.b_" + part, stack=E)
        elif form == "turns":
            runs = ((0, first // I, I),)
            out[f"{AT}/gate_up/{part}"] = Place(f"{THERE}.gate_up", runs, 2 * I, 1, step=2, transposed=True)
            out[f"{AT}/gate_up_bias/{part}"] = Place(f"{THERE}.gate_up_bias", runs, 2 * I, 1, step=2)
        else:
            out[f"{AT}/gate_up/{part}"] = Place(f"{THERE}.gate_up", ((0, first, I),), 2 * I, 1, transposed=form == "transposed")
    out[f"{AT}/down"] = Place(THERE + ".{}.down", stack=E) if form == "each" else Place(f"{THERE}.down", transposed=form != "fused")
    return out


def disk(params: Any, form: str) -> dict[str, torch.Tensor]:
    """The file of a form, from the whole parameters, worked out without `Place`."""
    out = {}
    for path, spec in ONE.specs.items():
        for piece in spec.pieces(ONE.mesh.coords(0)):
            out[f"model.{piece.key}"] = piece.view(tree.get(params, path)).clone()
    gate, up, down = (out.pop(f"model.{AT}/{key}") for key in ("gate_up/gate", "gate_up/up", "down"))
    biases = [out[f"model.{AT}/gate_up_bias/{part}"] for part in ("gate", "up")]
    if form in ("each", "turns"):
        for part in ("gate", "up"):
            del out[f"model.{AT}/gate_up_bias/{part}"]
    if form == "each":
        for e in range(E):
            for name, x in {"gate": gate, "up": up, "down": down, "b_gate": biases[0], "b_up": biases[1]}.items():
                out[f"{THERE}.{e}.{name}"] = x[e].clone()
    elif form == "turns":
        out[f"{THERE}.gate_up"] = torch.stack([gate, up], 2).flatten(1, 2).mT.contiguous()  # rows g0 u0 g1 u1 …
        out[f"{THERE}.gate_up_bias"] = torch.stack(biases, 2).flatten(1, 2)
        out[f"{THERE}.down"] = down.mT.contiguous()
    else:
        joined = torch.cat([gate, up], 1)
        out[f"{THERE}.gate_up"], out[f"{THERE}.down"] = (joined, down) if form == "fused" else (joined.mT.contiguous(), down.mT.contiguous())
    return out


FORMS = ["each", "fused", "transposed", "turns"]


def use(monkeypatch: Any, form: str) -> None:
    made = SimpleNamespace(read=lambda values: MODEL.config, write=lambda config: {"model_type": "made"}, names=lambda config: names(form))
    made.copies, made.derived = lambda config: {}, lambda name: False
    monkeypatch.setattr(families, "FAMILIES", {"made": made})


@pytest.fixture(scope="module")
def whole() -> Any:
    """Parameters in which no two numbers are alike."""
    pairs, at = [], 0
    for path, param in MODEL.params().items():
        n = int(torch.Size(param.shape).numel())
        pairs.append((path, torch.arange(at, at + n, dtype=torch.float32).view(param.shape) / 64))
        at += n
    return tree.build(pairs)


def folder(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "made"}')
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt", **metadata})
    return path


def loaded(mesh: str, source: Path, precision: str = "fp32", **options: Any) -> list[Any]:
    def rank(axes: Any) -> Any:
        layout = lf.layout(MODEL, axes.mesh)
        return layout, axes.coords, lf.hf.load(source, layout, context(axes, precision), **options)

    return lf.sim.spmd(lf.Mesh.parse(mesh), rank)


def assert_pieces(ranks: list[Any], whole: Any) -> None:
    for layout, coords, params in ranks:
        held = layout.held(coords)
        assert [path for path, _ in tree.items(params)] == list(held)
        for path, spec in held.items():
            for piece, full in zip(spec.pieces(coords), ONE.specs[path].pieces(ONE.mesh.coords(0))):
                want = full.view(tree.get(whole, path))[box.slices(piece.box, full.box)]
                assert torch.equal(piece.view(tree.get(params, path)), want), (piece.key, coords)


@pytest.mark.parametrize("form", FORMS)
def test_each_rank_has_its_own_experts(whole: Any, tmp_path: Path, monkeypatch: Any, form: str) -> None:
    use(monkeypatch, form)
    folder(tmp_path, disk(whole, form))
    for mesh in MESHES:
        assert_pieces(loaded(mesh, tmp_path), whole)

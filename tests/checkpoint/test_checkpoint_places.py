"""Parts that share a tensor on disk: each rank reads its own rows, any mesh writes the same bytes, and what is wrong is said of the whole tensor."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import context
from qwen3_oracle import files
from safetensors.torch import load_file, save_file

import lf
from lf import box, tree
from lf.checkpoint import CheckpointError, export
from lf.config import ConfigError
from lf.models import families
from lf.models.families import internlm2, qwen3
from lf.models.families.place import Place
from lf.models.small import tiny

MESHES = ["", "tp=2", "tp=4", "tp=5,dp=2", "tp=8", "dp=3"]
MODEL = tiny(tied=False)
SHARED = "all.tables"


def names(config: Any) -> dict[str, str | Place]:
    """As InternLM2 has q, k and v; gate and up joined; both head norms in one vector; both tables side by side, along dim 1."""
    out: dict[str, str | Place] = {**qwen3.names(config)}
    for i, layer in enumerate(config.layers):
        a, f, d = layer.mixer, layer.ffn.dim, layer.mixer.head_dim
        out |= {f"layers.{i}.attn/qkv/{part}": place for part, place in internlm2.wqkv(f"{i}.wqkv", a).items()}
        out |= {f"layers.{i}.mlp/gate_up/{part}": Place(f"{i}.gate_up", ((0, at, f),), 2 * f) for part, at in (("gate", 0), ("up", f))}
        out |= {f"layers.{i}.attn/{part}_norm": Place(f"{i}.norms", ((0, at, d),), 2 * d) for part, at in (("k", 0), ("q", d))}
    tables = {key: Place(SHARED, ((0, at, config.dim),), 2 * config.dim, 1) for key, at in (("embed/weight", 0), ("head/weight", config.dim))}
    return out | tables


@pytest.fixture
def family(monkeypatch: Any) -> None:
    made_up = SimpleNamespace(read=qwen3.read, write=qwen3.write, copies=lambda config: {}, derived=lambda name: False, names=names)
    made_up.unused = lambda name, config: "heads for later" if name.startswith("mtp.") else ""
    monkeypatch.setattr(families, "FAMILIES", {"qwen3": made_up})


def saved(out: Path, mesh: str = "", **options: Any) -> Any:
    """The folder of a fresh model in which no two parts are alike, and its parameters on rank 0."""

    def rank(axes: Any) -> Any:
        ctx, layout = context(axes, "fp32"), lf.layout(MODEL, axes.mesh)
        params = lf.init(layout, ctx, 0)
        for i, (_, gain) in enumerate((path, x) for path, x in tree.items(params) if x.ndim == 1):
            gain += torch.arange(len(gain)) + 100 * i
        lf.hf.save(out, layout, params, ctx, **options)
        return params

    return lf.sim.spmd(lf.Mesh.parse(mesh), rank)[0]


def loads(folder: Path, mesh: str = "", precision: str = "fp32", **options: Any) -> list[Any]:
    def rank(axes: Any) -> Any:
        ctx, layout = context(axes, precision), lf.layout(MODEL, axes.mesh)
        return layout, axes.coords, lf.hf.load(folder, layout, ctx, **options)

    return lf.sim.spmd(lf.Mesh.parse(mesh), rank)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("limit", [10**9, 3000])
def test_any_mesh_writes_the_same_and_reads_its_own_rows(tmp_path: Path, limit: int) -> None:
    whole, one = saved(tmp_path / "one", max_shard_bytes=limit), lf.layout(MODEL, lf.Mesh(dp=1))
    for mesh in MESHES:
        saved(tmp_path / "again", mesh, max_shard_bytes=limit)
        assert files(tmp_path / "again") == files(tmp_path / "one"), mesh
        for layout, coords, params in loads(tmp_path / "one", mesh):
            for path, spec in layout.specs.items():
                for piece, all_of_it in zip(spec.pieces(coords), one.specs[path].pieces(one.mesh.coords(0))):
                    want = all_of_it.view(tree.get(whole, path))[box.slices(piece.box, all_of_it.box)]
                    assert torch.equal(piece.view(tree.get(params, path)), want), piece.key


@pytest.mark.usefixtures("family")
def test_the_rows_lie_where_the_family_says(tmp_path: Path) -> None:
    params = saved(tmp_path)
    disk, a, at = load_file(tmp_path / export.SINGLE), MODEL.config.layers[0].mixer, 0
    q, k, v = params["layers.0.attn"]["qkv"].split([a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim])
    group, d = a.heads // a.kv_heads, a.head_dim
    for g in range(a.kv_heads):
        for part, n in ((q, group * d), (k, d), (v, d)):
            assert torch.equal(disk["0.wqkv"][at : at + n], part[g * n : g * n + n])
            at += n
    assert at == len(disk["0.wqkv"])
    assert torch.equal(disk[SHARED], torch.cat([params["embed"]["weight"], params["head"]["weight"]], 1))


def test_every_row_of_internlm2s_matrix_has_one_owner() -> None:
    for place_of in (internlm2.names(MODEL.config), names(MODEL.config)):
        rows: dict[str, list[int]] = {}
        sizes = {}
        for place in place_of.values():
            if isinstance(place, Place):
                sizes[place.name] = place.rows
                rows.setdefault(place.name, []).extend(row for _, there, n in place.runs for row in range(there, there + n))
        assert {name: sorted(held) for name, held in rows.items()} == {name: list(range(n)) for name, n in sizes.items()}


@pytest.mark.usefixtures("family")
def test_what_is_wrong_is_said_of_the_tensor_on_disk(tmp_path: Path) -> None:
    saved(tmp_path)
    held = load_file(tmp_path / export.SINGLE)
    rows = len(held["1.wqkv"])
    for change, words in (
        ({"1.wqkv": None}, f"1.wqkv [{rows}, 15] is missing"),
        ({"1.wqkv": held["1.wqkv"][:-1].clone()}, f"1.wqkv has shape [{rows - 1}, 15], the model [{rows}, 15]"),
        ({SHARED: held[SHARED].T.contiguous()}, f"{SHARED} has shape [30, 37], the model [37, 30]"),
        ({"2.wqkv": held["1.wqkv"].clone()}, f"2.wqkv [{rows}, 15] is no tensor of this model"),
    ):
        save_file({k: v for k, v in {**held, **change}.items() if v is not None}, tmp_path / export.SINGLE, metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            loads(tmp_path, "tp=4")
        assert words in str(caught.value)
        assert ": 1 problem\n" in str(caught.value)


@pytest.mark.usefixtures("family")
def test_tensors_that_are_left_alone_are_counted_aloud_once(tmp_path: Path, capsys: Any) -> None:
    saved(tmp_path)
    extra = {f"mtp.{i}.weight": torch.zeros(2, 3, dtype=torch.int8) for i in range(3)}
    save_file({**load_file(tmp_path / export.SINGLE), **extra}, tmp_path / export.SINGLE, metadata={"format": "pt"})
    loads(tmp_path, "tp=2")
    assert capsys.readouterr().out == f"{tmp_path}: 3 tensors are left alone: heads for later\n"


# What the values are rounded to is the user's to say, and nobody else's.


def test_rounding_on_load_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path)
    exact = {k: v.double() + 1e-12 for k, v in load_file(tmp_path / export.SINGLE).items()}
    save_file(exact, tmp_path / export.SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"F64, which torch.float32 cannot hold exactly; use precision='fp64', or ask for dtype='fp32'"):
        loads(tmp_path)
    key = "model.embed_tokens.weight"
    for dtype, precision, want in (
        ("fp32", "fp32", exact[key].float()),
        (torch.bfloat16, "fp32", exact[key].bfloat16().float()),
        (None, "fp64", exact[key]),
        ("fp32", "fp64", exact[key].float().double()),
    ):
        [(_, _, params)] = loads(tmp_path, precision=precision, dtype=dtype)
        assert torch.equal(params["embed"]["weight"], want)
    wrong = {"fp64": "cannot be held by masters of torch.float32", "bf61": "did you mean 'bf16'", torch.int8: "unknown dtype 'int8'"}
    for dtype, words in wrong.items():
        with pytest.raises(ConfigError, match=words):
            loads(tmp_path, "tp=2", dtype=dtype)


def test_dtypes_of_an_export_by_name(tmp_path: Path) -> None:
    for name, dtype in (("bf16", torch.bfloat16), ("fp64", torch.float64)):
        saved(tmp_path / name, dtype=name)
        assert {x.dtype for x in load_file(tmp_path / name / export.SINGLE).values()} == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")

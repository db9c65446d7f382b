"""Weights in 8 bits with a scale for each block: read by boxes, written the same by any mesh, and refused where the files contradict themselves."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from helpers import context
from qwen3_oracle import files
from safetensors.torch import load_file, save_file

import lf
from lf import box, tree
from lf.checkpoint import CheckpointError, export, fp8, shards, weights
from lf.config import ConfigError
from lf.models import families
from lf.models.attention import Attention
from lf.models.decoder import DecoderConfig, GatedMLP, Layer, decoder
from lf.models.families.place import Place
from lf.models.moe import MoE
from lf.models.router import Router

E, I, H = 3, 136, 144
MODEL = decoder(
    DecoderConfig(
        37, H, tuple(Layer(Attention(4, 2, 40), f) for f in (GatedMLP(100), MoE(Router(E, 2, score="sigmoid", bias=True), I, 40, shared_gate=True)))
    )
)
ONE = lf.layout(MODEL, lf.Mesh(dp=1))
PIECES = [p for spec in ONE.specs.values() for p in spec.pieces(ONE.mesh.coords(0))]
AT = "layers.1.experts"
RENAMED = {"embed/weight": "embed_tokens.weight", "layers.1.route/weight": "1.gate.weight", "layers.1.combine/gate": "1.shared_expert_gate.weight"}
KEPT = {"embed_tokens.weight", "1.gate.weight", "1.shared_expert_gate.weight"}  # matrices in more bits


def names(fused: bool) -> dict[str, str | Place]:
    """One tensor an expert; or all in one, of which the halves meet in the middle of a block."""
    out: dict[str, str | Place] = {p.key: RENAMED.get(p.key, f"{p.key}.weight") for p in PIECES}
    for part, first in (("gate", 0), ("up", I)):
        here = Place("gate_up_proj", ((0, first, I),), 2 * I, 1, transposed=True) if fused else Place("experts.{}." + part + "_proj.weight", stack=E)
        out[f"{AT}/gate_up/{part}"] = here
    out[f"{AT}/down"] = Place("down_proj") if fused else Place("experts.{}.down_proj.weight", stack=E)
    return out


@pytest.fixture(params=[False, True], ids=["each", "fused"])
def family(request: Any, monkeypatch: Any) -> bool:
    made = SimpleNamespace(read=lambda values: MODEL.config, write=lambda config: {"model_type": "made"}, names=lambda config: names(request.param))
    made.copies, made.derived = lambda config: {}, lambda name: False
    monkeypatch.setattr(families, "FAMILIES", {"made": made})
    return request.param


def loaded(mesh: str, source: Path, **options: Any) -> list[Any]:
    def rank(axes: Any) -> Any:
        layout = lf.layout(MODEL, axes.mesh)
        return layout, axes.coords, lf.hf.load(source, layout, context(axes, options.pop("precision", "fp32")), **options)

    return lf.sim.spmd(lf.Mesh.parse(mesh), rank)


def saved(mesh: str, out: Path, **options: Any) -> Any:
    def rank(axes: Any) -> Any:
        ctx, layout = context(axes, "fp32"), lf.layout(MODEL, axes.mesh)
        params = lf.init(layout, ctx, 0)
        lf.hf.save(out, layout, params, ctx, **{"fp8": True, **options})
        return params

    return lf.sim.spmd(lf.Mesh.parse(mesh), rank)[0]


def product(w8: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = fp8.BLOCK) -> torch.Tensor:
    """The weights of one matrix, number by number."""
    q, s = w8.to(torch.float32).numpy(), scales.to(torch.float32).numpy()
    out = np.empty(q.shape, np.float32)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            out[i, j] = q[i, j] * s[i // block[0], j // block[1]]
    return torch.from_numpy(out)


def whole(held: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor of a file as the format means it."""
    x, scales = held[name], held.get(name + fp8.SCALE)
    if scales is None:
        return x
    each = [product(w, s) for w, s in zip(x.reshape(-1, *x.shape[-2:]), scales.reshape(-1, *scales.shape[-2:]))]
    return torch.stack(each).view(x.shape)


def matrix(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def test_blocks_against_loops() -> None:
    w = matrix(2, 200, 300) * torch.logspace(-6, 6, 300)
    w[0, :128, 128:256] = 0
    w[1, 128:, 256:] = 1e-43  # a scale of it is no float32
    w8, scales = fp8.quantise(w)
    assert (w8.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, fp8.scales_shape(w.shape))
    for e, i, j in ((e, i, j) for e in range(2) for i in range(2) for j in range(3)):
        block = w[e, i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
        scale = scales[e, i, j]
        assert scale == (np.float32(block.abs().max()) / np.float32(448) or 1.0)
        mine = w8[e, i * 128 : i * 128 + 128, j * 128 : j * 128 + 128].float()
        assert mine.abs().max() == (0 if block.abs().max() < 1e-40 else 448)
        # to the nearest of 4 significant bits, or of steps of 2^-9 below 2^-6
        step = torch.exp2(torch.floor(torch.log2((block / scale).abs().clamp_min(2**-6))) - 3)
        assert bool(((mine - block / scale).abs() <= step / 2 + 1e-4 * step).all())
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="not finite"):
            fp8.quantise(torch.tensor([[bad, 1.0]]))


def test_any_box_of_the_weights_with_the_scales_that_it_needs() -> None:
    rng, block = random.Random(0), (3, 5)
    w8 = matrix(2, 10, 17, scale=50).to(torch.float8_e4m3fn)
    scales = matrix(*fp8.scales_shape((2, 10, 17), block)).abs()
    assert scales.shape == (2, 4, 4)
    full = torch.stack([product(w, s, block) for w, s in zip(w8, scales)])
    for _ in range(50):
        held = tuple((lo := rng.randrange(n), rng.randrange(lo, n) + 1) for n in w8.shape)
        at, need = box.slices(held, ((0, 0),) * 3), box.slices(fp8.scales_box(held, block), ((0, 0),) * 3)
        assert torch.equal(fp8.dequantise(w8[at], scales[need], held, block), full[at])


MESHES = ["tp=2,dp=2,ep=4", "pp=2,tp=2,dp=2,ep=2,etp=2", "dp=4,ep=2,etp=2", "tp=3,etp=3"]


def test_any_mesh_writes_the_same_and_reads_its_own_boxes(family: bool, tmp_path: Path) -> None:
    saved("", tmp_path / "one", dtype="bf16")
    for mesh in MESHES:
        saved(mesh, tmp_path / "out", dtype="bf16", max_shard_bytes=10**9)
        assert files(tmp_path / "out") == files(tmp_path / "one"), mesh
    held = load_file(tmp_path / "one" / "model.safetensors")
    [(_, _, want)] = loaded("", tmp_path / "one")
    experts = want[AT]
    mine = {
        "down_proj": experts["down"], "gate_up_proj": experts["gate_up"].mT, "experts.2.down_proj.weight": experts["down"][2],
        "experts.1.gate_proj.weight": experts["gate_up"][1, :I], "layers.1.attn/out.weight": want["layers.1.attn"]["out"],
    }  # fmt: skip
    assert len(seen := [name for name in mine if name in held]) == 3
    assert all(torch.equal(mine[name], whole(held, name)) for name in seen)
    for mesh in MESHES:
        for layout, coords, params in loaded(mesh, tmp_path / "one"):
            for path, spec in layout.held(coords).items():
                for piece, full in zip(spec.pieces(coords), ONE.specs[path].pieces(ONE.mesh.coords(0))):
                    there = full.view(tree.get(want, path))[box.slices(piece.box, full.box)]
                    assert torch.equal(piece.view(tree.get(params, path)), there), (mesh, piece.key)


def test_matrices_are_in_8_bits_from_float32_and_the_rest_is_not(family: bool, tmp_path: Path) -> None:
    params = saved("dp=2,ep=2", tmp_path, dtype="bf16", max_shard_bytes=130_000)
    held = {k: x for p in tmp_path.glob("*.safetensors") for k, x in load_file(p).items()}
    plain = {k: x for k, x in held.items() if not k.endswith(fp8.SCALE)}
    scaled = {k for k, x in plain.items() if x.dtype == torch.float8_e4m3fn}
    assert scaled == {k for k, x in plain.items() if x.ndim > 1} - KEPT
    assert held.keys() - plain.keys() == {k + fp8.SCALE for k in scaled}
    assert {k for k in plain.keys() - scaled if plain[k].dtype != torch.bfloat16} == {"layers.1.route/bias.weight"}
    w8, scales = fp8.quantise(params["layers.0.attn"]["out"])
    assert torch.equal(held["layers.0.attn/out.weight"].float(), w8.float())
    assert torch.equal(held["layers.0.attn/out.weight" + fp8.SCALE], scales)
    assert not torch.equal(scales, fp8.quantise(params["layers.0.attn"]["out"].bfloat16().float())[1])
    about = json.loads((tmp_path / "config.json").read_text())
    kept = sorted(name.removesuffix(".weight") for name in KEPT)
    assert about[fp8.FIELD] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "modules_to_not_convert": kept
    }  # fmt: skip
    assert about["dtype"] == "bfloat16"
    index = json.loads((tmp_path / export.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in held.values())
    assert {name: file for file in sorted(set(index["weight_map"].values())) for name in load_file(tmp_path / file)} == index["weight_map"]
    assert len(sizes := [p.stat().st_size for p in tmp_path.glob("*.safetensors")]) > 1
    assert max(sizes) <= 130_000


def test_written_again_it_is_the_same(family: bool, tmp_path: Path) -> None:
    saved("", tmp_path / "a")

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(MODEL, axes.mesh)
        lf.hf.save(tmp_path / "b", layout, lf.hf.load(tmp_path / "a", layout, ctx), ctx, fp8=True)

    lf.sim.spmd(lf.Mesh(dp=2, ep=2), rank)
    first, second = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    for name, x in first.items():
        if name.endswith(fp8.SCALE):  # 448·s is rounded
            torch.testing.assert_close(second[name], x, rtol=2**-22, atol=0)
        else:
            assert torch.equal(second[name].float(), x.float())


@pytest.mark.parametrize("code", [c for c, v in fp8.SCALES.items() if v is not None])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_kinds_of_scales_and_rounding(family: bool, tmp_path: Path, code: str, dtype: str | None) -> None:
    saved("", tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held = {k: x.to(fp8.SCALES[code]) if k.endswith(fp8.SCALE) else x.clone() for k, x in held.items()}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    want = whole(held, "layers.0.attn/out.weight")
    for _, coords, params in loaded("tp=2,ep=2", tmp_path, dtype=dtype):
        mine = want[:, coords["tp"] * 80 : coords["tp"] * 80 + 80]
        assert torch.equal(params["layers.0.attn"]["out"], mine if dtype is None else mine.bfloat16().float())


def test_only_the_boxes_that_a_rank_holds_are_read(family: bool, tmp_path: Path, monkeypatch: Any) -> None:
    saved("", tmp_path)
    seen: list[tuple[str, Any]] = []
    real = weights.read_box
    monkeypatch.setattr(weights, "read_box", lambda file, name, *where: (seen.append((name, where[0])), real(file, name, *where))[1])
    loaded("tp=3,etp=3", tmp_path)
    rows = {held[-1 if family else -2] for name, held in seen if name.endswith(("gate_up_proj", "1.gate_proj.weight"))}
    parts = [(r * I // 3, (r + 1) * I // 3) for r in range(3)]
    assert rows == {(lo + at, hi + at) for lo, hi in parts for at in ((0, I) if family else (0,))}
    scales = {held[-1 if family else -2] for name, held in seen if name.endswith(("gate_up_proj_scale_inv", "1.gate_proj.weight_scale_inv"))}
    assert scales == {(lo // 128, -(-hi // 128)) for lo, hi in rows}
    assert len(scales) > 1


# What is wrong with a folder.

OUT = "layers.0.attn/out.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "quantization", "words"),
    [
        (lambda t: t.pop(OUT + fp8.SCALE), {}, rf"{OUT}_scale_inv \[2, 2\] is missing: {OUT} is F8_E4M3 and needs its scales"),
        (lambda t: t.update({OUT + fp8.SCALE: torch.ones(2, 1)}), {}, rf"{OUT}_scale_inv has shape \[2, 1\], the weights need \[2, 2\]"),
        (lambda t: t.update({OUT + fp8.SCALE: torch.ones(2, 2).half()}), {}, rf"{OUT}_scale_inv has dtype F16; scales are F32, BF16"),
        (lambda t: t.update({OUT: t[OUT].float()}), {}, rf"{OUT}_scale_inv \[2, 2\] is no tensor of this model"),
        (lambda t: t.update({OUT: t[OUT][:, :-1].clone()}), {}, rf"{OUT} has shape \[144, 159\], the model \[144, 160\]"),
        (
            lambda t: t.update({"head/norm.weight": t["head/norm.weight"].to(torch.float8_e4m3fn), "head/norm.weight_scale_inv": torch.ones(2)}),
            {},
            r"head/norm\.weight \[144\] is F8_E4M3: in 8 bits are matrices only",
        ),
        (lambda t: None, {"modules_to_not_convert": ["layers.0.attn/out"]}, rf"{OUT} is F8_E4M3, and modules_to_not_convert .* correct one"),
        (lambda t: None, {"weight_block_size": [64, 128]}, rf"{OUT}_scale_inv has shape \[2, 2\], the weights need \[3, 2\]"),
        (lambda t: None, None, rf"{OUT} has dtype F8_E4M3; .* no quantised weights: F8_E4M3 needs a quantization_config"),
    ],
)
@pytest.mark.parametrize("family", [False], indirect=True, ids=["each"])
@pytest.mark.usefixtures("family")
def test_files_that_contradict_themselves(tmp_path: Path, change: Change, quantization: Any, words: str) -> None:
    saved("", tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    change(held)
    save_file({k: x.clone() for k, x in held.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    about = json.loads((tmp_path / "config.json").read_text())
    about[fp8.FIELD] = None if quantization is None else {**about[fp8.FIELD], **quantization}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=words):
        loaded("dp=2,ep=2", tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quant_method": "fp8"}, "weight_block_size=None, which should be two whole numbers above 0"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt='e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme='static'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": "gate"}, "modules_to_not_convert='gate'"),
    ],
)
def test_other_kinds_of_fp8_are_refused(values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fp8.scheme({fp8.FIELD: values})


@pytest.mark.parametrize("values", [{"quant_method": "mxfp4"}, {"quant_method": "awq", "bits": 4}, {"bits": 4}, ["fp8"]])
def test_other_methods_are_refused_by_name(tmp_path: Path, values: Any) -> None:
    model = lf.models.small.tiny()
    config = {**families.qwen3.write(model.config), fp8.FIELD: values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=re.escape(f"quantization_config={values!r} is not supported; weights as they are, or in 8 bits by blocks")):
        lf.hf.read_config(tmp_path)
    config[fp8.FIELD] = fp8.described([])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert lf.hf.read_config(tmp_path) == attrs.evolve(model.config, family="qwen3")


def test_modules_that_are_kept() -> None:
    scheme = fp8.Scheme(kept=("gate", "model.layers.1", "a.b"))
    kept = {"model.layers.0.mlp.gate.weight": True, "model.layers.1.mlp.up.weight": True, "a.b.weight": True}
    kept |= {"model.layers.0.mlp.gate_proj.weight": False, "model.layers.11.mlp.up.weight": False, "xa.b.weight": False}
    assert {name: scheme.keeps(name) for name in kept} == kept
    assert fp8.scheme({fp8.FIELD: None}) is fp8.scheme({}) is None


@pytest.mark.parametrize(
    ("preset", "kept"),
    [
        ("deepseek-v3", {"embed_tokens", "lm_head", "gate", "eh_proj"}),
        ("qwen1.5-moe-a2.7b", {"embed_tokens", "lm_head", "gate", "shared_expert_gate"}),
        ("minimax-m2", {"embed_tokens", "lm_head", "gate"}),
        ("gpt-oss-20b", {"embed_tokens", "lm_head", "router"}),
    ],
)
def test_what_the_releases_leave_in_more_bits(preset: str, kept: set[str]) -> None:
    layout = lf.layout(lf.hf.model(preset), lf.Mesh(dp=1))
    config = layout.model.config
    [form, *_] = weights.forms(families.of(config), config).values()
    matrices = [e for e in shards.entries(layout, form, torch.bfloat16, True) if e.matrix]
    assert {e.name.removesuffix(".weight").rpartition(".")[2] for e in matrices if not e.scaled} == kept
    assert sum(e.scaled for e in matrices) > 100


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = lf.models.small.tiny()

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(model, axes.mesh)
        params = lf.init(layout, ctx, 0)
        params["layers.0.mlp"]["down"][3, 0] = math.nan
        lf.hf.save(tmp_path / "out", layout, params, ctx, fp8=True)

    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj\.weight cannot be written in 8 bits: it has values that are not"):
        lf.sim.spmd(lf.Mesh(tp=2), rank)
    assert not (tmp_path / "out").exists()


def test_transformers_reads_the_same_weights(tmp_path: Path, monkeypatch: Any) -> None:
    """Its own dequantisation; of whole blocks, for it takes those at the edge to be as large as the others."""
    from transformers import Qwen3ForCausalLM
    from transformers.quantizers import quantizer_finegrained_fp8 as theirs_fp8

    monkeypatch.setattr(theirs_fp8, "is_accelerate_available", lambda: True)  # it asks, and on a CPU does without

    model = decoder(DecoderConfig(256, 128, (Layer(Attention(2, 1, 128, qk_norm=True), GatedMLP(256)),), tied=False, family="qwen3"))
    ctx = context(lf.solo(), "fp32")
    layout = lf.layout(model, ctx.axes.mesh)
    lf.hf.save(tmp_path, layout, lf.init(layout, ctx, 0), ctx, fp8=True)
    theirs, info = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    ours = lf.hf.load(tmp_path, layout, ctx)
    want = dict(theirs.named_parameters())
    a, m = ours["layers.0.attn"], ours["layers.0.mlp"]
    q, k, _ = a["qkv"].split([256, 128, 128])
    gate, up = m["gate_up"].chunk(2)
    block = "model.layers.0."
    for name, x in {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.o_proj": a["out"], "mlp.gate_proj": gate, "mlp.up_proj": up}.items():
        assert torch.equal(want[f"{block}{name}.weight"], x), name
    assert torch.equal(want["lm_head.weight"], ours["head"]["weight"])

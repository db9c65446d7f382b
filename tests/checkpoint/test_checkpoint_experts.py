"""Experts in files: one tensor each, fused, transposed or row by row in turn; read and written under any folding of the expert mesh."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import context, processes
from qwen3_oracle import files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lf
from lf import box, tree
from lf.checkpoint import CheckpointError, hf, weights
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


def use(monkeypatch: Any, *forms: str) -> None:
    """The only family there is: its files have one of these forms."""
    made = SimpleNamespace(read=lambda values: MODEL.config, write=lambda config: {"model_type": "made"}, names=lambda config: names(forms[0]))
    made.copies, made.derived = lambda config: {}, lambda name: False
    if len(forms) > 1:
        made.forms = lambda config: {form: names(form) for form in forms}
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


def test_only_the_files_of_the_own_experts_are_read(whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    use(monkeypatch, "each")
    folder(tmp_path, disk(whole, "each"))
    seen: list[str] = []
    real = weights.read_box
    monkeypatch.setattr(weights, "read_box", lambda file, name, *where: (seen.append(name), real(file, name, *where))[1])

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(MODEL, axes.mesh)
        with ExitStack() as stack:
            found = hf._inspect(tmp_path, layout, ctx, None, stack)
            seen.clear()
            hf._read(tmp_path, layout, ctx, None, found)
        mine = range(axes.coords["ep"] * E // 4, (axes.coords["ep"] + 1) * E // 4)
        assert {n for n in seen if n.startswith(f"{THERE}.")} >= {f"{THERE}.{e}.down" for e in mine}
        assert {int(n.split(".")[3]) for n in seen if n.startswith(f"{THERE}.")} == set(mine)

    lf.sim.spmd(lf.Mesh(dp=4, ep=4), rank)


def saved(mesh: str, source: Path, out: Path, precision: str = "fp32", **options: Any) -> None:
    def rank(axes: Any) -> None:
        ctx, layout = context(axes, precision), lf.layout(MODEL, axes.mesh)
        lf.hf.save(out, layout, lf.hf.load(source, layout, ctx), ctx, **options)

    lf.sim.spmd(lf.Mesh.parse(mesh), rank)


@pytest.mark.parametrize(("form", "limit"), [*((form, 10**9) for form in FORMS), ("each", 3000), ("turns", 3000)])
def test_any_folding_writes_the_same(whole: Any, tmp_path: Path, monkeypatch: Any, form: str, limit: int) -> None:
    use(monkeypatch, form)
    source = folder(tmp_path / "source", disk(whole, form))
    saved("", source, tmp_path / "one", max_shard_bytes=limit)
    held = {k: x for p in (tmp_path / "one").glob("*.safetensors") for k, x in load_file(p).items()}
    assert held.keys() == load_file(source / "model.safetensors").keys()
    assert all(torch.equal(x, held[name]) for name, x in load_file(source / "model.safetensors").items())
    for mesh in MESHES[1:]:
        saved(mesh, source, tmp_path / "out", max_shard_bytes=limit)
        assert files(tmp_path / "out") == files(tmp_path / "one"), mesh
    assert_pieces(loaded("dp=2,tp=2,ep=2,etp=2", tmp_path / "out"), whole)


def test_real_processes_write_the_same(whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    use(monkeypatch, "each")
    source = folder(tmp_path / "source", disk(whole, "each"))
    saved("", source, tmp_path / "one", max_shard_bytes=3000)

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(MODEL, axes.mesh)
        lf.hf.save(tmp_path / "out", layout, lf.hf.load(source, layout, ctx), ctx, max_shard_bytes=3000)

    processes(lf.Mesh(pp=2, dp=2, tp=2, ep=2, etp=2), rank)
    assert files(tmp_path / "out") == files(tmp_path / "one")


def test_one_tensor_at_a_time_and_no_whole_stack(whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """What travels in one exchange is a tensor for each rank that writes: of a stack of experts one."""
    use(monkeypatch, "each")
    source = folder(tmp_path / "source", disk(whole, "each"))
    one = {x.numel() * 4 for x in load_file(source / "model.safetensors").values()}
    assert whole["layers.1.experts"]["down"].numel() * 4 not in one
    sizes: list[int] = []

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(MODEL, axes.mesh)
        params, real = lf.hf.load(source, layout, ctx), axes.world.all_to_all
        axes.world.all_to_all = lambda x, send, recv: (sizes.append(sum(recv)), real(x, send, recv))[1]
        lf.hf.save(tmp_path / "out", layout, params, ctx)

    lf.sim.spmd(lf.Mesh(dp=4, tp=2, ep=4), rank)
    assert set(sizes) == {0, *one}


def test_what_is_not_learned_keeps_float32(whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    use(monkeypatch, "each")
    source = folder(tmp_path / "source", disk(whole, "each"))
    bias = whole["layers.1.route"]["bias"]
    assert not torch.equal(bias, bias.bfloat16().float())
    for mesh in ("", "tp=2,dp=2,ep=4"):
        saved(mesh, source, tmp_path / "out", dtype="bf16")
        held = load_file(tmp_path / "out" / "model.safetensors")
        state = {f"model.layers.1.route/{name}" for name in ("bias", "fraction")}
        assert {name for name, x in held.items() if x.dtype == torch.float32} == state
        assert {x.dtype for name, x in held.items() if name not in state} == {torch.bfloat16}
    for _, _, params in loaded("dp=2,ep=2", source, dtype="bf16"):
        assert torch.equal(params["layers.1.route"]["bias"], bias)
        assert not torch.equal(params["head"]["weight"], whole["head"]["weight"])
    held["model.layers.1.route/bias"] = bias.bfloat16()  # some releases round it
    for _, _, params in loaded("dp=2,ep=2", folder(source, {k: x.clone() for k, x in held.items()})):
        assert torch.equal(params["layers.1.route"]["bias"], bias.bfloat16().float())
    saved("", folder(source, disk(whole, "each")), tmp_path / "wide", "fp64", dtype="bf16")
    assert load_file(tmp_path / "wide" / "model.safetensors")["model.layers.1.route/bias"].dtype == torch.float32


def test_what_is_wrong_is_said_of_each_tensor(whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for form, change, words in (
        ("each", lambda t: t.pop(f"{THERE}.3.down"), f"{THERE}.3.down [15, 6] is missing"),
        ("each", lambda t: t.update({f"{THERE}.4.up": t[f"{THERE}.4.up"][:5].clone()}), f"{THERE}.4.up has shape [5, 15], the model [6, 15]"),
        ("each", lambda t: t.update({f"{THERE}.5.up": t[f"{THERE}.4.up"].clone()}), f"{THERE}.5.up [6, 15] is no tensor of this model"),
        ("fused", lambda t: t.update({f"{THERE}.gate_up": t[f"{THERE}.gate_up"].mT.contiguous()}), "has shape [5, 15, 12], the model [5, 12, 15]"),
        ("turns", lambda t: t.update({f"{THERE}.gate_up_bias": t[f"{THERE}.gate_up_bias"][:, :11].clone()}), "has shape [5, 11], the model [5, 12]"),
    ):
        use(monkeypatch, form)
        tensors = disk(whole, form)
        change(tensors)
        with pytest.raises(CheckpointError) as caught:
            loaded("dp=2,ep=2", folder(tmp_path, tensors))
        assert words in str(caught.value)
        assert ": 1 problem\n" in str(caught.value)


# A family with several forms.


def test_the_form_is_found_by_names_and_shapes(whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    use(monkeypatch, "each", *FORMS[1:3])
    for form in FORMS[:3]:
        assert_pieces(loaded("tp=2,dp=2,ep=4", folder(tmp_path, disk(whole, form))), whole)
    both = {**disk(whole, "each"), **disk(whole, "fused")}
    with pytest.raises(CheckpointError, match=r"is no tensor of this model"):
        loaded("dp=2", folder(tmp_path, both))


SQUARE = decoder(DecoderConfig(37, 2 * I, (Layer(Attention(2, 1, 4), MoE(Router(E, 2), I)),), tied=False))  # gate_up is (E, 2I, 2I)
SQUARES = "layers.0.experts"


def square(monkeypatch: Any, down_tells: bool) -> None:
    """The only family there is: two forms, of which the first is written. down_tells: whether the other matrix, which is not square, differs, too."""

    def form(transposed: bool) -> dict[str, str | Place]:
        keys = [p.key for spec in lf.layout(SQUARE, ONE.mesh).specs.values() for p in spec.pieces(ONE.mesh.coords(0))]
        at = {part: Place("experts.gate_up", ((0, n, I),), 2 * I, 1, transposed=transposed) for part, n in (("gate", 0), ("up", I))}
        down = Place("experts.down", transposed=transposed and down_tells)
        return {**{key: key for key in keys}, **{f"{SQUARES}/gate_up/{part}": place for part, place in at.items()}, f"{SQUARES}/down": down}

    made = SimpleNamespace(read=lambda values: SQUARE.config, write=lambda config: {"model_type": "made"}, derived=lambda name: False)
    made.copies, made.forms = lambda config: {}, lambda config: {"transposed": form(True), "fused": form(False)}
    monkeypatch.setattr(families, "FAMILIES", {"made": made})


def square_saved(mesh: str, out: Path) -> Any:
    def rank(axes: Any) -> Any:
        ctx, layout = context(axes, "fp32"), lf.layout(SQUARE, axes.mesh)
        params = lf.init(layout, ctx, 0)
        lf.hf.save(out, layout, params, ctx)
        return params[SQUARES]["gate_up"]

    return lf.sim.spmd(lf.Mesh.parse(mesh), rank)[0]


def square_loaded(source: Path) -> torch.Tensor:
    ctx = context(lf.solo(), "fp32")
    return lf.hf.load(source, lf.layout(SQUARE, ctx.axes.mesh), ctx)[SQUARES]["gate_up"]


def test_our_own_files_say_their_form(tmp_path: Path, monkeypatch: Any) -> None:
    square(monkeypatch, down_tells=False)
    params = square_saved("", tmp_path / "one")
    square_saved("dp=4,ep=2,etp=2", tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "one")
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "lf.layout": "transposed"}
        assert torch.equal(file.get_tensor("experts.gate_up").mT, params)
    header = (tmp_path / "one" / "model.safetensors").read_bytes()[8:]
    assert header.startswith(b'{"__metadata__":{"format":"pt","lf.layout":"transposed"},')  # in one order, whatever run writes it
    assert torch.equal(square_loaded(tmp_path / "one"), params)


def test_a_form_that_nothing_tells_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    square(monkeypatch, down_tells=False)
    params, held = square_saved("", tmp_path / "x"), load_file(tmp_path / "x" / "model.safetensors")
    words = r"experts\.gate_up \[5, 12, 12\] may be in the form 'transposed' or 'fused', .* as lf\.layout='transposed'"
    with pytest.raises(CheckpointError, match=words):
        square_loaded(folder(tmp_path / "x", held))
    assert torch.equal(square_loaded(folder(tmp_path / "x", held, **{"lf.layout": "fused"})), params.mT)
    with pytest.raises(CheckpointError, match=words + ", not 'flat'"):
        square_loaded(folder(tmp_path / "x", held, **{"lf.layout": "flat"}))


def test_another_matrix_may_tell_the_form(tmp_path: Path, monkeypatch: Any) -> None:
    square(monkeypatch, down_tells=True)
    params, held = square_saved("", tmp_path / "x"), load_file(tmp_path / "x" / "model.safetensors")
    assert torch.equal(square_loaded(folder(tmp_path / "x", held)), params)
    held = {**held, "experts.down": held["experts.down"].mT.contiguous()}
    assert torch.equal(square_loaded(folder(tmp_path / "x", held)), params.mT)

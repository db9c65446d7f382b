"""Hugging Face folders: exchanged with transformers both ways under any mesh, refused whole when anything is wrong, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers import context, processes
from qwen3_oracle import assert_pieces, files, oracle, tensors
from safetensors.torch import load_file, save_file

import lf
from lf import tree
from lf.checkpoint import CheckpointError, atomic, export
from lf.config import ConfigError
from lf.models.small import tiny

MESHES = ["", "tp=2", "tp=3", "tp=4", "tp=5,dp=2", "dp=3", "tp=8"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def theirs(request: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    """transformers' model and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("theirs")
    model = oracle(request.param)
    model.save_pretrained(folder)
    return model, folder


def loaded(mesh: str, folder: Path, check: Callable[..., Any], model: Any = None) -> list[Any]:
    """check(params, layout, ctx) on every rank of `mesh` after it has loaded `folder`."""

    def rank(axes: Any) -> Any:
        ctx = context(axes, "fp32")
        layout = lf.layout(model or lf.hf.model(folder), axes.mesh)
        return check(lf.hf.load(folder, layout, ctx), layout, ctx)

    return lf.sim.spmd(lf.Mesh.parse(mesh), rank)


def saved(mesh: str, source: Path, out: Path, **options: Any) -> list[Any]:
    return loaded(mesh, source, lambda params, layout, ctx: lf.hf.save(out, layout, params, ctx, **options))


@pytest.mark.parametrize("mesh", MESHES)
def test_each_rank_reads_its_own_boxes(theirs: tuple[Any, Path], mesh: str) -> None:
    model, folder = theirs
    whole = {k: p.detach() for k, p in tensors(model).items()}

    def check(params: Any, layout: Any, ctx: Any) -> None:
        assert [p for p, _ in tree.items(params)] == list(layout.specs)
        assert_pieces(params, layout, ctx.axes.coords, whole, atol=0.0)

    loaded(mesh, folder, check)


def test_their_shards_and_their_half_precision(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = theirs
    import copy

    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = {k: p.detach().float() for k, p in tensors(half).items()}
    loaded("tp=4", tmp_path, lambda params, layout, ctx: assert_pieces(params, layout, ctx.axes.coords, whole, atol=0.0))


@pytest.mark.parametrize("limit", [5_000_000_000, 3000], ids=["single", "sharded"])
def test_what_any_mesh_saves_is_the_same_and_transformers_opens_it(theirs: tuple[Any, Path], tmp_path: Path, limit: int) -> None:
    from transformers import Qwen3ForCausalLM

    model, folder = theirs
    written = None
    for i, mesh in enumerate(MESHES):
        out = tmp_path / str(i)
        assert saved(mesh, folder, out, max_shard_bytes=limit) == [out] * lf.Mesh.parse(mesh).fill().size
        written = written or files(out)
        assert files(out) == written, mesh
        assert sorted(p.name for p in tmp_path.iterdir()) == [str(j) for j in range(i + 1)]
    assert written is not None
    shards = [name for name in written if name.endswith(".safetensors")]
    assert (len(shards) > 3 and export.INDEX in written) if limit == 3000 else shards == ["model.safetensors"]
    assert all(len(written[name]) <= limit for name in shards)
    back, info = Qwen3ForCausalLM.from_pretrained(tmp_path / "0", output_loading_info=True)
    assert not any(info.values()), info
    assert back.dtype == torch.float32
    for name, p in tensors(model).items():
        assert torch.equal(tensors(back)[name], p), name
    ids = torch.arange(20)[None] % 37
    torch.testing.assert_close(back(ids).logits, model(ids).logits, atol=1e-5, rtol=0)  # sdpa against eager
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "0").iterdir()} == {(tmp_path / "0").stat().st_mode & 0o666}


def test_index_names_every_tensor_and_the_total(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = theirs
    saved("tp=2", folder, tmp_path / "out", max_shard_bytes=3000, dtype=torch.bfloat16)
    index = json.loads((tmp_path / "out" / export.INDEX).read_text())
    whole = tensors(model)
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(p.numel() * 2 for p in whole.values())
    for file in set(index["weight_map"].values()):
        for name, x in load_file(tmp_path / "out" / file).items():
            assert index["weight_map"][name] == file
            assert torch.equal(x, whole[name].to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_state_saves_its_masters_and_the_tokenizer_comes_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    lf.data.train_bpe(["to be or not to be"] * 3, 260, tmp_path / "tokenizer")
    model = tiny(vocab=270)

    def rank(axes: Any) -> None:
        ctx = context(axes, "bf16")
        layout = lf.layout(model, axes.mesh)
        init, _ = lf.train.make(layout, lf.optim.adamw(1e-3), lf.schedule.one_f_one_b(1, 1), ctx)
        master = lf.init(layout, ctx, 0)
        lf.hf.save(tmp_path / "out", layout, init(master), ctx, tokenizer=tmp_path / "tokenizer")
        again = lf.hf.load(tmp_path / "out", lf.layout(lf.hf.model(tmp_path / "out"), axes.mesh), ctx)
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(tree.leaves(again), tree.leaves(master)))

    lf.sim.spmd(lf.Mesh(tp=2), rank)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("to be")["input_ids"] == lf.data.load_tokenizer(tmp_path / "tokenizer").encode(["to be"])[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert GenerationConfig.from_model_config(lf_config(tmp_path / "out")).eos_token_id == tokenizer.eos_token_id
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        lf.sim.spmd(lf.Mesh(tp=2), lambda axes: export_of(model, axes, tmp_path / "more", tokenizer=tmp_path))
    assert not (tmp_path / "more").exists()


def lf_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def export_of(model: Any, axes: Any, out: Path, **options: Any) -> Path:
    ctx, layout = context(axes, "fp32"), lf.layout(model, axes.mesh)
    return lf.hf.save(out, layout, lf.init(layout, ctx, 0), ctx, **options)


def test_real_processes_exchange_the_same_files(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = theirs

    def rank(axes: Any) -> str:
        ctx = context(axes, "fp32")
        layout = lf.layout(lf.hf.model(folder), axes.mesh)
        return str(lf.hf.save(tmp_path / "gloo", layout, lf.hf.load(folder, layout, ctx), ctx, max_shard_bytes=3000))

    processes(lf.Mesh(tp=2, dp=2), rank)
    saved("", folder, tmp_path / "one", max_shard_bytes=3000)
    assert files(tmp_path / "gloo") == files(tmp_path / "one")


# What is wrong with a folder: (how to break it, words of the error). `single` folders have model.safetensors, `sharded` an index.


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors") -> None:
    held = load_file(folder / file)
    change(held)
    save_file(held, folder / file, metadata={"format": "pt"})


def rewrite(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def reindex(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / export.INDEX).read_text())
    change(index)
    (folder / export.INDEX).write_text(json.dumps(index))


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def shard(folder: Path, i: int) -> str:
    return sorted(p.name for p in folder.glob("*.safetensors"))[i]


DOWN, Q = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"
SINGLE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "cut in the data": (lambda d: cut(d / "model.safetensors", 0.9), ["model.safetensors is cut short", ": 1 problem\n"]),
    "cut in the header": (lambda d: cut(d / "model.safetensors", 0.01), ["model.safetensors is cut short"]),
    "empty": (lambda d: cut(d / "model.safetensors", 0), ["model.safetensors is cut short"]),
    "something else": (lambda d: (d / "model.safetensors").write_text("PK" * 99), ["no safetensors file"]),
    "longer than it says": (lambda d: (d / "model.safetensors").open("ab").write(b"xx"), ["model.safetensors is cut short, or no"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["there is no model.safetensors and no", ": 1 problem\n"]),
    "pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        ["pytorch_model.bin is a pickle, which is never opened"],
    ),
    "tensor missing": (lambda d: edit(d, lambda t: t.pop(DOWN)), [f"{DOWN} [15, 10] is missing", ": 1 problem\n"]),
    "norm missing": (lambda d: edit(d, lambda t: t.pop("model.norm.weight")), ["model.norm.weight [15] is missing"]),
    "layer too many": (
        lambda d: edit(d, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(10, 15)})),
        ["model.layers.2.mlp.up_proj.weight [10, 15] is no tensor of this model"],
    ),
    "bias": (lambda d: edit(d, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)})), ["q_proj.bias [24] is no tensor"]),
    "transposed": (lambda d: edit(d, lambda t: t.update({DOWN: t[DOWN].T.contiguous()})), [f"{DOWN} has shape [10, 15], the model [15, 10]"]),
    "head cut off": (lambda d: edit(d, lambda t: t.update({Q: t[Q][:20].clone()})), [f"{Q} has shape [20, 15], the model [24, 15]"]),
    "flat": (lambda d: edit(d, lambda t: t.update({Q: t[Q].flatten()})), [f"{Q} has shape [360]"]),
    "whole numbers": (lambda d: edit(d, lambda t: t.update({Q: t[Q].to(torch.int8)})), [f"{Q} has dtype I8;", "no quantised weights"]),
    "fp8": (lambda d: edit(d, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), [f"{Q} has dtype F8_E4M3;"]),
    "float64": (lambda d: edit(d, lambda t: t.update({Q: t[Q].double()})), [f"{Q} has dtype F64, which torch.float32 cannot hold exactly"]),
    "many": (
        lambda d: edit(d, lambda t: (t.pop(DOWN), t.pop("model.norm.weight"), t.update({Q: t[Q][:20].clone(), "x": torch.zeros(3)}))),
        [": 4 problems\n", f"{DOWN} [15, 10] is missing", "model.norm.weight [15] is missing", f"{Q} has shape [20, 15]", "x [3] is no tensor"],
    ),
    "everything": (lambda d: edit(d, lambda t: (t.clear(), t.update(x=torch.zeros(1)))), ["problems\n", "… and "]),
    "no config": (lambda d: (d / "config.json").unlink(), ["cannot read", "config.json"]),
    "broken config": (lambda d: (d / "config.json").write_text('{"model_type": '), ["cannot read", "config.json"]),
    "other config": (lambda d: rewrite(d, rms_norm_eps=1e-3), ["config.json has norm_eps=0.001, the layout's model 1e-05; build it with"]),
    "other theta": (lambda d: rewrite(d, rope_theta=7, rope_parameters=None), ["layers.1.mixer.rope.theta=7.0"]),
    "unsupported config": (lambda d: rewrite(d, mlp_bias=True), ["mlp_bias=True is not supported"]),
    "unknown family": (lambda d: rewrite(d, model_type="gpt5"), ["unknown model_type 'gpt5'", "qwen3"]),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), ["config.json should be a JSON object, is a list"]),
    "config no text": (lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), ["cannot read", "'utf-8' codec can't decode"]),
    "a layer more": (lambda d: rewrite(d, num_hidden_layers=3), ["config.json has layers.2.ffn.dim=10, the layout's model None"]),
    "link to nothing": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").symlink_to("../blobs/4a")),
        ["model.safetensors is a link to ../blobs/4a, which is not there", ": 1 problem\n"],
    ),
    "header too long": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 7 + b"\0{}"), ["no safetensors file (", "header too large"]),
    "scalar": (lambda d: edit(d, lambda t: t.update({"model.norm.weight": torch.tensor(1.0)})), ["model.norm.weight has shape [], the model [15]"]),
    "padded vocabulary": (
        lambda d: edit(d, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(64, 15)})),
        ["model.embed_tokens.weight has shape [64, 15], the model [37, 15]"],
    ),
    "packed": (lambda d: edit(d, lambda t: t.update({Q: t[Q].to(torch.uint8)})), [f"{Q} has dtype U8;", "no quantised weights"]),
    "names without model.": (
        lambda d: edit(d, lambda t: [t.update({k.removeprefix("model."): t.pop(k)}) for k in list(t)]),
        ["48 problems", "embed_tokens.weight [37, 15] is no tensor of this model"],
    ),
    "both": (lambda d: (d / export.INDEX).write_text("{}"), ["are both there; remove the one"]),
}
SHARDED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "shard missing": (lambda d: (d / shard(d, 1)).unlink(), ["-00002-of-", "is not there", ": 1 problem\n"]),
    "two shards missing": (lambda d: ((d / shard(d, 2)).unlink(), (d / shard(d, 1)).unlink()), [": 2 problems\n", "-00002-of-", "-00003-of-"]),
    "shard cut": (lambda d: cut(d / shard(d, -1), 0.5), ["is cut short", ": 1 problem\n"]),
    "shard cut and tensor missing": (
        lambda d: (cut(d / shard(d, -1), 0.5), edit(d, lambda t: t.pop("model.embed_tokens.weight"), shard(d, 0))),
        ["is cut short", "model.embed_tokens.weight [37, 15] is missing", ": 2 problems\n"],
    ),
    "index no JSON": (lambda d: cut(d / export.INDEX, 0.5), [f"{export.INDEX} is no JSON object with a weight_map"]),
    "index without map": (lambda d: reindex(d, lambda i: i.pop("weight_map")), ["no JSON object with a weight_map (KeyError"]),
    "map is a list": (lambda d: reindex(d, lambda i: i.update(weight_map=["a"])), ["no JSON object with a weight_map"]),
    "index is a list": (lambda d: (d / export.INDEX).write_text("[]"), ["no JSON object with a weight_map"]),
    "map leaves the folder": (
        lambda d: reindex(d, lambda i: i["weight_map"].update(x="../y.safetensors")),
        ["'../y.safetensors' in it is no plain name of a .safetensors file"],
    ),
    "map is empty": (lambda d: reindex(d, lambda i: i["weight_map"].clear()), ["weight_map (ValueError: it is empty)", ": 1 problem\n"]),
    "map names the folder": (lambda d: reindex(d, lambda i: i["weight_map"].update(x="..")), ["'..' in it is no plain name"]),
    "map names a number": (lambda d: reindex(d, lambda i: i["weight_map"].update(x=3)), ["3 in it is no plain name"]),
    "map names a pickle": (lambda d: reindex(d, lambda i: i["weight_map"].update(x="a.bin")), ["'a.bin' in it is no plain name of a .safetensors"]),
    "index no text": (lambda d: (d / export.INDEX).write_bytes(b"\xff\xfe"), ["no JSON object with a weight_map (UnicodeDecodeError"]),
    "one shard twice": (
        lambda d: shutil.copyfile(d / shard(d, 0), d / shard(d, 1)),
        ["model.embed_tokens.weight stands in two shards", "k_proj.weight [12, 15] is missing"],
    ),
    "index in error": (lambda d: reindex(d, lambda i: i["weight_map"].update({DOWN: shard(d, -1)})), [f"{DOWN} is in model-0", "has it in model-0"]),
    "not in the index": (lambda d: reindex(d, lambda i: i["weight_map"].pop(DOWN)), [f"{DOWN} is in model-0", "has it in no file"]),
    "in two shards": (
        lambda d: edit(d, lambda t: t.update({"model.norm.weight": torch.zeros(15)}), shard(d, 0)),
        ["model.norm.weight stands in two shards"],
    ),
    "promised only": (lambda d: edit(d, lambda t: t.pop("model.norm.weight"), shard(d, -1)), ["model.norm.weight [15] is missing"]),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: Any) -> Path:
    """A `single` and a `sharded` export of one tied model."""
    root = tmp_path_factory.mktemp("clean")
    for name, limit in (("single", 10**9), ("sharded", 3000)):
        lf.sim.spmd(lf.Mesh(), lambda axes, n=name, k=limit: export_of(MODEL, axes, root / n, max_shard_bytes=k))
    return root


MODEL = tiny(norm_eps=1e-5)


@pytest.mark.parametrize("kind", [*SINGLE, *SHARDED])
def test_a_folder_with_anything_wrong_is_one_clear_error(clean: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(clean / ("single" if kind in SINGLE else "sharded"), folder)
    spoil, words = {**SINGLE, **SHARDED}[kind]
    spoil(folder)
    mesh = "tp=4" if len(kind) % 2 else ""
    with pytest.raises(CheckpointError) as caught:
        loaded(mesh, folder, lambda *_: None, MODEL)
    for word in (*words, str(folder)):
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 22


@pytest.mark.parametrize("kind", ["no config", "broken config", "unsupported config", "unknown family"])
def test_a_model_needs_a_config_that_is_right(clean: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(clean / "single", tmp_path / "broken")
    SINGLE[kind][0](tmp_path / "broken")
    with pytest.raises(ConfigError) as caught:
        lf.hf.model(tmp_path / "broken")
    assert all(word in str(caught.value) for word in SINGLE[kind][1])


def test_heads_of_tied_and_untied_models(clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "single"
    shutil.copytree(clean / "single", folder)
    table = "model.embed_tokens.weight"
    inv = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    edit(folder, lambda t: t.update({"lm_head.weight": t[table].clone(), **inv}))
    for mesh in ("", "tp=4"):
        loaded(mesh, folder, lambda *_: None, MODEL)  # an equal copy, and a table that follows from the config, say nothing new

    def change(t: dict[str, torch.Tensor]) -> None:
        t["lm_head.weight"][36, 2] += 1

    edit(folder, change)
    for mesh in ("", "tp=4", "dp=2"):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight; set tie_word_embeddings to false"):
            loaded(mesh, folder, lambda *_: None, MODEL)
    edit(folder, lambda t: t.update({"lm_head.weight": torch.zeros(3, 15)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[3, 15\], the model \[37, 15\]"):
        loaded("", folder, lambda *_: None, MODEL)
    rewrite(folder, tie_word_embeddings=False)
    edit(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \[37, 15\] is missing"):
        loaded("tp=2", folder, lambda *_: None)


# Nothing half-written is ever left under the final name.


def failing(monkeypatch: Any, words: str) -> None:
    """The file whose name has `words` cannot be written: one rank's disk is full."""
    real = export.write_tensors

    def write(path: Path, *held: Any) -> None:
        real(path, *held)
        if words in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tensors", write)


@pytest.mark.parametrize("mesh", ["", "tp=2", "tp=2,dp=2", "dp=4"])
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "over another"])
def test_a_failing_write_leaves_what_was_there(clean: Path, tmp_path: Path, monkeypatch: Any, mesh: str, before: bool) -> None:
    out = tmp_path / "out"
    if before:
        shutil.copytree(clean / "single", out)
    failing(monkeypatch, "-00002-of")
    there = files(out) if before else None

    def rank(axes: Any) -> str:
        with pytest.raises(CheckpointError, match=rf"saving {out} failed on rank \d: .*No space left on device") as caught:
            export_of(MODEL, axes, out, max_shard_bytes=3000)
        return str(caught.value)

    said = lf.sim.spmd(lf.Mesh.parse(mesh), rank)
    assert len(said) == lf.Mesh.parse(mesh).fill().size
    assert sorted(p.name for p in tmp_path.iterdir()) == (["out"] if before else [])
    assert not before or files(out) == there


@pytest.mark.parametrize("where", ["write_json", "copyfile", "rename"])
def test_a_failure_at_the_end_leaves_what_was_there(clean: Path, tmp_path: Path, monkeypatch: Any, where: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(clean / "single", out)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    there = files(out)

    def fail(*args: Any, **_: Any) -> None:
        if where != "rename" or ".partial" in str(args[0]):
            raise OSError(5, "Input/output error")
        real(*args)

    real = Path.rename
    owner = {"write_json": export, "copyfile": export.shutil, "rename": Path}[where]
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        lf.sim.spmd(lf.Mesh(tp=2), lambda axes: export_of(MODEL, axes, out, tokenizer=tmp_path / "tok"))
    monkeypatch.undo()
    assert files(out) == there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tok"]


def test_a_failing_rank_among_real_processes_ends_all(tmp_path: Path, monkeypatch: Any) -> None:
    failing(monkeypatch, "-00002-of")

    def rank(axes: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            export_of(MODEL, axes, tmp_path / "out", max_shard_bytes=3000)
        return str(caught.value)

    said = processes(lf.Mesh(dp=2, tp=2), rank, timeout_s=60)
    assert all("failed on rank 2: " in words and "No space left" in words for words in said)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_save_left_is_cleaned_and_put_back(clean: Path, tmp_path: Path) -> None:
    out, partial, old = (tmp_path / name for name in ("out", ".out.partial", ".out.old"))
    for leftover in (partial, old):
        shutil.copytree(clean / "sharded", leftover)
    one = lf.Mesh()
    lf.sim.spmd(one, lambda axes: export_of(MODEL, axes, out))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert files(out) == files(clean / "single")
    out.rename(old)  # killed between the two renames; and the next save fails
    with pytest.raises(CheckpointError, match="max_shard_bytes=0"):
        lf.sim.spmd(one, lambda axes: export_of(MODEL, axes, out, max_shard_bytes=0))
    lf.sim.spmd(one, lambda axes: export_of(MODEL, axes, out, max_shard_bytes=3000))  # replaces a single file by shards
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert files(out) == files(clean / "sharded")


def test_a_folder_with_other_things_in_it_is_never_replaced(clean: Path, tmp_path: Path) -> None:
    shutil.copytree(clean / "single", tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("ten years")
    (tmp_path / "file").write_text("")
    for name, words in (("out", r"holds what no save has written \(thesis\.tex\)"), ("file", "it is a file"), (".", "holds what no save")):
        with pytest.raises(CheckpointError, match=words):
            lf.sim.spmd(lf.Mesh(tp=2), lambda axes, n=name: export_of(MODEL, axes, tmp_path / n))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "ten years"
    (tmp_path / "empty").mkdir()
    lf.sim.spmd(lf.Mesh(tp=2), lambda axes: export_of(MODEL, axes, tmp_path / "empty"))
    assert files(tmp_path / "empty") == files(clean / "single")


def test_a_link_to_a_folder_stays_one(clean: Path, tmp_path: Path) -> None:
    shutil.copytree(clean / "sharded", tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lf.sim.spmd(lf.Mesh(), lambda axes: export_of(MODEL, axes, tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert files(tmp_path / "real") == files(clean / "single")


def test_odd_requests_are_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"dtype": torch.int8}, "unknown dtype 'int8'"), ({"dtype": "bf61"}, "did you mean 'bf16'"), ({"max_shard_bytes": -1}, "max_shard_bytes=-1")
    ):  # fmt: skip
        with pytest.raises((CheckpointError, ConfigError), match=words):
            lf.sim.spmd(lf.Mesh(), lambda axes, o=options: export_of(MODEL, axes, tmp_path / "x", **o))
    config = tiny().config
    config = attrs.evolve(config, layers=(config.layers[0], attrs.evolve(config.layers[1], ffn=lf.models.decoder.GatedMLP(12))))
    with pytest.raises(ConfigError, match="its layers must all be alike"):
        lf.sim.spmd(lf.Mesh(), lambda axes: export_of(lf.models.decoder.decoder(config), axes, tmp_path / "x"))


def test_every_rank_hears_what_went_wrong() -> None:
    def rank(axes: Any) -> str:
        errors: list[Exception] = []
        atomic.attempt(errors, lambda: 1 / (axes.rank != 2))
        with pytest.raises((CheckpointError, ZeroDivisionError)) as caught:
            atomic.agree(errors, "dividing", context(axes))
        return str(caught.value)

    said = lf.sim.spmd(lf.Mesh(dp=4), rank)
    assert said[2] == "division by zero"
    assert said[0] == said[1] == said[3] == "dividing failed on rank 2: division by zero"

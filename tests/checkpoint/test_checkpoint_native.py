"""Native checkpoints: any layout loads any checkpoint exact to the bit; a run killed anywhere goes on as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED, context, processes
from qwen3_oracle import files
from safetensors.torch import load_file, save_file

import lf
from lf import box, rng, tree
from lf.checkpoint import CheckpointError, manifests, native
from lf.models.small import tiny
from lf.parity import random_batches, randomised

MODEL = tiny()
EXTRA = {"rows": 96, "data": {"seed": 3, "files": ["a", "b"]}, "ratio": 0.1}
MESHES = ["", "tp=2", "tp=3,dp=2", "tp=4", "dp=3", "tp=8", "tp=2,dp=2"]


def some_state(layout: Any, ctx: Any, optimizer: Any = None) -> lf.State:
    """A state of which every tensor is random and the same logical one under any layout."""
    init, _ = lf.train.make(layout, optimizer or lf.optim.adamw(1e-3), lf.schedule.one_f_one_b(1, 1), ctx)
    state = init(randomised(layout, ctx, 1))
    for i, name in enumerate(state.optimizer):
        if name in ("m", "v"):
            for path, x in tree.items(randomised(layout, ctx, 2 + i)):
                tree.get(state.optimizer[name], path).copy_(x)
        elif name == "t":
            state.optimizer["t"]["t"].fill_(41)
    return attrs.evolve(state, step=state.step + 50)


def assert_same(a: lf.State, b: lf.State) -> None:
    for mine, other in ((a.optimizer, b.optimizer), (a.params, b.params), ({"step": a.step}, {"step": b.step})):
        one, two = dict(tree.items(mine)), dict(tree.items(other))
        assert list(one) == list(two)
        for path, x in one.items():
            assert x.dtype == two[path].dtype, path
            assert x.device == two[path].device
            assert torch.equal(x, two[path]), path


def save_under(mesh: str, folder: Path, precision: str = "bf16", model: Any = MODEL, optimizer: Any = None) -> None:
    def rank(axes: Any) -> None:
        ctx, layout = context(axes, precision), lf.layout(model, axes.mesh)
        assert lf.checkpoint.save(folder, layout, some_state(layout, ctx, optimizer), ctx, EXTRA) == folder

    lf.sim.spmd(lf.Mesh.parse(mesh), rank)


def load_under(mesh: str, folder: Path, precision: str = "bf16", model: Any = MODEL, optimizer: Any = None, spmd: Any = lf.sim.spmd) -> None:
    def rank(axes: Any) -> None:
        ctx, layout = context(axes, precision), lf.layout(model, axes.mesh)
        state, extra = lf.checkpoint.load(folder, layout, ctx)
        assert extra == EXTRA
        assert_same(state, some_state(layout, ctx, optimizer))

    spmd(lf.Mesh.parse(mesh), rank)


@pytest.mark.parametrize("source", MESHES)
def test_any_mesh_loads_any_checkpoint_to_the_bit(tmp_path: Path, source: str) -> None:
    save_under(source, tmp_path / "c")
    others = [source, *rng.generator(SEED, source).permutation([m for m in MESHES if m != source])[:3]]
    for target in others:
        load_under(str(target), tmp_path / "c")
    about = lf.checkpoint.manifest(tmp_path / "c")
    assert (about.step, about.mesh, about.extra) == (50, str(lf.Mesh.parse(source).fill()), EXTRA)
    assert sorted(about.files) == sorted(p.name for p in (tmp_path / "c").glob("rank-*"))
    for stored in about.tensors.values():  # every element once
        count = torch.zeros(stored.shape, dtype=torch.int64)
        for held in stored.boxes:
            count[box.slices(held.box, box.whole(stored.shape))] += 1
        assert (count == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("source", MESHES)
def test_all_pairs(tmp_path: Path, source: str) -> None:
    save_under(source, tmp_path / "c")
    for target in MESHES:
        load_under(target, tmp_path / "c")


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", lf.optim.sgd(0.1)), ("fp64", lf.optim.adamw(0.1))], ids=["sgd", "fp64"])
def test_whatever_the_optimizer_and_the_precision(tmp_path: Path, precision: str, optimizer: Any) -> None:
    model = tiny(tied=False)
    save_under("tp=2", tmp_path / "c", precision, model, optimizer)
    load_under("tp=3", tmp_path / "c", precision, model, optimizer)


def test_real_processes_and_threads_exchange_checkpoints(tmp_path: Path) -> None:
    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "bf16"), lf.layout(MODEL, axes.mesh)
        lf.checkpoint.save(tmp_path / "step-00000050", layout, some_state(layout, ctx), ctx, EXTRA)
        lf.checkpoint.prune(tmp_path, 1, ctx)

    processes(lf.Mesh(tp=3), rank)
    load_under("tp=2,dp=2", tmp_path / "step-00000050")
    load_under("tp=2", tmp_path / "step-00000050", spmd=processes)


@pytest.mark.parametrize(("first", "then"), [("tp=2,dp=2", "tp=2,dp=2"), ("tp=3", "tp=3")])
def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(tmp_path: Path, first: str, then: str) -> None:
    def steps(axes: Any, start: Any, numbers: range) -> Any:
        ctx, layout = context(axes, "bf16"), lf.layout(MODEL, axes.mesh)
        init, step = lf.train.make(layout, lf.optim.adamw(1e-2), lf.schedule.one_f_one_b(1, 1), ctx)
        state = lf.checkpoint.load(start, layout, ctx)[0] if start else init(lf.init(layout, ctx, 0))
        losses = []
        for i in numbers:
            batch = random_batches(MODEL, 0, i, axes.mesh["dp"], 12)[axes.coords["dp"]]
            state, metrics = step(state, [batch])
            losses.append(metrics["loss"].item())
            if i == 1 and not start:
                lf.checkpoint.save(tmp_path / "c", layout, state, ctx, {})
        return losses, state

    whole = lf.sim.spmd(lf.Mesh.parse(first), steps, None, range(4))
    rest = lf.sim.spmd(lf.Mesh.parse(then), steps, tmp_path / "c", range(2, 4))
    for (losses, state), (again, resumed) in zip(whole, rest):
        assert losses[2:] == again
        assert_same(state, resumed)


# What is wrong with a checkpoint.


def meddle(folder: Path, change: Any) -> None:
    path = folder / manifests.MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit(folder: Path, file: str, change: Any) -> None:
    held = load_file(folder / file)
    change(held)
    save_file(held, folder / file, metadata={"format": "pt"})


R0, R1, DOWN = "rank-00000.safetensors", "rank-00001.safetensors", "layers.0.mlp/down"
BROKEN: dict[str, tuple[Any, list[str]]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), ["is no manifest of a checkpoint (FileNotFoundError"]),
    "no JSON": (lambda d: (d / "manifest.json").write_text("{"), ["is no manifest of a checkpoint"]),
    "a list": (lambda d: (d / "manifest.json").write_text("[]"), ["is no manifest of a checkpoint"]),
    "another format": (lambda d: meddle(d, lambda m: m.update(format="x")), ["has format 'x' version 1; this version of lf reads"]),
    "a later version": (lambda d: meddle(d, lambda m: m.update(version=2, more=1)), ["version 2; this version of lf reads 'lf checkpoint'"]),
    "a field is missing": (lambda d: meddle(d, lambda m: m.pop("leaves")), ["leaves"]),
    "no folder": (shutil.rmtree, ["is no manifest of a checkpoint"]),
    "another model": (
        lambda d: meddle(d, lambda m: (m["config"].update(vocab=38), m["config"]["layers"][1]["mixer"].update(heads=3))),
        [": 2 problems\n", "vocab was 38, is 37", "layers.1.mixer.heads was 3, is 6"],
    ),
    "another kind of model": (lambda d: meddle(d, lambda m: m.update(kind="Diffusion")), ["kind was 'Diffusion', is 'DecoderConfig'"]),
    "a leaf is missing": (lambda d: meddle(d, lambda m: m["leaves"].remove(f"master/{DOWN}")), [f"master/{DOWN} is missing", ": 1 problem\n"]),
    "a tensor is missing": (lambda d: meddle(d, lambda m: m["tensors"].pop(f"m/{DOWN}")), [f"m/{DOWN} is missing"]),
    "a scalar is missing": (lambda d: meddle(d, lambda m: m["tensors"].pop("t/t")), ["t/t is missing"]),
    "a box is missing": (
        lambda d: meddle(d, lambda m: m["tensors"][f"v/{DOWN}"]["boxes"].pop()),
        [f"v/{DOWN}: the boxes in manifest.json have 75 of the 150 elements of ((0, 15), (0, 10))"],
    ),
    "another shape": (
        lambda d: meddle(d, lambda m: m["tensors"][f"v/{DOWN}"].update(shape=[10, 15])),
        [f"v/{DOWN} has shape [10, 15], the model [15, 10]"],
    ),
    "an unknown dtype": (lambda d: meddle(d, lambda m: m["tensors"][f"v/{DOWN}"].update(dtype="F4")), [f"v/{DOWN} has dtype F4; known"]),
    "file missing": (lambda d: (d / R1).unlink(), [f"{R1} is not there", ": 1 problem\n"]),
    "file cut": (lambda d: (d / R1).write_bytes((d / R1).read_bytes()[:-9]), [f"{R1} is cut short", ": 1 problem\n"]),
    "two files": (lambda d: ((d / R1).unlink(), (d / R0).write_bytes(b"")), [": 2 problems\n", f"{R1} is not there", f"{R0} is cut short"]),
    "not in the file": (lambda d: edit(d, R0, lambda t: t.pop(f"master/{DOWN}")), [f"{R0}: master/{DOWN} is missing"]),
    "another shape in the file": (
        lambda d: edit(d, R1, lambda t: t.update({f"master/{DOWN}": torch.zeros(3, 5)})),
        [f"{R1}: master/{DOWN} is F32 [3, 5], manifest.json has F32 [15, 5]"],
    ),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("native") / "step-00000050"
    save_under("tp=2", folder)
    return folder


@pytest.mark.parametrize("kind", BROKEN)
def test_a_checkpoint_with_anything_wrong_is_one_clear_error(clean: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "c"
    shutil.copytree(clean, folder)
    spoil, words = BROKEN[kind]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        load_under("tp=3" if kind == "no manifest" else "", folder)
    for word in (*words, str(folder)):
        assert word in str(caught.value)


def test_masters_are_not_cast(clean: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has dtype F32; this run's masters are torch\.float64: use the precision that it was saved with"):
        load_under("", clean, "fp64")


def test_only_one_rank_has_what_is_broken(clean: Path, tmp_path: Path) -> None:
    shutil.copytree(clean, tmp_path / "c")
    (tmp_path / "c" / R1).unlink()

    def rank(axes: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            lf.checkpoint.load(tmp_path / "c", lf.layout(MODEL, axes.mesh), context(axes, "bf16"))
        return str(caught.value)

    said = lf.sim.spmd(lf.Mesh(tp=2), rank)
    assert all(f"{R1} is not there" in words for words in said)


def test_ranks_that_chose_different_steps_are_told(clean: Path, tmp_path: Path) -> None:
    shutil.copytree(clean, tmp_path / "c")
    meddle(tmp_path / "c", lambda m: m.update(step=40))

    def rank(axes: Any) -> None:
        with pytest.raises(CheckpointError, match=r"this rank reads step .0, others read 40 to 50"):
            lf.checkpoint.load(clean if axes.rank else tmp_path / "c", lf.layout(MODEL, axes.mesh), context(axes, "bf16"))

    lf.sim.spmd(lf.Mesh(tp=2), rank)


# Killed at any point.


def failing(monkeypatch: Any, words: str, error: type[BaseException] = OSError) -> None:
    real = native.write_tensors

    def write(path: Path, held: Any) -> None:
        real(path, held)
        if words in path.name:
            raise error(28, "No space left on device")

    monkeypatch.setattr(native, "write_tensors", write)


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "over another"])
def test_a_failing_write_on_one_rank_raises_on_all(clean: Path, tmp_path: Path, monkeypatch: Any, before: bool) -> None:
    out = tmp_path / clean.name
    if before:
        shutil.copytree(clean, out)
    failing(monkeypatch, R1)

    def rank(axes: Any) -> str:
        ctx, layout = context(axes, "bf16"), lf.layout(MODEL, axes.mesh)
        with pytest.raises(CheckpointError, match=r"failed on rank 1: .*No space left") as caught:
            lf.checkpoint.save(out, layout, some_state(layout, ctx), ctx, {})
        return str(caught.value)

    assert len(lf.sim.spmd(lf.Mesh(tp=2, dp=2), rank)) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ([clean.name] if before else [])
    assert not before or files(out) == files(clean)


def test_latest_is_the_newest_and_what_killed_saves_left_is_none(clean: Path, tmp_path: Path) -> None:
    assert lf.checkpoint.latest(tmp_path / "none") is None
    (tmp_path / ".step-00000030.partial").mkdir()
    (tmp_path / "step-notes").write_text("")
    assert lf.checkpoint.latest(tmp_path) is None
    for name in ("step-00000040", "step-00000050", ".step-00000060.partial", ".step-00000070.old", "other"):
        shutil.copytree(clean, tmp_path / name)
    assert lf.checkpoint.latest(tmp_path) == tmp_path / "step-00000050"
    assert lf.checkpoint.latest(str(tmp_path)) == tmp_path / "step-00000050"
    shutil.copytree(clean, tmp_path / "step-123456789")  # more digits than eight: newer, not smaller
    assert lf.checkpoint.latest(tmp_path) == tmp_path / "step-123456789"


DAMAGED: dict[str, tuple[Any, str]] = {
    "empty": (lambda d: (shutil.rmtree(d), d.mkdir()), "manifest.json is no manifest of a checkpoint"),
    "a file": (lambda d: (shutil.rmtree(d), d.touch()), "manifest.json is no manifest of a checkpoint"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is no manifest of a checkpoint"),
    "half a manifest": (lambda d: (d / "manifest.json").write_text('{"format"'), "manifest.json is no manifest of a checkpoint"),
    "a later version": (lambda d: meddle(d, lambda m: m.update(version=2)), "reads 'lf checkpoint' version 1: use the one that wrote it"),
    "file missing": (lambda d: (d / R1).unlink(), f"{R1}: No such file or directory"),
    "file cut": (lambda d: (d / R1).write_bytes(b"123"), f"{R1} has 3 bytes, manifest.json says"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_newest_is_refused_and_never_passed_over(clean: Path, tmp_path: Path, kind: str) -> None:
    spoil, words = DAMAGED[kind]
    for n in (40, 50, 60):
        shutil.copytree(clean, tmp_path / f"step-{n:08d}")
    newest = tmp_path / "step-00000060"
    spoil(newest)
    for way_out in (f"remove {newest} to go on from step-00000050", f"remove {tmp_path}, where no checkpoint is whole, to begin at step 0"):
        with pytest.raises(CheckpointError) as caught:
            lf.checkpoint.latest(tmp_path)
        for part in (f"cannot go on from {newest}: ", words, way_out):
            assert part in str(caught.value)
        for n in (40, 50):
            (tmp_path / f"step-{n:08d}" / R0).unlink(missing_ok=True)


def test_killed_while_saving_the_one_before_is_there(clean: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(clean, tmp_path / "step-00000050")
    shutil.copytree(clean, tmp_path / ".step-00000060.partial")
    (tmp_path / ".step-00000060.partial" / "manifest.json").unlink()
    assert lf.checkpoint.latest(tmp_path) == tmp_path / "step-00000050"
    save_under("tp=3", tmp_path / "step-00000060")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000050", "step-00000060"]
    load_under("tp=2", tmp_path / "step-00000060")


# Where a save is killed: (function, which call of it) → the newest complete checkpoint afterwards, for a new step and for one saved again.
KILLED = {
    ("write_tensors", 1): (50, 50),
    ("write_json", 1): (50, 50),
    ("rename", 1): (50, 50),
    ("rename", 2): (60, 40),  # the old one is moved aside, the new one not in place: for this moment the one before counts
    ("rmtree", 1): (60, 50),
}


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
@pytest.mark.parametrize(("function", "call"), KILLED)
def test_killed_at_any_point(clean: Path, tmp_path: Path, function: str, call: int, again: bool) -> None:
    for n in (40, 50):
        shutil.copytree(clean, tmp_path / f"step-{n:08d}")
    target = tmp_path / ("step-00000050" if again else "step-00000060")
    if (child := os.fork()) == 0:
        owner: Any = {"write_tensors": native, "write_json": native, "rename": Path, "rmtree": shutil}[function]
        real, calls = getattr(owner, function), []

        def die(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == call:
                os._exit(9)
            return real(*args, **kwargs)

        setattr(owner, function, die)
        try:
            save_under("", target)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    newest = tmp_path / f"step-{KILLED[function, call][again]:08d}"
    assert lf.checkpoint.latest(tmp_path) == newest
    load_under("tp=2", newest)
    save_under("tp=2", target)  # what the resumed run does
    load_under("", target)
    lf.sim.spmd(lf.Mesh(), lambda axes: lf.checkpoint.prune(tmp_path, 3, context(axes)))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"step-00000040", "step-00000050", target.name})


def test_prune_keeps_the_newest_and_clears_leftovers(clean: Path, tmp_path: Path) -> None:
    for n in range(1, 6):
        shutil.copytree(clean, tmp_path / f"step-{n:08d}")
    (tmp_path / "step-00000005" / R0).unlink()  # broken: neither counted nor removed
    for name in (".step-00000002.partial", ".step-00000001.old", ".other.partial"):
        (tmp_path / name).mkdir()
    lf.sim.spmd(lf.Mesh(tp=2), lambda axes: lf.checkpoint.prune(tmp_path, 2, context(axes)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.partial", "step-00000003", "step-00000004", "step-00000005"]
    with pytest.raises(CheckpointError, match="keep=0"):
        lf.sim.spmd(lf.Mesh(), lambda axes: lf.checkpoint.prune(tmp_path, 0, context(axes)))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    def rank(axes: Any, change: Any, extra: Any) -> None:
        ctx, layout = context(axes, "bf16"), lf.layout(MODEL, axes.mesh)
        state = some_state(layout, ctx)
        change(state.optimizer)
        lf.checkpoint.save(tmp_path / "c", layout, state, ctx, extra)

    cases: list[tuple[Any, Any, str]] = [
        (lambda o: o["m"]["head"].update(norm=torch.zeros(3)), {}, r"m/head/norm has shape \[3\] and should have \[15\]: the shape of its parameter"),
        (lambda o: o.update(rows={"all": torch.zeros(4)}), {}, r"rows/all has shape \[4\] and should have \[\]: a scalar"),
        (lambda o: o["t"].update(z=torch.zeros((), dtype=torch.complex64)), {}, r"t/z has dtype torch\.complex64"),
        (lambda o: None, {"a": (1, 2)}, "extra would not come back from JSON as it is"),
        (lambda o: None, {1: 2}, "extra would not come back from JSON"),
        (lambda o: None, {"a": torch.zeros(1)}, "extra is no JSON"),
        (lambda o: None, {"a": float("nan")}, "extra is no JSON"),
        (lambda o: None, [1], "extra would not come back"),
    ]
    for change, extra, words in cases:
        with pytest.raises(CheckpointError, match=words):
            lf.sim.spmd(lf.Mesh(tp=2), rank, change, extra)
    assert not list(tmp_path.iterdir())


def test_nothing_on_disk_is_a_pickle(clean: Path) -> None:
    for name, content in files(clean).items():
        assert name == "manifest.json" or name.endswith(".safetensors")
        assert not content.startswith((b"\x80", b"PK"))

"""What is said when memory runs out: what filled it, and a way out that is enough by the estimate."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import chained
import pytest
import torch
from chained import at, laid_out
from helpers import context, processes

import lf
from lf import memory, parity, tree
from lf.memory import Setting, Usage, way_out
from lf.models.small import tiny
from lf.schedule.memory import OutOfMemory, memory_at

NOW = Setting(micro_batch=8, seq_len=1024, tp=2, compute=torch.bfloat16, master=torch.float32)
MIXTURE = {"seq_len": 128, "routed": 0.8, "ep": 2, "edp": 4, "experts": 8}
GIB = 1 << 30


@pytest.mark.parametrize(
    ("lasting", "activations", "change", "words"),
    [
        (40, 48, {}, "--micro-batch 4 instead of 8 (about 64.0 GiB)"),
        (60, 96, {}, "--micro-batch 1 instead of 8 (about 72.0 GiB)"),
        (70, 96, {"whole": 34}, "--micro-batch 4 instead of 8 and --recompute full (about 74.2 GiB; a step then takes up to a third longer)"),
        (60, 96, {"micro_batch": 1, "whole": 34}, "--recompute full (about 68.5 GiB; a step then takes up to a third longer)"),
        (60, 96, {"micro_batch": 1, "whole": 1}, "--seq-len 128 instead of 1024 (about 72.0 GiB)"),  # one layer is as much when it is run again
        (70, 96, {}, "--micro-batch 1 and --seq-len 512 instead of 1024 (about 76.0 GiB)"),
        (70, 40, {"micro_batch": 1}, "--seq-len 128 instead of 1024 (about 75.0 GiB)"),
        (78, 40, {}, "tp=4 instead of 2, on twice the ranks (about 59.0 GiB each)"),
        (100, 100, {"compute": torch.float64, "master": torch.float64, "micro_batch": 1}, "tp=8 instead of 2 (about 50.0 GiB each)"),
        (80, 90, {"compute": torch.float64, "master": torch.float64, "micro_batch": 1}, "; or --precision fp32 (about 85.0 GiB)"),
        (60, 40, {"compute": torch.float32, "seq_len": 128, "micro_batch": 1}, "(about 50.0 GiB each)"),  # bf16 would need 87.5: a copy more
        (60, 17, {"compute": torch.float32, "seq_len": 128, "micro_batch": 1}, "; or --precision bf16 (about 76.0 GiB)"),
        (100, 20, {"micro_batch": 1, "seq_len": 128, "layers": 4}, "tp=4 instead of 2, on twice the ranks (about 60.0 GiB each); or pp=2"),
        (100, 40, {"micro_batch": 1, "seq_len": 128, "layers": 4}, "tp=4 instead of 2, on twice the ranks (about 70.0 GiB each)"),  # pp leaves 90
        (100, 20, {"micro_batch": 1, "seq_len": 128, "layers": 5, "pp": 3}, "(about 60.0 GiB each)"),  # pp=6 would have nothing to do
        (200, 96, {}, "--micro-batch 1 and tp=8 instead of 2 (about 53.0 GiB each)"),
        (99999, 1, {}, "none of fewer rows"),
        # of several chains a larger mesh of the largest leaves the rest as it is
        (100, 0, {"chain": "vision", "share": 0.8}, "tp=4 instead of 2 in chain 'vision', on twice the ranks (about 60.0 GiB each)"),
        (100, 0, {"chain": "vision", "share": 0.5}, "tp=4 instead of 2 in chain 'vision', on twice the ranks (about 75.0 GiB each)"),
        (100, 0, {"chain": "vision", "share": 0.4}, "--micro-batch 1 and tp=8 instead of 2 in chain 'vision' (about 70.0 GiB each)"),
        (100, 4, {"chain": "vision", "share": 0.2}, "none of fewer rows"),
        # experts go over more of the ranks that there are, as long as each has one; tp holds no fewer
        (100, 17, MIXTURE | {"micro_batch": 1}, "ep=8 instead of 2, on the same ranks (about 57.0 GiB each)"),  # ep=4 leaves 77
        (88, 40, MIXTURE | {"micro_batch": 2}, "--micro-batch 1 and ep=4 instead of 2, on the same ranks (about 72.8 GiB each)"),
        (100, 16, MIXTURE | {"edp": 3}, "ep=6 instead of 2, on the same ranks (about 62.7 GiB each)"),
        (100, 16, MIXTURE | {"experts": 3}, "more tp, ep or lower precision is enough; take a smaller model or more memory"),
        (84, 8, MIXTURE | {"edp": 1}, "ep=4 instead of 2 and twice the dp (about 58.4 GiB each)"),  # tp=4 leaves 79.6
        (90, 8, MIXTURE | {"edp": 1, "routed": 0.3}, "tp=4 instead of 2, on twice the ranks (about 62.5 GiB each)"),  # ep=4 leaves 84.5
        (80, 8, MIXTURE | {"edp": 1, "routed": 0.5}, "; or ep=4 instead of 2 and twice the dp (about 68.0 GiB each)"),
        (200, 8, MIXTURE | {"edp": 1, "micro_batch": 1}, "tp=8 instead of 2 and ep=8 instead of 2 (about 52.0 GiB each)"),
    ],
)
def test_the_smallest_change_that_fits(lasting: int, activations: int, change: dict[str, Any], words: str) -> None:
    limit = 90 if "85.0" in words else 80
    said = way_out(Usage({}, lasting * GIB, activations * GIB, limit * GIB), attrs.evolve(NOW, **change))
    assert said.endswith(words) or said.startswith(words)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_filled_the_memory_is_counted(precision: str) -> None:
    """A device of 1 MiB: the report's bytes are those of the tensors, and all of them are what is held."""
    ctx = context(lf.solo(), precision)
    ctx = attrs.evolve(ctx, device=SimpleNamespace(**{**vars(ctx.device), "memory_peak": lambda: 900_000, "memory_total": lambda: 1 << 20}))
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    init, _ = lf.train.make(layout, lf.optim.adamw(1e-3), lf.schedule.one_f_one_b(1, 1), ctx)
    state = init(lf.init(layout, ctx, 0))
    n = sum(x.numel() for x in tree.leaves(state.params))
    error = OutOfMemory("full", "the forward of head, action 0F0", forward=0.5, gradients=100, wanted=50_000)
    usage = memory.measure(error, layout, state, 950_000, ctx)
    copy = 2 * n if precision == "bf16" else 0  # in fp32 it is the master
    assert [*usage.kinds.values()][:-1] == [copy, 4 * n, 4 * n, 4 * n, 8, 100]
    assert sum(usage.kinds.values()) == 950_000
    assert usage.lasting == copy + 16 * n + 8
    assert usage.activations == 2 * [*usage.kinds.values()][-1]

    batches = parity.random_batches(tiny(), 0, 0, 2, 64)
    said = str(memory.explained(error, layout, state, batches, 16, ctx))
    assert said.startswith("out of memory on rank 0, in the forward of head, action 0F0: it holds 878.9 KiB of 1.0 MiB; 48.8 KiB more were asked for")
    assert f"{4 * n / 1024:.1f} KiB  optimizer: master" in said
    assert f"{12 * 37 * 15 / 1024:.1f} KiB  embed/weight [37, 15]" in said
    assert "\nThe smallest change that should fit, by an estimate: --micro-batch 2 instead of 4 (about" in said


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"), int(2.5 * GIB)),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes."), 512),
        (torch.OutOfMemoryError("out of memory"), 0),
    ],
)
def test_what_was_asked_for_is_read_from_the_words(error: RuntimeError, wanted: int) -> None:
    with pytest.raises(OutOfMemory, match="out of memory in here: ") as caught, memory_at("here", 1.0, {"a": torch.zeros(3)}):
        raise error
    assert (caught.value.wanted, caught.value.gradients) == (wanted, 12)


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_at("here", 1.0, {}):
        raise RuntimeError("shape")


def _full(axes: Any, folder: Path) -> str:
    """A step that fits, and one whose logits alone, 8192 x 20000 float32, are as much as this process may still get."""
    ctx, model = context(axes, "fp32"), tiny(vocab=20000)
    layout = lf.layout(model, axes.mesh)
    init, step = lf.train.make(layout, lf.optim.adamw(1e-3), lf.schedule.one_f_one_b(1, 1), ctx)
    rows = [parity.random_batches(model, 0, i, 1, n) for i, n in enumerate((16, 8192))]
    feed = lf.loop.Feed(lambda i: rows[i], lambda i: 4 * i, 2048, {})
    state = init(lf.init(layout, ctx, 0))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 4 * 8192 * 20000, resource.RLIM_INFINITY))
    try:
        lf.loop.run(lf.runs.Run(folder, None), layout, step, state, feed, ctx, lf.loop.Policy(2))
    except OutOfMemory as error:
        return str(error)
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to a limit of the address space")
def test_a_run_whose_memory_is_full_ends_with_the_report(tmp_path: Path) -> None:
    (said,) = processes(1, _full, tmp_path)
    assert said.startswith("out of memory on rank 0, in the forward of head, action 0F0: it holds "), said
    assert "optimizer: master" in said
    assert "by an estimate: --micro-batch 2 instead of 4" in said
    assert [r["step"] for r in lf.runs.read_metrics(tmp_path / "metrics.jsonl")] == []  # step 1 is read when step 2 has begun


@pytest.mark.parametrize("frozen", [(), ("embed", "layers.0")])
def test_each_rank_is_measured_by_what_it_holds(frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said before anything is made is what is there afterwards, on each rank of a pipeline; frozen parameters have no moments."""
    seen: dict[int, tuple[int, dict[str, int]]] = {}

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "bf16"), lf.layout(tiny(), axes.mesh, split=(0, 2, 2), frozen=frozen)
        small = SimpleNamespace(**{**vars(ctx.device), "memory_total": lambda: -1, "memory_peak": lambda: 0})
        optimizer, program = lf.optim.adamw(1e-3), lf.schedule.one_f_one_b(3, 1)
        with pytest.raises(OutOfMemory) as caught:
            memory.refuse_what_cannot_fit(layout, optimizer, attrs.evolve(ctx, device=small))
        state = lf.train.make(layout, optimizer, program, ctx)[0](lf.init(layout, ctx, 0))
        usage = memory.measure(OutOfMemory("full"), layout, state, 0, attrs.evolve(ctx, device=small))
        assert f"needs {memory._bytes(usage.lasting)} besides activations" in str(caught.value)
        seen[axes.rank] = usage.lasting, usage.kinds

    lf.sim.spmd(lf.Mesh(pp=3), rank)
    whole = lf.layout(tiny(), lf.Mesh(dp=1), frozen=frozen)
    coords = [{"pp": r} for r in range(3)]
    layout = lf.layout(tiny(), lf.Mesh(pp=3), split=(0, 2, 2), frozen=frozen)
    for r in range(3):
        held, trained = (sum(math.prod(whole.specs[p].param.shape) for p in of(coords[r])) for of in (layout.held, layout.trained))
        assert seen[r][1]["optimizer: master"] == 4 * held
        assert seen[r][1]["optimizer: m"] == 4 * trained
        assert seen[r][0] == 2 * held + 4 * held + 8 * trained + 4 * trained + 8
    assert seen[0][0] == 8  # a rank without a parameter keeps the count of updates


def test_a_state_that_cannot_fit_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-3.1-8b in bf16: 8.03e9 parameters of 2 + 4 + 4 + 4 + 4 bytes, a little over 134 GiB; on half of a card, each of two ranks has 67."""
    layout = lf.layout(lf.hf.model("llama-3.1-8b"), lf.Mesh(dp=1))
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "bf16")
    monkeypatch.setattr(lf.devices.get("cpu"), "memory_total", lambda: 80 << 30)
    with pytest.raises(OutOfMemory, match=r"before the first step: rank 0 needs 134\.6 GiB besides activations, its device has 80\.0 GiB") as caught:
        lf.train.make(layout, lf.optim.adamw(0.1), lf.schedule.one_f_one_b(1, 1), ctx)
    words = str(caught.value)
    for line in ("15.0 GiB  compute copy", "29.9 GiB  optimizer: master", "29.9 GiB  optimizer: m", "29.9 GiB  gradients", "tp=2 instead of 1"):
        assert line in words
    monkeypatch.setattr(lf.devices.get("cpu"), "memory_total", lambda: 140 << 30)
    lf.train.make(layout, lf.optim.adamw(0.1), lf.schedule.one_f_one_b(1, 1), ctx)


def test_several_chains_are_measured_by_what_each_rank_has_of_them() -> None:
    """Each chain in its own precision, the frozen one without moments; what is said before anything is made is what is there afterwards."""
    layouts = laid_out(at("tp=2", "pp=2,dp=2", "", {"eyes": (0, 1), "hand": (3,)}, eyes_frozen=("*",)))
    optimizer, seen = lf.optim.adamw(1e-3), dict[int, int]()

    def rank(axes: Any) -> str:
        ctx = chained.tiny_device(chained.context(axes, layouts, {"words": "fp32"}), memory_total=-1, memory_peak=0)
        with pytest.raises(OutOfMemory) as caught:
            memory.refuse_what_cannot_fit(layouts, optimizer, ctx)
        state = chained.some_state(layouts, ctx)
        usage = memory.measure(OutOfMemory("full"), layouts, state, 0, ctx)
        assert f"rank {axes.rank} needs {memory._bytes(usage.lasting)} besides activations" in str(caught.value)
        seen[axes.rank] = usage.lasting
        sizes = {path: math.prod(layouts.local_shape(path, axes.rank)) for path in layouts.held(axes.rank)}
        assert sum(memory._each(layouts, state.optimizer, sizes, ctx).values()) == usage.lasting - 8  # but for the count of updates
        return str(memory.explained(OutOfMemory("full", "here"), layouts, state, [], 16, ctx))

    said = chained.world(layouts, rank)
    # 2 bytes for the copy in bf16 of eyes and hand, none in fp32; 4 for each master, and 12 for gradient and moments of what trains
    sizes = [{path: math.prod(layouts.local_shape(path, r)) for path in layouts.held(r)} for r in range(4)]
    held = [{chain: sum(n for path, n in of.items() if layouts.chain_of[path] == chain) for chain in layouts.chains} for of in sizes]
    assert [seen[r] for r in range(4)] == [6 * n["eyes"] + 16 * n["words"] + 18 * n["hand"] + 8 for n in held]
    assert "largest parameters, with all that is kept for each:\n     2.6 KiB  embed/table [37, 6]" in said[0]


@pytest.mark.parametrize(("frozen", "words"), [((), "tp=32 instead of 1 in chain 'words'"), (("*",), "tp=2 instead of 1 in chain 'eyes', on twice")])
def test_the_chain_that_takes_the_most_is_named(frozen: tuple[str, ...], words: str) -> None:
    """Rank 1 has 281 elements of eyes and 330 of words, of 18 bytes where they train and 6 where not."""
    layouts = laid_out(at("", "pp=2", "tp=2", {"eyes": (1,)}, words_frozen=frozen))

    def rank(axes: Any) -> str:
        ctx = chained.tiny_device(chained.context(axes, layouts), memory_total=6000)
        try:
            memory.refuse_what_cannot_fit(layouts, lf.optim.adamw(1e-3), ctx)
        except OutOfMemory as error:
            return str(error).splitlines()[-1]
        return ""

    fits, said = chained.world(layouts, rank)
    assert fits == ""
    assert said.startswith(f"The smallest change that should fit, without activations: {words}")

"""On a card: kernels against their twins, a step against the same step on the CPU, law 1 in float64, and that the host does not wait in a step."""

from __future__ import annotations

import contextlib
import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import draw

import lf
from lf import drift, memory, parity, tree
from lf.models.small import tiny
from lf.optim.adamw import is_matrix
from lf.schedule import one_f_one_b
from lf.schedule.measured import Clock
from lf.schedule.memory import OutOfMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = torch.device("cuda")


def on(device: str, precision: str) -> lf.Context:
    return lf.Context(lf.solo(), lf.devices.get(device), precision)


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(
    ("heads", "kv", "dim", "value", "sinks"), [(4, 4, 64, 64, False), (6, 2, 64, 64, True), (4, 4, 192, 128, False), (4, 2, 64, 96, True)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_attention_and_twin(dtype: torch.dtype, heads: int, kv: int, dim: int, value: int, sinks: bool, window: int | None) -> None:
    from lf.kernels import varlen
    from lf.ops import attention as twin

    starts, tokens = [0, 1, 130, 131, 400], 700
    cu = torch.tensor([*starts, *[tokens] * 11], dtype=torch.int32, device=CUDA)
    shapes = {"q": (tokens, heads, dim), "k": (tokens, kv, dim), "v": (tokens, kv, value), **({"sinks": (heads,)} if sinks else {})}
    inputs = [draw(name, shape=shape).to(CUDA, dtype) for name, shape in shapes.items()]
    dy = draw("dy", shape=(tokens, heads, value)).to(CUDA, dtype)
    results = []
    for f, wide in ((varlen.attention, False), (twin.attention, True)):
        leaves = [x.double() if wide else x.clone() for x in inputs]
        leaves = [x.requires_grad_() for x in leaves]
        y = f(*leaves[:3], cu, window, 0.7 * dim**-0.5, *leaves[3:])
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * max(b.abs().max().item(), 1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_rms_norm_and_twin(dtype: torch.dtype, tolerance: float) -> None:
    from lf.kernels.fused_norm import rms_norm
    from lf.ops import norm as twin

    results = []
    for f in (rms_norm, twin.rms_norm):
        leaves = [draw(k, shape=s).to(CUDA, dtype).requires_grad_() for k, s in (("x", (70, 3, 64)), ("w", (64,)))]
        y = f(*leaves, 1e-5)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, draw("dy", shape=(70, 3, 64)).to(CUDA, dtype))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_adamw_and_twin() -> None:
    from lf.kernels import adamw as kernel
    from lf.ops import adamw as twin

    def fresh() -> list[list[torch.Tensor]]:
        kinds = [[draw(k, i, shape=s, dtype=torch.float32).to(CUDA) for i, s in enumerate([(50, 70), (3,)])] for k in "wgmv"]
        return [*kinds[:3], [v.square() for v in kinds[3]]]

    a, b = fresh(), fresh()
    for f, x in ((kernel.adamw_update, a), (twin.adamw_update, b)):
        for ok in (True, False, True):
            f(*x[:1], [g.clone() for g in fresh()[1]], *x[2:], *(torch.tensor(n, device=CUDA) for n in (3, 0.1, 0.3, ok)), (0.8, 0.95), 1e-5, 0.3)
    for kind in (0, 2, 3):
        for i, j in zip(a[kind], b[kind]):
            torch.testing.assert_close(i, j, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_adamw_in_bf16_and_twin(rounding: str) -> None:
    """Boxes of fused parameters, of stacks, along columns, of vectors and scalars; moments are the same but where the last bit of float32 was not."""
    from lf.kernels import bf16_moments as kernel
    from lf.ops import adamw as twin
    from lf.ops import muon
    from lf.ops.rounding import Noise
    from lf.spec import Piece

    pieces = [
        (Piece("a/q", (900, 130), ((100, 400), (0, 130)), 0, 0), Piece("a/k", (70, 130), ((10, 50), (0, 130)), 0, 300)),
        (Piece("b", (6, 40, 33), ((2, 5), (4, 30), (1, 32)), 1, 0),),
        (Piece("c/x", (50, 80), ((0, 50), (8, 20)), 1, 0), Piece("c/y", (50, 90), ((0, 50), (30, 90)), 1, 12)),
        (Piece("d", (3000,), ((11, 2000),), 0, 0),),
        (Piece("e", (), (), 0, 0),),
    ]
    shapes = [(340, 130), (3, 26, 31), (50, 72), (1989,), ()]
    results = []
    for f in (kernel.adamw_update, twin.adamw_update):
        ws, ms, vs = ([draw(kind, i, shape=shape).to(CUDA, torch.float32) for i, shape in enumerate(shapes)] for kind in "wmv")
        ms, vs = [m.bfloat16() for m in ms], [v.square().bfloat16() for v in vs]
        for t in (1, 2):
            grads = [draw("g", t, i, shape=shape).to(CUDA, torch.float32) for i, shape in enumerate(shapes)]
            step, numbers = torch.tensor(t, device=CUDA), [torch.tensor(x, device=CUDA) for x in (0.1, 0.3)]
            noises = [Noise(5, p, step) for p in pieces] if rounding == "stochastic" else None
            f(ws, grads, ms, vs, step, *numbers, torch.tensor(True, device=CUDA), (0.8, 0.95), 1e-5, 0.3, noises)
        bad = [torch.full_like(w, torch.nan) for w in ws]
        held = [x.clone() for x in (*ws, *ms, *vs)]
        f(ws, bad, ms, vs, step, *(n * torch.nan for n in numbers), torch.tensor(False, device=CUDA), (0.8, 0.95), 1e-5, 0.3, noises)
        assert all(map(torch.equal, held, (*ws, *ms, *vs)))
        results.append((ws, ms, vs))
    for a, b in zip(results[0][0], results[1][0]):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # where a moment was rounded the other way
        assert ((a - b).abs() > 1e-5).double().mean() < 1e-2
    for kind in (1, 2):
        for a, b in zip(results[0][kind], results[1][kind]):
            torch.testing.assert_close(a, b, rtol=1 / 64, atol=1e-3)
            assert (a != b).double().mean() < 1e-2
    sums = []
    for f in (kernel.momentum_update, muon.momentum_update):
        m, grad = (draw(kind, shape=(340, 130)).to(CUDA, torch.float32) for kind in "mg")
        m, noise = m.bfloat16(), Noise(5, pieces[0], torch.tensor(3, device=CUDA)) if rounding == "stochastic" else None
        args = (torch.tensor(0.3, device=CUDA), torch.tensor(True, device=CUDA), 0.9)
        sums.append([f(m, grad, *args, True, torch.float32, noise), f(m, grad, *args, False, torch.bfloat16, noise), m])
        held, gone = m.clone(), f(m, grad * torch.nan, args[0] * torch.nan, torch.tensor(False, device=CUDA), 0.9, True, torch.float32, noise)
        assert torch.equal(m, held)
        assert torch.isfinite(gone).all()
    for a, b in zip(*sums):
        assert a.dtype == b.dtype
        assert a.dtype == torch.float32 or (a != b).double().mean() < 1e-2
        torch.testing.assert_close(a, b, rtol=1 / 64, atol=2e-3)


@pytest.mark.parametrize("mesh", ["tp=2,dp=2", "tp=5", "dp=3"])
def test_law_1_in_float64(mesh: str) -> None:
    """Ranks simulated on one card."""
    report = parity.compare(tiny(), lf.Mesh.parse(mesh), device="cuda", steps=2, padding=3)
    assert report.ok, str(report)


def stepped(device: str, precision: str, config: Any, tokens: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Metrics, gradients and parameters of one step from the same model and rows, on the CPU and wide."""
    ctx, model = on(device, precision), lf.models.decoder.decoder(config)
    layout = lf.layout(model, ctx.axes.mesh)
    params = lf.init(layout, ctx, seed=0)
    batches = parity.random_batches(model, 0, 0, 1, tokens)
    program = lf.schedule.one_f_one_b(1, 1)
    grads, _ = lf.train.gradients(layout, program, ctx)(tree.map(lambda w: w.to(ctx.precision.compute), params), batches)
    init, step = lf.train.make(layout, lf.optim.adamw(1e-3), program, ctx)
    state, metrics = step(init(params), batches)
    return tuple({k: v.detach().cpu().double() for k, v in x} for x in (metrics.items(), tree.items(grads), tree.items(state.optimizer["master"])))


@pytest.mark.parametrize("name", ["qwen3-demo", "qwen3-0.6b"])
def test_one_step_equals_the_cpu_within_bfloat16(name: str) -> None:
    """The CPU in float32 is what both mean; in bfloat16 a gradient may be off by its rounding, 2⁻⁸ of a sum's largest terms."""
    config = lf.models.presets.PRESETS[name]
    want, want_grads, want_params = stepped("cpu", "fp32", config, 64)
    for precision, loose, of_loss in (("fp32", 2e-3, 1e-5), ("bf16", 6e-2, 1e-3)):
        got, grads, params = stepped("cuda", precision, config, 64)
        assert abs(got["loss"] - want["loss"]) <= of_loss * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= loose * want["grad_norm"]
        for path, g in want_grads.items():
            assert (grads[path] - g).norm() <= loose * g.norm(), f"{precision} {path}"
        for path, w in want_params.items():
            assert (params[path] - w).abs().max() <= 2.1e-3, "an update of Adam is the learning rate at most"


RATE = lf.optim.warmup_cosine(1e-3, 2, 10)
OPTIMIZERS = {
    "adamw": lf.optim.adamw(RATE),
    "in bf16": lf.optim.adamw(RATE, moments="bf16"),
    "muon": lf.optim.muon(RATE, moments="bf16"),
    "muon gathered, an average": lf.optim.ema(lf.optim.muon(RATE, way="gathered"), 0.9),
    "groups, in the host's memory": lf.optim.on_host(
        lf.optim.groups([(is_matrix, lf.optim.adamw(lf.optim.times(2, RATE)))], lf.optim.adamw(RATE))
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_host_never_waits_inside_a_step(name: str) -> None:
    """Law 9: torch raises at any operation that makes the host wait for the device."""
    ctx, model = on("cuda", "bf16"), lf.models.decoder.decoder(lf.models.presets.PRESETS["qwen3-demo"])
    layout = lf.layout(model, ctx.axes.mesh)
    init, step = lf.train.make(layout, OPTIMIZERS[name], lf.schedule.one_f_one_b(1, 2), ctx)
    state = init(lf.init(layout, ctx, seed=0))
    state, _ = step(state, parity.random_batches(model, 0, 0, 2, 300))  # the first one loads kernels
    batches = parity.random_batches(model, 0, 1, 2, 300)
    batches = [lf.Batch({k: v.pin_memory() for k, v in b.plan.items()}) for b in batches]
    torch.cuda.set_sync_debug_mode("error")
    try:
        state, metrics = step(state, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(metrics["loss"])
    assert importlib.import_module("lf.devices.cuda").memory_peak() > 0


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("make", [lf.optim.adamw, partial(lf.optim.adamw, moments="bf16"), lf.optim.muon], ids=["adamw", "in bf16", "muon"])
def test_state_in_the_host_s_memory_changes_no_bit(make: Any, share: float, tmp_path: Path) -> None:
    """Nor does a checkpoint between two steps; the state lies in pinned memory after both."""
    ctx, model = on("cuda", "bf16"), lf.models.decoder.decoder(lf.models.presets.PRESETS["qwen3-demo"])
    layout, ends = lf.layout(model, ctx.axes.mesh), []
    for optimizer in (make(1e-2), lf.optim.on_host(make(1e-2), share)):
        init, step = lf.train.make(layout, optimizer, lf.schedule.one_f_one_b(1, 2), ctx)
        state = init(lf.init(layout, ctx, seed=0))
        for i in range(3):
            state, _ = step(state, parity.random_batches(model, 0, i, 2, 300))
            if i == 1:
                lf.checkpoint.save(tmp_path / "c", layout, state, ctx, {})
                state, _ = lf.checkpoint.load(tmp_path / "c", layout, ctx, optimizer.hosted)
            away = optimizer.hosted([*layout.specs], lf.chain_layouts.joined(layout))
            for leaf, x in tree.items(state.optimizer):
                kind, _, path = leaf.partition("/")
                assert x.is_pinned() if path in away and kind != "master" else x.is_cuda, leaf
        ends.append({path: x.cpu() for path, x in tree.items(state.optimizer)})
    assert all(torch.equal(ends[1][path], x) for path, x in ends[0].items())


def test_bytes_go_to_pinned_memory_and_back() -> None:
    cuda = lf.devices.get("cuda")
    streams, sources = cuda.copy_streams(), [torch.randint(0, 256, (n,), dtype=torch.uint8, device=CUDA) for n in (5000, 1, 2048)]
    hosts, after = cuda.copy_out(sources, 2048, streams)
    assert [[len(piece) for piece in pieces] for pieces in hosts] == [[2048, 2048, 904], [1], [2048]]
    assert all(piece.is_pinned() for pieces in hosts for piece in pieces)
    for source, pieces in zip(sources, hosts):
        back, wait = cuda.copy_in(pieces, source.device, after, streams)
        wait()
        assert torch.equal(back, source)


def test_what_a_forward_keeps_goes_to_the_host_and_back_while_others_use_its_memory() -> None:
    """Several times over, the memory that an offload leaves and that a fetch takes being written in between; and the host never waits."""
    from lf.schedule.slots import Slots, entry
    from lf.schedule.vjp import ends, vjp

    ctx, tokens, dim, inner = on("cuda", "fp32"), 4096, 1024, 2048
    shapes = {"norm": (dim,), "gate_up": (2 * inner, dim), "down": (dim, inner)}
    layers = [{k: (draw(k, i, shape=s) / s[-1] ** 0.5).to(CUDA, torch.float32).requires_grad_() for k, s in shapes.items()} for i in range(2)]
    leaves = [w for layer in layers for w in layer.values()]
    x, dy = (draw(k, shape=(tokens, dim)).to(CUDA, torch.float32) for k in ("x", "dy"))

    def forward(slots: Slots | None) -> tuple[torch.Tensor, Any]:
        leaf, y = entry(x)
        ops = ctx.ops if slots is None else slots.table(ctx.ops)
        with contextlib.nullcontext() if slots is None else slots.filing():
            for p in layers:
                y = y + F.linear(ops.swiglu(F.linear(ops.rms_norm(y, p["norm"], 1e-6), p["gate_up"])), p["down"])
            return leaf, ends([y])

    def write_over() -> None:
        for size in (tokens * dim, 2 * tokens * inner) * 3:
            torch.full((size,), torch.nan, device=CUDA)

    leaf, held = forward(None)
    want = vjp(held, [dy], [leaf, *leaves])
    del leaf, held
    streams, keep = ctx.device.copy_streams(), {t.untyped_storage().data_ptr() for t in (x, *leaves)}
    torch.cuda.synchronize()
    for i, ops in enumerate([(), ("swiglu",), ("rms_norm", "swiglu"), ("rms_norm", "swiglu")]):
        base = torch.cuda.memory_allocated()
        slots = Slots(keep, ops)
        torch.cuda.set_sync_debug_mode("error" if i else "default")  # the first round loads kernels
        try:
            leaf, held = forward(slots)
            filed, _ = slots.bytes()
            assert torch.cuda.memory_allocated() - base >= filed
            slots.offload(ctx.device, streams, 1 << 22)
            small, moved = slots.bytes()
            assert moved > 100 << 20
            assert small + moved == filed
            assert torch.cuda.memory_allocated() - base < 1 << 20
            write_over()
            slots.fetch(ctx.device, streams)
            write_over()
            slots.remat()
            got = vjp(held, [dy], [leaf, *leaves])
            assert slots.bytes() == (0, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(want, got))
        del leaf, held, slots, got


def test_hashes_of_replicas_are_those_of_the_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        x = draw("x", shape=(300, 70)).to(dtype)
        assert drift.digest(x.to(CUDA)).item() == drift.digest(x).item()


def test_a_step_that_does_not_fit_is_explained() -> None:
    """The allocator is given 1.5 % of the card."""
    config = lf.models.presets.PRESETS["qwen3-demo"]
    ctx, model = on("cuda", "fp32"), lf.models.decoder.decoder(config)
    layout = lf.layout(model, ctx.axes.mesh)
    init, step = lf.train.make(layout, lf.optim.adamw(1e-3), lf.schedule.one_f_one_b(1, 1), ctx)
    state = init(lf.init(layout, ctx, seed=0))
    batches = parity.random_batches(model, 0, 0, 1, 120_000)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.015)
    try:
        with pytest.raises(OutOfMemory, match=r"out of memory in .*0F0") as caught:
            step(state, batches)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert caught.value.wanted > 0
    words = str(memory.explained(caught.value, layout, state, batches, 1000, ctx))
    for line in ("optimizer: master", "activations, buffers", "embed/weight", "The smallest change that should fit"):
        assert line in words


@pytest.mark.parametrize("shape", [(64, 48, 32), (7, 5, 3), (0, 8, 8)])
def test_a_sum_of_products_is_made_in_the_dtype_of_the_sum(shape: tuple[int, int, int]) -> None:
    """bfloat16 factors, float32 sum: the product is never rounded to bfloat16 on its way."""
    from lf.parallel.product import weight_gradient

    tokens, n, m = shape
    dy, x = draw("dy", shape=(tokens, n)).to(CUDA, torch.bfloat16), draw("x", shape=(tokens, m)).to(CUDA, torch.bfloat16)
    acc = draw("acc", shape=(n, m)).to(CUDA, torch.float32)
    want = acc.double() + dy.double().T @ x.double()
    weight_gradient(acc, x, dy)
    torch.testing.assert_close(acc.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "acc", "probe"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp64", 1e-12)])
def test_a_compiled_layer_gives_the_same_gradients(precision: str, tolerance: float, form: str) -> None:
    """bf16 through flash attention, fp64 through the mask written out."""
    from test_compile import Setup, agree

    agree(Setup(on("cuda", precision)), "layers.0", form, "inductor", tolerance)


def test_a_clock_takes_down_when_the_card_has_worked_and_nobody_waits() -> None:
    ctx, program, x = on("cuda", "fp32"), one_f_one_b(1, 1), torch.ones(2048, 2048, device=CUDA)
    clock = Clock(ctx.axes, ctx.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(2):
            start = clock.moment()
            for _ in range(20):
                x = x @ x / 2048
            clock(i, start, clock.moment())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ((f, b),) = (timeline := clock.timeline(program)).rows
    assert 0 == f.start < f.end <= b.start < b.end < 10
    assert min(held for _, held in timeline.memory[0]) >= x.numel() * 4


@pytest.mark.parametrize(
    ("name", "recompute", "offload"), [("1f1b", "none", "full"), ("zb-v", "full:1", "full;distance=2"), ("zb-h1", "ops=swiglu,rms_norm,rope", "none")]
)
def test_law_1_over_stages(name: str, recompute: str, offload: str) -> None:
    """Ranks of a pipeline on one card, with copies to the host's memory beside the computation."""
    from functools import partial

    from lf.schedule.build import build
    from lf.schedule.named import SCHEDULES
    from lf.schedule.recompute import parse_offload, parse_recompute

    schedule = SCHEDULES[name]
    program = partial(build, generate=schedule.generate, recomputed=parse_recompute(recompute), offloaded=parse_offload(offload))
    for mesh in ("pp=2", "pp=2,tp=2"):
        where = lf.Mesh.parse(mesh)
        report = parity.compare(tiny(), where, device="cuda", placement=schedule.place(2, schedule.chunks), program=program, microbatches=3, steps=2)
        assert report.ok, str(report)


@pytest.mark.parametrize(("recompute", "offload"), [("full", "none"), ("none", "full"), ("ops=swiglu,rms_norm,rope,attention", "none")])
def test_the_host_does_not_wait_for_what_is_made_again_or_moved(recompute: str, offload: str) -> None:
    from lf.schedule.build import build
    from lf.schedule.named import SCHEDULES
    from lf.schedule.recompute import parse_offload, parse_recompute

    ctx, model = on("cuda", "bf16"), tiny()
    layout = lf.layout(model, lf.Mesh(dp=1))
    program = build(layout, 3, SCHEDULES["gpipe"].generate, parse_recompute(recompute), parse_offload(offload))
    init, step = lf.train.make(layout, lf.optim.adamw(1e-3), program, ctx)
    state = init(lf.init(layout, ctx, 0))
    batches = parity.random_batches(model, 0, 0, 3, 300)
    for _ in range(2):  # kernels are loaded and memory is pinned
        state, _ = step(state, batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        state, metrics = step(state, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(metrics["loss"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("widths", [(64, 96), (15, 30)])
def test_grouped_products_and_twin(widths: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """Experts without a row, with one, with odd numbers; a gradient whose strides are 0."""
    from lf.kernels import grouped
    from lf.ops import grouped as twin

    counts = torch.tensor([0, 1, 130, 0, 7, 77, 0])
    inputs = [draw(k, shape=s).to(CUDA, dtype) for k, s in (("x", (215, widths[0])), ("w", (7, widths[1], widths[0])))]
    assert grouped._usable(*inputs) == (dtype == torch.bfloat16 and widths[0] == 64 and torch.cuda.get_device_capability() >= (8, 0))
    for dy in (draw("dy", shape=(215, widths[1])).to(CUDA, dtype), torch.ones((), dtype=dtype, device=CUDA).expand(215, widths[1])):
        results = []
        for f, wide in ((grouped.grouped_linear, False), (twin.grouped_linear, True)):
            leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in inputs]
            y = f(*leaves, counts)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
        for a, b in zip(*results, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [2400, 1999, 0])
def test_permutes_and_twins(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    """Of all choices, of some, of none; and twice the same bits."""
    from lf.kernels import permute
    from lf.ops import permute as twin

    order = torch.randperm(2400, generator=torch.Generator().manual_seed(0))[:rows].to(CUDA)
    x, y = (draw(k, shape=(n, 70)).to(CUDA, dtype) for k, n in (("x", 300), ("y", rows)))
    w = draw("w", shape=(300, 8)).to(CUDA, torch.promote_types(dtype, torch.float32))
    dx, dy = (draw(k, shape=(n, 70)).to(CUDA, dtype) for k, n in (("dx", 300), ("dy", rows)))
    results = []
    for module, wide in ((permute, False), (permute, False), (twin, True)):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (x, y, w)]
        there, back = module.permute(leaves[0], order, 8), module.unpermute(leaves[1], order, leaves[2])
        grads = [*torch.autograd.grad(there, leaves[0], dy.to(there.dtype)), *torch.autograd.grad(back, leaves[1:], dx.to(back.dtype))]
        results.append([there.detach(), back.detach(), *grads])
    for a, again, b in zip(*results, strict=True):
        assert torch.equal(a, again)
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * (b.abs().max().item() if b.numel() else 1.0))


def test_the_host_does_not_wait_in_permutes() -> None:
    from lf.kernels import grouped, permute

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:60].to(CUDA)
    x, w = draw("x", shape=(16, 64)).to(CUDA, torch.bfloat16), draw("w", shape=(3, 64, 64)).to(CUDA, torch.bfloat16)
    weights, counts = draw("weights", shape=(16, 4)).to(CUDA, torch.float32), torch.tensor([10, 0, 50])
    if not grouped._usable(x, w):
        pytest.skip("this card's products read the counts")
    leaves = [t.requires_grad_() for t in (x, w, weights)]

    def step() -> None:
        y = permute.unpermute(grouped.grouped_linear(permute.permute(x, order, 4), w, counts), order, weights)
        torch.autograd.grad(y.sum(), leaves)

    step()  # the first call of a kernel may wait, to load it
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

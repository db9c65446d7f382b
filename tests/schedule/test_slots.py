"""What a forward keeps, moved by the program: gradients stay the same to the bit, and the graph holds no memory that was moved away."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from helpers import context, draw
from torch.multiprocessing.reductions import StorageWeakRef

import lf
from lf import parity, tree
from lf.config import ConfigError
from lf.models.small import tiny
from lf.schedule.slots import SMALL, SlotError, Slots, entry
from lf.schedule.vjp import ends, vjp
from lf.segment import path_of

CPU = lf.devices.get("cpu")


@attrs.frozen
class Case:
    """The layers of a tiny decoder, with what the interpreter would know."""

    ctx: lf.Context
    layout: Any
    leaves: dict[str, torch.Tensor]
    batch: lf.Batch
    keep: frozenset[int]


@pytest.fixture(scope="module")
def case() -> Case:
    ctx, model = context(lf.solo()), tiny()
    layout = lf.layout(model, lf.Mesh(dp=1))
    leaves = {path: w.detach().requires_grad_() for path, w in tree.items(parity.randomised(layout, ctx, seed=3))}
    (batch,) = parity.random_batches(model, 3, 0, 1, 33)
    batch = lf.shard_batch(batch, model, ctx)
    fixed = [*leaves.values(), *batch.plan.values(), *(t for pair in batch.derived.values() for t in pair)]
    return Case(ctx, layout, leaves, batch, frozenset(t.untyped_storage()._cdata for t in fixed))


@attrs.define
class Kept:
    """What stays of a forward: the leaf of its input, what stands for its outputs, and the paths it uses."""

    leaf: torch.Tensor
    seeds: list[torch.Tensor]
    ends: tuple[Any, ...]
    paths: list[str]


def forward(case: Case, slots: Slots | None, segments: Any, tokens: int = 33) -> Kept:
    """Some segments, their input and the gradients of what comes out drawn."""
    ctx = case.ctx if slots is None else attrs.evolve(case.ctx, ops=slots.table(case.ctx.ops))
    paths: dict[str, None] = {}
    outs: list[torch.Tensor] = []
    leaf, y = entry(draw("x", shape=(tokens, 15)))
    with contextlib.nullcontext() if slots is None else slots.filing():
        for s in segments:
            named = {n: path_of(s, n) for n in s.params}
            paths.update(dict.fromkeys(named.values()))
            y, terms = s.apply({n: case.leaves[p] for n, p in named.items()}, y, case.batch, ctx)
            outs += terms.get("losses", {}).values()
        outs += [y] if isinstance(y, torch.Tensor) else []
        seeds = [draw("dy", i, shape=tuple(out.shape)) for i, out in enumerate(outs)]
        return Kept(leaf, seeds, ends(outs), [*paths])


def backward(case: Case, kept: Kept) -> list[torch.Tensor]:
    grads = vjp(kept.ends, kept.seeds, [kept.leaf, *(case.leaves[p] for p in kept.paths)])
    assert all(g.abs().max() > 0 for g in grads)
    return list(grads)


LAYERS = {"layer": "layers.0", "head": "head"}
ALL = ("attention", "rms_norm", "rope", "swiglu")


@pytest.mark.parametrize("ops", [(), ("swiglu",), ("rms_norm",), ("rope",), ("attention",), ALL], ids=lambda ops: "+".join(ops) or "none")
@pytest.mark.parametrize("moved", [False, True], ids=["stay", "offload"])
@pytest.mark.parametrize("name", LAYERS.values())
def test_gradients_are_those_without_slots_to_the_bit(case: Case, name: str, moved: bool, ops: tuple[str, ...]) -> None:
    segments = [s for s in case.layout.model.segments if s.layer == name]
    want = backward(case, forward(case, None, segments))
    slots = Slots(case.keep, ops)
    kept = forward(case, slots, segments)
    if moved:
        slots.offload(CPU, CPU.copy_streams(), chunk=1000)
        slots.fetch(CPU, CPU.copy_streams())
    slots.remat()
    got = backward(case, kept)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    assert slots.bytes() == (0, 0), "what a backward has used goes"


@pytest.mark.parametrize("ops", [(), ALL], ids=["none", "all"])
def test_after_an_offload_the_graph_holds_none_of_what_was_filed(case: Case, ops: tuple[str, ...]) -> None:
    """All that autograd was given to keep and all that ops made, the layer's own input and output included: nothing but small ones is left."""
    made: list[StorageWeakRef] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.nbytes() >= SMALL and storage._cdata not in case.keep:
            made.append(StorageWeakRef(storage))
        return x

    class Looking(Slots):
        def file(self, x: torch.Tensor) -> Any:
            return super().file(look(x))

    table = {name: lambda *args, op=op: look(op(*args)) for name, op in vars(case.ctx.ops).items()}
    slots = Looking(case.keep, ops)
    segments = [s for s in case.layout.model.segments if s.layer == "layers.0"]
    kept = forward(attrs.evolve(case, ctx=attrs.evolve(case.ctx, ops=SimpleNamespace(**table))), slots, segments)
    there = {ref.cdata for ref in made if not ref.expired()}
    assert len(there) == 4 if ops else len(there) > 10, "of ops that run again only what they take: x, qkv, the middle, gate and up"
    on_device, _ = slots.bytes()
    slots.offload(CPU, CPU.copy_streams())
    assert all(ref.expired() for ref in made)
    small, moved = slots.bytes()
    assert small + moved == on_device
    assert small < 4 * SMALL < moved
    slots.fetch(CPU, CPU.copy_streams())
    slots.remat()
    backward(case, kept)


def test_ops_that_run_again_keep_less(case: Case) -> None:
    """swiglu: its output, T·F. rope: q and k turned, T·(h+k)·d. Nothing that attention keeps beside its inputs and output; see the docstring."""
    segments = [s for s in case.layout.model.segments if s.layer == "layers.0"]
    size, tokens = 8, 33

    def filed(*ops: str) -> int:
        slots = Slots(case.keep, ops)
        kept = forward(case, slots, segments)
        on_device, _ = slots.bytes()
        del kept
        assert slots.bytes() == (0, 0), "no cycle keeps it"
        return on_device

    gc.disable()
    try:
        plain = filed()
        assert plain - filed("swiglu") == size * tokens * 10
        assert plain - filed("rope") == size * tokens * (-(6 + 3) * 4 + (6 + 3) * 4)  # what the norms before gave is kept instead
        assert plain - filed("rms_norm", "rope") == size * tokens * (2 * 15 + (6 + 3) * 4 + 2 + 6 + 3)  # r of each row, too
        assert filed(*ALL) < filed("rms_norm", "rope", "swiglu") < plain / 1.5
    finally:
        gc.enable()


def test_copies_are_made_once_a_storage_and_in_chunks() -> None:
    sizes: list[list[int]] = []

    def copy_out(sources: Any, chunk: int, streams: Any) -> Any:
        hosts, after = CPU.copy_out(sources, chunk, streams)
        sizes.extend([len(piece) for piece in pieces] for pieces in hosts)
        return hosts, after

    slots, device = Slots(), SimpleNamespace(copy_out=copy_out, copy_in=CPU.copy_in)
    a = draw("a", shape=(30, 20)).requires_grad_()
    with slots.filing():
        b = a * 2
        y = (b[3:17, ::2] * b[:14, 1::2]).sum() + (b.T @ b).sum() + b.float().square().sum()
    want = torch.autograd.grad(y, a, retain_graph=True)
    slots.offload(device, None, chunk=2000)
    slots.offload(device, None, chunk=2000)  # there is nothing left to move
    assert sorted(sizes) == [[2000, 400], [2000, 2000, 800]]
    slots.fetch(device, None)
    slots.fetch(device, None)
    assert torch.equal(torch.autograd.grad(y, a)[0], want[0])


def test_a_value_that_is_not_there_is_named(case: Case) -> None:
    segments = [s for s in case.layout.model.segments if s.layer == "layers.0"]
    slots = Slots(case.keep)
    kept = forward(case, slots, segments)
    slots.offload(CPU, CPU.copy_streams())
    with pytest.raises(SlotError, match="no FETCH of it has run"):
        backward(case, kept)
    kept = forward(case, Slots(case.keep, ("swiglu",)), segments)
    with pytest.raises(SlotError, match=r"output of swiglu .* no REMAT of it has run"):
        backward(case, kept)
    with pytest.raises(ConfigError, match=r"unknown op to run again 'swigl'; did you mean 'swiglu'.* Known: adamw_update, attention"):
        Slots(ops=("swigl",)).table(case.ctx.ops)


@pytest.mark.parametrize("when", ["kept", "moved", "recipe"])
def test_a_change_in_place_is_seen_as_autograd_sees_it(when: str) -> None:
    slots = Slots(ops=("double",))
    double = slots.table(SimpleNamespace(double=lambda x: x * 2)).double
    a = draw("a", shape=(30, 20)).requires_grad_()
    with slots.filing():
        b = double(a) if when == "recipe" else a * 2
        y = b.square().sum()
    if when == "moved":
        slots.offload(CPU, None)
    b.detach().add_(1)
    slots.fetch(CPU, None)
    slots.remat()
    with pytest.raises(SlotError, match="changed in place since: it is at version 1, not 0"):
        torch.autograd.grad(y, a)


class OwnOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        assert y.grad_fn is not None, "what a node keeps of its own is still its own"
        return dy * (y * (1 - y)).detach()


@pytest.mark.parametrize("moved", [False, True], ids=["stay", "offload"])
@pytest.mark.parametrize("again", [(), ("two", "first", "double")], ids=["none", "all"])
def test_outputs_of_every_kind(again: tuple[str, ...], moved: bool) -> None:
    """Kept by the node that made them (softmax, exp, a Function's), changed in place by the next op before they are kept, several of one op, a view
    of what the op was given, one that nobody differentiates, and an op of an op."""

    def two(x: torch.Tensor, scale: float, parts: torch.Tensor) -> list[torch.Tensor]:
        return [x.exp() * scale, (x * parts).softmax(-1), x.argmax(-1)]

    ops = SimpleNamespace(two=two, first=lambda x: x[:20], double=lambda x: x * 2)

    def f(a: torch.Tensor, ops: SimpleNamespace) -> torch.Tensor:
        b = OwnOutput.apply(a * 3)
        top = ops.first(b)
        e, s, at = ops.two(top, 0.5, parts)
        d = ops.double(e).mul_(1.5)
        return (d.square() * s).sum() + (b**2).sum() + e.gather(1, at[:, None]).sum()

    a, parts = draw("a", shape=(30, 20)).requires_grad_(), draw("parts", shape=(20, 20))
    (want,) = torch.autograd.grad(f(a, ops), a)
    slots = Slots(ops=again)
    with slots.filing():
        y = f(a, slots.table(ops))
    if moved:
        slots.offload(CPU, None)
        slots.fetch(CPU, None)
    slots.remat()
    slots.remat()
    (got,) = torch.autograd.grad(y, a)
    slots.remat()  # there is nothing left to run
    # an input of `two` that is used in it and elsewhere: autograd may add in another order
    torch.testing.assert_close(got, want, rtol=1e-14 if again else 0, atol=0)


def test_an_op_that_is_not_the_same_again_is_refused() -> None:
    calls: list[int] = []

    def fickle(x: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return x.T.contiguous().T * 2 if len(calls) % 2 else x * 2

    slots = Slots(ops=("fickle",))
    again = slots.table(SimpleNamespace(fickle=fickle)).fickle
    a = draw("a", shape=(3, 2)).requires_grad_()
    assert again(a).grad_fn is not None  # outside a forward it is the op itself
    calls.clear()
    with slots.filing():
        y = again(a).square().sum()
    with pytest.raises(SlotError, match=r"fickle, run again, gave .* must be exact"):
        slots.remat()
    del y


def test_what_is_no_plain_tensor_is_not_offloaded() -> None:
    slots = Slots()
    a = torch.randn(30, 30, dtype=torch.complex128, requires_grad=True)
    with slots.filing():
        y = (a * 2).conj() * a
    with pytest.raises(SlotError, match=r"a Tensor of torch.complex128.* only plain tensors can"):
        slots.offload(CPU, None)
    del y


def test_under_tensor_parallelism_ops_that_run_again_do_not_communicate(case: Case) -> None:
    def run(axes: Any, ops: tuple[str, ...] | None) -> list[torch.Tensor]:
        ctx, layout = context(axes), lf.layout(tiny(), axes.mesh)
        leaves = {path: w.detach().requires_grad_() for path, w in tree.items(parity.randomised(layout, ctx, seed=3))}
        batch = lf.shard_batch(case.batch, layout.model, ctx)
        tokens = 16 + axes["tp"].index
        slots = None if ops is None else Slots({t.untyped_storage()._cdata for t in leaves.values()}, ops)
        one = Case(ctx, layout, leaves, batch, frozenset())
        kept = forward(one, slots, [s for s in layout.model.segments if s.layer == "layers.0"], tokens)
        if slots is not None:
            slots.offload(CPU, None)
            slots.fetch(CPU, None)
            slots.remat()
        return backward(one, kept)

    for want, got in zip(lf.sim.spmd(lf.Mesh(tp=2), run, None), lf.sim.spmd(lf.Mesh(tp=2), run, ALL)):
        assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_segment(backend: str) -> None:
    """What it keeps is filed and moved, the graph being compiled once for all; ops that run again are refused: the compiler chooses."""
    import torch._dynamo.testing

    from lf.ops.norm import rms_norm
    from lf.ops.swiglu import swiglu

    torch._dynamo.reset()
    w, n, d = (draw(k, shape=s).requires_grad_() for k, s in (("w", (24, 16)), ("n", (16,)), ("d", (16, 12))))
    linear = torch.nn.functional.linear

    def f(x: torch.Tensor, ops: SimpleNamespace) -> torch.Tensor:
        return x + linear(ops.swiglu(linear(ops.rms_norm(x, n, 1e-6), w)), d)

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled, ops = torch.compile(f, backend=counter, fullgraph=True), SimpleNamespace(rms_norm=rms_norm, swiglu=swiglu)
    results = []
    for slots in (None, Slots({t.untyped_storage()._cdata for t in (w, n, d)}), Slots()):
        leaf, x = entry(draw("x", shape=(33, 16)))
        with contextlib.nullcontext() if slots is None else slots.filing():
            held = ends([compiled(x, ops)])
        if slots is not None:
            slots.offload(CPU, None, 1000)
            assert slots.bytes()[0] < SMALL < slots.bytes()[1]
            slots.fetch(CPU, None)
        results.append(vjp(held, [draw("dy", shape=(33, 16))], [leaf, w, n, d]))
    assert counter.frame_count == 1
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], got))
    slots = Slots(ops=("swiglu",))
    with slots.filing(), pytest.raises(Exception, match="recompute of the op 'swiglu' inside a compiled segment"):
        compiled(leaf, slots.table(ops))

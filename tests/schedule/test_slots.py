"""What a forward keeps, moved by the program: gradients stay the same to the bit, and the graph holds no memory that was moved away."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from helpers import context, draw

import lf
from lf import parity, tree
from lf.models.small import tiny
from lf.schedule.slots import Slots, entry, handle
from lf.schedule.vjp import vjp
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
    return Case(ctx, layout, leaves, batch, frozenset(t.untyped_storage().data_ptr() for t in fixed))


def forward(case: Case, slots: Slots | None, segments: Any) -> tuple[Any, ...]:
    """(leaf of the input, handles of what comes out, paths) of some segments, the input drawn."""
    x = draw("x", shape=(33, 15))
    leaf, y = entry(x)
    del x
    ctx = case.ctx if slots is None else attrs.evolve(case.ctx, ops=slots.table(case.ctx.ops))
    paths: dict[str, None] = {}

    def run(y: Any) -> list[torch.Tensor]:
        losses: list[torch.Tensor] = []
        for s in segments:
            named = {n: path_of(s, n) for n in s.params}
            paths.update(dict.fromkeys(named.values()))
            y, terms = s.apply({n: case.leaves[p] for n, p in named.items()}, y, case.batch, ctx)
            losses += terms.get("losses", {}).values()
        return [handle(out) for out in ([y] if isinstance(y, torch.Tensor) else [])] + losses

    if slots is None:
        return leaf, run(y), [*paths]
    with slots.filing():
        return leaf, run(y), [*paths]


def backward(case: Case, leaf: Any, outs: Any, paths: Any) -> list[torch.Tensor]:
    grads = [draw("dy", i, shape=tuple(y.shape)) for i, y in enumerate(outs)]
    got = vjp(outs, grads, [leaf, *(case.leaves[p] for p in paths)])
    assert all(g is not None and g.abs().max() > 0 for g in got)
    return list(got)  # type: ignore[arg-type]


LAYERS = {"layer": "layers.0", "head": "head"}
ALL = ("attention", "rms_norm", "rope", "swiglu")


@pytest.mark.parametrize("ops", [(), ("swiglu",), ("rms_norm",), ("rope",), ("attention",), ALL], ids=lambda ops: "+".join(ops) or "none")
@pytest.mark.parametrize("moved", [False, True], ids=["stay", "offload"])
@pytest.mark.parametrize("name", LAYERS.values())
def test_gradients_are_those_without_slots_to_the_bit(case: Case, name: str, moved: bool, ops: tuple[str, ...]) -> None:
    segments = [s for s in case.layout.model.segments if s.layer == name]
    want = backward(case, *forward(case, None, segments))
    slots = Slots(case.keep, ops)
    kept = forward(case, slots, segments)
    if moved:
        slots.offload(CPU, CPU.copy_streams(), chunk=1000)
        slots.fetch(CPU, CPU.copy_streams())
    slots.remat()
    got = backward(case, *kept)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    assert slots.bytes() == (0, 0), "what a backward has used goes"

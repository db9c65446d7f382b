"""AdamW against torch's in float64, the update that is gated, the learning rate."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import draw

import lf
from lf import optim, tree
from lf.kernels import adamw as kernel
from lf.ops import adamw as twin
from lf.spec import Init, Param

PARAMS = {
    "a/matrix": Param((4, 3), (None, None), Init()),
    "a/gain": Param((3,), (None,), Init()),
    "b/stack": Param((2, 2, 3), (None, None, None), Init()),
}


NOWHERE: Any = None  # an update element by element asks nobody who holds what


def numbers(*key: object) -> tree.Tree:
    return tree.build([(path, draw(*map(str, key), path, shape=p.shape)) for path, p in PARAMS.items()])


def scalar(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def update(optimizer, state, grads, step: int, lr: float = 0.1, scale: float = 1.0, ok: bool = True):
    ops = lf.devices.op_table(lf.devices.get("cpu"))
    return optimizer.update(state, grads, PARAMS, scalar(lr), scalar(scale), torch.tensor(step), torch.tensor(ok), SimpleNamespace(ops=ops), NOWHERE)


def test_adamw_is_torch_adamw() -> None:
    """Matrices decay, gains do not; gradients arrive times the clip factor; the rate changes from step to step."""
    ours = optim.adamw(0.1, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.3)
    state = ours.init(numbers("w"), torch.device("cpu"), NOWHERE)
    theirs = {path: w.clone().requires_grad_() for path, w in tree.items(numbers("w"))}
    groups = [{"params": [theirs["a/matrix"], theirs["b/stack"]], "weight_decay": 0.3}, {"params": [theirs["a/gain"]], "weight_decay": 0.0}]
    torch_adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95), eps=1e-5)
    for step in range(5):
        grads, lr, scale = numbers("g", step), 0.1 / (step + 1), 0.5 + step / 10
        for group in torch_adamw.param_groups:
            group["lr"] = lr
        for path, w in theirs.items():
            w.grad = tree.get(grads, path) * scale
        torch_adamw.step()
        state = update(ours, state, grads, step, lr, scale)
        for path, w in tree.items(state["master"]):
            torch.testing.assert_close(w, theirs[path].detach(), rtol=1e-12, atol=1e-12, msg=f"step {step} {path}")


def test_what_decays_can_be_chosen() -> None:
    all_decay = optim.adamw(0.1, weight_decay=0.5, decays=lambda param: True)
    state = update(all_decay, all_decay.init(numbers("w"), torch.device("cpu"), NOWHERE), tree.map(torch.zeros_like, numbers("g")), 0)
    for path, w in tree.items(numbers("w")):
        torch.testing.assert_close(tree.get(state["master"], path), w * (1 - 0.1 * 0.5))


def four(step: int) -> list[list[torch.Tensor]]:
    """Weights, gradients and both moments of three tensors, float32."""
    kinds = [[draw(kind, i, shape=shape, dtype=torch.float32) for i, shape in enumerate([(5, 7), (3,), ()])] for kind in ("w", f"g{step}", "m", "v")]
    return [*kinds[:3], [v.square() for v in kinds[3]]]


def test_kernel_and_twin_make_the_same_update() -> None:
    a, b = four(0), four(0)
    for t in range(1, 5):
        for (ws, _, ms, vs), f in ((a, twin.adamw_update), (b, kernel.adamw_update)):
            f(ws, four(t)[1], ms, vs, torch.tensor(t), torch.tensor(0.1 / t), torch.tensor(0.3), torch.tensor(True), (0.8, 0.95), 1e-5, 0.3)
        for kind, x, y in zip("wgmv", a, b):
            for i, j in zip(x, y):
                torch.testing.assert_close(i, j, rtol=2e-6, atol=1e-7, msg=lambda m, kind=kind, t=t: f"{kind} after {t}: {m}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gated_kernel_leaves_every_bit(value: float) -> None:
    ws, _, ms, vs = four(0)
    bad = [torch.full_like(w, value) for w in ws]
    x = torch.tensor(value)
    kernel.adamw_update(ws, bad, ms, vs, torch.tensor(0), x, x, torch.tensor(False), (0.8, 0.95), 1e-5, 0.3)
    for kind, want in zip((ws, ms, vs), (four(0)[0], four(0)[2], four(0)[3])):
        assert all(torch.equal(i, j) for i, j in zip(kind, want))


@pytest.mark.parametrize("make", [optim.adamw, optim.sgd])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gated_update_leaves_every_bit(make, value: float) -> None:
    optimizer = make(0.1)
    state = update(optimizer, optimizer.init(numbers("w"), torch.device("cpu"), NOWHERE), numbers("g", 0), 0)
    before = tree.map(torch.clone, state)
    bad = tree.map(lambda g: torch.full_like(g, value), numbers("g"))
    state = update(optimizer, state, bad, 1, lr=value, scale=value, ok=False)
    for path, x in tree.items(before):
        assert torch.equal(tree.get(state, path), x), path
    after, straight = update(optimizer, state, numbers("g", 2), 2), optimizer.init(numbers("w"), torch.device("cpu"), NOWHERE)
    straight = update(optimizer, update(optimizer, straight, numbers("g", 0), 0), numbers("g", 2), 1)
    for path, x in tree.items(straight):  # and a skipped step does not age the bias correction
        assert torch.equal(tree.get(after, path), x), path


def test_sgd() -> None:
    sgd = optim.sgd(0.1)
    state = update(sgd, sgd.init(numbers("w"), torch.device("cpu"), NOWHERE), numbers("g"), 0, lr=0.1, scale=0.5)
    tree.map(lambda a, w, g: torch.testing.assert_close(a, w - 0.05 * g), state["master"], numbers("w"), numbers("g"))


def test_init_keeps_its_own_moments() -> None:
    master = numbers("w")
    state = optim.adamw(0.1).init(master, torch.device("cpu"), NOWHERE)
    assert {id(x) for x in tree.leaves(state["m"])}.isdisjoint(id(x) for x in tree.leaves(state["v"]))
    assert all(not x.any() for x in tree.leaves(state["m"]) + tree.leaves(state["v"]))


def test_warmup_then_half_a_cosine() -> None:
    rate = optim.warmup_cosine(2.0, warmup=4, steps=20, final=0.1)
    got = [rate(torch.tensor(s)).item() for s in range(25)]
    assert got[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert got[4] == pytest.approx(2.0)
    assert got[19] == pytest.approx(0.2)
    assert got[20:] == pytest.approx([0.2] * 5)  # and stays there
    for s in range(4, 20):
        assert got[s] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (s - 4) / 15)) / 2), rel=1e-6)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 5), (5, 5), (1, 1), (0, 0)])
def test_warmup_at_its_edges_is_finite_and_within_reach(warmup: int, steps: int) -> None:
    rate = optim.warmup_cosine(1.0, warmup, steps)
    assert all(0 < rate(torch.tensor(s)).item() <= 1.0 for s in range(8))


@pytest.mark.parametrize(("warmup", "steps"), [(6, 5), (-1, 5)])
def test_a_warmup_longer_than_the_run_is_refused(warmup: int, steps: int) -> None:
    with pytest.raises(ValueError, match=f"warmup={warmup} must lie between 0 and steps={steps}"):
        optim.warmup_cosine(1.0, warmup, steps)


def test_constant() -> None:
    rate = optim.constant(0.25)
    assert [rate(torch.tensor(s)).item() for s in (0, 9)] == [0.25, 0.25]

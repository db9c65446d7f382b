"""RMS norm, rotary positions and the gate against what they say they are, in float64, and in at least float32 below it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import draw

from lf.context import wide
from lf.kernels import fused_norm
from lf.kernels import norm as fast_norm
from lf.kernels import rope as fast_rope
from lf.kernels import swiglu as fast_swiglu
from lf.ops.norm import rms_norm
from lf.ops.rope import Rope, rope, rope_table
from lf.ops.swiglu import swiglu


def test_rms_norm() -> None:
    x, w = draw("x", shape=(3, 2, 6)).requires_grad_(), draw("w", shape=(6,)).requires_grad_()
    got, want = rms_norm(x, w, 1e-3), F.rms_norm(x, (6,), w, 1e-3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got.pow(3).sum(), (x, w)), torch.autograd.grad(want.pow(3).sum(), (x, w))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rms_norm_widens() -> None:
    x = torch.full((1, 4), 200.0, dtype=torch.float16)  # its square is beyond float16
    assert torch.equal(rms_norm(x, torch.ones(4, dtype=torch.float16), 1e-6), torch.ones(1, 4, dtype=torch.float16))
    assert rms_norm(x.double(), torch.ones(4).double(), 0.0).dtype == torch.float64


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_wide(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert wide(dtype) == expected


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_rope_tables_are_worked_out_wide(kind: str) -> None:
    """Of position 4001, float32 and float64 give the same bfloat16; an angle in bfloat16 would be off by whole turns."""
    r, at, n = Rope(1e4, kind, 4.0 if kind != "default" else 1.0, original_len=64), torch.tensor([4001]), torch.tensor([5000])
    for low, exact in zip(rope_table(at, n, 16, r, torch.bfloat16), rope_table(at, n, 16, r, torch.float64)):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.double(), exact, atol=5e-3, rtol=0)


def test_rope_turns_each_pair_by_its_angle() -> None:
    positions, theta = torch.tensor([0, 5, 2]), 100.0
    x = draw("x", shape=(3, 2, 6))
    got = rope(x, *rope_table(positions, positions + 1, 6, Rope(theta), x.dtype))
    for t, position in enumerate(positions.tolist()):
        for i in range(3):
            turned = torch.view_as_complex(torch.stack([x[t, :, i], x[t, :, i + 3]], -1).contiguous())
            turned = turned * complex(math.cos(position * theta ** (-2 * i / 6)), math.sin(position * theta ** (-2 * i / 6)))
            torch.testing.assert_close(got[t, :, [i, i + 3]], torch.view_as_real(turned), rtol=1e-12, atol=1e-12)
    assert torch.equal(got[0], x[0])


def test_a_score_depends_on_the_distance_alone() -> None:
    q, k = draw("q", shape=(1, 1, 8)), draw("k", shape=(1, 1, 8))

    def score(a: int, b: int) -> float:
        at = [rope_table(torch.tensor([p]), torch.tensor([p + 1]), 8, Rope(1e4), q.dtype) for p in (a, b)]
        return (rope(q, *at[0]) * rope(k, *at[1])).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-10)


def test_swiglu() -> None:
    gate, up = draw("gate", shape=(3, 4)), draw("up", shape=(3, 4))
    torch.testing.assert_close(swiglu(torch.cat([gate, up], 1)), gate / (1 + (-gate).exp()) * up)


def both(kernel, twin, *inputs: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and gradients of the inputs that have one, of a kernel and of its twin."""
    results = []
    for f in (kernel, twin):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = f(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, draw("dy", shape=tuple(y.shape), dtype=y.dtype))])
    return list(zip(*results))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(7, 8), (5, 3, 8), (0, 8)])
def test_kernels_and_twins_agree(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x, w = draw("x", shape=shape, dtype=dtype), draw("w", shape=shape[-1:], dtype=dtype)
    pairs = both(lambda x, w: fast_norm.rms_norm(x, w, 1e-5), lambda x, w: rms_norm(x, w, 1e-5), x, w)
    pairs += both(lambda x, w: fused_norm.rms_norm(x, w, 1e-5), lambda x, w: rms_norm(x, w, 1e-5), x, w)
    pairs += both(fast_swiglu.swiglu, swiglu, x)
    if len(shape) == 3:
        for dim in (8, 4):  # all of a head turns, or its first half
            table = rope_table(torch.arange(shape[0]), torch.full(shape[:1], 9), 8, Rope(dim=dim), dtype)
            pairs += both(lambda x, t=table: fast_rope.rope(x, *t), lambda x, t=table: rope(x, *t), x)
    for got, want in pairs:
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_kernels_take_slices_of_a_larger_tensor() -> None:
    """As q and k are, of the fused product."""
    whole, table = draw("x", shape=(5, 12)), rope_table(torch.arange(5), torch.full((5,), 5), 4, Rope(), torch.float64)
    x = whole.view(5, 3, 4)[:, 1:]
    for got, want in both(lambda w: fast_rope.rope(w.view(5, 3, 4)[:, 1:], *table), lambda w: rope(w.view(5, 3, 4)[:, 1:], *table), whole):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not x.is_contiguous()

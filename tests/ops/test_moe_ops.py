"""Ops of mixtures: fast twins against readable ones, values and gradients; what is adjoint is."""

from __future__ import annotations

import pytest
import torch
from helpers import SEED
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lf.kernels import grouped as fast_grouped
from lf.kernels import permute as fast
from lf.ops import grouped, permute


def leaf(*shape: int, g: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def choices(t: int, k: int, n: int, g: torch.Generator) -> Tensor:
    """n of t·k choices, in any order."""
    return torch.randperm(t * k, generator=g)[:n]


@given(st.integers(0, 5), st.integers(1, 3), st.integers(0, 15), st.integers(0, 4), st.integers(0, 99))
def test_fast_and_readable_are_one(t: int, k: int, n: int, width: int, seed: int) -> None:
    """Also of no token, no row and tokens without one."""
    g = torch.Generator().manual_seed(seed)
    order = choices(t, k, min(n, t * k), g)
    x, w = leaf(t, width, g=g), leaf(t, k, g=g)
    y = leaf(len(order), width, g=g)
    for make in (lambda m: m.permute(x, order, k), lambda m: m.unpermute(y, order, w)):
        a, b = make(fast), make(permute)
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        seeded = torch.randn(a.shape, generator=g, dtype=a.dtype)
        got, want = (torch.autograd.grad(z, [x, y, w], seeded, allow_unused=True) for z in (a, b))
        for one, other in zip(got, want):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 18), st.integers(0, 99))
def test_there_and_back_are_adjoint(t: int, k: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    order = choices(t, k, min(n, t * k), g)
    x, y = leaf(t, 3, g=g), leaf(len(order), 3, g=g)
    ones = torch.ones(t, k, dtype=torch.float64)
    there, back = (fast.permute(x, order, k) * y).sum(), (x * fast.unpermute(y, order, ones)).sum()
    assert torch.allclose(there, back, rtol=1e-10, atol=1e-12)
    if len(order) == t * k:  # nothing lost: the mean of a token's own rows is the token
        assert torch.allclose(fast.unpermute(fast.permute(x, order, k), order, ones / k), x)


def test_sums_of_bf16_are_made_in_float32() -> None:
    g = torch.Generator().manual_seed(SEED)
    y, w = leaf(80, 16, g=g, dtype=torch.bfloat16), torch.rand(10, 8, generator=g)
    order = choices(10, 8, 80, g)
    exact = permute.unpermute(y.double(), order, w.double())
    for module in (fast, permute):
        out = module.unpermute(y, order, w)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, exact.to(torch.bfloat16)) or (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


COUNTS = {"some": [3, 0, 4, 1], "one has all": [0, 8, 0, 0], "one expert": [5], "no row": [0, 0], "no expert": []}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_products(counts: list[int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(SEED)
    n, e = sum(counts), len(counts)
    x, w = leaf(n, 8, g=g, dtype=dtype), leaf(e, 16, 8, g=g, dtype=dtype)
    y = fast_grouped.grouped_linear(x, w, torch.tensor(counts, dtype=torch.int64))
    assert (y.shape, y.dtype) == ((n, 16), dtype)
    want = [x[sum(counts[:i]) : sum(counts[: i + 1])].double() @ w[i].double().T for i in range(e)]
    whole = torch.cat(want) if want else y.new_zeros(0, 16)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(y.double(), whole.double(), rtol=tolerance, atol=tolerance)
    readable = grouped.grouped_linear(x, w, torch.tensor(counts, dtype=torch.int64))
    assert torch.allclose(y.double(), readable.double(), rtol=tolerance, atol=tolerance)
    if not e:
        return  # nothing is used that could have a gradient
    # a gradient with strides of 0, as a sum gives
    got, want_of = torch.autograd.grad(y.sum(), [x, w]), torch.autograd.grad(whole.sum(), [x, w], allow_unused=True)
    for a, b in zip(got, want_of):
        assert torch.allclose(a.double(), torch.zeros_like(a).double() if b is None else b.double(), rtol=tolerance, atol=tolerance)


def test_float64_goes_through_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_grouped, "_product", None)
    g = torch.Generator().manual_seed(SEED)
    x, w, counts = leaf(3, 8, g=g, dtype=torch.float32), leaf(2, 4, 8, g=g, dtype=torch.float32), torch.tensor([1, 2])
    assert torch.equal(fast_grouped.grouped_linear(x, w, counts), grouped.grouped_linear(x, w, counts))

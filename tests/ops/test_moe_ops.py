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


def test_gradients_of_permutes_are_those_of_differences() -> None:
    """Of a token with all its rows, one with some and one with none."""
    g = torch.Generator().manual_seed(SEED)
    order = torch.tensor([3, 0, 2, 5, 4])
    x, w, y = leaf(4, 3, g=g), leaf(4, 2, g=g), leaf(5, 3, g=g)
    assert torch.autograd.gradcheck(lambda x: fast.permute(x, order, 2), x)
    assert torch.autograd.gradcheck(lambda y, w: fast.unpermute(y, order, w), (y, w))


def test_gradients_of_bf16() -> None:
    """Each is rounded once, of numbers that were worked out in float32."""
    g = torch.Generator().manual_seed(SEED)
    x, y, w = leaf(10, 16, g=g, dtype=torch.bfloat16), leaf(70, 16, g=g, dtype=torch.bfloat16), torch.rand(10, 8, generator=g, requires_grad=True)
    order = choices(10, 8, 70, g)
    rows, tokens = torch.randn(70, 16, generator=g).bfloat16(), torch.randn(10, 16, generator=g).bfloat16()
    got = [*torch.autograd.grad(fast.permute(x, order, 8), x, rows), *torch.autograd.grad(fast.unpermute(y, order, w), [y, w], tokens)]
    exact = [t.detach().double().requires_grad_() for t in (x, y, w)]
    want = [
        *torch.autograd.grad(permute.permute(exact[0], order, 8), exact[0], rows.double()),
        *torch.autograd.grad(permute.unpermute(exact[1], order, exact[2]), exact[1:], tokens.double()),
    ]
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for a, b, bits in zip(got, want, (8, 8, 20)):
        assert ((a.double() - b).abs() <= 2**-bits * b.abs() + 2**-18 * b.abs().max()).all()


COUNTS = {"some": [3, 0, 4, 1], "one has all": [0, 8, 0, 0], "one expert": [5], "no row": [0, 0], "no expert": []}
WIDTHS = {"16 bytes": (8, 16), "in odd": (15, 16), "out odd": (8, 6), "nothing in": (0, 8), "nothing out": (8, 0)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_products(counts: list[int], widths: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(SEED)
    n, e, (into, out) = sum(counts), len(counts), widths
    x, w = leaf(n, into, g=g, dtype=dtype), leaf(e, out, into, g=g, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    whole = [wide[0][sum(counts[:i]) : sum(counts[: i + 1])] @ wide[1][i].T for i in range(e)]
    want = torch.cat(whole) if whole else wide[0].new_zeros(0, out)
    for module in (fast_grouped, grouped):
        y = module.grouped_linear(x, w, torch.tensor(counts, dtype=torch.int64))
        assert (y.shape, y.dtype) == ((n, out), dtype)
        assert torch.allclose(y.double(), want, rtol=tolerance, atol=tolerance)
        if not e:
            continue  # nothing is used that could have a gradient
        # a gradient with strides of 0, as a sum gives, and one without
        for dy in (torch.ones((), dtype=dtype).expand_as(y), torch.randn(y.shape, generator=g, dtype=torch.float64).to(dtype)):
            got = torch.autograd.grad(y, [x, w], dy, retain_graph=True)
            exact = torch.autograd.grad(want, wide, dy.double(), retain_graph=True, materialize_grads=True)
            for a, b in zip(got, exact):
                assert a.dtype == dtype
                assert torch.allclose(a.double(), b, rtol=tolerance, atol=2 * tolerance)


def test_which_product_is_taken() -> None:
    """torch's where it is known to take it: what it would refuse goes through the loop."""
    if fast_grouped._product is None:
        pytest.skip("this torch has no grouped product")
    x, w = torch.zeros(3, 8), torch.zeros(2, 16, 8)
    assert fast_grouped._usable(x, w)
    assert fast_grouped._usable(x.bfloat16(), w.bfloat16())
    assert not fast_grouped._usable(x.double(), w.double())
    assert not fast_grouped._usable(x[:0], w)
    assert not fast_grouped._usable(x[:, :6].contiguous(), w[:, :, :6].contiguous())
    assert not fast_grouped._usable(x.repeat(1, 2)[:, ::2], w)
    assert not fast_grouped._usable(torch.zeros(25)[1:].view(3, 8), w), "memory that starts between 16 bytes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_torch_without_a_grouped_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(SEED)
    x, w, counts = leaf(3, 8, g=g, dtype=dtype), leaf(2, 16, 8, g=g, dtype=dtype), torch.tensor([1, 2])
    found = fast_grouped.grouped_linear(x, w, counts)
    monkeypatch.setattr(fast_grouped, "_product", None)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(fast_grouped.grouped_linear(x, w, counts), found, rtol=tolerance, atol=tolerance)

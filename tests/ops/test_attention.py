"""Fast attention against its readable twin, and the twin against the definition, one document and one head at a time."""

from __future__ import annotations

import pytest
import torch
from helpers import draw

from lf.kernels import sdpa
from lf.ops import attention as twin

STARTS = {"one document": [0], "packed": [0, 1, 4, 9], "single tokens": list(range(11))}


def cu_seqlens(starts: list[int], tokens: int) -> torch.Tensor:
    return torch.tensor([*starts, *[tokens] * (tokens + 1 - len(starts))], dtype=torch.int32)


def inputs(heads: int, kv: int, tokens: int = 11, dim: int = 4) -> list[torch.Tensor]:
    return [draw(name, shape=(tokens, n, dim)).requires_grad_() for name, n in (("q", heads), ("k", kv), ("v", kv))]


def by_hand(q, k, v, starts: list[int], window: int = 99) -> torch.Tensor:
    out = torch.zeros_like(q)
    for lo, hi in zip(starts, [*starts[1:], len(q)]):
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            for t in range(lo, hi):
                seen = slice(max(lo, t + 1 - window), t + 1)
                out[t, h] = ((k[seen, kv] @ q[t, h]) / q.shape[2] ** 0.5).softmax(0) @ v[seen, kv]
    return out


@pytest.mark.parametrize("attention", [twin.attention, sdpa.attention], ids=["twin", "sdpa"])
@pytest.mark.parametrize("documents", STARTS)
@pytest.mark.parametrize(("heads", "kv", "window"), [(4, 4, None), (4, 2, None), (3, 1, None), (4, 2, 1), (3, 1, 3), (2, 2, 20)])
def test_against_the_definition(attention, documents: str, heads: int, kv: int, window: int | None) -> None:
    q, k, v = inputs(heads, kv)
    dy = draw("dy", shape=(11, heads, 4))
    got, want = attention(q, k, v, cu_seqlens(STARTS[documents], 11), window), by_hand(q, k, v, STARTS[documents], window or 99)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), dy), torch.autograd.grad(want, (q, k, v), dy)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", [twin.attention, sdpa.attention], ids=["twin", "sdpa"])
def test_a_rank_without_heads(attention) -> None:
    q, k, v = inputs(0, 0)
    y = attention(q, k, v, cu_seqlens([0, 3], 11))
    assert y.shape == (11, 0, 4)
    (dq,) = torch.autograd.grad(y.sum(), q)  # its backward runs all the same: the collectives before it must
    assert dq.shape == q.shape


@pytest.mark.parametrize("starts", [[0], [0, 10, 300, 650], [0, 256, 512], [0, 255, 257], [0, 350], list(range(0, 700, 7))])
@pytest.mark.parametrize("window", [None, 1, 9, 300, 699])
def test_kernel_and_twin_agree_on_long_rows(starts: list[int], window: int | None) -> None:
    """Longer than what the kernel takes at once."""
    (q, k, v), cu = inputs(2, 1, tokens=700), cu_seqlens(starts, 700)
    dy = draw("dy", shape=(700, 2, 4))
    a, b = (f(q, k, v, cu, window) for f in (twin.attention, sdpa.attention))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    for x, y in zip(torch.autograd.grad(a, (q, k, v), dy), torch.autograd.grad(b, (q, k, v), dy)):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_twin_agree_in_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in inputs(4, 2))
    a, b = (f(q, k, v, cu_seqlens([0, 5], 11)) for f in (twin.attention, sdpa.attention))
    assert a.dtype == b.dtype == dtype
    torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)

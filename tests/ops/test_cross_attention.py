"""Attention from document to document against the definition, one document, head and query at a time."""

from __future__ import annotations

import pytest
import torch
from helpers import draw

from lf.models.trio_data import slots
from lf.ops.cross_attention import cross_attention

LENGTHS = {"some": ([3, 1, 4], [2, 5, 1]), "empty ones": ([0, 2, 3, 0], [4, 0, 2, 0]), "none": ([], []), "no key at all": ([2, 1], [0, 0])}


def by_hand(q, k, v, lengths: list[int], lengths_k: list[int]) -> torch.Tensor:
    out, a, c = torch.zeros_like(q), 0, 0
    for n, m in zip(lengths, lengths_k):
        for t in range(a, a + n):
            for h in range(q.shape[1]):
                kv = h * k.shape[1] // q.shape[1]
                if m:
                    out[t, h] = ((k[c : c + m, kv] @ q[t, h]) / q.shape[2] ** 0.5).softmax(0) @ v[c : c + m, kv]
        a, c = a + n, c + m
    return out


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("padding", [0, 2])
def test_against_the_definition(lengths: str, heads: int, kv: int, padding: int) -> None:
    n, m = LENGTHS[lengths]
    shapes = {"q": (sum(n) + padding, heads, 4), "k": (sum(m) + padding, kv, 4), "v": (sum(m) + padding, kv, 4)}
    q, k, v = (draw(name, lengths, shape=shape).requires_grad_() for name, shape in shapes.items())
    dy = draw("dy", shape=shapes["q"])
    got, want = cross_attention(q, k, v, slots(n), slots(m)), by_hand(q, k, v, n, m)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    asked = torch.autograd.grad(want, (q, k, v), dy, allow_unused=True) if want.requires_grad else (None, None, None)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), dy), asked):  # none of them unused: collectives before it must run backward
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-12, atol=1e-12)


def test_a_rank_without_heads() -> None:
    q, k, v = (draw(name, shape=(5, 0, 4)).requires_grad_() for name in "qkv")
    y = cross_attention(q, k, v, slots([2, 3]), slots([4, 1]))
    assert y.shape == (5, 0, 4)
    assert all(g.shape == (5, 0, 4) for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_bfloat16_is_widened_inside() -> None:
    q, k, v = (draw(name, shape=(40, 2, 8), dtype=torch.bfloat16) for name in "qkv")
    rows = slots([17, 23])
    y = cross_attention(q, k, v, rows, rows)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, cross_attention(q.float(), k.float(), v.float(), rows, rows).bfloat16(), rtol=0, atol=0)

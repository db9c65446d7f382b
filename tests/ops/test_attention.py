"""Fast attention against its readable twin, and the twin against the definition, one document and one head at a time."""

from __future__ import annotations

import pytest
import torch
from helpers import draw

from lf.kernels import sdpa, varlen
from lf.ops import attention as twin

STARTS = {"one document": [0], "packed": [0, 1, 4, 9], "single tokens": list(range(11))}


def cu_seqlens(starts: list[int], tokens: int) -> torch.Tensor:
    return torch.tensor([*starts, *[tokens] * (tokens + 1 - len(starts))], dtype=torch.int32)


def inputs(heads: int, kv: int, tokens: int = 11, dim: int = 4, value: int = 4) -> list[torch.Tensor]:
    return [draw(name, shape=(tokens, n, d)).requires_grad_() for name, n, d in (("q", heads, dim), ("k", kv, dim), ("v", kv, value))]


def by_hand(q, k, v, starts: list[int], window: int = 99, scale: float | None = None, sinks=None) -> torch.Tensor:
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    for lo, hi in zip(starts, [*starts[1:], len(q)]):
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            for t in range(lo, hi):
                seen = slice(max(lo, t + 1 - window), t + 1)
                scores = (k[seen, kv] @ q[t, h]) * (q.shape[2] ** -0.5 if scale is None else scale)
                weights = scores.exp() / (scores.exp().sum() + (0 if sinks is None else sinks[h].exp()))
                out[t, h] = weights @ v[seen, kv]
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
@pytest.mark.parametrize("documents", STARTS)
@pytest.mark.parametrize(
    ("heads", "kv", "window", "value", "scale", "sinks"),
    [(4, 2, None, 3, None, False), (3, 1, 3, 7, 0.3, False), (4, 4, None, 4, None, True), (4, 2, 3, 4, 0.7, True), (3, 3, 1, 6, 0.3, True)],
)
def test_other_values_scales_and_sinks(
    attention, documents: str, heads: int, kv: int, window: int | None, value: int, scale: float | None, sinks: bool
) -> None:
    leaves = inputs(heads, kv, value=value) + ([draw("sinks", shape=(heads,)).requires_grad_()] if sinks else [])
    more, starts, dy = (scale, *leaves[3:]), STARTS[documents], draw("dy", shape=(11, heads, value))
    got, want = attention(*leaves[:3], cu_seqlens(starts, 11), window, *more), by_hand(*leaves[:3], starts, window or 99, *more)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", [twin.attention, sdpa.attention, varlen.attention], ids=["twin", "sdpa", "varlen"])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_rank_without_heads(attention, sinks: bool) -> None:
    leaves = inputs(0, 0, value=3) + ([draw("sinks", shape=(0,)).requires_grad_()] if sinks else [])
    y = attention(*leaves[:3], cu_seqlens([0, 3], 11), None, 0.5, *leaves[3:])
    assert y.shape == (11, 0, 3)
    for leaf, d in zip(leaves, torch.autograd.grad(y.sum(), leaves)):  # backwards run all the same: the collectives before them must
        assert d.shape == leaf.shape


@pytest.mark.parametrize("starts", [[0], [0, 10, 300, 650], [0, 256, 512], [0, 255, 257], [0, 350], list(range(0, 700, 7))])
@pytest.mark.parametrize("window", [None, 1, 9, 300, 699])
def test_kernel_and_twin_agree_on_long_rows(starts: list[int], window: int | None) -> None:
    """Longer than what the kernel takes at once."""
    leaves, cu = inputs(2, 1, tokens=700, value=3), cu_seqlens(starts, 700)
    dy = draw("dy", shape=(700, 2, 3))
    for sinks in ([], [draw("sinks", shape=(2,)).requires_grad_()]):
        a, b = (f(*leaves, cu, window, None, *sinks) for f in (twin.attention, sdpa.attention))
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        for x, y in zip(*(torch.autograd.grad(o, leaves + sinks, dy) for o in (a, b)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_a_sink_beyond_all_scores_takes_all_and_one_far_below_takes_nothing() -> None:
    """In bfloat16, where exp(sink) would be infinite."""
    q, k, v = (x.detach().bfloat16() for x in inputs(2, 1))
    cu = cu_seqlens([0, 5], 11)
    for f in (twin.attention, sdpa.attention):
        y = f(q, k, v, cu, None, None, torch.tensor([300.0, -300.0], dtype=torch.bfloat16))
        assert y[:, 0].abs().max() == 0
        torch.testing.assert_close(y[:, 1], f(q, k, v, cu)[:, 1], rtol=0, atol=0)


@pytest.mark.parametrize("sinks", [False, True])
def test_one_op_where_it_is_compiled(sinks: bool) -> None:
    leaves = inputs(4, 2, value=3) + ([draw("sinks", shape=(4,)).requires_grad_()] if sinks else [])
    cu, dy = cu_seqlens(STARTS["packed"], 11), draw("dy", shape=(11, 4, 3))
    got, want = (f(*leaves[:3], cu, 3, 0.4, *leaves[3:]) for f in (lambda *a: sdpa._Opaque.apply(*a[:6], a[6] if sinks else None), twin.attention))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, leaves, dy) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    shapes = torch.ops.lf.packed_attention(*(x.detach().to("meta") for x in (*leaves[:3], cu)), 3, 0.4, None)
    assert shapes.shape == want.shape


@pytest.mark.parametrize("starts", [[0], [0, 1, 4, 9], [0, 5]])
def test_what_flash_attention_has_for_each_query_is_found_in_either_of_its_layouts(starts: list[int]) -> None:
    """Of each document by itself, as older releases have it, or of the row."""
    z, cu = draw("z", shape=(3, 11)), cu_seqlens(starts, 11)
    documents = torch.full((len(cu) - 1, 3, 11), torch.nan, dtype=z.dtype)
    for i, (lo, hi) in enumerate(zip(starts, [*starts[1:], 11])):
        documents[i, :, : hi - lo] = z[:, lo:hi]
    for layout in (z, documents):
        torch.testing.assert_close(varlen._by_token(layout, cu, 11), z, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_twin_agree_in_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in inputs(4, 2))
    a, b = (f(q, k, v, cu_seqlens([0, 5], 11)) for f in (twin.attention, sdpa.attention))
    assert a.dtype == b.dtype == dtype
    torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)

"""One matrix product whose weight's gradient goes where the weight says."""

from __future__ import annotations

import pytest
import torch
from helpers import draw

from lf.parallel.product import W, probe_of, product, weight_gradient


def test_a_wide_sum_keeps_what_a_narrow_one_loses() -> None:
    """Microbatches of bfloat16 added one by one: 1 + 2⁻⁹ is 1 in bfloat16, so 256 of them would add nothing."""
    x, w = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    acc, later = torch.ones(1, 1), torch.ones(1, 1)
    dy = torch.full((1, 1), 2.0**-9, dtype=torch.bfloat16)
    for _ in range(256):
        assert torch.autograd.grad(product(x, W(w, acc)), w, dy, allow_unused=True) == (None,)
        weight_gradient(later, x, dy)
    assert acc.item() == later.item() == 1.5
    assert (torch.ones_like(dy) + dy).item() == 1


def test_the_sum_may_change_between_forward_and_backward() -> None:
    """Other microbatches come between the two; nothing that was kept for the backward may depend on what acc was."""
    x, w, acc = draw("x", shape=(4, 3)).requires_grad_(), draw("w", shape=(2, 3)).requires_grad_(), torch.zeros(2, 3, dtype=torch.float64)
    ys = [product(x, W(w, acc)) for _ in range(2)]
    for y in ys:
        torch.autograd.grad(y.sum(), [x, w], allow_unused=True)
    torch.testing.assert_close(acc, 2 * torch.ones(2, 4, dtype=torch.float64) @ x.detach())


def test_a_probe_takes_no_memory() -> None:
    for leaf, shape in zip(probe_of(((1 << 20, 1 << 10), torch.bfloat16, (7, 5), torch.float32), torch.device("cpu")), [(1 << 20, 1 << 10), (7, 5)]):
        assert leaf.shape == shape
        assert leaf.is_leaf
        assert leaf.requires_grad
        assert leaf.untyped_storage().nbytes() <= 4


def test_what_a_product_has_seen_is_what_its_probe_must_be() -> None:
    seen: list = []
    x, w = torch.empty(6, 3, device="meta", dtype=torch.bfloat16), torch.empty(4, 3, device="meta", dtype=torch.bfloat16)
    product(x, W(w, seen=seen))
    assert seen == [((6, 3), torch.bfloat16, (6, 4), torch.bfloat16)]
    probe = probe_of(seen[0], torch.device("cpu"))
    real = torch.zeros(4, 3, dtype=torch.bfloat16, requires_grad=True)
    y = product(torch.ones(6, 3, dtype=torch.bfloat16), W(real, probe=probe))
    rows, dy = torch.autograd.grad(y, probe, torch.full_like(y, 2.0))
    assert torch.equal(rows, torch.ones_like(rows))
    assert torch.equal(dy, torch.full_like(y, 2.0))


def test_the_wrong_shape_of_a_probe_is_an_error() -> None:
    """Autograd compares each gradient with its leaf, so a probe that was made for other rows cannot pass unseen."""
    x, w = torch.ones(6, 3), torch.ones(4, 3, requires_grad=True)
    probe = probe_of(((5, 3), torch.float32, (6, 4), torch.float32), torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"got \[6, 3\] but expected shape compatible with \[5, 3\]"):
        torch.autograd.grad(product(x, W(w, probe=probe)).sum(), probe)


def test_one_place_for_a_gradient() -> None:
    w, seen = torch.ones(4, 3, requires_grad=True), ((6, 3), torch.float32, (6, 4), torch.float32)
    with pytest.raises(ValueError, match=r"a weight \(4, 3\) has acc and probe: .* give acc for B, or probe for I and W"):
        product(torch.ones(6, 3), W(w, torch.zeros(4, 3), probe_of(seen, w.device)))

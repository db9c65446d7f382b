"""Column and row linear on a group of ranks against one matrix product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import draw

from lf.mesh import Mesh, shares
from lf.parallel.linear import column_linear, row_linear
from lf.parallel.redistribute import S
from lf.sim import spmd

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "columns"), [(8, 12), (7, 10), (3, 3), (2, 5)])
def test_column_then_row_is_two_products(ranks: int, tokens: int, columns: int) -> None:
    x, w1, w2 = draw("x", shape=(tokens, 5)), draw("w1", shape=(columns, 5)), draw("w2", shape=(4, columns))
    dy = draw("dy", shape=(tokens, 4))
    leaves = [t.clone().requires_grad_() for t in (x, w1, w2)]
    wanted = F.linear(F.silu(F.linear(leaves[0], leaves[1])), leaves[2])
    want_dx, want_dw1, want_dw2 = torch.autograd.grad(wanted, leaves, dy)
    rows, cols = shares(tokens, ranks), shares(columns, ranks)

    def body(axes):
        tp, seq = axes["tp"], S(0, rows)
        mine = [x.split(rows)[tp.index], w1.split(cols)[tp.index], w2.split(cols, 1)[tp.index]]
        leaves = [t.clone().requires_grad_() for t in mine]
        y = row_linear(F.silu(column_linear(leaves[0], leaves[1], tp, seq)), leaves[2], tp, seq)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.split(rows)[tp.index])

    y, dx, dw1, dw2 = zip(*spmd(Mesh(tp=ranks, dp=1), body))
    torch.testing.assert_close(torch.cat(y), wanted.detach(), **CLOSE)
    torch.testing.assert_close(torch.cat(dx), want_dx, **CLOSE)
    torch.testing.assert_close(torch.cat(dw1), want_dw1, **CLOSE)
    torch.testing.assert_close(torch.cat(dw2, 1), want_dw2, **CLOSE)


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    def body(axes):
        x, w = draw("x", shape=(2, 3)), draw("w", shape=(4, 3))
        (w if frozen == "x" else x).requires_grad_()
        y = row_linear(column_linear(x, w, axes["tp"], S(0)), draw("o", shape=(5, 4)), axes["tp"], S(0))
        y.sum().backward()
        return x.grad is None, w.grad is None

    assert spmd(Mesh(tp=2, dp=1), body) == [(frozen == "x", frozen == "w")] * 2


def test_a_frozen_matrix_still_joins_the_collectives_of_the_input() -> None:
    """Every rank runs the same collectives whatever trains: a frozen weight must not skip the reduce-scatter of dX."""

    def body(axes):
        x = draw("x", axes.rank, shape=(2, 3)).requires_grad_()
        y = column_linear(x, torch.eye(3, dtype=torch.float64), axes["tp"], S(0))
        return torch.autograd.grad(y.sum(), x)[0]

    for dx in spmd(Mesh(tp=2, dp=1), body):
        assert torch.equal(dx, torch.full((2, 3), 2.0, dtype=torch.float64))


def test_the_backward_of_column_linear_hides_both_collectives(monkeypatch) -> None:
    """gather starts, dX, scatter starts, gather ends, dW, scatter ends: a product runs while each travels."""
    events: list[str] = []
    product = F.linear

    class Logged:
        """An axis of two ranks that are alike, which says what it is asked for and when it is waited for."""

        size, index, name, ranks = 2, 0, "tp", (0, 1)

        def all_gather(self, x, sizes, dim, later=False):
            return self.log("gather", torch.cat([x, x], dim).detach(), later)

        def reduce_scatter(self, x, sizes, dim, later=False):
            return self.log("scatter", 2 * x.split(list(sizes), dim)[0].detach(), later)

        def log(self, what, result, later):
            events.append(f"{what} starts")

            def wait():
                events.append(f"{what} ends")
                return result

            return wait if later else wait()

    x, w = draw("x", shape=(2, 3)).requires_grad_(), draw("w", shape=(4, 3)).requires_grad_()
    y = column_linear(x, w, Logged(), S(0, (2, 2)))
    events.clear()
    monkeypatch.setattr(F, "linear", lambda a, b: events.append("product") or product(a, b))
    torch.autograd.grad(y.sum(), [x, w])
    assert events == ["gather starts", "product", "scatter starts", "gather ends", "product", "scatter ends"]

"""Column and row linear on a group of ranks against one matrix product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import draw

from lf.mesh import Mesh, shares
from lf.parallel.linear import column_linear, row_linear
from lf.parallel.product import W, probe_of, weight_gradient
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


FORMS = ("plain", "acc", "probe")


def two_products(axes: Any, form: str, tokens: int, columns: int, trains: tuple[bool, bool, bool]) -> tuple[torch.Tensor, ...]:
    """(dx, dw1, dw2) of this rank, zeros where nothing trains, of a row linear after a column linear whose weights come as `form`."""
    tp = axes["tp"]
    rows, cols = shares(tokens, tp.size), shares(columns, tp.size)
    seq, dy = S(0, rows), draw("dy", shape=(tokens, 4)).split(rows)[tp.index]
    x = draw("x", shape=(tokens, 5)).split(rows)[tp.index].clone().requires_grad_(trains[0])
    values = [draw("w1", shape=(columns, 5)).split(cols)[tp.index], draw("w2", shape=(4, columns)).split(cols, 1)[tp.index]]
    values = [v.clone().requires_grad_(t) for v, t in zip(values, trains[1:])]
    accs = [torch.ones_like(v, requires_grad=False) for v in values]
    mine, full = (cols[tp.index],), (tokens,)
    seen = [((*full, 5), x.dtype, (*full, *mine), x.dtype), ((*full, *mine), x.dtype, (*full, 4), x.dtype)]
    probes = [probe_of(s, x.device) for s in seen]
    weights = {"plain": values, "acc": map(W, values, accs), "probe": [W(v, probe=p) for v, p in zip(values, probes)]}[form]
    w1, w2 = weights
    y = row_linear(F.silu(column_linear(x, w1, tp, seq)), w2, tp, seq)
    wanted = [t for t in (x, *values) if t.requires_grad]
    wanted += [p for v, pair in zip(values, probes) for p in pair if form == "probe" and v.requires_grad]
    got = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy, allow_unused=True)))
    dw = [got.get(id(v)) for v in values]
    if form == "acc":
        assert dw == [None, None]
        dw = [acc - 1 for acc in accs]
    if form == "probe":
        assert dw == [None, None]
        for v, acc, pair in zip(values, accs, probes):
            if v.requires_grad:
                factors = [got[id(p)] for p in pair]
                assert not any(f.requires_grad for f in factors), "a factor that carries a graph keeps all activations before it alive"
                weight_gradient(acc, *factors)
        dw = [acc - 1 for acc in accs]
    return tuple(torch.zeros_like(t) if g is None else g.detach() for t, g in zip((x, *values), (got.get(id(x)), *dw)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "columns"), [(8, 12), (7, 10), (2, 2), (1, 5)])
@pytest.mark.parametrize("trains", [(True, True, True), (False, True, True), (True, False, True), (True, True, False), (False, False, True)])
def test_a_weight_gradient_is_the_same_wherever_it_goes(ranks: int, tokens: int, columns: int, trains: tuple[bool, bool, bool]) -> None:
    """Added to a sum in backward, or multiplied later from what the probes have caught; with empty shares, frozen weights and inputs."""
    leaves = [draw("x", shape=(tokens, 5)), draw("w1", shape=(columns, 5)), draw("w2", shape=(4, columns))]
    leaves = [t.requires_grad_() for t in leaves]
    y = F.linear(F.silu(F.linear(leaves[0], leaves[1])), leaves[2])
    want = [g if t else torch.zeros_like(g) for g, t in zip(torch.autograd.grad(y, leaves, draw("dy", shape=(tokens, 4))), trains)]
    plain, *others = (spmd(Mesh(tp=ranks, dp=1), two_products, form, tokens, columns, trains) for form in FORMS)
    for found in (plain, *others):
        dx, dw1, dw2 = zip(*found)
        for got, whole in zip((torch.cat(dx), torch.cat(dw1), torch.cat(dw2, 1)), want):
            torch.testing.assert_close(got, whole, **CLOSE)
        assert torch.equal(torch.cat(dx), torch.cat([p[0] for p in plain])), "the gradient of the input is one product, whatever the weight"


@pytest.mark.parametrize("form", FORMS)
def test_the_backward_of_column_linear_hides_its_collectives(monkeypatch, form: str) -> None:
    """gather starts, dX, scatter starts, gather ends, dW, scatter ends: a product runs while each travels. With a probe there is no dW."""
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
    acc, probe = torch.zeros(4, 3, dtype=w.dtype), probe_of(((4, 3), w.dtype, (4, 4), w.dtype), w.device)
    weight = {"plain": w, "acc": W(w, acc), "probe": W(w, probe=probe)}[form]
    y = column_linear(x, weight, Logged(), S(0, (2, 2)))
    events.clear()
    monkeypatch.setattr(F, "linear", lambda a, b: events.append("product") or product(a, b))
    monkeypatch.setattr("lf.parallel.product.weight_gradient", lambda *_: events.append("product"))
    torch.autograd.grad(y.sum(), [x, w, *(probe if form == "probe" else ())], allow_unused=True)
    second = [] if form == "probe" else ["product"]
    assert events == ["gather starts", "product", "scatter starts", "gather ends", *second, "scatter ends"]


@pytest.mark.parametrize("form", ["acc", "probe"])
def test_a_frozen_weight_gathers_nothing_in_backward(monkeypatch, form: str) -> None:
    """Whatever else it brings along: no gradient is made that nobody asked for."""

    def body(axes):
        x, w = draw("x", axes.rank, shape=(2, 3)).requires_grad_(), draw("w", shape=(4, 3))
        acc, probe = torch.zeros_like(w), probe_of(((4, 3), w.dtype, (4, 4), w.dtype), w.device)
        y = column_linear(x, W(w, acc) if form == "acc" else W(w, probe=probe), axes["tp"], S(0))
        before = axes["tp"].calls
        dx, *factors = torch.autograd.grad(y.sum(), [x, *probe], allow_unused=True)
        return dx is not None, factors, acc.abs().max().item(), axes["tp"].calls - before

    assert spmd(Mesh(tp=2, dp=1), body) == [(True, [None, None], 0.0, 1)] * 2

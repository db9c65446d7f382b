"""Rows on their way to experts and back, for random routings on every folding: what is sent arrives, by expert, and comes back to its token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED, context, draw, processes
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lf.axes_meta import MetaAxes
from lf.context import DISPATCH
from lf.mesh import Mesh
from lf.models.router import tally
from lf.ops import permute
from lf.parallel.expert import STYLES, counted, each, send_by_exchange, sorted_by_expert
from lf.parallel.redistribute import exchange, exchange_later
from lf.sim import spmd
from lf.spec import Part

D = 3
FOLDS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (2, 3), (4, 1)]


def routing(rank: int, tokens: int, k: int, experts: int, seed: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """h (t, D), ids (t, k) of which some are E, weights (t, k) of a rank. kind: "any", "none" (all go nowhere) or "one" (all to the last expert)."""
    g = torch.Generator().manual_seed(1000 * seed + rank)
    ids = torch.stack([torch.randperm(experts + 1, generator=g)[:k] for _ in range(tokens)]) if tokens else torch.empty(0, k, dtype=torch.int64)
    if kind == "none":
        ids = torch.full_like(ids, experts)
    if kind == "one":
        ids = torch.full_like(ids, experts).index_fill(1, torch.tensor([0]), experts - 1)
    h = torch.randn(tokens, D, generator=g, dtype=torch.float64)
    return h, ids, torch.rand(tokens, k, generator=g, dtype=torch.float64)


def of_expert(rows: Tensor, e: int) -> Tensor:
    """What expert e makes of its rows here: of each its own, so that a row at the wrong expert is seen."""
    return (e + 2) * rows.square() + e


def want(h: Tensor, ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    out = torch.zeros_like(h)
    for e in range(experts):
        out = out + (weights * (ids == e)).sum(1, keepdim=True) * of_expert(h, e)
    return out


def there_and_back(axes: Any, style: str, tokens: list[int], k: int, experts: int, seed: int, kind: str) -> dict[str, Tensor]:
    """Of a rank: what it got, and output and gradients beside those without any travelling."""
    ctx = context(axes)
    h, ids, weights = routing(axes.rank, tokens[axes.rank], k, experts, seed, kind)
    h, weights = h.requires_grad_(), weights.requires_grad_()
    send, back = STYLES[style]
    sent = send(h, ids, weights, experts, ctx)
    first, _ = Part("", experts).bounds(axes["ep"].index, axes["ep"].size)
    etp = axes["etp"].size  # each of them has columns of the expert: here all of its rows' shares
    made = [of_expert(rows, first + i) / etp for i, rows in enumerate(sent["rows"].split(sent["counts"].tolist()))]
    y = back({**sent, "rows": torch.cat([*made, sent["rows"][:0]])}, ctx)()
    dy = draw("dy", axes.rank, seed, shape=tuple(y.shape))
    exact = want(h, ids, weights, experts)
    found = {"y": y, **dict(zip(("dh", "dw"), torch.autograd.grad(y, [h, weights], dy)))}
    told = {"y": exact, **dict(zip(("dh", "dw"), torch.autograd.grad(exact, [h, weights], dy)))}
    out = {f"{where} {name}": x.detach() for where, each in (("found", found), ("told", told)) for name, x in each.items()}
    return out | {"counts": sent["counts"], "rows": torch.tensor(len(sent["rows"])), "load": tally(ids, experts), "first": torch.tensor(first)}


def is_right(ranks: list[dict[str, Tensor]], ep: int, etp: int) -> None:
    for got in ranks:
        for name in ("y", "dh", "dw"):
            torch.testing.assert_close(got[f"found {name}"], got[f"told {name}"], rtol=1e-12, atol=1e-12)
    groups = [ranks[i : i + ep * etp] for i in range(0, len(ranks), ep * etp)]
    for group in groups:
        load = sum(got["load"] for got in group)
        for got in group:  # the etp ranks of an expert have the same rows: those of all ranks of the group
            assert got["rows"] == got["counts"].sum()
            assert torch.equal(got["counts"], load[got["first"] : got["first"] + len(got["counts"])])
        assert sum(int(got["rows"]) for got in group) == etp * load.sum()


@st.composite
def cases(draw: Any) -> tuple[int, int, int, list[int], int, int, int, str]:
    (ep, etp), edp = draw(st.sampled_from(FOLDS)), draw(st.integers(1, 2))
    experts = draw(st.integers(1, 6))  # fewer than ranks, too: some then have none
    tokens = draw(st.lists(st.integers(0, 5), min_size=ep * etp * edp, max_size=ep * etp * edp))
    kind = draw(st.sampled_from(("any", "any", "none", "one")))
    return ep, etp, edp, tokens, draw(st.integers(1, experts)), experts, draw(st.integers(0, 999)), kind


@pytest.mark.parametrize("style", STYLES)
@given(cases())
@example((2, 2, 1, [0, 0, 0, 0], 1, 2, 0, "any"))
@example((2, 1, 1, [0, 4], 2, 4, 0, "any"))
@example((2, 1, 1, [3, 4], 2, 4, 0, "none"))
@example((2, 2, 1, [3, 1, 4, 2], 2, 4, 0, "one"))
@example((4, 1, 1, [3, 1, 4, 2], 2, 3, 0, "any"))
def test_rows_come_back_to_their_tokens(style: str, case: tuple[int, int, int, list[int], int, int, int, str]) -> None:
    """Output and gradients as without any travelling; so both styles agree, too."""
    ep, etp, edp, *rest = case
    is_right(spmd(Mesh(dp=ep * etp * edp, ep=ep, etp=etp), there_and_back, style, *rest), ep, etp)


@pytest.mark.parametrize("style", STYLES)
def test_rows_come_back_over_processes(style: str) -> None:
    """A rank without a token and an expert without one among them; to the bit as simulated."""
    mesh, rest = Mesh(dp=4, ep=2, etp=2), ([3, 0, 5, 2], 2, 5, SEED, "any")
    real, simulated = processes(mesh, there_and_back, style, *rest), spmd(mesh, there_and_back, style, *rest)
    is_right(real, 2, 2)
    for a, b in zip(real, simulated):
        for name, x in a.items():
            torch.testing.assert_close(x, b[name], rtol=1e-14, atol=1e-14, msg=name)


def tables(axes: Any, tokens: list[int], k: int, experts: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    h, ids, weights = routing(axes.rank, tokens[axes.rank], k, experts, seed, "any")
    ctx = context(axes)
    return counted(ids, experts, ctx), send_by_exchange(h, ids, weights, experts, ctx)


@given(cases())
def test_what_is_sent_is_what_arrives(case: tuple[int, int, int, list[int], int, int, int, str]) -> None:
    ep, etp, edp, tokens, k, experts, seed, _ = case
    mesh = Mesh(dp=ep * etp * edp, ep=ep, etp=etp)
    results = spmd(mesh, tables, tokens, k, experts, seed)
    for g in range(edp):
        group = results[g * ep * etp : (g + 1) * ep * etp]
        for i, (table, sent) in enumerate(group):
            e, c = divmod(i, etp)
            assert torch.equal(table, group[0][0]), "all ranks of a group know the same"
            assert table.shape == (ep, etp, 1 + experts)
            assert table[e, c, 0] == tokens[g * ep * etp + i]
            assert sent["send"].sum() == table[e, c, 1:].sum()
            assert sent["sizes"][c] == sent["recv"].sum()
            for other in range(ep):
                assert sent["send"][other] == group[other * etp + c][1]["recv"][e]


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_blocks_are_put_expert_by_expert(sources: int, experts: int, data: Any) -> None:
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=sources * experts, max_size=sources * experts))
    blocks = torch.tensor(lengths).view(sources, experts)
    came = torch.tensor([(e, s, i) for s in range(sources) for e in range(experts) for i in range(blocks[s, e])]).view(-1, 3)
    place = sorted_by_expert(blocks, torch.device("cpu"))
    assert came[place].tolist() == sorted(came.tolist())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_each_row_has_the_value_of_its_expert(counts: list[int]) -> None:
    values = torch.arange(2.0 * len(counts)).view(-1, 2)
    found = each(values, torch.tensor(counts), sum(counts))
    assert found.tolist() == [values[e].tolist() for e, n in enumerate(counts) for _ in range(n)]


def exchanges(axes: Any, rows: list[list[int]], order: str) -> dict[str, Tensor]:
    """Both ways of the same exchange, rows[i][j] of them from i to j; the later one is waited for before or after other work."""
    ep, out = axes["ep"], {}
    me = ep.index
    send, recv = rows[me], [row[me] for row in rows]
    x = draw("x", axes.rank, shape=(sum(send), D))
    dy = draw("dy", axes.rank, shape=(sum(recv), D))
    for name in ("now", "later"):
        leaf = x.clone().requires_grad_()
        if name == "now":
            y, other = exchange(leaf, send, recv, ep), leaf.sum()
        elif order == "before":
            y = exchange_later(leaf, send, recv, ep)()
            other = leaf.sum()
        else:
            wait = exchange_later(leaf, send, recv, ep)
            other = leaf.sum()  # beside it: joins the graph between start and end
            y = wait()
        (dx,) = torch.autograd.grad((y * dy).sum() + 2 * other, leaf)
        out |= {f"{name} y": y.detach(), f"{name} dx": dx}
    return out


def agree(ranks: list[dict[str, Tensor]], rows: list[list[int]]) -> None:
    n = len(rows)
    x = [draw("x", r, shape=(sum(rows[r]), D)).split(rows[r]) for r in range(n)]
    back = [draw("dy", r, shape=(sum(row[r] for row in rows), D)).split([row[r] for row in rows]) for r in range(n)]
    for r, got in enumerate(ranks):
        y = torch.cat([x[s][r] for s in range(n)])
        dx = torch.cat([back[s][r] for s in range(n)]) + 2
        for name in ("now", "later"):
            assert torch.equal(got[f"{name} y"], y)
            torch.testing.assert_close(got[f"{name} dx"], dx, rtol=1e-14, atol=1e-14)


@given(st.integers(1, 4), st.sampled_from(("before", "after")), st.data())
def test_exchange_and_the_later_one_agree(ranks: int, order: str, data: Any) -> None:
    flat = data.draw(st.lists(st.integers(0, 3), min_size=ranks * ranks, max_size=ranks * ranks))
    rows = [flat[i * ranks : (i + 1) * ranks] for i in range(ranks)]
    agree(spmd(Mesh(dp=ranks, ep=ranks), exchanges, rows, order), rows)


@pytest.mark.parametrize("order", ["before", "after"])
def test_exchanges_agree_over_processes(order: str) -> None:
    rows = [[1, 0, 2], [0, 0, 0], [3, 1, 0]]
    agree(processes(Mesh(dp=3, ep=3), exchanges, rows, order), rows)


def shapes(axes: Any, style: str, device: str) -> dict[str, Any]:
    """Of an even routing: 6 tokens of this rank, 2 experts of each, 4 experts in all."""
    ctx = attrs.evolve(context(axes), ops=SimpleNamespace(permute=permute.permute, unpermute=permute.unpermute))
    h, ids, weights = torch.ones(6, D, device=device), torch.arange(12, device=device).view(6, 2) % 4, torch.ones(6, 2, device=device)
    send, back = STYLES[style]
    sent = send(h, ids, weights, 4, ctx)
    on_host = {name: sent[name].tolist() for name in ("counts", "send", "recv", "sizes") if name in sent}
    return on_host | {name: (tuple(x.shape), x.dtype) for name, x in {**sent, "y": back(sent, ctx)()}.items()}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_on_paper_all_experts_get_equally_many(style: str, ep: int, etp: int) -> None:
    mesh = Mesh(dp=ep * etp, ep=ep, etp=etp)
    assert [shapes(MetaAxes(mesh, rank), style, "meta") for rank in range(mesh.size)] == spmd(mesh, shapes, style, "cpu")


def test_a_context_names_the_styles_that_there_are() -> None:
    assert {*DISPATCH} == STYLES.keys()

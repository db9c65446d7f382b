"""Every edge against its meaning: a group of ranks is one logical tensor, and `redistribute` is the identity on it, forward and backward.

What a type says about the local tensors, and what its gradient is:

    R  each rank has X            gradient P: the ranks' gradients add up to dX
    I  each rank has X            gradient I: each rank has dX
    S  X is the ranks' pieces     gradient S: dX is the ranks' pieces
    P  X is the ranks' sum        gradient R: each rank has dX
"""

from __future__ import annotations

import pytest
import torch
from helpers import draw
from torch import Tensor

from lf.mesh import Mesh, shares
from lf.parallel.redistribute import EDGES, I, P, R, S, Type, exchange, redistribute, shift
from lf.sim import spmd
from lf.spec import LayoutError

GRADIENT = {"R": "P", "I": "I", "S": "S", "P": "R"}
TYPES = {"R": R, "I": I, "P": P}
RANKS = (2, 3, 4)
PAIRS = [*EDGES, "S→S"]


def cuts(n: int, ranks: int) -> list[tuple[int, ...]]:
    """Ways to cut n: even or balanced, uneven, with nothing on the first rank, all on the last."""
    uneven = [1] * (ranks - 1) + [n - ranks + 1]
    return [shares(n, ranks), tuple(uneven), (0, *shares(n, ranks - 1)), (*[0] * (ranks - 1), n)]


def lay(x: Tensor, kind: str, dim: int, sizes: tuple[int, ...], key: str) -> list[Tensor]:
    """The local tensors of the logical x."""
    if kind == "S":
        return list(x.split(list(sizes), dim))
    if kind == "P":
        parts = [draw(key, r, shape=tuple(x.shape)) for r in range(1, len(sizes))]
        return [x - sum(parts), *parts]
    return [x.clone() for _ in sizes]


def is_laid(x: Tensor, local: list[Tensor], kind: str, dim: int, sizes: tuple[int, ...]) -> None:
    """The local tensors mean the logical x."""
    if kind == "P":
        torch.testing.assert_close(sum(local), x, rtol=1e-13, atol=1e-13)
        return
    for got, want in zip(local, lay(x, kind, dim, sizes, "")):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def move(ranks: int, src: Type, dst: Type, x: list[Tensor], dy: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, input gradients) of the ranks, given their inputs and output gradients."""

    def body(axes) -> tuple[Tensor, Tensor]:
        leaf = x[axes.rank].clone().requires_grad_()
        y = redistribute(leaf, axes["tp"], src, dst)
        (dx,) = torch.autograd.grad(y, leaf, dy[axes.rank])
        return y.detach(), dx

    results = spmd(Mesh(tp=ranks, dp=1), body)
    return [y for y, _ in results], [dx for _, dx in results]


def check(pair: str, ranks: int, src: Type, dst: Type, src_sizes: tuple[int, ...], dst_sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    x, dy = draw(pair, "x", shape=shape), draw(pair, "dy", shape=shape)
    given = lay(dy, GRADIENT[dst.kind], dst.dim, dst_sizes, "dy")
    y, dx = move(ranks, src, dst, lay(x, src.kind, src.dim, src_sizes, "x"), given)
    is_laid(x, y, dst.kind, dst.dim, dst_sizes)
    is_laid(dy, dx, GRADIENT[src.kind], src.dim, src_sizes)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("pair", PAIRS)
def test_an_edge_is_the_identity_on_logical_tensors(pair: str, ranks: int) -> None:
    source, target = pair.split("→")
    for dim in (0, 1, -1):
        for length in (2 * ranks, 2 * ranks + 1):
            shape = [3, 2, 5]
            shape[dim] = length
            if pair == "S→S":
                other = (dim + 1) % 3
                shape[other] = 2 * ranks - 1
                for a, b in zip(cuts(length, ranks), reversed(cuts(shape[other], ranks))):
                    check(pair, ranks, S(dim, a), S(other, b), a, b, tuple(shape))
                continue
            for sizes in cuts(length, ranks) if "S" in (source, target) else cuts(length, ranks)[:1]:
                types = {**TYPES, "S": S(dim, sizes)}
                check(pair, ranks, types[source], types[target], sizes, sizes, tuple(shape))


@pytest.mark.parametrize("ranks", RANKS)
def test_sizes_left_out_are_balanced_shares_or_equal_pieces(ranks: int) -> None:
    length = 2 * ranks + 1
    for source in (I, P, R):  # what is cut without sizes is cut in balanced shares
        check("cut", ranks, source, S(0), shares(length, ranks), shares(length, ranks), (length, 2))
    even = (2,) * ranks  # what is joined without sizes has equal pieces
    for target in (R, I):
        check("join", ranks, S(1), target, even, even, (3, 2 * ranks))
    check("both", ranks, S(0), S(1), even, shares(length, ranks), (2 * ranks, length))


def test_kept_is_what_coordinate_0_has() -> None:
    for source in (R, I):
        y, _ = move(3, source, P, [torch.full((2,), 5.0)] * 3, [torch.ones(2)] * 3)
        assert [t.tolist() for t in y] == [[5, 5], [0, 0], [0, 0]]


@pytest.mark.parametrize("ranks", RANKS)
def test_exchange_against_the_plain_gradient(ranks: int) -> None:
    counts = [[(2 * i + 3 * j + i * j) % 4 for j in range(ranks)] for i in range(ranks)]  # counts[i][j] rows go from i to j; some are 0
    xs = [draw("exchange", i, shape=(sum(counts[i]), 3)).requires_grad_() for i in range(ranks)]
    received = [torch.cat([xs[i].split(counts[i])[j] for i in range(ranks)]) for j in range(ranks)]
    dys = [draw("dy", j, shape=tuple(y.shape)) for j, y in enumerate(received)]
    wanted = torch.autograd.grad(received, xs, dys)

    def body(axes) -> tuple[Tensor, Tensor]:
        x = xs[axes.rank].detach().clone().requires_grad_()
        y = exchange(x, counts[axes.rank], [row[axes.rank] for row in counts], axes["tp"])
        return y.detach(), torch.autograd.grad(y, x, dys[axes.rank])[0]

    for r, (y, dx) in enumerate(spmd(Mesh(tp=ranks, dp=1), body)):
        assert torch.equal(y, received[r])
        assert torch.equal(dx, wanted[r])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("k", [-1, 0, 1, 2, 7])
def test_shift_against_the_plain_gradient(ranks: int, k: int) -> None:
    xs, dys = ([draw(name, r, shape=(2, 3)) for r in range(ranks)] for name in ("x", "dy"))

    def body(axes) -> tuple[Tensor, Tensor]:
        x = xs[axes.rank].clone().requires_grad_()
        y = shift(x, k, axes["tp"])
        return y.detach(), torch.autograd.grad(y, x, dys[axes.rank])[0]

    for r, (y, dx) in enumerate(spmd(Mesh(tp=ranks, dp=1), body)):
        assert torch.equal(y, xs[(r - k) % ranks])  # what the rank k places before has
        assert torch.equal(dx, dys[(r + k) % ranks])


def test_one_rank_makes_every_move_the_identity() -> None:
    def body(axes) -> bool:
        x = torch.ones(3, 2)
        moves = [redistribute(x, axes["tp"], a, b) for a, b in ((P, R), (S(0), R), (I, S(1)), (S(0), S(1)))]
        return all(y is x for y in [*moves, exchange(x, [3], [3], axes["tp"]), shift(x, 1, axes["tp"])])

    assert spmd(Mesh(dp=1), body) == [True]


def refused(src: Type, dst: Type, shape: tuple[int, ...] = (4, 6), ranks: int = 2) -> str:
    with pytest.raises(LayoutError) as caught:
        spmd(Mesh(tp=ranks, dp=1), lambda axes: redistribute(torch.zeros(shape), axes["tp"], src, dst))
    return str(caught.value)


def test_every_other_pair_is_refused() -> None:
    kinds = {**TYPES, "S": S(0)}
    others = [(a, b) for a in kinds for b in kinds if f"{a}→{b}" not in PAIRS]
    assert {f"{a}→{b}" for a, b in others} == {"R→R", "R→I", "I→I", "P→P", "S→P"}
    for a, b in others:
        message = refused(kinds[a], kinds[b])
        assert f"no edge {kinds[a]}→{kinds[b]} on tp" in message
        assert "P→S" in message  # and what there is


def test_a_pair_is_refused_on_one_rank_too() -> None:
    with pytest.raises(LayoutError, match="no edge R→I"):
        spmd(Mesh(dp=1), lambda axes: redistribute(torch.zeros(2), axes["tp"], R, I))


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, -1), (-2, 0)])
def test_a_shard_moves_to_another_dim(a: int, b: int) -> None:
    assert "on the same dim there is nothing to do" in refused(S(a), S(b))


def test_wrong_sizes_are_refused() -> None:
    assert "sizes [1, 2] do not cut dim 0 of (4, 6) for the 2 ranks of tp" in refused(I, S(0, (1, 2)))
    assert "sizes [2, 1, 1] do not cut dim 0 of (4, 6) for the 2 ranks of tp" in refused(P, S(0, (2, 1, 1)))
    assert "has 4 along dim 0; sizes [3, 5] say otherwise" in refused(S(0, (3, 5)), R)
    assert "has 6 along dim 1; sizes [6] say otherwise" in refused(S(1, (6,)), I)
    assert "sizes [1, 1] do not cut dim 1 of (4, 6)" in refused(S(0, (4, 4)), S(1, (1, 1)))

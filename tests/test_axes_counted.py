"""Counted axes answer as those that they are of, and count the same wherever these are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import processes

from lf.axes_counted import Count, CountedAxes, Traffic, sent
from lf.axes_meta import MetaAxes
from lf.axes_metered import MeteredAxes
from lf.mesh import Mesh
from lf.meter import Meter
from lf.sim import spmd

MESH = Mesh(pp=2, dp=3, tp=2)
KINDS = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift", "send", "recv"}


def everything(axes: Any, device: str = "cpu") -> list[torch.Tensor]:
    """One or two of each kind, over axes of 3 and of 2 ranks, joint ones and parts of one; and on an axis of one rank, which do not count."""
    dp, tp, pipe, (near, far) = axes["dp"], axes["tp"], axes.pipe(), axes.part(("dp", "tp"), 2 if axes.mesh.tp == 2 else 3)
    assert (dp.size, dp.index, dp.name) == (3, axes.coords["dp"], "dp")
    sizes = [4, 1, 2]
    mine, whole = torch.ones(sizes[dp.index], 5, device=device), torch.ones(7, 5, device=device)
    out = [dp.sum(whole), dp.max(whole), tp.all_reduce(whole.double(), later=True)()]
    flat = whole.clone()
    out += [axes["dp", "tp"].all_reduce(flat, spend=True), axes.world.sum(whole[0])]
    out += [dp.all_gather(mine, sizes), dp.reduce_scatter(whole.T, sizes, 1, later=True)(), dp.shift(mine[:1], 1), dp.shift(mine[:1], 3)]
    send, recv = [1 + dp.index, 2, 0], [[1, 2, 3], [2, 2, 2], [0, 0, 0]][dp.index]
    out += [dp.all_to_all(torch.ones(sum(send), 2, device=device), send, recv)]
    out += [tp.all_to_all(whole[:, :4], [4 // tp.size] * tp.size, [7] * tp.size, dim=1, join=0)]
    shards, filled = [mine, torch.ones(2, device=device)], [torch.zeros(7, 5, device=device), torch.zeros(6, device=device)]
    dp.gather_many(filled, shards, [sizes, [2, 2, 2]], [0, 0])
    summed = [torch.ones(4, device=device), torch.ones(2, device=device)]
    far.sum_many(summed, later=True)()
    rows = torch.zeros_like(mine)
    dp.scatter_many([rows], [whole], [sizes], [0], later=True)()
    out += [*filled, *summed, rows, near.sum(whole)]
    if pipe.index == 0:
        pipe.send(whole, 1, "x")()
    else:
        out.append(pipe.recv((7, 5), torch.float32, torch.device(device), 0, "x")())
    axes["cp"].all_gather(whole, [7])
    dp.barrier()
    return out


def counted(axes: Any, device: str = "cpu") -> tuple[dict[Any, Count], list[Any]]:
    traffic = Traffic()
    out = everything(CountedAxes(axes, traffic), device)
    assert {kind for _, kind in traffic} <= KINDS
    assert sum(traffic.of_axes().values()) == sum(c.sent for c in traffic.values())
    return dict(traffic), out


def metered(axes: Any) -> tuple[dict[Any, Count], list[Any], int]:
    with Meter() as meter:
        found = counted(MeteredAxes(axes, meter))
        now = meter.now
    assert now == sum(x.untyped_storage().nbytes() for x in found[1] if x.dim())
    return *found, now


def test_traffic_by_hand() -> None:
    (found, _), *_ = spmd(MESH, counted)
    n = 7 * 5 * 4  # bytes of what most have
    assert found["dp", "all_reduce"] == Count(2, 2 * n, 2 * (2 * n * 2 // 3))
    assert found["tp", "all_reduce"] == Count(1, 2 * n, 2 * n)
    assert found["dp·tp", "all_reduce"] == Count(1, n, 2 * n * 5 // 6)
    assert found["pp·dp·cp·tp", "all_reduce"] == Count(1, 20, 2 * 20 * 11 // 12)
    assert found["dp", "all_gather"] == Count(2, n + n + 24, n * 2 // 3 + (n + 24) * 2 // 3)
    assert found["dp", "reduce_scatter"] == Count(2, 2 * n, 2 * (n * 2 // 3))
    assert found["dp", "shift"] == Count(1, 20, 20)
    assert found["dp", "all_to_all"] == Count(1, 3 * 2 * 4, 2 * 2 * 4)  # one of three rows stays
    assert found["tp", "all_to_all"] == Count(1, 7 * 4 * 4, 7 * 2 * 4)
    assert found["dp·tp%2", "all_reduce"] == Count(1, 24, 2 * 24 * 2 // 3)
    assert found["dp·tp/2", "all_reduce"] == Count(1, n, n)
    assert found["pp", "send"] == Count(1, n, n)
    assert len(found) == 12


def test_the_same_with_data_on_paper_and_over_processes() -> None:
    plain = spmd(MESH, everything)
    simulated = spmd(MESH, counted)
    seen = spmd(MESH, metered)
    for rank, (traffic, out) in enumerate(simulated):
        on_paper, shapes = counted(MetaAxes(MESH, rank), "meta")
        assert on_paper == traffic == seen[rank][0]
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(out, plain[rank], seen[rank][1], strict=True))
        assert [(x.shape, x.dtype) for x in out] == [(x.shape, x.dtype) for x in shapes]


def test_the_same_over_processes() -> None:
    mesh = Mesh(pp=2, dp=3, tp=1)
    for (traffic, out), (want, values) in zip(processes(mesh, counted), spmd(mesh, counted), strict=True):
        assert traffic == want
        assert all(torch.equal(a, b) for a, b in zip(out, values, strict=True))


@pytest.mark.parametrize(("kind", "payload", "ranks", "want"), [("all_gather", 10, 1, 0), ("all_gather", 10, 3, 6), ("all_reduce", 10, 3, 13)])
def test_what_leaves_a_rank(kind, payload, ranks, want) -> None:
    assert sent(kind, payload, ranks) == want


def test_axes_of_another_mesh_are_counted_too() -> None:
    def body(axes: Any) -> dict[Any, Count]:
        traffic = Traffic()
        inner = CountedAxes(axes, traffic).over(Mesh(tp=2), (2, 0))
        if inner is not None:
            inner["tp"].sum(torch.ones(1))
        return dict(traffic)

    assert spmd(Mesh(dp=3), body) == [{("tp", "all_reduce"): Count(1, 4, 4)}, {}, {("tp", "all_reduce"): Count(1, 4, 4)}]

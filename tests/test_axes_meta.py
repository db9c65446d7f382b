"""Axes on paper answer as axes of threads do, but for the data."""

from __future__ import annotations

import pytest
import torch

from lf.axes_meta import MetaAxes
from lf.mesh import Mesh
from lf.sim import spmd

MESH = Mesh(pp=2, dp=3, tp=2, ep=2)
NAMES = ["pp", "dp", "tp", "ep", ("dp", "tp"), ("edp", "ep"), ()]


def collectives(axis, x: torch.Tensor) -> list:
    """What each collective gives on (4, 3·size), with uneven sizes; and what it gives later."""
    n = axis.size
    sizes = tuple(range(4, 4 + n))
    rows, all_rows = x.new_zeros(sizes[axis.index], 3 * n), x.new_zeros(sum(sizes), 3 * n)
    out = [axis.sum(x), axis.max(x), axis.all_reduce(x, "sum", later=True)(), axis.shift(x, 1), axis.shift(x, n)]
    out += [axis.all_gather(rows, sizes), axis.all_gather(rows.T, sizes, 1, later=True)(), axis.reduce_scatter(all_rows, sizes)]
    out += [axis.reduce_scatter(all_rows.T, sizes, dim=1, later=True)()]
    out += [axis.all_to_all(x.new_zeros(2 * n, 3), [2] * n, [2] * n), axis.all_to_all(x, [3] * n, [4] * n, dim=1, join=0)]
    axis.barrier()
    return [(tuple(y.shape), y.dtype, y.requires_grad) for y in out]


def test_shapes_are_those_of_ranks_with_data() -> None:
    def body(axes):
        each = [axes[name] for name in NAMES]
        return [(a.size, a.index, a.ranks, a.name, collectives(a, torch.zeros(4, 3 * a.size, dtype=torch.float16))) for a in each]

    for rank, wanted in enumerate(spmd(MESH, body)):
        axes = MetaAxes(MESH, rank)
        for name, want in zip(NAMES, wanted):
            a = axes[name]
            x = torch.zeros(4, 3 * a.size, dtype=torch.float16, device="meta", requires_grad=True)
            assert (a.size, a.index, a.ranks, a.name, collectives(a, x)) == want


def test_rows_that_do_not_fit_are_refused_as_they_are_there() -> None:
    axis = MetaAxes(Mesh(tp=2, dp=1), 1)["tp"]
    x = torch.zeros(3, 2, device="meta")
    for move in (lambda: axis.all_gather(x, (3, 4)), lambda: axis.reduce_scatter(x, (3, 4)), lambda: axis.all_to_all(x, [1, 1], [1, 1])):
        with pytest.raises(ValueError, match="rank 1 has 3 rows, the sizes say"):
            move()


def test_data_is_refused() -> None:
    """Its result would be numbers that nobody has sent."""
    with pytest.raises(ValueError, match=r"tp of 2 ranks is on paper: it takes meta tensors.*lf\.sim\.spmd"):
        MetaAxes(Mesh(tp=2, dp=1))["tp"].sum(torch.ones(2))


def test_one_rank_of_very_many() -> None:
    """Nothing is listed that grows with the mesh: a joint group of all 32,768 ranks is as quick as one of two."""
    mesh = Mesh(pp=8, dp=512, tp=8)
    axes = MetaAxes(mesh, mesh.size - 1)
    assert (axes.world.size, axes.world.index) == (32768, 32767)
    assert axes["tp"].ranks == tuple(range(32760, 32768))
    assert axes["dp"].all_gather(torch.zeros(1, 2, device="meta"), [1] * 512).shape == (512, 2)

"""Real processes over gloo: the live axes do what the simulated ones do, bit for bit where order allows, and law 1 holds there, too."""

from __future__ import annotations

import os
import time

import pytest
import torch
from helpers import context, draw, processes

import lf
from lf import parity
from lf.axes import connect
from lf.mesh import MeshError
from lf.models.small import tiny
from lf.parallel.redistribute import exchange, redistribute
from lf.parallel.redistribute import shift as ring
from lf.sim import spmd

MESH = lf.Mesh(dp=2, tp=2)
SIZES = {"even": (2, 2, 2, 2), "uneven": (3, 1, 4, 2), "with nothing": (0, 3, 0, 1), "none at all": (0, 0, 0, 0)}
DTYPES = {"float64": torch.float64, "bf16": torch.bfloat16, "int64": torch.int64}


def _numbers(key: object, rank: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    # whole numbers: their sums are exact in bf16 as well, whatever the order
    return (draw(str(key), rank, shape=tuple(shape)) * 4).round().to(dtype)


def every_collective(axes) -> dict[str, torch.Tensor]:
    """Each collective on each kind of group, with each kind of sizes, dim and dtype, at once and later."""
    out: dict[str, torch.Tensor] = {}
    for names in (("pp", "dp", "cp", "tp"), ("dp",), ("tp",), ("dp", "tp"), ()):
        axis = axes[names]
        n, me = axis.size, axis.index
        for dtype_name, dtype in DTYPES.items():
            for op in ("sum", "max"):
                x = _numbers(op, axes.rank, [3, 2], dtype)
                out[f"{names} all_reduce {op} {dtype_name}"] = axis.all_reduce(x, op)
                out[f"{names} all_reduce {op} {dtype_name} later"] = axis.all_reduce(x.T, op, later=True)()
            out[f"{names} sum {dtype_name}"], out[f"{names} max {dtype_name}"] = axis.sum(x), axis.max(x)
            out[f"{names} shift {dtype_name}"] = torch.stack([axis.shift(x, k) for k in (-1, 0, 1, 2, 3)])
            for kind, sizes in SIZES.items():
                mine = list(sizes[:n])
                for dim in (0, 1, -1):
                    where = f"{names} {dtype_name} {kind} dim {dim}"
                    shape = [3, 2, 5]
                    shape[dim] = mine[me]
                    x = _numbers(where, axes.rank, shape, dtype)
                    out[f"all_gather {where}"] = axis.all_gather(x, mine, dim)
                    out[f"all_gather later {where}"] = axis.all_gather(x, mine, dim, later=True)()
                    shape[dim] = sum(mine)
                    x = _numbers(where, axes.rank, shape, dtype)
                    out[f"reduce_scatter {where}"] = axis.reduce_scatter(x, mine, dim)
                    out[f"reduce_scatter later {where}"] = axis.reduce_scatter(x, mine, dim, later=True)()
                    for join in {0, 1, 2} - {dim % 3}:  # cut dim, join another
                        shape = [3, 2, 5]
                        shape[dim], shape[join] = sum(mine), mine[me]
                        x = _numbers(where, axes.rank, shape, dtype)
                        out[f"all_to_all {where} join {join}"] = axis.all_to_all(x, mine, mine, dim, join)
                    send = [(me + 2 * j) % 3 for j in range(n)]  # rank j is sent as many rows as it expects
                    recv = [(j + 2 * me) % 3 for j in range(n)]
                    shape = [3, 2, 5]
                    shape[dim] = sum(send)
                    out[f"all_to_all {where}"] = axis.all_to_all(_numbers(where, axes.rank, shape, dtype), send, recv, dim)
        axis.barrier()
    return out


def test_every_collective_equals_the_simulated_one() -> None:
    real, simulated = processes(MESH, every_collective), spmd(MESH, every_collective)
    for rank, (a, b) in enumerate(zip(real, simulated)):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            assert torch.equal(a[name], b[name]), f"rank {rank}: {name}"


def _moves(axes) -> list[torch.Tensor]:
    tp, out = axes["tp"], []
    for src, dst in ((lf.S(0, (3, 1)), lf.R), (lf.P, lf.S(1, (0, 5))), (lf.S(0, (3, 1)), lf.S(1, (2, 3))), (lf.I, lf.R)):
        shape = [4, 5]
        if src.kind == "S":
            shape[src.dim] = src.sizes[tp.index]
        x = draw("move", axes.rank, shape=tuple(shape)).requires_grad_()
        y = redistribute(x, tp, src, dst)
        out += [y, *torch.autograd.grad(y.square().sum(), x)]
    x = draw("ring", axes.rank, shape=(4, 2)).requires_grad_()
    y = exchange(ring(x, 1, axes["dp", "tp"]), [1, 3], [1, 1] if tp.index == 0 else [3, 3], tp)
    return [t.detach() for t in (*out, y, *torch.autograd.grad(y.pow(3).sum(), x))]


def test_moves_and_their_gradients_equal_the_simulated_ones() -> None:
    for a, b in zip(processes(MESH, _moves), spmd(MESH, _moves)):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)


def test_law_1_over_real_processes() -> None:
    """The one multi-process run of parity: tp=2,dp=2."""
    report = parity.compare(tiny(), MESH, padding=2, spmd=processes)
    assert report.ok, str(report)


def _connect(axes, mesh: lf.Mesh) -> lf.Mesh:
    return connect(mesh, lf.devices.get("cpu")).mesh


def test_a_mesh_that_is_not_the_world_is_refused_with_both_products() -> None:
    with pytest.raises(MeshError, match=r"pp\*dp\*cp\*tp = 1\*3\*1\*1 = 3 ranks; the world has 2"):
        processes(2, _connect, lf.Mesh(dp=3))
    with pytest.raises(MeshError, match=r"needs a multiple of pp\*cp\*tp = 1\*1\*4 = 4 ranks; the world has 2"):
        processes(2, _connect, lf.Mesh(tp=4))
    assert processes(2, _connect, lf.Mesh(tp=2)) == [lf.Mesh(dp=1, tp=2)] * 2  # dp fills what is left


def test_one_process_needs_no_group() -> None:
    axes = connect(lf.Mesh(), lf.devices.get("cpu"))
    assert axes.mesh == lf.Mesh(dp=1)
    assert not torch.distributed.is_initialized()
    with pytest.raises(MeshError, match=r"= 2 ranks; the world has 1"):
        connect(lf.Mesh(dp=2), lf.devices.get("cpu"))


def _fails(axes, how: str) -> None:
    if axes.rank == 1:
        if how == "raise":
            raise KeyError("the reason")
        os._exit(7)
    axes.world.barrier()


def test_what_a_child_raises_is_raised_here() -> None:
    with pytest.raises(KeyError, match="the reason") as caught:
        processes(2, _fails, "raise")
    assert "in _fails" in str(caught.value.__cause__)
    assert "rank 1" in str(caught.value.__cause__)


def _late(axes) -> None:
    time.sleep(60 if axes.rank == 0 else 0)


def test_a_child_that_dies_or_hangs_is_told() -> None:
    with pytest.raises(RuntimeError):  # that rank 1 died with exit code 7, or what rank 0 says of a connection that was closed
        processes(2, _fails, "die")
    with pytest.raises(TimeoutError, match=r"ranks \[0(, 1)?\] of mesh dp=2 said nothing for 1 s"):
        processes(2, _late, timeout_s=1)


def test_context_over_processes_is_plain_data() -> None:
    assert processes(2, lambda axes: context(axes).axes.coords["dp"]) == [0, 1]


def _timeouts(axes) -> list[float]:
    axes = lf.connect(lf.Mesh(tp=2), lf.devices.get("cpu"), timeout_s=7)
    groups = [axes[name].group for name in ("tp", "dp", ("dp", "tp"))]
    return [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups if g is not torch.distributed.group.WORLD]


def test_a_time_limit_holds_for_every_group() -> None:
    assert processes(4, _timeouts) == [[7.0, 7.0]] * 4


def test_ranks_that_srun_started_meet_or_are_told_how(monkeypatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # of a launcher that runs these tests
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(ValueError, match="start it as `srun scripts/launch"):
        lf.connect(lf.Mesh(), lf.devices.get("cpu"))
    monkeypatch.delenv("SLURM_NTASKS")
    for name, value in {"NNODES": "2", "NODE_RANK": "0", "NPROC_PER_NODE": "4", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"8 ranks and this process is none of them: start it with scripts/launch or torchrun"):
        lf.connect(lf.Mesh(), lf.devices.get("cpu"))

"""Laws that are about a whole process: no globals (6), and no waiting of the host inside a step (9). README.md names where each law is tested."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from helpers import ROOT, context, processes
from torch.utils._python_dispatch import TorchDispatchMode

import lf
from lf import parity, tree
from lf.models.small import tiny
from lf.ops.attention import attention as twin
from lf.schedule import one_f_one_b

MESH = lf.Mesh(tp=2, dp=2)

# law 9: the host never waits inside a step


class Reads(TorchDispatchMode):
    """Which ops make the host wait for a value: item() and all that uses it (bool, int, float, if), and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags) and not by_integers(func, args):
            self.at.append(f"{func}: {asked()}")
        return func(*args, **(kwargs or {}))


def by_integers(func: Any, args: Any) -> bool:
    """x[i] has a known shape, unless i is a mask."""
    return "aten.index.Tensor" in str(func) and not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def asked() -> str:
    """The file and the function that asked, if they are ours."""
    frame: Any = sys._getframe(2)
    while frame and (frame.f_code.co_name.startswith("<") or not Path(frame.f_code.co_filename).is_relative_to(ROOT / "lf")):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)} {frame.f_code.co_name}" if frame else "not ours"


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Of this thread. On a CPU tolist() and numpy() take the memory as it is and no op is dispatched: they are watched by name."""
    with monkeypatch.context() as patch, Reads() as mode:
        for name in ("tolist", "numpy", "__array__"):
            right = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda x, *a, name=name, right=right: (mode.at.append(f"{name}: {asked()}"), right(x, *a))[1])
        yield mode.at


def a_step(axes: Any, monkeypatch: pytest.MonkeyPatch, readable: bool) -> list[str]:
    """What the host reads within the second step of AdamW with clipping, on this rank."""
    ctx = context(axes)
    if readable:
        ctx = attrs.evolve(ctx, ops=SimpleNamespace(**{**vars(ctx.ops), "attention": twin}))
    layout, dp = lf.layout(tiny(), axes.mesh), axes["dp"]
    init, step = lf.train.make(layout, lf.optim.adamw(lf.optim.warmup_cosine(0.1, 1, 9)), one_f_one_b(1, 2), ctx, clip=0.5)
    rows = [parity.random_batches(tiny(), 0, i, 2 * dp.size, 15)[dp.index :: dp.size] for i in range(2)]
    state, _ = step(init(lf.init(layout, ctx, 0)), rows[0])
    axes.world.barrier()
    with reads(monkeypatch) as seen:
        step(state, rows[1])
        axes.world.barrier()  # tolist() is watched for all threads: none goes on while another is looked at
    return seen


BATCH = "numpy: lf/models/tokens.py accepts"  # looks at a batch that the host has just made, and only where it lies in the host's memory


@pytest.mark.parametrize("mesh", [lf.Mesh(dp=1), MESH], ids=str)
def test_a_step_reads_nothing_from_the_device(mesh: lf.Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    for seen in lf.sim.spmd(mesh, a_step, monkeypatch, True):
        assert set(seen) <= {BATCH}


def test_a_batch_on_a_device_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = parity.random_batches(tiny(), 0, 0, 1, 15)
    with reads(monkeypatch) as seen:
        tiny().accepts(lf.Batch({name: x.to("meta") for name, x in batch.plan.items()}))
    assert seen == []


def test_the_one_read_on_a_cpu_is_where_documents_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """lf/kernels/sdpa.py is a kernel for the CPU alone: its host and its device share memory, so nobody waits. Another device has another one."""
    (seen,) = lf.sim.spmd(lf.Mesh(dp=1), a_step, monkeypatch, False)
    assert [read for read in seen if read != BATCH] == ["tolist: lf/kernels/sdpa.py _attention"] * (2 * 2)  # two microbatches, two layers
    others = [name for name in lf.devices.KNOWN if name != "cpu"]
    assert not [n for n in others if importlib.import_module(f"lf.devices.{n}").OPS["attention"].startswith("lf.kernels.sdpa.")]


HOST = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "float": lambda x: float(x[0]),
    "nonzero": torch.nonzero,
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x + 1),
    "unique": torch.unique,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "isfinite": lambda x: 1 if torch.isfinite(x).all() else 0,
}


@pytest.mark.parametrize("what", HOST)
def test_a_read_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3.0)
    with reads(monkeypatch) as seen:
        x[torch.tensor([0, 1])].sum()
        torch.where(x > 0, x, 0.0)
        assert seen == []
        HOST[what](x)
    assert seen, "the measure is blind"


# law 6: no globals


def trained(axes: Any, model: lf.segment.Model, seed: int) -> Iterator[dict[str, float]]:
    """The metrics of three steps, one at a time; in the end a number for every parameter."""
    ctx = context(axes)
    layout, dp = lf.layout(model, axes.mesh), axes["dp"]
    init, step = lf.train.make(layout, lf.optim.adamw(0.05), one_f_one_b(1, 4 // dp.size), ctx)
    state = init(lf.init(layout, ctx, seed))
    for i in range(3):
        state, metrics = step(state, parity.random_batches(model, seed, i, 4, 15)[dp.index :: dp.size])
        yield {k: v.item() for k, v in metrics.items() if k != "finite"}
    yield {path: w.abs().sum().item() for path, w in tree.items(state.params)}


ONE, OTHER = (tiny(), 1), (tiny(tied=False, vocab=29, dim=12), 2)


def alone(axes: Any, what: tuple[lf.segment.Model, int]) -> list[dict[str, float]]:
    return list(trained(axes, *what))


def in_turns(axes: Any) -> list[tuple[dict[str, float], ...]]:
    """A step of the one, a step of the other, in the same processes: one layout has tp=2, the other dp=2."""
    other = lf.connect(lf.Mesh(dp=2), lf.devices.get("cpu"))
    return list(zip(trained(axes, *ONE), trained(other, *OTHER)))


def test_two_models_with_two_layouts_live_in_one_process() -> None:
    want = zip(*(lf.sim.spmd(mesh, alone, what) for mesh, what in ((lf.Mesh(tp=2, dp=1), ONE), (lf.Mesh(dp=2), OTHER))))
    for rank, (got, (one, other)) in enumerate(zip(processes(lf.Mesh(tp=2, dp=1), in_turns), want)):
        for i, (a, b) in enumerate(zip(one, other)):
            assert got[i][0] == pytest.approx(a, rel=1e-9), f"rank {rank}"
            assert got[i][1] == pytest.approx(b, rel=1e-9), f"rank {rank}"


def test_two_worlds_of_threads_at_once() -> None:
    cases = [(lf.Mesh(tp=2, dp=1), ONE), (MESH, OTHER), (lf.Mesh(dp=2), ONE)]
    want = [lf.sim.spmd(mesh, alone, what) for mesh, what in cases]
    got: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: lf.sim.spmd(cases[i][0], alone, cases[i][1])})) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(len(cases))] == want

"""Simulated ranks: what does not fit together is told at once, with the places, and never hangs."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lf.mesh import Mesh
from lf.sim import CollectiveMismatch, Deadlock, spmd

TWO, THREE = Mesh(dp=2), Mesh(dp=3)


def both(fn_0, fn_1):
    """Rank 0 does one thing, the others another."""
    return lambda axes: (fn_0 if axes.rank == 0 else fn_1)(axes["dp"])


ONES = torch.ones(2)
MISMATCHES = {
    "another collective": (lambda dp: dp.sum(ONES), lambda dp: dp.all_gather(ONES, (2, 2))),
    "another shape": (lambda dp: dp.sum(ONES), lambda dp: dp.sum(torch.ones(3))),
    "another dtype": (lambda dp: dp.sum(ONES), lambda dp: dp.sum(ONES.double())),
    "another op": (lambda dp: dp.sum(ONES), lambda dp: dp.max(ONES)),
    "other sizes": (lambda dp: dp.all_gather(ONES, (2, 2)), lambda dp: dp.all_gather(ONES, (1, 2))),
    "another dim": (lambda dp: dp.all_gather(torch.ones(2, 2), (2, 2), 0), lambda dp: dp.all_gather(torch.ones(2, 2), (2, 2), 1)),
    "another shift": (lambda dp: dp.shift(ONES, 1), lambda dp: dp.shift(ONES, -1)),
    "another width": (lambda dp: dp.all_to_all(ONES, (1, 1), (1, 1)), lambda dp: dp.all_to_all(torch.ones(2, 3), (1, 1), (1, 1))),
    "another cut": (
        lambda dp: dp.all_to_all(torch.ones(2, 2), (1, 1), (2, 2), 0, 1),
        lambda dp: dp.all_to_all(torch.ones(2, 2), (2, 0), (2, 2), 0, 1),
    ),
    "a barrier": (lambda dp: dp.barrier(), lambda dp: dp.sum(ONES)),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_mismatch_raises_with_both_places(what: str) -> None:
    with pytest.raises(CollectiveMismatch) as caught:
        spmd(TWO, both(*MISMATCHES[what]))
    message = str(caught.value)
    assert "ranks 0 and 1 differ" in message
    assert message.count("test_sim.py:") == 2
    assert all(f"  rank {r}: " in message for r in (0, 1))


def test_wrong_sizes_are_told_by_the_rank_that_has_them() -> None:
    with pytest.raises(ValueError, match="all_gather over dp of 2 ranks: rank 0 has 2 rows, the sizes say 3"):
        spmd(TWO, lambda axes: axes["dp"].all_gather(ONES, (3, 2)))
    with pytest.raises(ValueError, match="reduce_scatter over dp of 2 ranks: rank 0 has 2 rows, the sizes say 5"):
        spmd(TWO, lambda axes: axes["dp"].reduce_scatter(ONES, (3, 2)))
    with pytest.raises(CollectiveMismatch, match=r"all_to_all\(0, 0, \(2,\), .*\n.*all_to_all\(0, 0, \(3,\), "):
        spmd(TWO, lambda axes: axes["dp"].all_to_all(torch.ones(2, 2 + axes.rank), (1, 1), (1, 1)))
    with pytest.raises(ValueError, match=r"expects \[1, 2\] rows, is sent \[1, 1\]"):
        spmd(TWO, lambda axes: axes["dp"].all_to_all(ONES, (1, 1), (1, 1) if axes.rank == 0 else (1, 2)))


def test_a_deadlock_is_found_at_once_and_drawn() -> None:
    began = time.monotonic()
    with pytest.raises(Deadlock) as caught:
        spmd(THREE, lambda axes: axes["dp"].sum(ONES) if axes.rank else None)
    assert time.monotonic() - began < 5  # a safety net, not a measurement: nothing waits for a time-out
    lines = str(caught.value).splitlines()
    assert lines[0] == "no rank can go on:"
    assert "rank 0: has returned" in lines[1]
    assert "all_reduce sum" in lines[2]
    assert "for ranks [0]" in lines[2]
    assert "test_sim.py:" in lines[3]


def test_a_cycle_of_groups_is_a_deadlock() -> None:
    def body(axes):
        order = ("dp", "tp") if axes.rank in (0, 3) else ("tp", "dp")
        for name in order:
            axes[name].sum(ONES)

    with pytest.raises(Deadlock, match="no rank can go on"):
        spmd(Mesh(dp=2, tp=2), body)


def test_a_collective_too_few_is_a_deadlock() -> None:
    with pytest.raises(Deadlock):
        spmd(TWO, lambda axes: [axes["dp"].sum(ONES) for _ in range(2 + axes.rank)])


def test_a_failing_rank_ends_all() -> None:
    before = threading.active_count()

    def body(axes):
        if axes.rank == 1:
            raise KeyError("mine")
        axes["dp"].sum(ONES)

    with pytest.raises(KeyError, match="mine"):
        spmd(THREE, body)
    assert threading.active_count() == before  # none is left waiting


def test_a_failure_in_backward_ends_all() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, axes):
            ctx.axes = axes
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            if ctx.axes.rank == 0:
                raise RuntimeError("in backward")
            return ctx.axes["dp"].sum(dy), None

    def body(axes):
        x = torch.ones(2, requires_grad=True)
        Fails.apply(x, axes).sum().backward()

    with pytest.raises(RuntimeError, match="in backward"):
        spmd(TWO, body)


@pytest.mark.parametrize("mesh", [Mesh(dp=1), TWO])
@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_reaches_the_ranks(mesh: Mesh, enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        assert spmd(mesh, lambda axes: torch.is_grad_enabled()) == [enabled] * mesh.size
    assert torch.is_grad_enabled()


def test_results_come_in_the_order_of_the_ranks() -> None:
    mesh = Mesh(dp=2, tp=3)
    assert spmd(mesh, lambda axes, a: (a, axes.rank, axes["tp"].index), "x") == [("x", r, r % 3) for r in range(6)]


def test_one_rank_needs_no_thread() -> None:
    main = threading.current_thread()
    assert spmd(Mesh(), lambda axes: threading.current_thread() is main) == [True]


def test_results_share_no_memory() -> None:
    """A rank that changes what it got must not change what another has."""

    def body(axes):
        dp, x = axes["dp"], torch.ones(4)
        got = [dp.sum(x), dp.all_gather(x, (4, 4)), dp.reduce_scatter(x, (2, 2)), dp.all_to_all(x, (2, 2), (2, 2)), dp.shift(x, 1), dp.max(x)]
        dp.barrier()
        for y in got:
            y += axes.rank + 1
        dp.barrier()
        return [x.sum().item(), *(y[0].item() for y in got)]

    a, b = spmd(TWO, body)
    assert a == [4, 3, 2, 3, 2, 2, 2]
    assert b == [4, 4, 3, 4, 3, 3, 3]


def test_a_joint_axis_has_all_its_ranks() -> None:
    mesh = Mesh(dp=2, cp=1, tp=2)
    got = spmd(mesh, lambda axes: (axes["dp", "tp"].size, axes.world.sum(torch.tensor(axes.rank)).item(), axes[()].size))
    assert got == [(4, 6, 1)] * 4


def test_a_sender_that_waits_elsewhere_still_counts_as_waiting() -> None:
    """Rank 0 sends and then waits for a message that never comes; rank 1 takes what was sent, and then does the same."""

    def body(axes):
        pipe = axes.pipe()
        x, like = torch.ones(2), ((2,), torch.float32, torch.device("cpu"))
        if axes.rank == 0:
            pipe.send(x, 1, "there")
            pipe.recv(*like, 1, "back")()
        else:
            pipe.recv(*like, 0, "there")()
            pipe.recv(*like, 0, "more")()

    with pytest.raises(Deadlock, match="no rank can go on"):
        spmd(Mesh(pp=2, dp=1), body)


def test_messages_keep_their_order_and_their_content() -> None:
    def body(axes):
        pipe = axes.pipe()
        if axes.rank == 0:
            x = torch.arange(3.0)
            pipe.send(x, 1, "first")
            x.zero_()  # it has been sent
            pipe.send(x + 5, 1, "second")
            return []
        waits = [pipe.recv((3,), torch.float32, torch.device("cpu"), 0, what) for what in ("first", "second")]
        return [wait().tolist() for wait in reversed(waits)]

    assert spmd(Mesh(pp=2, dp=1), body)[1] == [[5, 5, 5], [0, 1, 2]]

    def mixed_up(axes):
        if axes.rank == 0:
            axes.pipe().send(torch.ones(1), 1, "third")
        else:
            axes.pipe().recv((1,), torch.float32, torch.device("cpu"), 0, "fourth")()

    with pytest.raises(CollectiveMismatch, match="third"):
        spmd(Mesh(pp=2, dp=1), mixed_up)

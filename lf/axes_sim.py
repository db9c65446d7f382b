"""Many ranks in one process, with real data: each rank is a thread, and only the holder of a baton computes.

The baton is one lock. A rank puts it down while it waits for others, so eight ranks cost little more than one after another, and it is always
known who waits for what: when nobody holds the baton and nobody can go on, that is a deadlock, found at once and drawn, not a time-out.
Collectives are one primitive, `meet`: leave your tensor, wait for the others, look at what all have left. Each leaves a tag (what, shape, dtype,
sizes) and where it was called; ranks that differ raise at once with both places.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from lf.axes import of_world, parted, placed
from lf.axis import at_once, check_rows
from lf.mesh import Mesh
from lf.position import Position


class CollectiveMismatch(RuntimeError):
    """Ranks of one group met in different collectives."""


class Deadlock(RuntimeError):
    """Every rank waits, or has returned, and none can go on."""


class _Ended(BaseException):
    """Unwinds a rank because another one failed."""


@attrs.define
class _Room:
    """One meeting: what each rank has left, and whom to wake."""

    left: dict[int, Any]
    where: dict[int, str]
    full: threading.Condition


class World:
    """What the threads share."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.baton = mesh, threading.Lock()
        self.positions = [Position(rank) for rank in range(mesh.size)]
        self.rooms: dict[tuple[Any, ...], _Room] = {}
        self.waiting: dict[int, tuple[_Room, tuple[int, ...]]] = {}
        self.returned: set[int] = set()
        self.error: tuple[int, BaseException] | None = None

    def meet(self, key: tuple[Any, ...], ranks: tuple[int, ...], rank: int, tag: tuple[Any, ...], x: Any, wait: bool = True) -> list[Any]:
        """Leave (tag, x) in the room and return what every rank of `ranks` has left, once all are there; without `wait` leave it and go on."""
        room = self.post(key, ranks, rank, tag, x)
        if not wait:
            return []
        self.settle(room, ranks, rank)
        return [room.left[r][1] for r in ranks]

    def post(
        self, key: tuple[Any, ...], ranks: tuple[int, ...], rank: int, tag: tuple[Any, ...], x: Any, finish: Callable[[list[Any]], None] | None = None
    ) -> _Room:
        """Leave (tag, x) in the room and go on. The last to come does `finish` with what all have left."""
        here = f"{self.positions[rank].action()}: {tag[0]}{tag[1:]} at {_call_site()}"
        room = self.rooms.setdefault(key, _Room({}, {}, threading.Condition(self.baton)))
        room.left[rank], room.where[rank] = (tag, x), here
        for other, (theirs, _) in room.left.items():
            if theirs != tag:
                raise CollectiveMismatch(f"ranks {other} and {rank} differ:\n  rank {other}{room.where[other]}\n  rank {rank}{here}")
        if len(room.left) == len(ranks):
            del self.rooms[key]
            if finish:
                finish([room.left[r][1] for r in ranks])
            for r in ranks:
                if r in self.waiting and self.waiting[r][0] is room:  # the sender of a message may wait elsewhere by now
                    del self.waiting[r]
            room.full.notify_all()
        return room

    def settle(self, room: _Room, ranks: tuple[int, ...], rank: int) -> None:
        """Wait until all of `ranks` have come to the room."""
        if len(room.left) == len(ranks):
            return
        self.waiting[rank] = room, ranks
        self.look_for_deadlock()
        while len(room.left) < len(ranks) and self.error is None:
            room.full.wait()
        if self.error is not None:
            raise _Ended

    def look_for_deadlock(self) -> None:
        if self.waiting and len(self.waiting) + len(self.returned) == self.mesh.size:
            lines = []
            for r in range(self.mesh.size):
                room, ranks = self.waiting.get(r, (None, ()))
                words = f"{room.where[r]}, for ranks {sorted(set(ranks) - set(room.left))}" if room else ": has returned"
                lines.append(f"  rank {r}{words}")
            raise Deadlock("no rank can go on:\n" + "\n".join(lines))

    def fail(self, rank: int, error: BaseException) -> None:
        self.error = self.error or (rank, error)
        for room in self.rooms.values():
            room.full.notify_all()


class SimAxis:
    """The same as `lf.axis.Axis`, over threads."""

    def __init__(self, world: World, ranks: tuple[int, ...], rank: int, name: str, of: int = 0):
        self.world, self.ranks, self.rank, self.name, self.of = world, ranks, rank, name, of
        self.size, self.index, self.calls = len(ranks), ranks.index(rank), 0
        self.messages: dict[tuple[int, int], int] = {}  # how many have gone from one place to another

    def _meet(self, x: Any, *tag: Any) -> list[Any]:
        self.calls += 1
        return self.world.meet((self.of, self.name, self.ranks, self.calls), self.ranks, self.rank, (*tag, self.name), x)

    def sum(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)

    def max(self, x: Tensor) -> Tensor:
        return self.all_reduce(x, "max")

    def all_reduce(self, x: Tensor, op: str = "sum", later: bool = False, spend: bool = False) -> Any:
        if self.size == 1:
            return at_once(x.detach(), later)
        stacked = torch.stack(self._meet(x.detach(), f"all_reduce {op}", tuple(x.shape), x.dtype))
        return at_once(stacked.sum(0) if op == "sum" else stacked.amax(0), later)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "all_gather", x.shape[dim], sizes[self.index])
        return at_once(torch.cat(self._meet(x.detach(), "all_gather", dim, _but(x.shape, dim), x.dtype, tuple(sizes)), dim), later)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "reduce_scatter", x.shape[dim], sum(sizes))
        full = self._meet(x.detach(), "reduce_scatter", dim, tuple(x.shape), x.dtype, tuple(sizes))
        return at_once(torch.stack([t.split(list(sizes), dim)[self.index] for t in full]).sum(0), later)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], dim: int = 0, join: int | None = None, later: bool = False
    ) -> Any:
        join = dim if join is None else join
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "all_to_all", x.shape[dim], sum(send))
        rest = tuple(n for d, n in enumerate(x.shape) if d not in (dim % x.dim(), join % x.dim()))
        cuts = () if join == dim else tuple(send)  # where another dim is joined, all pieces for one rank have one length
        rows = self._meet(x.detach().split(list(send), dim), "all_to_all", dim, join, rest, cuts, x.dtype)
        got = [pieces[self.index] for pieces in rows]
        if [p.shape[join] for p in got] != list(recv):
            raise ValueError(f"all_to_all over {self.name}: rank {self.rank} expects {list(recv)} rows, is sent {[p.shape[join] for p in got]}")
        return at_once(torch.cat(got, join), later)

    def gather_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        for x, each, dim in zip(xs, sizes, dims):
            check_rows(self, "gather_many", x.shape[dim], each[self.index] if self.size > 1 else x.shape[dim])

        def finish(left: Sequence[Any]) -> None:
            for outs, _ in left:
                for i, (out, dim) in enumerate(zip(outs, dims)):
                    for target, (_, xs) in zip(out.split([xs[i].shape[dim] for _, xs in left], dim), left):
                        target.copy_(xs[i])

        return self._many("gather_many", outs, xs, sizes, dims, finish, later)

    def scatter_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        for x, each, dim in zip(xs, sizes, dims):
            check_rows(self, "scatter_many", x.shape[dim], sum(each))

        def finish(left: Sequence[Any]) -> None:
            for index, (outs, _) in enumerate(left):
                for i, (out, each, dim) in enumerate(zip(outs, sizes, dims)):
                    out.copy_(_added([xs[i].split(list(each), dim)[index] for _, xs in left]))

        return self._many("scatter_many", outs, xs, sizes, dims, finish, later)

    def sum_many(self, xs: Sequence[Tensor], later: bool = False) -> Any:
        def finish(left: Sequence[Any]) -> None:
            for i in range(len(xs)):
                total = _added([mine[i] for _, mine in left])
                for _, mine in left:
                    mine[i].copy_(total)

        return self._many("sum_many", xs, xs, [()] * len(xs), [None] * len(xs), finish, later)

    def _many(
        self, what: str, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int | None],
        finish: Callable[[Sequence[Any]], None], later: bool,
    ) -> Any:  # fmt: skip
        """The last rank that starts it does it for all: until then who has not waited sees nothing, and what has changed meanwhile is seen."""
        if self.size == 1:
            finish([(outs, xs)])
            return _nothing if later else None
        about = [(_but(x.shape, d) if d is not None else tuple(x.shape), x.dtype, tuple(each), d) for x, each, d in zip(xs, sizes, dims)]
        self.calls += 1
        key = (self.of, self.name, self.ranks, self.calls)
        room = self.world.post(key, self.ranks, self.rank, (what, tuple(about), self.name), (outs, xs), finish)

        def wait() -> None:
            self.world.settle(room, self.ranks, self.rank)

        return wait if later else wait()

    def shift(self, x: Tensor, k: int) -> Tensor:
        if k % self.size == 0:
            return x.detach()
        ring = self._meet(x.detach(), "shift", k, tuple(x.shape), x.dtype)
        return ring[(self.index - k) % self.size].clone()

    def send(self, x: Tensor, to: int, what: str) -> Callable[[], None]:
        self._message(self.index, to, x, what, tuple(x.shape), x.dtype, wait=False)
        return lambda: None

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int, what: str) -> Callable[[], Tensor]:
        return self._message(source, self.index, None, what, tuple(shape), dtype)

    def _message(self, source: int, to: int, x: Any, *tag: Any, wait: bool = True) -> Any:
        """Messages from one rank to another arrive in the order of their sends. A send goes on at once; a receive waits when it is asked."""
        n = self.messages[source, to] = self.messages.get((source, to), 0) + 1
        ranks = (self.ranks[source], self.ranks[to])
        key, x = ("message", self.of, self.name, *ranks, n), None if x is None else x.detach().clone()

        def met() -> Any:
            return self.world.meet(key, ranks, self.rank, ("message", *tag), x, wait)

        return (lambda: met()[0]) if wait else met()

    def barrier(self) -> None:
        if self.size > 1:
            self._meet(None, "barrier")


class SimAxes:
    """The same as `lf.axes.Axes`, over threads. `of`: which of its meshes, counted by each rank: axes of one name over the same ranks never meet."""

    def __init__(self, world: World, rank: int, mesh: Mesh | None = None, ranks: Sequence[int] | None = None, of: int = 0):
        self.mesh, self.whole = world.mesh if mesh is None else mesh, ranks is None
        self.ranks = range(self.mesh.size) if ranks is None else tuple(ranks)
        self.rank, self.coords, self.position = rank, self.mesh.coords(rank), world.positions[self.ranks[rank]]
        self._world, self._axes, self._of, self._made = world, dict[tuple[str, ...], SimAxis](), of, 0

    def __getitem__(self, names: str | tuple[str, ...]) -> SimAxis:
        names = (names,) if isinstance(names, str) else tuple(names)
        if names not in self._axes:
            ranks = tuple(self.ranks[r] for r in self.mesh.group(self.rank, *names)) if names else (self.ranks[self.rank],)
            self._axes[names] = SimAxis(self._world, ranks, self.ranks[self.rank], "·".join(names) or "self", self._of)
        return self._axes[names]

    def part(self, names: str | tuple[str, ...], n: int) -> tuple[SimAxis, SimAxis]:
        names = (names,) if isinstance(names, str) else tuple(names)
        made = []
        for ranks, mark in zip(parted(self[names], n), "/%"):
            key = (*names, f"{mark}{n}")
            if key not in self._axes:
                self._axes[key] = SimAxis(self._world, ranks, self.ranks[self.rank], "·".join(names) + key[-1], self._of)
            made.append(self._axes[key])
        return made[0], made[1]

    def over(self, mesh: Mesh, ranks: Sequence[int], parts: Sequence[tuple[tuple[str, ...], int]] = ()) -> SimAxes | None:
        """The axes of another mesh over these ranks. Collective over the world: ranks that ask for different ones are told."""
        mesh, place = placed(self, mesh, ranks)
        if self.mesh.size > 1:
            self.world._meet(None, "over", str(mesh), tuple(ranks))
        self._made += 1
        return None if place is None else SimAxes(self._world, place, mesh, ranks, self._made)

    def links(self) -> SimAxis:
        of_world(self, "links")
        return self.world

    def pipe(self) -> SimAxis:
        """The pp axis; `send` and `recv` need no more."""
        return self["pp"]

    @property
    def world(self) -> SimAxis:
        return self["pp", "dp", "cp", "tp"]

    @property
    def first_of_node(self) -> bool:
        return self.ranks[self.rank] == 0


def spmd(mesh: Mesh, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """fn(axes, *args) once per rank of `mesh`; the results in the order of the ranks.

    Raises what the first failing rank raised, after ending the others; CollectiveMismatch or Deadlock where the ranks do not fit together.
    """
    mesh = mesh.fill()
    world, out = World(mesh), [None] * mesh.size
    grad = torch.is_grad_enabled()  # a thread starts with torch's own default

    def body(rank: int) -> None:
        # Backward must run in its rank's thread: on a GPU torch would hand it to one thread per device, where the baton is not held.
        with world.baton, torch.set_grad_enabled(grad), torch.autograd.set_multithreading_enabled(False):
            if world.error is not None:
                return
            try:
                out[rank] = fn(SimAxes(world, rank), *args)
                world.returned.add(rank)
                world.look_for_deadlock()
            except _Ended:
                pass
            except BaseException as error:
                world.fail(rank, error)

    if mesh.size == 1:
        return [fn(SimAxes(world, 0), *args)]
    threads = [threading.Thread(target=body, args=(r,), name=f"rank {r}", daemon=True) for r in range(mesh.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.error is not None:
        rank, error = world.error
        if hasattr(error, "add_note"):
            error.add_note(f"raised by rank {rank} {mesh.coords(rank)} of mesh {mesh}")
        raise error
    return out


def _nothing() -> None:
    """What waits for what is there already."""


def _added(pieces: Sequence[Tensor]) -> Tensor:
    """Their sum, in their order: what `all_reduce` makes of the same, to the bit."""
    return torch.stack(list(pieces)).sum(0)


def _but(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return tuple(n for d, n in enumerate(shape) if d != dim % len(shape))


def _call_site() -> str:
    """The line outside of the communication code that asked for this collective."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename == __file__
        or frame.f_code.co_filename.endswith("parallel/redistribute.py")
        or "/torch/" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"

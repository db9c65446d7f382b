"""Live mesh axes over real processes: groups of ranks and the raw collectives on them, which carry no gradient.

Every collective takes the sizes that each rank gives or gets. They are always known beforehand (from the spec or from the batch's plan), so
no shape travels, and what a backend cannot do unevenly is padded here and nowhere else. `later=True` starts the collective and returns a
function that waits for it and gives the result. `lf/axes_sim.py` has the same two classes for ranks that are threads; model code cannot tell.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lf import dump
from lf.cluster import ClusterError, find
from lf.config import ConfigError
from lf.mesh import DENSE, EXPERT, Mesh, MeshError
from lf.position import Position

Later = Callable[[], Tensor]
# torch 2.13 renamed these two; older ones have the names that stand second
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Axis:
    """A group of ranks, in the order of the mesh: `.size`, `.index` (this rank's place), `.ranks`, `.name`."""

    def __init__(self, group: dist.ProcessGroup | None, ranks: tuple[int, ...], rank: int, name: str):
        self.group, self.ranks, self.name = group, ranks, name
        self.size, self.index = len(ranks), ranks.index(rank)
        self.ways: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None  # messages up and down the ranks, see Axes.pipe

    def sum(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)

    def max(self, x: Tensor) -> Tensor:
        return self.all_reduce(x, "max")

    def all_reduce(self, x: Tensor, op: str = "sum", later: bool = False, spend: bool = False) -> Any:
        """x of every rank added (or the largest), element by element. `spend`: x is the caller's own, and the sum may take its place."""
        if self.size == 1:
            return at_once(x.detach(), later)
        out = x.detach() if spend and x.is_contiguous() else x.detach().clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(out, OPS[op], self.group, async_op=True)
        return _finish(work, lambda: out, later)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        """The ranks' x joined along `dim`, where rank j has sizes[j]."""
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "all_gather", x.shape[dim], sizes[self.index])
        rows, n = x.detach().movedim(dim, 0).contiguous(), max(sizes)
        if n * self.size != sum(sizes):  # pad to the longest: backends gather equal pieces only
            rows = torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])
        out = rows.new_empty(n * self.size, *rows.shape[1:])
        work = _gather(out, rows, group=self.group, async_op=True)

        def result() -> Tensor:
            even = n * self.size == sum(sizes)
            joined = out if even else torch.cat([piece[:k] for piece, k in zip(out.split(n), sizes)]) if n else out
            return joined.movedim(0, dim).contiguous()

        return _finish(work, result, later)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        """The sum over ranks of x, of which rank j keeps its sizes[j] along `dim`."""
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "reduce_scatter", x.shape[dim], sum(sizes))
        rows, n = x.detach().movedim(dim, 0).contiguous(), max(sizes)
        if n * self.size != sum(sizes):
            padded = rows.new_zeros(self.size, n, *rows.shape[1:])
            for slot, piece in zip(padded, rows.split(list(sizes))):
                slot[: len(piece)] = piece
            rows = padded.flatten(0, 1)
        out = rows.new_empty(n, *rows.shape[1:])
        work = _scatter(out, rows, group=self.group, async_op=True)
        return _finish(work, lambda: out[: sizes[self.index]].movedim(0, dim).contiguous(), later)

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int], dim: int = 0, join: int | None = None) -> Tensor:
        """send[j] of `dim` goes to rank j; recv[j] of `join` (default: `dim`) comes from it; joined in the order of the ranks."""
        join = dim if join is None else join
        if self.size == 1:
            return x.detach()
        dim, join = dim % x.dim(), join % x.dim()
        check_rows(self, "all_to_all", x.shape[dim], sum(send))
        shape = list(x.shape)
        if join != dim:
            check_rows(self, "all_to_all", x.shape[join], recv[self.index])
            shape[dim] = send[self.index]
        shapes = [[k if d == join else n for d, n in enumerate(shape)] for k in recv]
        pieces = x.detach().split(list(send), dim)
        flat = torch.cat([p.reshape(-1) for p in pieces])
        counts = [int(torch.Size(s).numel()) for s in shapes]
        out = flat.new_empty(sum(counts))
        dist.all_to_all_single(out, flat, counts, [p.numel() for p in pieces], group=self.group)
        return torch.cat([piece.view(s) for piece, s in zip(out.split(counts), shapes)], join)

    def shift(self, x: Tensor, k: int) -> Tensor:
        """x of the rank k places before this one on the ring; all of one shape."""
        if k % self.size == 0:
            return x.detach()
        x, out = x.detach().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        to, source = self.ranks[(self.index + k) % self.size], self.ranks[(self.index - k) % self.size]
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, to, self.group), dist.P2POp(dist.irecv, out, source, self.group)]
        ):
            work.wait()
        return out

    def send(self, x: Tensor, to: int, what: str) -> Callable[[], None]:
        """Starts sending x to place `to`, which must receive it in the same order; the function returned waits until it has left. `what` says
        what it is: simulated ranks compare it."""
        x = x.detach().contiguous()
        if not x.numel():
            return _nothing
        work = dist.isend(x, self.ranks[to], self._way(self.index, to))

        def wait() -> None:
            assert x.numel()  # held here, it lives until it has left
            assert work is not None
            work.wait()

        return wait

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int, what: str) -> Later:
        """Starts receiving what place `source` sends; the function returned waits for it."""
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
        if not out.numel():
            return lambda: out
        work = dist.irecv(out, self.ranks[source], self._way(source, self.index))
        return _finish(work, lambda: out, later=True)  # type: ignore[return-value]

    def _way(self, source: int, to: int) -> dist.ProcessGroup:
        assert self.ways is not None, "Axes.pipe makes them"
        return self.ways[source > to]

    def barrier(self) -> None:
        """Every rank of the group has come this far."""
        self.all_reduce(torch.zeros(1))


class Axes:
    """Live axes of one rank: axes["tp"], or a joint group axes["dp", "tp"]. Groups are made when first used and shared by their ranks.

    `position`: where the rank is in its program; the interpreter tells it. logs: the folder where a launcher looks for it.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        timeout: datetime.timedelta | None = None,
        logs: str | None = None,
        ranks: Sequence[int] | None = None,
        position: Position | None = None,
    ):
        self.mesh, self.rank, self.coords, self.timeout = mesh, rank, mesh.coords(rank), timeout
        self.ranks = tuple(range(mesh.size)) if ranks is None else tuple(ranks)  # of the world, in the order of the mesh
        where = ",".join(f"{a}={self.coords[a]}" for a in ("pp", "dp", "cp", "tp") if mesh[a] > 1)
        self.position = Position(rank, where, logs) if position is None else position
        self._axes: dict[tuple[str, ...], Any] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._own = ranks is None  # groups are made when first used, else all in `over`

    def __getitem__(self, names: str | tuple[str, ...]) -> Any:
        names = (names,) if isinstance(names, str) else tuple(names)
        if names not in self._axes:
            ranks = tuple(self.ranks[r] for r in self.mesh.group(self.rank, *names)) if names else (self.ranks[self.rank],)
            self._axes[names] = self._axis(ranks, "·".join(names) or "self")
        return self._axes[names]

    def over(self, mesh: Mesh, ranks: Sequence[int]) -> Axes | None:
        """The axes of another mesh, whose rank i is `ranks[i]` of this world; None on a rank that is none of these.

        Collective over this world, in one order on all ranks. All groups that the mesh can need are made here and by every rank, and a rank that is
        in none of them makes one of itself: torch names a group after its ranks and after how many groups a process has made before, so ranks that
        had made different numbers of groups would not find each other. What a group costs is small until it is first used.
        """
        mesh, place = mesh.fill(len(ranks)), {r: i for i, r in enumerate(ranks)}
        mine = place.get(self.ranks[self.rank])
        out = None if mine is None else Axes(mesh, mine, self.timeout, ranks=ranks, position=self.position)
        for names in _groups_of(mesh):
            members = (self.ranks[self.rank],) if mine is None else tuple(ranks[r] for r in mesh.group(mine, *names))
            group = self._new_group(members)
            if out is not None:
                out._groups[members] = group
        if mesh.pp > 1:
            members = (self.ranks[self.rank],) if mine is None else tuple(ranks[r] for r in mesh.group(mine, "pp"))
            ways = self._new_group(members), self._new_group(members)
            if out is not None:
                out["pp"].ways = ways
        return out

    def links(self) -> Any:
        """The world axis, ready for `send` and `recv` between any two ranks, in each direction by a communicator of its own. The first call is
        collective over the world."""
        axis = self.world
        if axis.size > 1 and axis.ways is None:
            axis.ways = (self._new_group(axis.ranks), self._new_group(axis.ranks))
        return axis

    @property
    def world(self) -> Any:
        """All ranks."""
        return self["pp", "dp", "cp", "tp"]

    @property
    def first_of_node(self) -> bool:
        """Whether this rank does what is done once on each node; a launcher that does not number the ranks of a node makes each one the first."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def pipe(self) -> Any:
        """The pp axis, ready for `send` and `recv`: each direction has a communicator of its own, so that neither waits for the other. The first
        call is collective over the axis."""
        axis = self["pp"]
        if axis.size > 1 and axis.ways is None:
            axis.ways = (self._new_group(axis.ranks), self._new_group(axis.ranks))
        return axis

    def _axis(self, ranks: tuple[int, ...], name: str) -> Any:
        if len(ranks) > 1 and ranks not in self._groups:
            assert self._own, f"{name} of mesh {self.mesh} is no group that `over` has made"
            world = dist.group.WORLD
            assert world is not None
            self._groups[ranks] = self._new_group(ranks) if len(ranks) < self.mesh.size else world
        return Axis(self._groups.get(ranks), ranks, self.ranks[self.rank], name)

    def _new_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """Only the members call, in the order in which the program reaches their first collective."""
        return dist.new_group(list(ranks), self.timeout, use_local_synchronization=True)


def _groups_of(mesh: Mesh) -> Iterator[tuple[str, ...]]:
    """The axes of every group of more than one rank that a mesh can have, in one order: each set of axes larger than 1 of either factoring."""
    for grid in (DENSE, EXPERT) if mesh.ep * mesh.etp > 1 else (DENSE,):
        large = [axis for axis in grid if mesh[axis] > 1]
        for n in range(1, len(large) + 1):
            yield from combinations(large, n)


def connect(mesh: Mesh, device: ModuleType, timeout_s: float | None = None) -> Axes:
    """Live axes for this process, in the world that torchrun, srun or a plain `python` (one rank) has set up.

    A collective that some rank does not join ends with an error after `timeout_s` seconds; None: what `scripts/launch --timeout` says, or 600.
    From here on SIGUSR1 makes this process write where it is (lf/dump.py). Raises MeshError when the mesh does not have exactly the ranks of the
    world, ClusterError when srun has started several ranks but nobody has told them how to meet.
    """
    timeout_s = _limit() if timeout_s is None else timeout_s
    cluster = find(os.environ)
    if cluster.world and cluster.world > 1 and "WORLD_SIZE" not in os.environ:
        if cluster.rank is None:
            raise ClusterError(f"this job has {cluster.world} ranks and this process is none of them: start it with scripts/launch or torchrun")
        for name, value in cluster.env.items():  # under plain srun: what torch.distributed reads
            os.environ.setdefault(name, value)
    world, timeout = int(os.environ.get("WORLD_SIZE", "1")), datetime.timedelta(seconds=timeout_s)
    mesh = mesh.fill(world)
    device.select(int(os.environ.get("LOCAL_RANK", "0")))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(device.BACKEND, timeout=timeout)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if dist.is_initialized() and dist.get_world_size() != mesh.size:
        raise MeshError(f"mesh {mesh} has {mesh.size} ranks; the process group has {dist.get_world_size()}")
    axes = Axes(mesh, rank, timeout, os.environ.get("LF_RANK_LOGS"))
    dump.listen(axes.position.line)
    return axes


def _limit() -> float:
    words = os.environ.get("LF_TIMEOUT", "600")
    try:
        if 0 < (seconds := float(words)) < 1e9:
            return seconds
    except ValueError:
        pass
    raise ConfigError(f"LF_TIMEOUT={words}: give seconds, more than 0; it is how long a collective waits for the other ranks")


def solo() -> Axes:
    """Axes of a mesh of one rank, whatever else this process belongs to: for work that one rank does alone."""
    return Axes(Mesh(dp=1), 0)


def check_rows(axis: Any, what: str, got: int, want: int) -> None:
    if got != want:
        raise ValueError(f"{what} over {axis.name} of {axis.size} ranks: rank {axis.ranks[axis.index]} has {got} rows, the sizes say {want}")


def _nothing() -> None:
    """What waits for a message without content."""


def at_once(x: Tensor, later: bool) -> Tensor | Later:
    return (lambda: x) if later else x


def _finish(work: Any, result: Later, later: bool) -> Tensor | Later:
    def wait() -> Tensor:
        work.wait()
        return result()

    return wait if later else wait()

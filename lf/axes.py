"""Live mesh axes over real processes: which groups of ranks there are, and how they are made.

`lf/axes_sim.py` has the same for ranks that are threads, `lf/axes_meta.py` for one rank on paper; model code cannot tell.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator, Sequence
from itertools import combinations
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from lf import dump
from lf.axis import Axis
from lf.cluster import ClusterError, find
from lf.config import ConfigError
from lf.mesh import DENSE, EXPERT, Mesh, MeshError
from lf.position import Position


class Axes:
    """Live axes of one rank: axes["tp"], or a joint group axes["dp", "tp"]. Groups are made when first used and shared by their ranks.

    `position`: where the rank is in its program; the interpreter tells it. logs: the folder where a launcher looks for it. ranks: those of the
    world that the mesh numbers 0, 1, …, where `over` has made these axes; `rank` is the number in the mesh, `Axis.ranks` are those of the world.
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
        self.whole = ranks is None  # of the world itself
        self.ranks = range(mesh.size) if ranks is None else tuple(ranks)
        where = ",".join(f"{a}={self.coords[a]}" for a in ("pp", "dp", "cp", "tp") if mesh[a] > 1)
        self.position = Position(rank, where, logs) if position is None else position
        self._axes: dict[tuple[str, ...], Any] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._parts: dict[tuple[tuple[str, ...], int], tuple[Any, Any]] = {}

    def __getitem__(self, names: str | tuple[str, ...]) -> Any:
        names = (names,) if isinstance(names, str) else tuple(names)
        if names not in self._axes:
            self._axes[names] = self._axis(self._members(names), "·".join(names) or "self")
        return self._axes[names]

    def part(self, names: str | tuple[str, ...], n: int) -> tuple[Any, Any]:
        """Of the joint group of these axes, (the n neighbours that this rank is among, those that have its place in each such n). Raises MeshError
        where n does not divide the group; AssertionError for groups of another mesh than the world's that `over` was not told of."""
        names = (names,) if isinstance(names, str) else tuple(names)
        if (names, n) not in self._parts:  # a GATHER asks each time, and the ranks of a group may be thousands
            inner, outer = parted(self[names], n)
            where = "·".join(names)
            self._parts[names, n] = self._axis(inner, f"{where}/{n}"), self._axis(outer, f"{where}%{n}")
        return self._parts[names, n]

    def over(self, mesh: Mesh, ranks: Sequence[int], parts: Sequence[tuple[tuple[str, ...], int]] = ()) -> Axes | None:
        """The axes of another mesh, whose rank i is `ranks[i]` of this world; None on a rank that is none of these.

        Collective over the world, in one order on all ranks. Every group that the mesh can need is made here, by all ranks step by step, and a rank
        that is in none makes one of itself, so that all go on with equally many (see `_level`). Two meshes share no group but that of the whole
        world. A group that is never used has no communicator of NCCL, which makes it at the first collective; gloo connects its ranks at once.
        parts: what `part` will be asked for.
        Raises MeshError for ranks that are not there or stand twice, a mesh of another size, and for axes that are not those of the world.
        """
        mesh, place = placed(self, mesh, ranks)
        out = None if place is None else Axes(mesh, place, self.timeout, ranks=ranks, position=self.position)
        alone = (self.ranks[self.rank],)
        self._level()
        for names in _groups_of(mesh):
            members = alone if out is None else out._members(names)
            group = self._new_group(members) if math.prod(mesh[a] for a in names) < self.mesh.size else _world()
            if out is not None:
                out._groups[members] = group
        for names, n in parts:
            for side in (0, 1):
                members = alone if out is None else parted(out[names], n)[side]
                group = self._new_group(members)
                if out is not None:
                    out._groups.setdefault(members, group)
        if mesh.pp > 1:
            members = alone if out is None else out._members(("pp",))
            ways = self._new_group(members), self._new_group(members)
            if out is not None:
                out["pp"].ways = ways
        return out

    def links(self) -> Any:
        """The axis of the world, ready for `send` and `recv` between any two ranks, by one communicator for each direction, as in `pipe`. The first
        call is collective over the world. Raises MeshError for axes that are not those of the world."""
        of_world(self, "links")
        axis = self.world
        if axis.size > 1 and axis.ways is None:
            self._level()
            # With NCCL two ranks make a communicator of the two at their first message each way (ProcessGroupNCCL::pointToPoint; not where the world
            # was made with device_id). The others need not come, but each of the two waits there on the host: messages need one order for all ranks.
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
            assert self.whole, f"{name} of mesh {self.mesh} is no group that `over` has made"
            self._groups[ranks] = self._new_group(ranks) if len(ranks) < self.mesh.size else _world()
        return Axis(self._groups.get(ranks), ranks, self.ranks[self.rank], name)

    def _members(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The ranks of the world in the group of these axes, in the order of the mesh."""
        return tuple(self.ranks[r] for r in self.mesh.group(self.rank, *names)) if names else (self.ranks[self.rank],)

    def _level(self) -> None:
        """From here on all ranks have equally many groups: those that have fewer fill up with groups of themselves alone. torch names a group after
        its ranks and how many groups the process has (`_hash_ranks_to_str`), and ranks with different names for it would wait for each other for
        ever; of groups that are made when first used, some ranks have more than others."""
        if self.mesh.size > 1:
            made = len(dist.distributed_c10d._world.pg_names)
            for _ in range(int(self.world.max(torch.tensor([made]))) - made):
                self._new_group((self.ranks[self.rank],))

    def _new_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """Only the members call, in the order in which the program reaches their first collective."""
        return dist.new_group(list(ranks), self.timeout, use_local_synchronization=True)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def of_world(axes: Any, what: str) -> None:
    if not axes.whole:
        raise MeshError(f"{what}: these axes, of mesh {axes.mesh}, are not those of the whole world; call it on what `lf.connect` gave")


def parted(axis: Any, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ranks of `Axes.part`."""
    if n < 1 or axis.size % n:
        raise MeshError(f"{axis.name} has {axis.size} ranks, which {n} does not divide: take a divisor")
    first = axis.index // n * n
    return axis.ranks[first : first + n], axis.ranks[axis.index % n :: n]


def placed(axes: Any, mesh: Mesh, ranks: Sequence[int]) -> tuple[Mesh, int | None]:
    """The mesh that `over` lays on these ranks, filled, and the number in it of this one, if any. Raises MeshError, the same on all ranks."""
    of_world(axes, "over")
    if not ranks:
        raise MeshError(f"over: no rank is given for the mesh {mesh}")
    if wrong := [r for r in ranks if not 0 <= r < axes.mesh.size]:
        raise MeshError(f"over: {wrong[0]} is no rank of the world, which has 0 to {axes.mesh.size - 1}")
    place = {r: i for i, r in enumerate(ranks)}
    if len(place) < len(ranks):
        raise MeshError(f"over: a rank stands twice in {tuple(ranks)}; each has one place in the mesh {mesh}")
    return mesh.fill(len(ranks)), place.get(axes.rank)


def _groups_of(mesh: Mesh) -> Iterator[tuple[str, ...]]:
    """The axes of every group of more than one rank that a mesh can have, once and in one order: of each set of axes larger than 1 of either
    factoring."""
    seen = set()  # by the group of rank 0: two partitions of this kind that agree there agree everywhere
    for grid in (DENSE, EXPERT) if mesh.ep * mesh.etp > 1 else (DENSE,):
        large = [axis for axis in grid if mesh[axis] > 1]
        for names in (names for n in range(1, len(large) + 1) for names in combinations(large, n)):
            if (group := mesh.group(0, *names)) not in seen:
                seen.add(group)
                yield names


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

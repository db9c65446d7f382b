"""Axes of several meshes over the ranks of one world: threads, real processes and paper agree, and no two of them get in each other's way."""

from __future__ import annotations

import pytest
import torch
from helpers import processes

from lf.axes import solo
from lf.axes_meta import MetaAxes
from lf.mesh import Mesh, MeshError
from lf.sim import CollectiveMismatch, Deadlock, spmd

FOUR = (0, 1, 2, 3)
# mesh, ranks of each chain; the worlds are of dp alone
WORLDS = {
    4: {"a": (Mesh(pp=2, tp=2), FOUR), "b": (Mesh(dp=2), (2, 3)), "c": (Mesh(dp=4, ep=2), FOUR), "d": (Mesh(pp=2, dp=2), (3, 1, 0, 2))},
    6: {"a": (Mesh(pp=2, tp=2), FOUR), "b": (Mesh(dp=2), (4, 5)), "c": (Mesh(dp=6), range(6)), "d": (Mesh(cp=3, tp=2, ep=3), (5, 4, 1, 0, 3, 2))},
}
RUNS = {"threads": spmd, "processes": processes}


def groups(mesh: Mesh) -> list[tuple[str, ...]]:
    dense = [("pp", "tp"), ("pp",), ("dp",), ("cp",), ("tp",), ("dp", "cp"), ("pp", "dp"), ("cp", "tp"), ("pp", "dp", "cp", "tp"), ()]
    return dense + ([("ep",), ("edp",), ("edp", "ep")] if mesh.ep > 1 else [])


def collectives(axes) -> list:
    """Every group of one mesh, each with a collective whose result tells who is where."""
    out = []
    for names in groups(axes.mesh):
        axis = axes[names]
        n, me = axis.size, axis.index
        sizes = [1 + (j % 2) for j in range(n)]
        mine = torch.full((sizes[me], 2), float(axis.ranks[me]))
        rows = torch.arange(2.0 * sum(sizes)).view(-1, 2) * (1 + axes.rank)
        even = torch.arange(2.0 * n).view(-1, 2) * (1 + axes.rank)
        out += [axis.all_gather(mine, sizes), axis.all_gather(mine[:1], [1] * n), axis.all_gather(mine[:0], [0] * n)]
        out += [axis.reduce_scatter(rows, sizes), axis.reduce_scatter(even, [1] * n, later=True)()]
        give = torch.cat([torch.full((1 + (me + j) % 3, 1), 10.0 * axis.ranks[me] + axis.ranks[j]) for j in range(n)])
        counts = [1 + (me + j) % 3 for j in range(n)]
        out += [axis.all_to_all(give, counts, counts), axis.all_to_all(even.T, [1] * n, [2] * n, 1, 0), axis.shift(mine[:1], 1)]
        out += [axis.sum(mine.sum()), axis.max(mine.sum())]
    return out


def piped(axes) -> list:
    """A message to the next stage and one to the stage before, both on their way at once."""
    pipe, out = axes.pipe(), []
    for step in (1, -1):
        if 0 <= pipe.index + step < pipe.size:
            out.append(pipe.send(torch.full((2,), float(axes.rank)), pipe.index + step, f"{step}"))
    got = [
        pipe.recv((2,), torch.float32, torch.device("cpu"), pipe.index - step, f"{step}")
        for step in (1, -1) if 0 <= pipe.index - step < pipe.size
    ]  # fmt: skip
    got = [wait() for wait in got]
    for wait in out:
        wait()
    return got


def linked(axes) -> list[list[float]]:
    """A message from every rank of the world to every other, all at once, two of each, which arrive in their order."""
    link = axes.links()
    others = [r for r in range(link.size) if r != link.index]
    left = [link.send(torch.tensor([10.0 * link.index + r, n]), r, f"{n}") for r in others for n in range(2)]
    got = [link.recv((2,), torch.float32, torch.device("cpu"), r, f"{n}") for r in others for n in range(2)]
    out = [wait().tolist() for wait in got]
    for wait in left:
        wait()
    return out


def everything(axes, size: int) -> dict:
    chains = {name: axes.over(*of) for name, of in WORLDS[size].items()}
    mine = {name: of for name, of in chains.items() if of is not None}
    for of in mine.values():
        assert of.position is axes.position
        assert of.first_of_node == axes.first_of_node
    out = {name: (of.mesh, of.rank, of.coords, [(of[g].size, of[g].index, of[g].ranks) for g in groups(of.mesh)]) for name, of in mine.items()}
    out |= {f"{name} world": of.world.ranks for name, of in mine.items()}
    out |= {f"{name} collectives": collectives(of) for name, of in mine.items()}
    out |= {f"{name} pipe": piped(of) for name, of in reversed(mine.items())}
    out["links"] = linked(axes)
    # b and the first stage of a have no rank in common: while one is in its own, the other may be anywhere
    order = ["a", "b"] if axes.rank < 2 else ["b", "a"]
    out["apart"] = [chains[name]["tp", "dp"].sum(torch.tensor(1.0 + axes.rank)) for name in order if chains[name]]
    # the same collective of two chains over the same ranks, interleaved otherwise on each group
    out["world"] = [axes.world.sum(torch.tensor(1.0 + axes.rank)), *(of.world.sum(torch.tensor(of.rank + 0.5)) for of in mine.values())]
    return out


@pytest.mark.parametrize("size", WORLDS)
def test_threads_and_processes_agree(size: int) -> None:
    threads, real = (run(Mesh(dp=size), everything, size) for run in RUNS.values())
    for rank, (a, b) in enumerate(zip(threads, real)):
        assert a.keys() == b.keys()
        for name in a:
            assert str(a[name]) == str(b[name]), f"rank {rank}: {name}"


@pytest.mark.parametrize("size", WORLDS)
def test_places_are_those_of_the_mesh_and_ranks_those_of_the_world(size: int) -> None:
    """Against rank arithmetic, and the data that went."""
    for rank, got in enumerate(spmd(Mesh(dp=size), everything, size)):
        assert {n for n in got if n in WORLDS[size]} == {name for name, (_, ranks) in WORLDS[size].items() if rank in ranks}
        for name, (mesh, ranks) in WORLDS[size].items():
            if rank not in ranks:
                continue
            mesh, place = mesh.fill(len(ranks)), list(ranks).index(rank)
            assert got[name][:3] == (mesh, place, mesh.coords(place))
            assert got[f"{name} world"] == tuple(ranks)
            for i, names in enumerate(groups(mesh)):
                group = [ranks[r] for r in (mesh.group(place, *names) if names else (place,))]
                assert got[name][3][i] == (len(group), group.index(rank), tuple(group))
                gathered = got[f"{name} collectives"][10 * i + 1]
                assert gathered[:, 0].tolist() == group
            stage = mesh.coords(place)["pp"]
            near = [mesh.rank(**{a: (stage - s if a == "pp" else mesh.coords(place)[a]) for a in ("pp", "dp", "cp", "tp")})
                    for s in (1, -1) if 0 <= stage - s < mesh.pp]  # fmt: skip
            assert [int(x[0]) for x in got[f"{name} pipe"]] == near
        assert got["links"] == [[10.0 * r + rank, n] for r in range(size) if r != rank for n in range(2)]


@pytest.mark.parametrize("size", WORLDS)
def test_on_paper(size: int) -> None:
    def shapes(axes) -> dict:
        chains = {name: axes.over(*of) for name, of in WORLDS[size].items()}
        axes.links()
        return {
            name: of and (of.mesh, of.rank, of.coords, of.world.ranks, of.first_of_node, of.pipe().ranks, [of[g].ranks for g in groups(of.mesh)])
            for name, of in chains.items()
        }

    assert [shapes(MetaAxes(Mesh(dp=size), rank)) for rank in range(size)] == spmd(Mesh(dp=size), shapes)


def trap(axes) -> list[float]:
    """Groups that are made when first used are more on some ranks than on others; then a mesh over ranks of both kinds, and more of the first."""
    if axes.rank < 2:
        axes["tp"].sum(torch.zeros(1))
    both = axes.over(Mesh(pp=2, dp=2), (1, 2, 3, 0))
    some = axes.over(Mesh(tp=2), (1, 2))
    out = [both["dp"].sum(torch.tensor(float(axes.rank))), both["pp"].sum(torch.tensor(float(axes.rank))), *piped(both)]
    out += [some.world.sum(torch.tensor(float(axes.rank)))] if some else []
    out += [axes["dp"].sum(torch.tensor(float(axes.rank))), *piped(axes)] if axes.rank % 2 == 0 else []
    linked(axes)  # collective over the world, and half of the ranks have made more groups
    third = axes.over(Mesh(dp=3), (0, 1, 3))
    return [x.sum().item() for x in out] + ([third.world.sum(torch.tensor(1.0)).item()] if third else [])


def test_ranks_that_have_made_different_numbers_of_groups_find_each_other() -> None:
    """torch names a group after how many a process has: without making up for it, this waits for ever."""
    mesh = Mesh(pp=1, dp=2, tp=2)
    assert processes(mesh, trap, timeout_s=60) == spmd(mesh, trap)


def apart(axes) -> list[str]:
    """Two chains without a rank in common, rank 5 in neither, and groups of the world's own mesh before and after."""
    out = [axes["tp"].sum(torch.tensor(1.0 + axes.rank))] if axes.rank < 2 else []
    one, other = axes.over(Mesh(pp=2), (1, 0)), axes.over(Mesh(dp=2), (4, 3))
    out += [linked(axes), *(piped(one) if one else []), *([other.world.all_gather(torch.tensor([1.0 * axes.rank]), [1, 1])] if other else [])]
    return [str(x) for x in [*out, axes["dp"].sum(torch.tensor(1.0 + axes.rank)), axes["tp"].sum(torch.tensor(1.0 + axes.rank))]]


def test_ranks_that_share_no_chain_have_links() -> None:
    mesh = Mesh(dp=3, tp=2)
    real = processes(mesh, apart, timeout_s=60)
    assert real == spmd(mesh, apart)
    for rank, got in enumerate(real):
        links = str([[10.0 * r + rank, float(n)] for r in range(6) if r != rank for n in range(2)])
        assert got[int(rank < 2)] == links
        assert got[-2:] == [f"tensor({sum(r + 1.0 for r in group):.0f}.)" for group in (range(rank % 2, 6, 2), (rank // 2 * 2, rank // 2 * 2 + 1))]


def test_two_meshes_over_the_same_ranks_do_not_meet() -> None:
    """One rank is in one of them while the other is in the other: with threads that is told, and no tensor goes to the wrong chain."""

    def crossed(axes) -> None:
        one, other = axes.over(Mesh(dp=2), (0, 1)), axes.over(Mesh(dp=2), (0, 1))
        (one if axes.rank == 0 else other)["dp"].sum(torch.ones(1))

    def messages(axes) -> list[float]:
        pipes = [axes.over(Mesh(pp=2), (0, 1)).pipe() for _ in range(2)]
        if axes.rank == 0:
            for wait in [pipe.send(torch.tensor([i]), 1, "x") for i, pipe in ((0.0, pipes[0]), (1.0, pipes[1]), (7.0, axes.links()))]:
                wait()
            return []
        own = [pipe.recv((1,), torch.float32, torch.device("cpu"), 0, "x") for pipe in (axes.links(), *reversed(pipes))]
        return [wait().item() for wait in own]

    with pytest.raises(Deadlock):
        spmd(Mesh(dp=2), crossed)
    assert spmd(Mesh(dp=2), messages) == processes(2, messages) == [[], [7.0, 1.0, 0.0]]


def test_what_over_refuses() -> None:
    def refused(axes, mesh: Mesh, ranks: tuple[int, ...]) -> str:
        with pytest.raises(MeshError) as caught:
            axes.over(mesh, ranks)
        return str(caught.value)

    for mesh, ranks, words in (
        (Mesh(dp=2), (0, 4), "over: 4 is no rank of the world, which has 0 to 3"),
        (Mesh(dp=2), (1, 1), "over: a rank stands twice in (1, 1)"),
        (Mesh(), (), "over: no rank is given"),
        (Mesh(tp=2), (0, 1, 2), "mesh tp=2 needs a multiple of pp*cp*tp = 1*1*2 = 2 ranks; the world has 3"),
    ):
        told = [*spmd(Mesh(dp=4), refused, mesh, ranks), refused(MetaAxes(Mesh(dp=4)), mesh, ranks)]
        assert all(words in x for x in told), told
    assert "4 is no rank" in processes(2, refused, Mesh(dp=2), (0, 4))[1]


def test_axes_of_a_chain_make_no_others() -> None:
    """Only all ranks together can: what some alone made would be too many."""

    def inner(axes) -> list[str]:
        told = []
        for call in (lambda of: of.over(Mesh(dp=2), (0, 1)), lambda of: of.links()):
            with pytest.raises(MeshError, match=r"these axes, of mesh dp=2, are not those of the whole world; call it on what") as caught:
                call(axes.over(Mesh(dp=2), (0, 1)))
            told.append(str(caught.value).split(":")[0])
        return told

    assert [*spmd(Mesh(dp=2), inner), *processes(2, inner), inner(MetaAxes(Mesh(dp=2)))] == [["over", "links"]] * 5


def test_ranks_that_ask_for_different_meshes_are_told() -> None:
    with pytest.raises(CollectiveMismatch, match="over"):
        spmd(Mesh(dp=2), lambda axes: axes.over(Mesh(dp=2), (0, 1) if axes.rank else (1, 0)))


def test_one_rank_needs_no_group() -> None:
    for axes in (solo(), MetaAxes(Mesh()), *spmd(Mesh(), lambda axes: axes)):
        own = axes.over(Mesh(), (0,))
        assert (own.world.size, own.pipe().size, axes.links().size) == (1, 1, 1)
        assert own.world.ranks == (0,)
    assert not torch.distributed.is_initialized()

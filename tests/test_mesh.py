"""Mesh arithmetic for any factoring, and meshes that cannot be, refused by name."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lf.mesh import DENSE, EXPERT, FIELDS, Mesh, MeshError, shares

small = st.integers(1, 3)


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    pp, dp, cp, tp = (draw(small) for _ in range(4))
    n = dp * cp * tp
    ep = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
    etp = draw(st.sampled_from([k for k in range(1, n // ep + 1) if (n // ep) % k == 0]))
    return Mesh(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, etp=etp)


@given(meshes())
def test_coordinates_and_rank_are_inverse(mesh: Mesh) -> None:
    for rank in range(mesh.size):
        at = mesh.coords(rank)
        assert mesh.rank(**{a: at[a] for a in DENSE}) == mesh.rank(**{a: at[a] for a in EXPERT}) == rank
        assert all(0 <= at[a] < mesh[a] for a in DENSE + EXPERT)
    assert math.prod(mesh[a] for a in DENSE) == math.prod(mesh[a] for a in EXPERT) == mesh.size


@settings(max_examples=30)
@given(meshes(), st.data())
def test_groups_partition_the_ranks(mesh: Mesh, data: st.DataObject) -> None:
    grid = data.draw(st.sampled_from([DENSE, EXPERT]))
    axes = tuple(data.draw(st.lists(st.sampled_from(grid), unique=True)))
    groups = {mesh.group(rank, *axes) for rank in range(mesh.size)}
    assert sorted(r for group in groups for r in group) == list(range(mesh.size))
    for group in groups:
        assert list(group) == sorted(group)
        assert len(group) == math.prod(mesh[a] for a in axes)
        rest = {tuple(mesh.coords(r)[a] for a in grid if a not in axes) for r in group}
        assert len(rest) == 1  # they share every other coordinate of the factoring


@given(meshes())
def test_the_two_factorings_share_pp(mesh: Mesh) -> None:
    for rank in range(mesh.size):
        assert mesh.rank(pp=mesh.coords(rank)["pp"]) == mesh.coords(rank)["pp"] * (mesh.size // mesh.pp)


def test_the_last_axis_is_the_fastest() -> None:
    mesh = Mesh(pp=2, dp=2, tp=2)
    assert mesh.group(0, "tp") == (0, 1)
    assert mesh.group(0, "dp") == (0, 2)
    assert mesh.group(0, "pp") == (0, 4)
    assert mesh.group(5, "dp", "tp") == (4, 5, 6, 7)
    assert Mesh(dp=2, ep=2).size == 2  # ep refolds, it never multiplies


@given(meshes())
def test_text_reads_back(mesh: Mesh) -> None:
    assert Mesh.parse("" if mesh.size == 1 else str(mesh)).fill() == mesh
    assert hash(mesh) == hash(Mesh.parse("" if mesh.size == 1 else str(mesh)).fill())


@given(st.integers(1, 64), small, small)
def test_dp_fills_what_is_left(world: int, tp: int, cp: int) -> None:
    assume(world % (tp * cp) == 0)
    mesh = Mesh(tp=tp, cp=cp).fill(world)
    assert mesh.size == world
    assert mesh["dp"] == world // (tp * cp)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mesh(tp=0), "mesh axis tp=0 must be at least 1"),
        (lambda: Mesh(dp=-2), "mesh axis dp=-2 must be at least 1"),
        (lambda: Mesh(tp=2.0), "mesh axis tp=2.0 must be a whole number"),
        (lambda: Mesh(cp=True), "mesh axis cp=True must be a whole number"),
        (lambda: Mesh(cp=None), "mesh axis cp=None must be a whole number"),
        (lambda: Mesh(dp=2, ep=3), "ep*etp = 3*1 = 3 must divide dp*cp*tp = 2*1*1 = 2"),
        (lambda: Mesh.parse("tq=2"), "unknown axis 'tq'; the axes are pp, dp, cp, tp, ep, etp"),
        (lambda: Mesh.parse("tp"), "'tp' should read tp=N"),
        (lambda: Mesh.parse("tp=x"), "'tp=x' should read tp=N"),
        (lambda: Mesh.parse("tp=--2"), "'tp=--2' should read tp=N"),
        (lambda: Mesh.parse("tp=²"), "'tp=²' should read tp=N"),
        (lambda: Mesh.parse("tp=٢"), "'tp=٢' should read tp=N"),
        (lambda: Mesh.parse("tp=" + "9" * 5000), "should read tp=N"),
        (lambda: Mesh.parse("tp=-"), "'tp=-' should read tp=N"),
        (lambda: Mesh.parse("tp=2,tp=2"), "axis 'tp' is given twice"),
        (lambda: Mesh.parse("tp=-1"), "mesh axis tp=-1 must be at least 1"),
        (lambda: Mesh(tp=2).fill(3), "needs a multiple of pp*cp*tp = 1*1*2 = 2 ranks; the world has 3"),
        (lambda: Mesh(dp=3, tp=2).fill(4), "pp*dp*cp*tp = 1*3*1*2 = 6 ranks; the world has 4"),
        (lambda: Mesh(ep=2).fill(3), "ep*etp = 2*1 = 2 must divide dp*cp*tp = 3*1*1"),
        (lambda: Mesh().size, "dp is open until the number of ranks is known"),
        (lambda: Mesh(dp=2)["qp"], "unknown mesh axis 'qp'; the axes are pp, dp, cp, tp, edp, ep, etp"),
        (lambda: Mesh(dp=2).coords(2), "rank 2 is outside mesh dp=2 of 2 ranks"),
        (lambda: Mesh(dp=2).coords(-1), "rank -1 is outside"),
        (lambda: Mesh(dp=2).rank(dp=2), "coordinate dp=2 is outside mesh dp=2: that axis has 2"),
        (lambda: Mesh(dp=2).group(0, "dp", "ep"), "belong to no single factoring"),
    ],
)
def test_refused_by_name(make, words: str) -> None:
    with pytest.raises(MeshError) as caught:
        make()
    assert words in str(caught.value)


@given(st.integers(0, 200), st.integers(1, 40))
def test_shares_are_balanced_and_whole(n: int, ranks: int) -> None:
    got = shares(n, ranks)
    assert sum(got) == n
    assert len(got) == ranks
    assert max(got) - min(got) <= 1


def test_every_field_is_a_field() -> None:
    assert set(FIELDS) == set(DENSE + EXPERT) - {"edp"}
    assert str(Mesh(dp=1)) == "one rank"

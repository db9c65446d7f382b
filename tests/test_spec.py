"""What follows from a spec, for any heads, kv heads and ranks: every element is held, and counted exactly once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lf import box
from lf.mesh import Mesh
from lf.spec import Init, LayoutError, Param, Part, constant, normal, spec_of

RULES = {"vocab": "tp", "heads": "tp", "mlp": "tp", "expert": "ep", "expert_mlp": "etp"}
ranks = st.integers(1, 9)


@st.composite
def fused(draw: st.DrawFn) -> Param:
    """q, k, v of any number of heads, kv heads that divide them, any head size."""
    kv, group, size = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads = kv * group
    parts = (Part("q", heads, size), Part("k", kv, size, of=heads), Part("v", kv, size, of=heads))
    if draw(st.booleans()):
        return Param(((heads + 2 * kv) * size, 2), ("heads", "embed"), Init(), parts)
    return Param((2, (heads + 2 * kv) * size), ("embed", "heads"), Init(), parts, part_dim=1)


@st.composite
def plain(draw: st.DrawFn) -> Param:
    names = draw(st.permutations(["vocab", "embed", None]))
    shape = tuple(draw(st.integers(1, 7)) for _ in names)
    return Param(shape, tuple(names), Init(), part_dim=draw(st.integers(0, 2)))


@st.composite
def vocabulary(draw: st.DrawFn) -> Param:
    n, unit = draw(st.integers(1, 40)), draw(st.integers(1, 8))
    return Param((n, 2), ("vocab", "embed"), Init(), (Part("", -(-n // unit), unit, rows=n),))


params = st.one_of(fused(), plain(), vocabulary(), st.just(Param((3,), (None,), Init())), st.just(Param((), (), Init())))


@given(params, ranks, st.integers(1, 3))
def test_every_element_is_held_and_counted_once(param: Param, tp: int, dp: int) -> None:
    mesh = Mesh(dp=dp, tp=tp)
    spec = spec_of("w", param, RULES, mesh)
    coords = [mesh.coords(r) for r in range(mesh.size)]
    for i, part in enumerate(spec.pieces(coords[0])):
        held, owned = torch.zeros(part.shape), torch.zeros(part.shape)
        for at in coords:
            held[box.slices(spec.pieces(at)[i].box, box.whole(part.shape))] = 1
            for mine in spec.owned(at):
                if mine.key == part.key:
                    owned[box.slices(mine.box, box.whole(part.shape))] += 1
        assert held.all()
        assert (owned == 1).all()
    assert sum(box.volume(p.shape and box.whole(p.shape)) for p in spec.pieces(coords[0])) == max(1, torch.Size(param.shape).numel())


@given(params, ranks)
def test_pieces_tile_the_local_tensor(param: Param, tp: int) -> None:
    spec = spec_of("w", param, RULES, Mesh(dp=1, tp=tp))
    for rank in range(tp):
        coords = spec.mesh.coords(rank)
        local = torch.zeros(spec.local_shape(coords))
        for piece in spec.pieces(coords):
            view = piece.view(local)
            assert tuple(view.shape) == box.shape(piece.box)
            view += 1
        assert (local == 1).all()
        for piece in spec.owned(coords):  # what is owned lies inside of what is held
            view = piece.view(local)
            assert tuple(view.shape) == box.shape(piece.box)
            view += 1
        assert local.numel() == 0 or local.max() <= 2


@given(params, ranks)
def test_the_first_holder_counts(param: Param, tp: int) -> None:
    """An element that several ranks hold is owned by the lowest of them."""
    spec = spec_of("w", param, RULES, Mesh(dp=2, tp=tp))
    seen: list[set[int]] = [set() for _ in spec.pieces(spec.mesh.coords(0))]
    for rank in range(spec.mesh.size):
        coords = spec.mesh.coords(rank)
        for i, piece in enumerate(spec.pieces(coords)):
            index = torch.arange(torch.Size(piece.shape).numel()).view(piece.shape)
            mine = set(index[box.slices(piece.box, box.whole(piece.shape))].flatten().tolist())
            own = [o for o in spec.owned(coords) if o.key == piece.key]
            got = {e for o in own for e in index[box.slices(o.box, box.whole(o.shape))].flatten().tolist()}
            assert got == mine - seen[i]
            seen[i] |= mine


@given(st.integers(1, 6), st.integers(1, 6), ranks)
def test_kv_heads_follow_their_query_heads(kv: int, group: int, tp: int) -> None:
    q, k = Part("q", kv * group), Part("k", kv, of=kv * group)
    for rank in range(tp):
        (q0, q1), (k0, k1) = q.units(rank, tp), k.units(rank, tp)
        assert {h // group for h in range(q0, q1)} == set(range(k0, k1))
    held = [k.units(rank, tp) for rank in range(tp)]
    ends = [hi for _, hi in held]
    assert ends == sorted(ends)  # what `owned` relies on, empty shares included
    copies = [sum(lo <= unit < hi for lo, hi in held) for unit in range(kv)]
    assert k.overlaps(tp) == (max(copies) > 1)


def test_sums_are_over_the_axes_not_named() -> None:
    mesh = Mesh(dp=2, cp=2, tp=2, ep=2, etp=2)
    cases = {
        ("vocab", "embed"): ("dp", "cp"),
        ("embed",): ("dp", "cp", "tp"),
        ("expert", "embed", "expert_mlp"): ("edp",),
        ("expert", "embed", "mlp_inner"): ("edp", "etp"),
    }
    for axes, expected in cases.items():
        spec = spec_of("w", Param((4,) * len(axes), axes, Init()), RULES, mesh)
        assert spec.sum_axes == expected, axes


def test_keys_name_the_parts() -> None:
    param = Param((8, 2), ("heads", None), Init(), (Part("q", 2, 2), Part("k", 1, 2, of=2), Part("v", 1, 2, of=2)))
    assert [p.key for p in spec_of("a/qkv", param, RULES, Mesh(dp=1)).pieces(Mesh(dp=1).coords(0))] == ["a/qkv/q", "a/qkv/k", "a/qkv/v"]
    assert [p.key for p in spec_of("a/w", Param((2,), (None,), Init()), RULES, Mesh(dp=1)).pieces(Mesh(dp=1).coords(0))] == ["a/w"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Part("q", 0), "part 'q': 0 units of 1 rows"),
        (lambda: Part("q", 2, 64, rows=64), "2 units of 64 rows cannot make 64 rows"),
        (lambda: Part("q", 2, 64, rows=129), "2 units of 64 rows cannot make 129 rows"),
        (lambda: Part("k", 4, of=6), "6 units cannot share 4 evenly"),
        (lambda: Param((2, 3), ("vocab",), Init()), "shape (2, 3) has 2 dims, axes ('vocab',) name 1"),
        (lambda: Param((5,), (None,), Init(), (Part("a", 2), Part("b", 2))), "parts a 2 + b 2 do not add up to dim 0 of shape (5,)"),
        (lambda: spec_of("x/w", Param((2, 2), ("vocab", "mlp"), Init()), RULES, Mesh(dp=1)), "x/w: axes ('vocab', 'mlp') put mesh axis 'tp' on"),
        (lambda: spec_of("x/w", Param((2,), ("vocab",), Init()), {"vocab": "ep"}, Mesh(dp=1)), "x/w: the rules put axes ('vocab',) on ['ep']"),
        (lambda: spec_of("x/w", Param((2,), ("vocab",), Init()), {"vocab": "pp"}, Mesh(dp=1)), "on ['pp']; its mesh axes are ('dp', 'cp', 'tp')"),
    ],
)
def test_refused_by_name(make, words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        make()
    assert words in str(caught.value)


def test_initial_distributions() -> None:
    assert normal(0.02) == Init(0.0, 0.02)
    assert constant(1.0) == Init(1.0, 0.0)

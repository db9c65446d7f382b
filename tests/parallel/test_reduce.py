"""Gradients summed over every rank that holds the element, and counted by the first: against sums over logical tensors, for any layout."""

from __future__ import annotations

import pytest
import torch
from helpers import draw

from lf import box
from lf.mesh import Mesh
from lf.parallel.reduce import owned_square_sum, reduce_gradients
from lf.sim import spmd
from lf.spec import Init, Param, Part, spec_of

RULES = {"vocab": "tp", "heads": "tp", "mlp": "tp"}
HD = 2


def params(heads: int, kv: int) -> dict[str, Param]:
    parts = (Part("q", heads, HD), Part("k", kv, HD, of=heads), Part("v", kv, HD, of=heads))
    return {
        "embed": Param((7, 3), ("vocab", "embed"), Init()),
        "norm": Param((3,), ("embed",), Init()),
        "qkv": Param(((heads + 2 * kv) * HD, 3), ("heads", "embed"), Init(), parts),
        "out": Param((3, heads * HD), ("embed", "heads"), Init(), (Part("", heads, HD),), part_dim=1),
        "scalar": Param((), (), Init()),
        "stack": Param((2, 5, 3), (None, "mlp", "embed"), Init(), part_dim=1),
    }


@pytest.mark.parametrize("text", ["dp=2", "tp=2", "tp=3", "dp=2,tp=2", "tp=5", "dp=3,tp=2", "dp=2,tp=4"])
@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (6, 3), (4, 1), (3, 3)])
def test_sums_and_norm_for_any_layout(text: str, heads: int, kv: int) -> None:
    mesh = Mesh.parse(text).fill()
    specs = [spec_of(path, param, RULES, mesh) for path, param in params(heads, kv).items()]

    def local(spec, axes) -> torch.Tensor:
        return draw(spec.path, axes.rank, shape=spec.local_shape(axes.coords))

    def body(axes):
        grads = {s.path: local(s, axes) for s in specs}
        reduce_gradients(specs, grads, {}, axes)()
        owned = [(s.path, p) for s in specs for p in s.owned(axes.coords)]
        square = owned_square_sum(owned, grads, torch.zeros((), dtype=torch.float64))
        return grads, axes.world.sum(square), axes.coords, {s.path: local(s, axes) for s in specs}

    results = spmd(mesh, body)
    square = torch.zeros((), dtype=torch.float64)
    for spec in specs:
        for i, part in enumerate(spec.pieces(mesh.coords(0))):
            full = torch.zeros(part.shape, dtype=torch.float64)  # the definition: every holder's element, added
            for _, _, coords, before in results:
                piece = spec.pieces(coords)[i]
                full[box.slices(piece.box, box.whole(part.shape))] += piece.view(before[spec.path])
            square += full.square().sum()
            for grads, _, coords, _ in results:
                piece = spec.pieces(coords)[i]
                want = full[box.slices(piece.box, box.whole(part.shape))]
                torch.testing.assert_close(piece.view(grads[spec.path]), want, rtol=1e-12, atol=1e-12, msg=f"{spec.path} {piece.key}")
    for _, total, _, _ in results:
        torch.testing.assert_close(total, square, rtol=1e-12, atol=0)


def test_one_launch_for_each_group() -> None:
    mesh = Mesh(dp=2, tp=2)
    specs = [spec_of(path, param, RULES, mesh) for path, param in params(4, 4).items()]  # nothing overlaps at tp=2

    def body(axes):
        grads = {s.path: draw(s.path, shape=s.local_shape(axes.coords)) for s in specs}
        grads["norm"] = grads["norm"].to(torch.float32)
        reduce_gradients(specs, grads, {}, axes)()
        return axes["dp"].calls, axes["dp", "cp"].calls, axes["dp", "cp", "tp"].calls, axes["tp"].calls

    assert spmd(mesh, body) == [(0, 1, 1, 0)] * 4


def test_the_sum_is_there_only_after_waiting() -> None:
    mesh = Mesh(dp=2)
    spec = spec_of("w", Param((2,), ("embed",), Init()), RULES, mesh)

    def body(axes):
        grads = {"w": torch.ones(2)}
        wait = reduce_gradients([spec], grads, {}, axes)
        before = grads["w"].tolist()  # the first rank is here before the other one has begun
        wait()
        return before, grads["w"].tolist()

    (first, after), (_, other) = spmd(mesh, body)
    assert (first, after, other) == ([1, 1], [2, 2], [2, 2])


def test_a_rank_that_owns_nothing_counts_nothing() -> None:
    mesh = Mesh(dp=2)
    spec = spec_of("w", Param((2,), ("embed",), Init()), RULES, mesh)
    squares = [owned_square_sum([("w", p) for p in spec.owned(mesh.coords(r))], {"w": torch.ones(2)}, torch.zeros(())).item() for r in range(2)]
    assert squares == [pytest.approx(2, rel=1e-6), 0]

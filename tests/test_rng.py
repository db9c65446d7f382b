"""Law 10: numbers depend on (seed, key, place) alone, so any box of any layout agrees with the whole."""

from __future__ import annotations

import pytest
import torch
from helpers import context
from hypothesis import given
from hypothesis import strategies as st

import lf
from lf import box, rng, tree
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.models.small import tiny
from lf.parity import randomised
from lf.spec import Init

UNIT = Init(std=1.0)
SHAPE = (3, 300, 520)  # a stack of three, more than a tile in both last dims


def drawn(b: box.Box, shape=SHAPE, seed: int = 0, key: str = "w", init: Init = UNIT) -> torch.Tensor:
    return rng.draw(seed, key, shape, init, b, torch.float64)


WHOLE = drawn(box.whole(SHAPE))


@given(st.tuples(*[st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda e: (min(e), max(e))) for n in SHAPE]))
def test_any_box_is_a_slice_of_the_whole(b: box.Box) -> None:
    assert torch.equal(drawn(b), WHOLE[box.slices(b, box.whole(SHAPE))])


@pytest.mark.parametrize("shape", [(), (5,), (600,), (2, 3, 4, 5)])
def test_any_number_of_dims(shape: tuple[int, ...]) -> None:
    x = drawn(box.whole(shape), shape)
    assert x.shape == shape
    for i in range(shape[0] if shape else 0):
        b = ((i, i + 1), *box.whole(shape[1:]))
        assert torch.equal(drawn(b, shape), x[i : i + 1])


def test_other_keys_seeds_and_tiles_give_other_numbers() -> None:
    b = box.whole((40, 40))
    draws = [drawn(b, (40, 40), seed, key) for seed in (0, 1) for key in ("w", "w2", "v")]
    tiles = [WHOLE[s, r : r + 40, c : c + 40] for s in range(3) for r in (0, 256) for c in (0, 256)]
    several = [*draws, *tiles]
    for i, a in enumerate(several):
        for other in several[:i]:
            same = min(len(a), len(other))
            assert (a[:same] == other[:same]).float().mean() < 0.01
    assert torch.equal(draws[0], drawn(b, (40, 40)))


def test_a_key_is_not_its_parts_run_together() -> None:
    assert rng.generator(1, 23).integers(1 << 60) != rng.generator(12, 3).integers(1 << 60)


def test_the_distribution() -> None:
    x = drawn(box.whole(SHAPE), init=Init(mean=3.0, std=0.5))
    assert x.mean().item() == pytest.approx(3.0, abs=0.01)
    assert x.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(drawn(box.whole((4,)), (4,), init=Init(mean=1.5)), torch.full((4,), 1.5, dtype=torch.float64))


def assembled(model: lf.segment.Model, mesh: lf.Mesh, start) -> dict[str, torch.Tensor]:
    """The logical parts of every parameter, from the pieces of all ranks; every copy must agree."""
    layout = lf.layout(model, mesh)
    ranks = lf.sim.spmd(mesh, lambda axes: (axes.coords, start(layout, context(axes), 5)))
    out: dict[str, torch.Tensor] = {}
    for path, spec in layout.specs.items():
        for coords, params in ranks:
            for piece in spec.pieces(coords):
                full = out.setdefault(piece.key, torch.full(piece.shape, torch.nan, dtype=torch.float64))
                at = full[box.slices(piece.box, box.whole(piece.shape))]
                values = piece.view(tree.get(params, path))
                assert (at.isnan() | (at == values)).all(), piece.key
                at.copy_(values)
    assert not any(x.isnan().any() for x in out.values())
    return out


@pytest.mark.parametrize("start", [lf.init, randomised], ids=["init", "randomised"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_seed_is_the_same_logical_model_on_any_mesh(start, tied: bool) -> None:
    large = Layer(Attention(6, 2, 64, qk_norm=True), GatedMLP(300))  # more than one tile
    for model in (tiny(tied), decoder(DecoderConfig(700, 300, (large,), tied=tied))):
        one = assembled(model, lf.Mesh(dp=1), start)
        for mesh in (lf.Mesh(dp=2), lf.Mesh(tp=2, dp=1), lf.Mesh(tp=5, dp=1), lf.Mesh(dp=2, tp=3)):
            for key, x in assembled(model, mesh, start).items():
                assert torch.equal(x, one[key]), f"{mesh} {key}"


def test_layers_differ_and_seeds_differ() -> None:
    model = tiny()
    layout = lf.layout(model, lf.Mesh(dp=1))
    a, b = (lf.init(layout, context(lf.solo()), seed) for seed in (0, 1))
    assert not torch.equal(a["layers.0.mlp"]["down"], a["layers.1.mlp"]["down"])
    assert not torch.equal(a["layers.0.mlp"]["down"], b["layers.0.mlp"]["down"])

"""Rounding by chance: to a neighbour, right in the mean, the same for an element wherever it lies."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import draw

from lf.box import Box, slices, whole
from lf.ops import rounding
from lf.ops.rounding import Noise, bits, chunks, key_of, rounded
from lf.spec import Piece

STEP = torch.tensor(7)


def of(shape: tuple[int, ...], held: Box | None = None, *, key: str = "w", step: int = 7, seed: int = 0) -> torch.Tensor:
    return bits(key_of(seed, key), torch.tensor(step), shape, whole(shape) if held is None else held)


def test_bits_are_fair_and_unlike_each_other() -> None:
    b = of((512, 256))
    n = b.numel()
    for i in range(32):
        assert abs(((b >> i) & 1).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(n), i
    low, high = ((b >> s) & 0xFFFF for s in (0, 16))
    others = [x & 0xFFFF for x in (of((512, 256), step=8), of((512, 256), key="x"), of((512, 256), seed=1))]
    for other in (high, low.roll(1, 0), low.roll(1, 1), *others):
        r = torch.corrcoef(torch.stack([low.flatten(), other.flatten()]).double())[0, 1]
        assert abs(r) < 5 / math.sqrt(n)
    assert b.unique().numel() > n - 10  # about n²/2³³ pairs are alike by chance


@pytest.mark.parametrize(
    ("shape", "held"),
    [((9, 7), ((2, 5), (3, 7))), ((4, 5, 6), ((1, 3), (2, 5), (0, 4))), ((11,), ((4, 9),)), ((), ()), ((3, 4), ((2, 2), (0, 4)))],
)
def test_an_element_has_its_noise_in_every_box(shape: tuple[int, ...], held: Box) -> None:
    assert torch.equal(of(shape, held), of(shape)[slices(held, whole(shape))])


def test_rows_that_are_made_a_part_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = (Piece("w/a", (6, 4), ((1, 5), (0, 4)), 0, 0), Piece("w/b", (3, 4), ((0, 3), (0, 4)), 0, 4))
    x = torch.arange(28.0).view(7, 4)
    parts = [(v.clone(), b) for (v,), b in chunks(Noise(3, pieces, STEP), [x])]
    monkeypatch.setattr(rounding, "CHUNK", 8)
    fine = [(v.clone(), b) for (v,), b in chunks(Noise(3, pieces, STEP), [x])]
    assert len(parts) == 2
    assert len(fine) == 4
    for i in (0, 1):
        assert torch.equal(torch.cat([p[i] for p in parts]), torch.cat([p[i] for p in fine]))
    assert torch.equal(torch.cat([p[0] for p in parts]), x)


def test_it_goes_to_a_neighbour_as_often_as_the_rest_says() -> None:
    n = 1 << 16
    for value in (1.0 + 0.3 / 128, -(2.0 + 1.7 / 64), 1e-20, 3e38):
        x = torch.full((n,), value)
        out = rounded(x, of((n,)).view(-1))
        assert out.dtype == torch.bfloat16
        down = (x.view(torch.int32) & -65536).view(torch.float32)[0].item()
        up = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)[0].item()
        assert set(out.float().tolist()) == {down, up}
        share = (value - down) / (up - down)
        assert abs((out.float() == up).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_what_bfloat16_holds_stays() -> None:
    x = torch.cat([draw("r", shape=(999,), dtype=torch.float32).bfloat16().float(), torch.tensor([0.0, -0.0, 1e-40, math.inf, -math.inf])])
    x = x.bfloat16().float()
    assert torch.equal(rounded(x, torch.full_like(x, -1, dtype=torch.int32)).view(torch.int16), x.bfloat16().view(torch.int16))

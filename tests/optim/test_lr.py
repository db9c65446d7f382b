"""Learning rates: each shape at every step against its formula in plain Python, and what cannot be refused."""

from __future__ import annotations

import math

import pytest
import torch

from lf import optim
from lf.config import ConfigError


def rates(rate, n: int) -> list[float]:
    return [rate(torch.tensor(s)).item() for s in range(n)]


def formula(name: str, s: int, warmup: int, steps: int, final: float, falling: int) -> float:
    if s < warmup:
        return (s + 1) / warmup
    if name == "constant":
        return 1.0
    start = steps - 1 - falling if name == "wsd" else warmup
    done = min(max((s - start) / max(steps - 1 - start, 1), 0), 1)
    return final + (1 - final) * ((1 + math.cos(math.pi * done)) / 2 if name == "cosine" else 1 - done)


@pytest.mark.parametrize("name", optim.lr.SCHEDULES)
@pytest.mark.parametrize(("warmup", "steps", "final", "decay", "falling"), [(4, 20, 0.1, 0.25, 5), (0, 7, 0.0, 3, 3), (3, 12, 0.5, 9, 9)])
def test_a_schedule_is_its_formula(name: str, warmup: int, steps: int, final: float, decay: float, falling: int) -> None:
    got = rates(optim.schedule(name, 2.0, warmup, steps, final, decay), steps + 4)
    assert got == pytest.approx([2.0 * formula(name, s, warmup, steps, final, falling) for s in range(steps + 4)], rel=1e-6, abs=1e-7)
    if name != "constant":
        assert got[steps - 1 :] == pytest.approx([2.0 * final] * 5, abs=1e-7)  # reached at the last step, and it stays there


def test_a_stable_phase_does_not_depend_on_the_end() -> None:
    short, long = (rates(optim.schedule("wsd", 1.0, 3, steps, decay=4), 20) for steps in (20, 200))
    assert short[:16] == long[:16]
    assert short[16:] < long[16:]
    assert rates(optim.schedule("wsd", 1.0, 0, 5, decay=0), 9) == [1.0] * 9


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("cosin", 1.0, 0, 5), "unknown lr_schedule 'cosin'; did you mean 'cosine'"),
        (("wsd", 1.0, 3, 5, 0.1, 3), "warmup=3 and a decay of 3 steps are more than steps=5"),
        (("wsd", 1.0, 0, 5, 0.1, 1.5), "decay=1.5 must be a share"),
        (("wsd", 1.0, 0, 5, 0.1, -0.1), "decay=-0.1 must be a share"),
        (("constant", 1.0, 9, 5), "warmup=9 must lie between 0 and steps=5"),
        (("linear", -1.0, 0, 5), "lr=-1.0 must not be negative"),
        (("linear", math.nan, 0, 5), "lr=nan must not be negative"),
        (("linear", 1.0, 0, 5, 1.5), "final=1.5 must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(args: tuple, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        optim.schedule(*args)

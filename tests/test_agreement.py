"""How closely less than float64 must agree: by kind, from what one rank is off, and counts not at all."""

from __future__ import annotations

import math

import attrs
import pytest

from lf.agreement import MOST, SMALL, TIMES, Quantity, rounded

ONE = (
    Quantity("load", 8.0, 0.0, 1e-10),
    Quantity("loss", 2.0, 1e-9, 1e-10),
    Quantity("grad_norm", 5.0, 5e-4, 1e-10),
    Quantity("gradient a", 1.0, 1e-3, 1e-10),
    Quantity("gradient b", 1e-6, 1e-6, 1e-10),
    Quantity("parameter a", 1.0, 1e-6, 1e-10),
)


def tolerances(one: tuple[Quantity, ...] = ONE, eps: float = 1e-7) -> dict[str, float]:
    return {q.name: q.tolerance for q in rounded(ONE, one, {"load"}, eps)}


def test_tolerances_go_by_the_worst_of_their_kind() -> None:
    found = tolerances()
    assert found["load"] == 1e-10
    assert found["loss"] == pytest.approx(TIMES * 1e-7 * 2), "a loss that is right by luck does not bind"
    assert found["grad_norm"] == pytest.approx(TIMES * 1e-3 * 5)
    assert found["gradient a"] == pytest.approx(TIMES * 1e-3)
    assert found["gradient b"] == pytest.approx(TIMES * 1e-3 * SMALL), "of the largest, where one is small"
    assert found["parameter a"] == pytest.approx(TIMES * 1e-6)


def test_no_tolerance_hides_a_missing_part() -> None:
    wild = tuple(attrs.evolve(q, error=q.size) for q in ONE)
    assert {q.tolerance / q.size for q in rounded(ONE, wild, {"load"}, 1e-7) if q.name in ("loss", "gradient a")} == {MOST}


def test_errors_are_those_of_the_mesh() -> None:
    mesh = [attrs.evolve(q, error=3 * q.error) for q in ONE]
    assert all(q.ok for q in rounded(mesh, ONE, {"load"}, 1e-7))
    bad = {"load": 1.0, "gradient a": 5e-3, "loss": math.nan, "parameter a": math.inf}
    mesh = [attrs.evolve(q, error=bad.get(q.name, q.error)) for q in ONE]
    assert {q.name for q in rounded(mesh, ONE, {"load"}, 1e-7) if not q.ok} == set(bad)

"""Dealing items: against brute force, against no balance, and its addresses."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lf.batch import BatchError
from lf.chains import Items
from lf.deal import Share, deal, dealt, imbalance, naive
from lf.spec import LayoutError

costs = st.lists(st.one_of(st.integers(0, 20).map(float), st.floats(0, 1e12)), max_size=60)


def loads(costs: list[float], hands: tuple[tuple[int, ...], ...]) -> list[float]:
    return [sum(costs[i] for i in hand) for hand in hands]


@given(costs, st.integers(1, 12))
def test_each_item_is_dealt_once_and_no_place_has_more_than_without_balance(costs: list[float], places: int) -> None:
    hands = deal(costs, places)
    assert len(hands) == places
    assert all(list(hand) == sorted(hand) for hand in hands)
    assert sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    assert max(loads(costs, hands)) <= max(loads(costs, naive(costs, places))) * (1 + 1e-12)


@given(st.lists(st.integers(0, 9), max_size=7), st.integers(1, 4))
def test_near_the_best(costs: list[int], places: int) -> None:
    best = min(max(sum(c for c, p in zip(costs, at) if p == q) for q in range(places)) for at in itertools.product(range(places), repeat=len(costs)))
    assert max(loads(costs, deal(costs, places))) <= best * (4 / 3 - 1 / (3 * places)) + 1e-9


@given(st.floats(0, 1e9), st.integers(0, 50), st.integers(1, 12))
@example(0.0, 5, 3)
def test_equal_items_are_dealt_in_equal_numbers(cost: float, n: int, places: int) -> None:
    numbers = [len(hand) for hand in deal([cost] * n, places)]
    assert max(numbers) - min(numbers) <= 1


def test_exchanges_better_the_longest_first() -> None:
    """3, 3, 2, 2, 2 over two places: the longest first gives 7 and 5, an exchange 6 and 6. Cut in this order they would give 5 and 7."""
    assert loads([3, 2, 3, 2, 2], deal([3, 2, 3, 2, 2], 2)) == [6, 6]


def test_items_that_lie_well_stay() -> None:
    """Where neither finds it, cut in order is better: 12, 13, 13 against 14."""
    costs = [3, 9, 6, 7, 6, 2, 5]
    assert deal(costs, 3) == naive(costs, 3) == ((0, 1), (2, 3), (4, 5, 6))


def test_many_items_of_many_sizes_are_near_even() -> None:
    rng = random.Random(0)
    costs = [rng.lognormvariate(0, 1) for _ in range(10_000)]
    before, after = (imbalance(loads(costs, hands)) for hands in (naive(costs, 100), deal(costs, 100)))
    assert before > 1.2
    assert after < 1.001


def test_imbalance_is_that_of_the_fullest_place() -> None:
    assert imbalance([3.0, 1.0]) == 1.5
    assert imbalance([3.0, 1.0], [1.0, 3.0]) == 1.5  # units run one after another: that another place is full makes up for nothing
    assert imbalance([3.0, 1.0], [0.0, 0.0]) == 1.5
    assert imbalance() == imbalance([]) == imbalance([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_cost_that_cannot_be_is_refused(bad: float) -> None:
    with pytest.raises(BatchError, match=f"item 1 costs {bad}"):
        deal([1.0, bad], 2)
    with pytest.raises(BatchError, match=f"item 1 of data batch dp=1 of microbatch 0 costs {bad}"):
        dealt([[Items((1.0, 2.0)), Items((1.0, bad))]], 1, [[0]])


def test_no_place_is_refused() -> None:
    with pytest.raises(LayoutError, match="1 items over 0 places"):
        deal([1.0], 0)


def test_a_step_is_dealt_by_unit() -> None:
    """Three microbatches, two data batches each, in two units on places of their own."""
    items = [[Items((4.0,)), Items((1.0, 1.0, 2.0))], [Items(()), Items((5.0,))], [Items((1.0,)), Items((2.0, 3.0))]]
    step = dealt(items, 2, [[0, 2], [1, 3, 4]])
    assert step.microbatches == (range(1), range(1, 3))
    assert [step.unit(m) for m in range(3)] == [0, 1, 1]
    assert step.shares == {
        (0, 0): (Share(0, 0, 0),), (0, 2): (Share(0, 1, 0), Share(0, 1, 1), Share(0, 1, 2)),
        (1, 1): (Share(1, 1, 0),), (1, 3): (Share(2, 1, 1),), (1, 4): (Share(2, 0, 0), Share(2, 1, 0)),
    }  # fmt: skip
    assert step.places == {(0, 0): (0,), (0, 1): (2, 2, 2), (1, 0): (), (1, 1): (1,), (2, 0): (4,), (2, 1): (4, 3)}
    assert step.loads == ((4.0, 4.0), (5.0, 3.0, 3.0))
    assert step.before == ((5.0, 3.0), (5.0, 1.0, 5.0))
    assert step.imbalance == (pytest.approx(10 / (4 + 11 / 3)), pytest.approx(9 / (4 + 11 / 3)))

"""Boxes against sets of places."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lf import box

side = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda ends: (min(ends), max(ends)))


def boxes(dims: int) -> st.SearchStrategy[box.Box]:
    return st.tuples(*[side] * dims)


def places(b: box.Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(lo, hi) for lo, hi in b)))


@given(st.integers(1, 3).flatmap(lambda d: st.tuples(boxes(d), boxes(d))))
def test_the_common_part(pair: tuple[box.Box, box.Box]) -> None:
    a, b = pair
    both = box.intersect(a, b)
    assert places(both) == places(a) & places(b)
    assert box.volume(both) == len(places(both))


@given(boxes(2))
def test_slices_cut_a_box_out_of_the_whole(b: box.Box) -> None:
    x = torch.arange(36).view(6, 6)
    cut = x[box.slices(b, box.whole((6, 6)))]
    assert tuple(cut.shape) == box.shape(b)
    assert set(cut.flatten().tolist()) == {6 * i + j for i, j in places(b)}


def test_a_scalar_is_a_box_of_one() -> None:
    assert box.volume(box.whole(())) == 1


def test_boxes_of_other_dims_do_not_meet() -> None:
    with pytest.raises(ValueError, match="zip"):
        box.intersect(box.whole((2,)), box.whole((2, 2)))

"""Nested dicts: flattening and building are inverse, and a map sees that trees are alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lf import tree

keys = st.text("abc.0", min_size=1, max_size=3)
trees = st.dictionaries(keys, st.recursive(st.integers(), lambda kids: st.dictionaries(keys, kids, min_size=1, max_size=3), max_leaves=5), max_size=3)


@given(trees)
def test_build_is_the_inverse_of_items(t: tree.Tree) -> None:
    assert tree.build(tree.items(t)) == t
    assert [v for _, v in tree.items(t)] == tree.leaves(t)
    assert all(tree.get(t, path) == leaf for path, leaf in tree.items(t))


@given(trees)
def test_map_keeps_the_shape(t: tree.Tree) -> None:
    assert dict(tree.items(tree.map(lambda a, b: a + b, t, t))) == {p: 2 * v for p, v in tree.items(t)}


@pytest.mark.parametrize("other", [{}, {"a": {"c": 1}}, {"a": 1}, {"a": {"b": 1}, "d": 2}])
def test_trees_that_differ_are_refused(other: tree.Tree) -> None:
    with pytest.raises(ValueError, match="trees differ"):
        tree.map(lambda a, b: a, {"a": {"b": 1}}, other)

"""Evaluation: one division over all rows, whatever the layout, the microbatches and the ranks that have nothing left."""

from __future__ import annotations

import math

import attrs
import numpy as np
import pytest
import torch
from helpers import context

import lf
from lf import parity
from lf.evaluate import HeldOut, make
from lf.models.small import tiny
from lf.rng import generator
from lf.segment import Objective


def row(k: int) -> lf.data.Row:
    """Rows of unequal length, every other one with hardly a label, so that a mean of means would show."""
    g = generator("evaluate", k)
    n = 9 + k % 4
    labels = g.integers(0, 37, n)
    labels[: (n - 1) * (k % 2)] = lf.IGNORE
    return lf.data.Row(g.integers(0, 37, n), labels, np.array([0, n // 2]))


def evaluated(axes, sets: dict[str, int], micro_batch: int, model=None) -> dict[str, float]:
    ctx = context(axes)
    layout = lf.layout(model or tiny(), axes.mesh)
    return make(layout, {name: HeldOut(row, n) for name, n in sets.items()}, micro_batch, ctx)(parity.randomised(layout, ctx, 0))


@pytest.fixture(scope="module")
def alone() -> dict[str, float]:
    return evaluated(lf.solo(), {"a": 5, "b": 1}, 1)


def test_the_loss_is_the_sum_over_the_count(alone: dict[str, float]) -> None:
    ctx, layout = context(lf.solo()), lf.layout(tiny(), lf.Mesh(dp=1))
    params = parity.randomised(layout, ctx, 0)
    terms = [lf.forward(layout.model, params, lf.data.pack([row(k)]), ctx)["losses"]["cross_entropy"].item() for k in range(5)]
    counts = [int((row(k).labels != lf.IGNORE).sum()) for k in range(5)]
    want = sum(terms) / sum(counts)
    assert alone["eval/a/loss"] == pytest.approx(want, rel=1e-12)
    assert alone["eval/a/perplexity"] == pytest.approx(math.exp(want), rel=1e-12)
    assert abs(want - sum(t / n for t, n in zip(terms, counts)) / 5) > 1e-2, "the rows should tell a mean of means"
    assert alone.keys() == {f"eval/{name}/{key}" for name in "ab" for key in ("loss", "cross_entropy", "perplexity")}


@pytest.mark.parametrize(("mesh", "micro_batch"), [("", 3), ("dp=3", 1), ("tp=2,dp=2", 2), ("tp=3", 7), ("dp=4", 4)])
def test_no_layout_and_no_microbatch_changes_it(alone: dict[str, float], mesh: str, micro_batch: int) -> None:
    for values in lf.sim.spmd(lf.Mesh.parse(mesh).fill(), evaluated, {"a": 5, "b": 1}, micro_batch):
        assert values == pytest.approx(alone, rel=1e-10)


def test_objectives_are_weighted() -> None:
    base = tiny()
    twice = attrs.evolve(base, objectives={"cross_entropy": Objective(2.0, base.objectives["cross_entropy"].count)})
    values = evaluated(lf.solo(), {"a": 2}, 1, twice)
    assert values["eval/a/loss"] == 2 * values["eval/a/cross_entropy"]
    assert values["eval/a/perplexity"] == math.exp(values["eval/a/cross_entropy"])


def test_rows_without_a_label_are_no_division_by_zero() -> None:
    empty = attrs.evolve(row(0), labels=np.full(9, lf.IGNORE))
    layout, ctx = lf.layout(tiny(), lf.Mesh(dp=1)), context(lf.solo())
    assert make(layout, {"a": HeldOut(lambda k: empty, 1)}, 1, ctx)(parity.randomised(layout, ctx, 0))["eval/a/loss"] == 0


def test_nothing_is_learned_and_nothing_kept() -> None:
    layout, ctx = lf.layout(tiny(), lf.Mesh(dp=1)), context(lf.solo())
    params = parity.randomised(layout, ctx, 0)
    before = lf.tree.map(torch.clone, params)
    make(layout, {"a": HeldOut(row, 2)}, 1, ctx)(params)
    lf.tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), params, before)


def test_names_of_sets() -> None:
    assert lf.evaluate.named(("a=x/y=z", "b.1=w")) == {"a": "x/y=z", "b.1": "w"}
    for words, error in ((("x/y",), "'x/y' should read NAME=path"), (("a/b=c",), "should read NAME=path"), (("a=b", "a=c"), "'a' stands twice")):
        with pytest.raises(lf.config.ConfigError, match=error):
            lf.evaluate.named(words)


@pytest.mark.parametrize(("name", "n", "words"), [("a/b", 1, "'a/b': a name is made of"), ("", 1, "'': a name"), ("a", 0, "'a' has no rows")])
def test_a_set_that_cannot_be_is_refused(name: str, n: int, words: str) -> None:
    with pytest.raises(lf.config.ConfigError, match=words):
        make(lf.layout(tiny(), lf.Mesh(dp=1)), {name: HeldOut(row, n)}, 1, context(lf.solo()))

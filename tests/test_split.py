"""How layers are dealt to stages: words that do not add up are refused with words that do, and no split is cheaper than that by cost."""

from __future__ import annotations

import itertools

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lf import parity, split
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.models.small import tiny
from lf.segment import Model, Segment
from lf.spec import LayoutError


def of_layers(n: int, vocab: int = 37) -> Model:
    return decoder(DecoderConfig(vocab, 8, (Layer(Attention(2, 1, 4), GatedMLP(10)),) * n))


@pytest.mark.parametrize(("stages", "sizes"), [(1, (18,)), (4, (4, 5, 4, 5)), (18, (1,) * 18)])
def test_by_count(stages: int, sizes: tuple[int, ...]) -> None:
    assert split.by_count(of_layers(16), stages) == sizes


def test_more_stages_than_layers_leave_some_empty() -> None:
    sizes = split.by_count(of_layers(2), 7)
    assert (sum(sizes), max(sizes), len(sizes)) == (4, 1, 7)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("e,4,4,5,3,h", (1, 4, 4, 5, 3, 1)),
        ("e+3,4,6+3+h", (4, 4, 10)),
        ("4,4,5,3", (5, 4, 5, 4)),
        ("e,16", (1, 17)),
        ("16,h", (17, 1)),
        (" e , 8 + 8 + h ", (1, 17)),
        ("0,e,16,0,h,0", (0, 1, 16, 0, 1, 0)),
        ("e+16+h", (18,)),
        ("e+0,0+16,h", (1, 16, 1)),
    ],
)
def test_words(text: str, sizes: tuple[int, ...]) -> None:
    assert split.explicit(of_layers(16), text) == sizes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("e,4,4,5,h", "4 + 4 + 5 = 13 for the 16 layers between the first and the last; 'e,5,5,6,h' would do"),
        ("e+20,h", "20 for the 16 layers between the first and the last; 'e+16,h' would do"),
        ("e,h", "no number for the 16 layers between the first and the last; 'e+8,8+h' would do"),
        ("e,0,0,h", "0 + 0 = 0 for the 16 layers between the first and the last; 'e,8,8,h' would do"),
        ("e,8,e,8", "'e' stands twice; there is one first layer"),
        ("h,8,8+h", "'h' stands twice; there is one last layer"),
        ("8,e,8,h", "e is the first layer, and 8 stand before it; put it in front of them"),
        ("8+e,8", "e is the first layer, and 8 stand before it"),
        ("e,8,h,8", "h is the last layer, and 8 stand behind it; put it behind them"),
        ("h,e", "h stands before e"),
        ("e,x,h", "'x' should be e, h or a number of layers"),
        ("e,,16", "'' should be e, h or a number of layers"),
        ("e,-1,17", "'-1' should be e, h or a number of layers"),
        ("", "'' should be e, h or a number of layers"),
    ],
)
def test_words_that_cannot_be_are_refused(text: str, words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        split.explicit(of_layers(16), text)
    assert f"split {text!r}: " in str(caught.value)
    assert words in str(caught.value)
    if "would do" in words:
        would = str(caught.value).split("; '")[1].split("'")[0]
        assert sum(split.explicit(of_layers(16), would)) == 18


def test_a_model_of_one_layer_has_no_words() -> None:
    one = Model(None, (Segment("only", "only", {}, lambda p, x, b, c: (x, {})),), {})
    with pytest.raises(LayoutError, match="the model has 1: give counts"):
        split.explicit(one, "e")
    assert split.counts(one, [0, 1]) == (0, 1)


@given(st.lists(st.integers(0, 9), max_size=7), st.integers(1, 4))
def test_no_partition_has_a_smaller_largest_group(costs: list[int], stages: int) -> None:
    def groups(sizes: tuple[int, ...]) -> list[int]:
        at = [0, *itertools.accumulate(sizes)]
        return [sum(costs[a:b]) for a, b in itertools.pairwise(at)]

    def price(sizes: tuple[int, ...]) -> tuple[int, int, int]:
        return max(groups(sizes)), sum(g * g for g in groups(sizes)), sizes.count(0)

    found = split.partition(costs, stages)
    every = [s for s in itertools.product(range(len(costs) + 1), repeat=stages) if sum(s) == len(costs)]
    assert price(found) == min(map(price, every))


def test_the_largest_group_comes_before_evenness() -> None:
    """8 | 4 | 13 has the smallest sum of squares, and a larger largest one than 12 | 12 | 1."""
    assert split.partition([8, 4, 12, 1], 3) == (2, 1, 1)


def test_by_cost_counts_the_head_as_what_it_is() -> None:
    """With a large vocabulary the head is worth many layers, so its stage has few; the embedding is a lookup."""
    batch = parity.random_batches(of_layers(12), 0, 0, 1, 21)[0]
    cheap, dear = of_layers(12, vocab=3), of_layers(12, vocab=1000)
    assert split.by_cost(cheap, 4, batch) == (4, 3, 3, 4)
    sizes = split.by_cost(dear, 4, batch)
    assert sizes == (5, 4, 4, 1)
    costs = [sum(s.flops(batch) for s in layer if s.flops) for layer in dear.layers().values()]
    assert costs[0] == 0
    assert costs[-1] == 6 * len(batch.plan["tokens"]) * 8 * 1000


def test_by_cost_needs_to_know_every_segment() -> None:
    model = tiny()
    silent = attrs.evolve(model, segments=(*model.segments[:2], attrs.evolve(model.segments[2], flops=None), *model.segments[3:]))
    with pytest.raises(LayoutError, match=r"segment 'layers\.0\.mlp' does not say its floating-point operations"):
        split.by_cost(silent, 2, parity.random_batches(model, 0, 0, 1, 9)[0])

"""The stream of rows and its batches against a slow reference that is right by its look."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain

import attrs
import numpy as np
import pytest
import torch
from data_helpers import EOS, documents
from hypothesis import given, settings
from hypothesis import strategies as st

from lf.batch import IGNORE
from lf.data import DataError, Documents, blend, in_order, microbatch, pack, rows, step_batches
from lf.data.permute import drawn, permuted

Item = tuple[int, int, int]  # token, label, position


def circle(docs: Documents, joined: bool) -> list[Item]:
    """(token, label, position in its document) of all tokens of the file."""
    every = [docs[d].tolist() for d in range(len(docs))]
    if joined:
        every = [list(chain(*every))]
    return [(t, label, i) for ids in every for i, (t, label) in enumerate(zip(ids, ids[1:] + [IGNORE]))]


def seen(items: list[Item]) -> list[Item]:
    """What a row of these has: positions count from where it begins, or where a document does."""
    out: list[Item] = []
    for i, (token, label, position) in enumerate(items):
        out.append((token, label, out[-1][2] + 1 if i and position else 0))
    return out


def slow_row(docs: Documents, seq_len: int, seed: int, k: int, joined: bool = False) -> list[Item]:
    """Row k of the shuffled stream, token by token."""
    around, total = circle(docs, joined), len(docs.tokens)
    epoch, i = divmod(k, max(total // seq_len, 1))
    first = drawn(total, seed, "rotation", epoch) + permuted(i, max(total // seq_len, 1), seed, "rows", epoch) * seq_len
    return seen([around[(first + j) % total] for j in range(seq_len)])


lengths = st.lists(st.integers(2, 20), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    lengths, st.none() | st.integers(0, 99), st.integers(1, 40), st.integers(0, 3), st.integers(0, 12), st.integers(1, 4), st.integers(1, 9),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_batch_equals_slow_reference(
    sizes: list[int], cuts: int | None, seq_len: int, seed: int, first: int, b: int, multiple: int, joined: bool, shuffled: bool
) -> None:
    docs = documents(sizes, cuts)
    if shuffled:
        row = rows(docs, seq_len, seed, joined)
        expected = [item for k in range(first, first + b) for item in slow_row(docs, seq_len, seed, k, joined)]
    else:
        row, count = in_order(docs, seq_len, joined)
        assert count == math.ceil(len(docs.tokens) / seq_len)
        padded = circle(docs, joined) + [(0, IGNORE, i) for i in range(-len(docs.tokens) % seq_len)]
        padded += [(0, IGNORE, i) for _ in range(20) for i in range(seq_len)]
        expected = [item for k in range(first, min(first + b, count + 20)) for item in seen(padded[k * seq_len : (k + 1) * seq_len])]
    plan = microbatch(row, first, b, multiple).plan
    expected += [(0, IGNORE, i % seq_len) for i in range(-len(expected) % multiple)]
    names = ("tokens", "labels", "positions")
    assert list(zip(*(plan[n].tolist() for n in names))) == expected
    assert all(plan[n].dtype == torch.int64 for n in names)

    starts = [i for i, (_, _, position) in enumerate(expected) if position == 0]
    total = len(expected)
    assert total % multiple == 0
    assert plan["cu_seqlens"].dtype == torch.int32
    size = len(plan["cu_seqlens"])
    assert plan["cu_seqlens"].tolist() == starts + [total] * (size - len(starts))
    assert size in (16, 32, 64, 128, 256)
    assert size == 16 or size // 2 < len(starts) + 1 <= size
    assert plan["cu_seqlens"].diff().max() <= seq_len


def test_padding_is_its_own_document() -> None:
    plan = microbatch(rows(documents([50]), 5, 0, joined=True), 0, 1, 4).plan
    assert plan["cu_seqlens"].tolist() == [0, 5] + [8] * 14
    assert plan["labels"].tolist()[5:] == [IGNORE] * 3
    assert plan["tokens"].tolist()[5:] == [0] * 3


def test_several_sets_follow_one_another() -> None:
    a, b = documents([7, 3]), documents([4, 9, 2])
    both, count = in_order([a, b], 4)
    of = [[in_order(d, 4)[0](k) for k in range(in_order(d, 4)[1])] for d in (a, b)]
    assert count == 3 + 4
    for got, want in zip([both(k) for k in range(count)], of[0] + of[1]):
        assert all(np.array_equal(getattr(got, name), getattr(want, name)) for name in ("tokens", "labels", "starts"))
    assert in_order([], 4)[1] == 0
    assert (both(count).labels == IGNORE).all()


def test_places_in_the_index_are_those_of_a_scan() -> None:
    for seed in (None, *range(20)):
        docs = documents([7, 3, 12, 5, 9, 2, 30], seed)
        of = [d for d in range(len(docs)) for _ in docs[d]]
        assert [docs.at(t) for t in range(len(docs.tokens))] == of
        begins = [i for i in range(len(of)) if i == 0 or of[i] != of[i - 1]]
        for begin in range(len(of)):
            for stop in range(begin, len(of) + 1):
                assert docs.starts(begin, stop).tolist() == [b for b in begins if begin < b < stop]


# the same stream for any number of ranks, and after any interrupt


def mixed() -> tuple[list[Documents], float]:
    return [documents([7, 3, 12, 5, 9, 2, 30]), documents([4] * 9), documents([100, 2])], 0.5


def blended() -> object:
    (a, b, c), weight = mixed()
    return blend([(weight, rows(a, 8, 1)), (0.3, rows(b, 8, 1)), (0.2, rows(c, 8, 1, joined=True))], 7)


@pytest.mark.parametrize("dp", [1, 2, 3, 8])
def test_stream_is_the_same_on_any_number_of_ranks_and_across_interrupts(dp: int) -> None:
    expected = [blended()(k) for k in range(48 * 3)]  # type: ignore[operator]
    dice = np.random.default_rng(dp)
    consumed, got = 0, []
    while consumed < len(expected):
        source = blended()  # an interrupt: all is made anew from the number of rows consumed, on another number of ranks
        ranks = dp if consumed == 0 else int(dice.choice([1, 2, 3, 8]))
        for _ in range(int(dice.integers(1, 3))):
            steps = [step_batches(source, consumed, 48, 2, ranks, d, 3) for d in range(ranks)]  # type: ignore[arg-type]
            # law 1: microbatch i of coordinate d is the step's microbatch i·dp + d
            got += [steps[d][i] for i in range(48 // 2 // ranks) for d in range(ranks)]
            consumed += 48
    assert len(got) >= len(expected) // 2
    for i in range(len(expected) // 2):
        want = pack(expected[2 * i : 2 * i + 2], 3)
        assert all(torch.equal(got[i].plan[n], want.plan[n]) for n in want.plan)


def test_any_order_of_access_gives_the_same_rows() -> None:
    docs = documents([7, 3, 12, 5, 9, 2, 30])
    row = rows(docs, 11, 5)
    ahead = [row(k).tokens for k in range(40)]
    assert all(np.array_equal(row(k).tokens, ahead[k]) for k in reversed(range(40)))
    assert not all(np.array_equal(rows(docs, 11, 6)(k).tokens, ahead[k]) for k in range(5))


def test_an_epoch_has_every_token_once_and_leaves_out_less_than_a_row() -> None:
    docs = documents([7, 3, 12, 5, 9, 2, 26])
    for seq_len, left in ((8, 0), (9, 1), (11, 9)):
        row, n = rows(docs, seq_len, 3), 64 // seq_len
        epochs = [Counter(np.concatenate([row(e * n + i).tokens for i in range(n)]).tolist()) for e in range(40)]
        missing = [Counter(docs.tokens.tolist()) - e for e in epochs]
        assert all(m.total() == left for m in missing)  # and so none is there twice
        if left == 9:
            assert len(sum(missing, Counter())) == len(set(docs.tokens.tolist()))  # each token is left out at some time, none for ever
        assert not np.array_equal(row(0).tokens, row(n).tokens)


def test_documents_shorter_than_a_row_are_read_round() -> None:
    docs = documents([4, 2])
    for k in range(20):
        r = rows(docs, 15, 0)(k)
        at = docs.tokens.tolist().index(r.tokens[0]) if r.tokens[0] else None
        assert at is None or r.tokens.tolist() == (docs.tokens.tolist() * 4)[at : at + 15]
        assert ((r.tokens == EOS) == (r.labels == IGNORE)).all()
        assert r.starts.tolist() == [0, *(np.flatnonzero(r.tokens[:-1] == EOS) + 1)]


def test_a_permutation_is_one_and_never_changes() -> None:
    for n in (1, 2, 3, 4, 5, 7, 10, 16, 17, 100, 997):
        assert all(sorted(permuted(i, n, 7, "x", e) for i in range(n)) == list(range(n)) for e in range(3))
    assert [permuted(i, 10, 0, "rows", 0) for i in range(10)] == PINNED
    assert [permuted(i, 10**15, 0, "rows", 0) for i in range(3)] == PINNED_LARGE
    assert len({permuted(i, 10**12, 1, "rows", 0) for i in range(5000)}) == 5000
    assert [permuted(i, 10, 0, "rows", 0) for i in range(10)] != [permuted(i, 10, 1, "rows", 0) for i in range(10)]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_come_about_as_often(n: int) -> None:
    orders, keys = math.factorial(n), 30 * math.factorial(n)
    counts = Counter(tuple(permuted(i, n, 0, "orders", key) for i in range(n)) for key in range(keys))
    square = sum((counts[order] - 30) ** 2 / 30 for order in counts) + 30 * (orders - len(counts))
    assert square < orders - 1 + 4 * math.sqrt(2 * (orders - 1)) + 4  # chi-square with orders - 1 degrees of freedom


def test_refusals_name_the_numbers() -> None:
    row = rows(documents([7, 3]), 4, 0)
    with pytest.raises(DataError, match=r"global_batch=20 .* 2\*3 = 6; the nearest that work: 18 or 24"):
        step_batches(row, 0, 20, 2, dp=3)
    with pytest.raises(DataError, match="the nearest that work: 8"):
        step_batches(row, 0, 4, 2, dp=4)
    with pytest.raises(DataError, match="at least 1"):
        step_batches(row, 0, 0, 2)
    with pytest.raises(DataError, match="dp_index=2 is outside 0 … 1"):
        step_batches(row, 0, 4, 2, dp=2, dp_index=2)
    with pytest.raises(DataError, match="consumed=-1"):
        step_batches(row, -1, 4, 2)
    for source in (row, in_order(documents([7, 3]), 4)[0], blend([(1, row)], 0)):
        with pytest.raises(DataError, match="row -1"):
            source(-1)
    with pytest.raises(DataError, match="seq_len=0"):
        rows(documents([7]), 0, 0)
    with pytest.raises(DataError, match="seq_len=0"):
        in_order(documents([7]), 0)
    with pytest.raises(DataError, match="multiple=0"):
        pack([row(0)], 0)


def test_documents_of_one_token_have_nothing_to_learn() -> None:
    """A loss of 0 and a perplexity of 1 would be said of them."""
    for seed in (None, 1):  # with a seed: empty documents among them
        single = documents([1] * 9, seed)
        for refused in (lambda d=single: rows(d, 4, 0), lambda d=single: in_order(d, 4), lambda d=single: in_order([d, d], 4)):
            with pytest.raises(DataError, match=r"documents: documents of one token, .* --joined"):
                refused()
        assert (rows(single, 4, 0, joined=True)(0).labels != IGNORE).any()
        assert in_order([single, documents([2])], 4)[1] == 4, "one of them has something"
    indices = np.array([0, 1, 1, 1])  # one document of two tokens, two empty ones
    pair = attrs.evolve(documents([2]), document_indices=indices)
    assert len(pair) > len(pair.tokens)
    assert (rows(pair, 2, 0)(0).labels != IGNORE).any() or (rows(pair, 2, 0)(1).labels != IGNORE).any()


PINNED = [8, 9, 7, 0, 1, 3, 4, 5, 2, 6]
PINNED_LARGE = [794097091666605, 836885913981070, 259655257023362]

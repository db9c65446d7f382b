"""The stream of rows and its batches against a slow reference that is right by its look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lf.batch import IGNORE
from lf.data import DataError, Documents, epoch_order, microbatch, pack, rows, step_batches, stream

EOS = 0


def documents(lengths: list[int]) -> Documents:
    """Document d of n tokens: ids that no other document has, then EOS."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    tokens[offsets[1:] - 1] = EOS
    return Documents(tokens, offsets, int(offsets[-1]) + 1, EOS, "", Path())


def slow_row(docs: Documents, seq_len: int, seed: int, k: int) -> list[tuple[int, int, int]]:
    """(token, label, position) of row k, token by token from the very beginning."""
    stream: list[tuple[int, int, int]] = []  # token, label, document's number in the stream
    epoch = number = 0
    while len(stream) < (k + 1) * seq_len:
        for d in epoch_order(len(docs), seed, epoch):
            ids = docs.tokens[docs.offsets[d] : docs.offsets[d + 1]].tolist()
            stream += [(t, label, number) for t, label in zip(ids, ids[1:] + [IGNORE])]
            number += 1
        epoch += 1
    out: list[tuple[int, int, int]] = []
    before = None
    for token, label, number in stream[k * seq_len : (k + 1) * seq_len]:
        out.append((token, label, out[-1][2] + 1 if number == before else 0))
        before = number
    return out


lengths = st.lists(st.integers(2, 20), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 40), st.integers(0, 3), st.integers(0, 12), st.integers(1, 4), st.integers(1, 9))
def test_batch_equals_slow_reference(sizes: list[int], seq_len: int, seed: int, first: int, b: int, multiple: int) -> None:
    docs = documents(sizes)
    plan = microbatch(stream(docs, seq_len, seed), first, b, multiple).plan
    expected = [item for k in range(first, first + b) for item in slow_row(docs, seq_len, seed, k)]
    expected += [(0, IGNORE, i % seq_len) for i in range(-len(expected) % multiple)]
    names = ("tokens", "labels", "positions")
    assert list(zip(*(plan[n].tolist() for n in names))) == expected
    assert all(plan[n].dtype == torch.int64 for n in names)

    starts = [i for i, (_, _, position) in enumerate(expected) if position == 0]
    total = len(expected)
    assert total % multiple == 0
    assert plan["cu_seqlens"].dtype == torch.int32
    assert plan["cu_seqlens"].tolist() == starts + [total] * (total + 1 - len(starts))
    assert plan["cu_seqlens"].diff().max() <= seq_len


def test_padding_is_its_own_document() -> None:
    plan = microbatch(rows(documents([50]), 5, 0), 0, 1, 4).plan
    assert plan["cu_seqlens"].tolist() == [0, 5] + [8] * 7
    assert plan["labels"].tolist()[5:] == [IGNORE] * 3
    assert plan["tokens"].tolist()[5:] == [0] * 3


@pytest.mark.parametrize("dp", [1, 2, 3, 8])
def test_stream_is_the_same_on_any_number_of_ranks(dp: int) -> None:
    docs = documents([7, 3, 12, 5, 9, 2, 30])
    steps = [[step_batches(rows(docs, 8, 1), start, 48, 2, dp, d, 3) for d in range(dp)] for start in (0, 48)]
    # law 1: microbatch i of coordinate d is the step's microbatch i·dp + d
    found = [batch for step in steps for i in range(48 // 2 // dp) for batch in (step[d][i] for d in range(dp))]
    expected = [batch for start in (0, 48) for batch in step_batches(rows(docs, 8, 1), start, 48, 2, multiple=3)]
    assert len(found) == len(expected) == 48
    for a, b in zip(found, expected):
        assert all(torch.equal(a.plan[n], b.plan[n]) for n in b.plan)


def test_resume_continues_to_the_bit() -> None:
    docs = documents([7, 3, 12, 5, 9, 2, 30])
    whole = rows(docs, 11, 5)
    for start in np.random.default_rng(0).integers(0, 60, 8).tolist():
        for batch_a, batch_b in zip(step_batches(whole, start, 12, 3), step_batches(rows(docs, 11, 5), start, 12, 3)):
            assert all(torch.equal(batch_a.plan[n], batch_b.plan[n]) for n in batch_a.plan)
    # any order of access gives the same rows
    ahead = [whole(k).tokens for k in range(40)]
    assert all(np.array_equal(whole(k).tokens, ahead[k]) for k in reversed(range(40)))


def test_every_token_once_per_epoch_and_new_order_each() -> None:
    docs = documents([7, 3, 12, 5, 9, 2, 26])
    total = len(docs.tokens)
    assert total % 8 == 0
    row, per_epoch = rows(docs, 8, 3), total // 8
    epochs = [np.concatenate([row(e * per_epoch + i).tokens for i in range(per_epoch)]) for e in range(3)]
    assert all(sorted(e) == sorted(docs.tokens) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    same, other = rows(docs, 8, 3), rows(docs, 8, 4)
    assert np.array_equal(epochs[0], np.concatenate([same(i).tokens for i in range(per_epoch)]))
    assert not np.array_equal(epochs[0], np.concatenate([other(i).tokens for i in range(per_epoch)]))


def test_rows_are_the_streams_dealt_out_anew() -> None:
    docs = documents([7, 3, 12, 5, 9, 2, 30])  # 68 tokens: windows of 8 rows of 8, which do not end where epochs do
    dealt, in_order = rows(docs, 8, 3), stream(docs, 8, 3)
    for w in range(5):
        window = [in_order(k).tokens.tolist() for k in range(w * 8, w * 8 + 8)]
        got = [dealt(k).tokens.tolist() for k in range(w * 8, w * 8 + 8)]
        assert sorted(got) == sorted(window)
        assert got != window
    assert rows(documents([4]), 9, 0)(3).tokens.tolist() == stream(documents([4]), 9, 0)(3).tokens.tolist()  # rows longer than an epoch


def test_order_is_a_permutation_that_never_changes() -> None:
    assert all(sorted(epoch_order(n, 7, e)) == list(range(n)) for n in (1, 2, 50) for e in range(3))
    assert epoch_order(8, 0, 0).tolist() == [4, 3, 7, 5, 0, 6, 2, 1]


def test_labels_never_cross_documents() -> None:
    docs = documents([7, 3, 12, 5, 9, 2, 30])
    document = {int(t): d for d in range(len(docs)) for t in docs.tokens[docs.offsets[d] : docs.offsets[d + 1]] if t != EOS}
    row = rows(docs, 6, 0)
    for k in range(40):
        r = row(k)
        assert ((r.tokens == EOS) == (r.labels == IGNORE)).all()
        inside = [(int(t), int(x)) for t, x in zip(r.tokens, r.labels) if x not in (IGNORE, EOS)]
        assert all(document[t] == document[x] and x == t + 1 for t, x in inside)


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
    with pytest.raises(DataError, match="row -1"):
        row(-1)
    with pytest.raises(DataError, match="seq_len=0"):
        rows(documents([7]), 0, 0)
    with pytest.raises(DataError, match="multiple=0"):
        pack([row(0)], 0)

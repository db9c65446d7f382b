"""Batch-size ramps against Megatron-LM's rule, step by step, and what does not divide."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lf.config import ConfigError
from lf.ramp import Ramp, length


def walked(start: int, increment: int, rows: int, full: int) -> Iterator[tuple[int, int]]:
    """(rows of the step, rows before it), one step after another, by the rule of Megatron-LM's calculator in whole numbers."""
    consumed = 0
    while True:
        size = full if consumed > rows else start + consumed * ((full - start) // increment) // rows * increment
        yield size, consumed
        consumed += size


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9), st.integers(1, 400))
def test_every_step_is_that_of_a_walk(start: int, increment: int, increments: int, rows: int) -> None:
    ramp = Ramp(start + increment * increments, start, increment, rows)
    for step, (size, consumed) in zip(range(150), walked(start, increment, rows, ramp.global_batch)):
        assert (ramp.at(step), ramp.consumed(step)) == (size, consumed)
        assert ramp.steps(consumed) == step
        assert ramp.steps(consumed + 1) == step + 1


@pytest.mark.slow
@pytest.mark.parametrize("args", [(4, 4, 100, 16), (2, 3, 1, 14), (8, 8, 5, 64), (1, 1, 1000, 9)])
def test_every_step_is_that_of_megatron(args: tuple[int, int, int, int]) -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    start, increment, rows, full = args
    theirs = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 0, start, increment, rows)
    ours, consumed = Ramp(full, start, increment, rows), 0
    for step in range(300):
        theirs.update(consumed, consistency_check=True)
        assert (ours.at(step), ours.consumed(step)) == (theirs.get_current_global_batch_size(), consumed)
        consumed += theirs.get_current_global_batch_size()


def test_without_a_ramp_all_steps_are_alike() -> None:
    ramp = Ramp.parse(None, 12)
    assert [ramp.at(i) for i in (0, 7)] == [12, 12]
    assert [ramp.consumed(i) for i in (0, 7)] == [0, 84]
    assert ramp.microbatches(2, 3) == (2,)


def test_the_numbers_of_microbatches_that_occur() -> None:
    assert Ramp.parse("4:4:100", 16).microbatches(2, 2) == (1, 2, 3, 4)
    assert Ramp.parse("4:4:1", 16).microbatches(2, 2) == (1, 4)  # stages that no step falls into need no program
    assert str(Ramp.parse("4:8:40", 20)) == "4 rows a step, 12 from step 6 on, 20 from step 8 on"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4:4", "should read start:increment:rows"),
        ("4:x:9", "should read start:increment:rows"),
        ("4:-4:9", "should read start:increment:rows"),
        ("0:4:9", "start=0 must lie between 1 and global_batch=16"),
        ("32:4:9", "start=32 must lie between 1 and global_batch=16"),
        ("4:0:9", "increment=0 must be at least 1"),
        ("4:5:9", "steps of 5 do not lead from start=4 to global_batch=16: their difference 12"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Ramp.parse(text, 16)


def test_stages_that_do_not_divide_are_refused_with_ramps_that_do() -> None:
    with pytest.raises(ConfigError, match=r"steps of 6, 10, 14 rows; .* 2\*2 = 4. The nearest that work: (.*)$") as caught:
        Ramp.parse("6:2:100", 16).microbatches(2, 2)
    for text in str(caught.value).rpartition(": ")[2].split(" or "):
        assert Ramp.parse(text, 16).microbatches(2, 2)
    with pytest.raises(ValueError, match="global_batch=10 must be a multiple"):
        Ramp.parse("2:2:9", 10).microbatches(2, 2)


def test_a_run_is_so_many_steps_or_so_many_tokens_long() -> None:
    ramp = Ramp.parse("2:2:8", 4)
    assert length(7, None, 10, ramp, default=99) == 7
    assert length(None, None, 10, ramp, default=99) == 99
    for tokens, steps in ((1, 1), (20, 1), (21, 2), (80, 4), (81, 5), (120, 5), (121, 6)):  # 2, 2, 2, 2, 4, 4 … rows of 10
        assert length(None, tokens, 10, ramp, default=99) == steps
    with pytest.raises(ConfigError, match="--steps 3 and --tokens 9 both say"):
        length(3, 9, 10, ramp, default=99)

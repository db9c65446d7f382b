"""A program is proven before it runs: every way to break one is refused by the name of the action that fails."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lf
from lf.models.small import tiny
from lf.schedule import Action, ProgramError, add_reduce, check, draw, one_f_one_b

LAYOUT = lf.layout(tiny(), lf.Mesh(dp=2, tp=2))
LAYERS = ["embed", "layers.0", "layers.1", "head"]


def program(microbatches: int = 3) -> tuple[Action, ...]:
    (row,) = add_reduce(one_f_one_b(1, microbatches), LAYOUT)
    return row


def refused(row: tuple[Action, ...], microbatches: int = 3) -> str:
    with pytest.raises(ProgramError) as caught:
        check((row,), LAYOUT, microbatches)
    return str(caught.value)


def test_one_f_one_b_with_its_reductions() -> None:
    words = "0F0 0B0 0F1 0B1 0F2 0B2 0REDUCE[head] 0REDUCE[layers.1] 0REDUCE[layers.0] 0REDUCE[embed]"
    assert draw((program(),)) == f"rank 0: {words}"
    assert check((program(),), LAYOUT, 3) == (1,)


def test_the_peak_is_the_most_microbatches_alive() -> None:
    actions = [Action(op, 0, i) for op in "FB" for i in range(3)]
    assert check(add_reduce((tuple(actions),), LAYOUT), LAYOUT, 3) == (3,)


@given(st.data())
def test_an_action_dropped_is_missed(data: st.DataObject) -> None:
    row = program()
    i = data.draw(st.integers(0, len(row) - 1))
    message = refused(row[:i] + row[i + 1 :])
    named = str(row[i]) in message  # as missing, or as what the next action needs
    assert named or f"the gradients of microbatches [{row[i].microbatch}] would come after it" in message


@given(st.data())
def test_an_action_doubled_is_refused(data: st.DataObject) -> None:
    row = program()
    i, at = data.draw(st.integers(0, len(row) - 1)), data.draw(st.integers(0, len(row)))
    message = refused((*row[:at], row[i], *row[at:]))
    assert str(row[i]) in message
    assert ">>" in message  # drawn, with the failing action marked


@given(st.data())
def test_an_action_in_the_wrong_place_is_refused(data: st.DataObject) -> None:
    """Swapping a forward with its backward, or a reduction with a backward."""
    row = program()
    i = data.draw(st.integers(0, 2))
    a, b = row.index(Action("F", 0, i)), row.index(Action("B", 0, i))
    swapped = list(row)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    assert f">>0B{i}<<" in refused(tuple(swapped))
    assert f"its forward 0F{i} has not run" in refused(tuple(swapped))
    late = list(row)
    r = data.draw(st.integers(6, len(row) - 1))
    late[b], late[r] = late[r], late[b]
    message = refused(tuple(late))
    assert f">>{row[r]}<<" in message
    assert "would come after it" in message


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Action("F", 0, 7), "there are 3 microbatches, 0 to 2"),
        (Action("B", 0, None), "there are 3 microbatches, 0 to 2"),
        (Action("F", 1, 0), "there are 1 stages, 0 to 0"),
        (Action("SEND", 0, 0), "unknown op 'SEND'; there are"),
        (Action("REDUCE", 0, segment="layers.9"), "stage 0 has no layer 'layers.9'; it has embed, layers.0, layers.1, head"),
    ],
)
def test_what_is_not_there_is_refused(bad: Action, why: str) -> None:
    message = refused((bad, *program()))
    assert why in message
    assert f">>{bad}<<" in message


def test_a_microbatch_left_out_is_refused() -> None:
    assert "0F3, 0B3" in refused(program(3), microbatches=4) or "[3]" in refused(program(3), microbatches=4)
    assert "there are 2 microbatches" in refused(program(3), microbatches=2)


def test_ranks_and_stages_must_be_those_of_the_mesh() -> None:
    with pytest.raises(ProgramError, match="for 2 pipeline ranks; mesh dp=2,tp=2 has pp=1"):
        check((program(), program()), LAYOUT, 3)


def test_no_microbatch_is_refused() -> None:
    with pytest.raises(ProgramError, match="microbatches=0 must be at least 1"):
        one_f_one_b(1, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_reduced_once(tied: bool) -> None:
    """A tied table belongs to the first layer that uses it: its backward is the last to add to it."""
    where = attrs.evolve(LAYOUT, model=tiny(tied), stages=(tiny(tied).segments,))
    paths = where.layer_paths(0)
    assert list(paths) == LAYERS
    flat = [p for layer in paths.values() for p in layer]
    assert sorted(flat) == sorted(tiny(tied).params())
    assert "embed/weight" in paths["embed"]
    assert ("head/weight" in paths["head"]) != tied

"""A program is proven before it runs: every way to break one is refused by the name of the action that fails."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import attrs
import pytest
from helpers import SEED
from hypothesis import given
from hypothesis import strategies as st

import lf
from lf.models.small import tiny
from lf.schedule import OVERLAP, Action, Program, ProgramError, add_reduce, check, draw, lower, one_f_one_b
from lf.schedule.build import build
from lf.schedule.ir import flat
from lf.schedule.keep import offload, recompute
from lf.schedule.lower import free, move, trainable
from lf.schedule.named import SCHEDULES
from lf.schedule.recompute import parse_offload, parse_recompute
from lf.schedule.text import loads

LAYOUT = lf.layout(tiny(), lf.Mesh(dp=2, tp=2))
LAYERS = ["embed", "layers.0", "layers.1", "head"]
PIPE = lf.layout(tiny(), lf.Mesh(pp=2, dp=1))


def program(microbatches: int = 3) -> tuple[Action, ...]:
    (row,) = add_reduce(one_f_one_b(1, microbatches), LAYOUT)
    return row


def refused(row: tuple[Action, ...], microbatches: int = 3) -> str:
    with pytest.raises(ProgramError) as caught:
        check((row,), LAYOUT, microbatches)
    return str(caught.value)


def test_one_f_one_b_with_its_reductions() -> None:
    """The last backward is cut into layers: the sums of the last ones travel while the first are still computed."""
    last = "0B2[head] 0REDUCE[head] 0B2[layers.1] 0REDUCE[layers.1] 0B2[layers.0] 0REDUCE[layers.0] 0B2[embed] 0REDUCE[embed]"
    assert draw((program(),)) == f"rank 0: 0F0 0B0 0F1 0B1 0F2 {last}"
    assert check((program(),), LAYOUT, 3) == (1,)


def test_two_ranks_in_one_order() -> None:
    rows = draw(build(PIPE, 2)).splitlines()
    assert rows[0] == (
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0FREE0[SEND_F] 0B0 0RECV_B1 0FREE1[SEND_F] 0B1[layers.0] 0REDUCE[layers.0] 0B1[embed] "
        "0REDUCE[embed] 0REDUCE[embed/weight]"
    )
    assert rows[1] == (
        "rank 1: 1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1[head] 1REDUCE[head] 1B1[layers.1] 1SEND_B1 1REDUCE[layers.1] 1REDUCE[embed/weight] "
        "1FREE0[SEND_B] 1FREE1[SEND_B]"
    )
    assert check(build(PIPE, 2), PIPE) == (2, 1)


def test_the_peak_is_the_most_microbatches_alive() -> None:
    actions = [Action(op, 0, i) for op in "FB" for i in range(3)]
    assert check(add_reduce((tuple(actions),), LAYOUT), LAYOUT, 3) == (3,)
    assert check(recompute((tuple(actions),), LAYOUT, parse_recompute("full"))) == (0.25,)  # a layer at a time, of a stage of four
    assert check(one_f_one_b(4, 9)) == (4, 3, 2, 1)


MICROBATCHES = (*range(1, 10), 15, 16, 17, 24, 31, 32, 33)
SWEEP = [(name, p, chunks, m) for name in SCHEDULES for p in range(1, 9) for chunks in range(1, 5) for m in MICROBATCHES]


def proven(name: str, p: int, chunks: int, m: int) -> None:
    schedule = SCHEDULES[name]
    try:
        placement = schedule.place(p, chunks)
        program = schedule.generate(placement, m)
    except ProgramError:
        assert chunks != schedule.chunks, "any number of ranks and microbatches has a program"
        return
    peaks = check(program)
    assert max(peaks) <= m * max(placement.count(r) for r in range(p))


def test_a_sample_of_what_the_generators_write() -> None:
    random.seed(SEED)
    for case in random.sample(SWEEP, 150):
        proven(*case)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_all_that_the_generators_write(name: str) -> None:
    for case in SWEEP:
        if case[0] == name:
            proven(*case)


@given(st.data())
def test_an_action_dropped_is_missed(data: st.DataObject) -> None:
    row = program()
    i = data.draw(st.integers(0, len(row) - 1))
    message = refused(row[:i] + row[i + 1 :])
    named = str(row[i]) in message or f"0B{row[i].microbatch}" in message  # as missing, or as what the next action needs
    assert named or f"the gradients of microbatches [{row[i].microbatch}] would come after it" in message or str(row[i + 1]) in message


@given(st.data())
def test_an_action_doubled_is_refused(data: st.DataObject) -> None:
    row = program()
    i, at = data.draw(st.integers(0, len(row) - 1)), data.draw(st.integers(0, len(row)))
    message = refused((*row[:at], row[i], *row[at:]))
    assert ">>" in message  # drawn, with the failing action marked


LOWERED: Callable[[], Program] = lambda: build(PIPE, 4, SCHEDULES["zb-h1"].generate, parse_recompute("full:1"), parse_offload("full"))


def change(program: Program, rank: int, word: str, new: Callable[[Action], tuple[Action, ...]]) -> Program:
    """The program with what stands at `word` replaced."""
    row = program[rank]
    (i,) = [i for i, a in enumerate(row) if str(a) == word]
    return (*program[:rank], (*row[:i], *new(row[i]), *row[i + 1 :]), *program[rank + 1 :])


def swap(program: Program, rank: int, one: str, other: str) -> Program:
    words = {str(a): a for a in program[rank]}
    return change(change(change(program, rank, one, lambda a: (attrs.evolve(a, op="swap"),)), rank, other, lambda a: (words[one],)), rank,
                  str(attrs.evolve(words[one], op="swap")), lambda a: (words[other],))  # fmt: skip


def evolved(**to: object) -> Callable[[Action], tuple[Action, ...]]:
    return lambda a: (attrs.evolve(a, **to),)


def dropped(a: Action) -> tuple[Action, ...]:
    return ()


def doubled(a: Action) -> tuple[Action, ...]:
    return (a, a)


PLAIN = [  # what is done to 1F1B of 4 microbatches on two ranks; the action that the error must name; what it must say
    (lambda p: swap(p, 0, "0F1", "0B0"), ">>0B0<<", "deadlock|has not run|has not arrived"),
    (lambda p: swap(p, 1, "1F0", "1B0"), ">>1B0<<", "its forward 1F0 has not run"),
    (lambda p: swap(p, 1, "1RECV_F0", "1F0"), ">>1F0<<", "what stage 0 gives has not arrived"),
    (lambda p: swap(p, 0, "0SEND_F0", "0SEND_F1"), ">>0SEND_F1<<", "there is nothing to send: 0F1 has not run"),
    (lambda p: swap(p, 1, "1RECV_F0", "1RECV_F1"), "1RECV_F1 on rank 1", "deadlock"),
    (lambda p: change(p, 0, "0F2", dropped), ">>0SEND_F2<<", "there is nothing to send: 0F2 has not run"),
    (lambda p: change(p, 0, "0SEND_F2", dropped), "1RECV_F2", "deadlock|nothing was sent"),
    (lambda p: change(p, 1, "1RECV_F2", dropped), "1F2|0SEND_F2", "deadlock|has not arrived"),
    (lambda p: change(p, 1, "1SEND_B1", dropped), "0RECV_B1|1FREE1", "deadlock|nothing was sent"),
    (lambda p: change(p, 0, "0B1", dropped), ">>0REDUCE[layers.0]<<", "the gradients of microbatches [1] would come after"),
    (lambda p: change(p, 1, "1REDUCE[head]", dropped), ">>1REDUCE[embed/weight]<<", "1REDUCE[head] comes before it"),
    (lambda p: change(p, 0, "0REDUCE[embed/weight]", dropped), "1REDUCE[embed/weight]", "deadlock"),
    (lambda p: change(p, 0, "0FREE1[SEND_F]", dropped), "0FREE1[SEND_F]", "values stay alive"),
    (lambda p: change(p, 0, "0F1", doubled), ">>0F1<<", "it stands twice"),
    (lambda p: change(p, 1, "1B2", doubled), ">>1B2<<", "it stands twice"),
    (lambda p: change(p, 1, "1SEND_B1", doubled), ">>1SEND_B1<<", "it stands twice"),
    (lambda p: change(p, 1, "1REDUCE[head]", doubled), ">>1REDUCE[head]<<", "it stands twice"),
    (lambda p: change(p, 0, "0SEND_F2", evolved(stage=1)), ">>1SEND_F2<<", "stage 1 lies on rank 1"),
    (lambda p: change(p, 0, "0SEND_F2", evolved(microbatch=3)), ">>0SEND_F3<<", "there is nothing to send: 0F3 has not run"),
    (lambda p: change(p, 1, "1RECV_F2", evolved(op="RECV_B")), ">>1RECV_B2<<", "there is no stage 2"),
    (lambda p: change(p, 1, "1SEND_B1", evolved(op="SEND_F")), ">>1SEND_F1<<", "there is no stage 2"),
    (lambda p: change(p, 0, "0B1", evolved(stage=7)), ">>7B1<<", "there are 2 stages, 0 to 1"),
    (lambda p: change(p, 0, "0B1", evolved(microbatch=9)), ">>0B9<<", "there are 4 microbatches, 0 to 3"),
    (lambda p: change(p, 0, "0B1", evolved(op="W")), ">>0W1<<", "its 0I1 has not run"),
    (lambda p: change(p, 0, "0B1", evolved(op="I")), "0I1|0REDUCE", "there is no W for 0I1|would come after it"),
    (lambda p: change(p, 0, "0F1", evolved(chain="vision")), ">>vision:0F1<<", "the model has one chain, which has no name"),
    (lambda p: change(p, 0, "0F1", evolved(op="GATHER")), ">>0GATHER1<<", "a GATHER is of one layer and names the op that it is for"),
    (lambda p: change(p, 0, "0F1", evolved(segment="layers.9")), ">>0F1[layers.9]<<", "stage 0 has no layer or segment 'layers.9'; it has embed"),
    (lambda p: change(p, 0, "0F1", evolved(segment="layers.0")), ">>0F1[layers.0]<<", "the forward of embed comes before it"),
    (lambda p: change(p, 1, "1F1", lambda a: (OVERLAP(a, Action("SEND_B", 1, 0)),)), "OVERLAP", "of two actions of compute"),
]  # fmt: skip


@pytest.mark.parametrize(("corrupt", "named", "why"), PLAIN, ids=range(len(PLAIN)))
def test_a_corrupted_program_is_refused(corrupt: Callable[[Program], Program], named: str, why: str) -> None:
    with pytest.raises(ProgramError) as caught:
        check(corrupt(build(PIPE, 4)), PIPE, 4)
    message = str(caught.value)
    assert any(n in message for n in named.split("|")), message
    assert any(w in message for w in why.split("|")), message
    assert "rank 0: " in message
    assert "rank 1: " in message  # drawn


MEMORY = [
    (lambda p: swap(p, 0, "0I1[layers.0]", "0REMAT1[layers.0]"), ">>0I1[layers.0]<<", "has not been made again: there is no REMAT before it"),
    (lambda p: change(p, 0, "0REMAT1[layers.0]", doubled), ">>0REMAT1[layers.0]<<", "it stands twice"),
    (lambda p: change(p, 0, "0F0[embed]", lambda a: (Action("REMAT", 0, 0, "embed"), a)), ">>0REMAT0[embed]<<", "there is nothing to make again"),
    (lambda p: change(p, 0, "0FETCH1[layers.0]", dropped), ">>0REMAT1[layers.0]<<", "is on the host: there is no FETCH before it"),
    (lambda p: change(p, 0, "0FETCH1[embed]", dropped), ">>0I1[embed]<<", "is on the host: there is no FETCH before it"),
    (lambda p: change(p, 0, "0OFFLOAD1[embed]", dropped), ">>0FETCH1[embed]<<", "it is not on the host: there is no OFFLOAD before it"),
    (lambda p: change(p, 0, "0OFFLOAD1[embed]", lambda a: (a, attrs.evolve(a, segment=None))), ">>0OFFLOAD1<<", "it is on the host already"),
    (lambda p: change(p, 1, "1W1", dropped), "1I1|1REDUCE", "there is no W for 1I1|would come after it"),
]  # fmt: skip


@pytest.mark.parametrize(("corrupt", "named", "why"), MEMORY, ids=range(len(MEMORY)))
def test_a_corrupted_use_of_memory_is_refused(corrupt: Callable[[Program], Program], named: str, why: str) -> None:
    check(LOWERED(), PIPE, 4)
    with pytest.raises(ProgramError) as caught:
        check(corrupt(LOWERED()), PIPE, 4)
    message = str(caught.value)
    assert any(n in message for n in named.split("|")), message
    assert any(w in message for w in why.split("|")), message


def test_an_action_in_the_wrong_place_is_refused() -> None:
    row = program()
    for i in range(2):
        a, b = row.index(Action("F", 0, i)), row.index(Action("B", 0, i))
        swapped = list(row)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        assert f">>0B{i}<<" in refused(tuple(swapped))
        assert f"its forward 0F{i} has not run" in refused(tuple(swapped))
        late = (*row[:b], *row[b + 1 :], row[b])
        message = refused(late)
        assert ">>0REDUCE[head]<<" in message
        assert f"the gradients of microbatches [{i}] would come after it" in message


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Action("F", 0, 7), "there are 3 microbatches, 0 to 2"),
        (Action("B", 0, None), "there are 3 microbatches, 0 to 2"),
        (Action("F", 1, 0), "there are 1 stages, 0 to 0"),
        (Action("SEND", 0, 0), "unknown op 'SEND'; there are"),
        (Action("REDUCE", 0, segment="layers.9"), "stage 0 has no layer 'layers.9' to reduce; it has embed, layers.0, layers.1, head"),
        (Action("FREE", 0, 0), "a FREE names what was sent, SEND_F or SEND_B, not None"),
        (Action("REDUCE", 0), "a REDUCE is of one layer, of embed, layers.0, layers.1, head; or give the compute alone"),
        (Action("REDUCE", 0, 1, "head"), "its gradients are kept whole, not in shards, and summed once: leave the number out"),
        (Action("SEND_F", 0, 1, "head"), "a message is of a whole stage: leave out 'head'"),
        (Action("F", 0, 1, None, ("rope",)), "only a REMAT names ops, not a F: leave out rope"),
        (OVERLAP(Action("I", 0, 1), Action("W", 0, 1)), "one of the two needs what the other makes"),
    ],
)
def test_what_is_not_there_is_refused(bad: Action, why: str) -> None:
    message = refused((bad, *program()))
    assert why in message
    assert f">>{bad}<<" in message


@pytest.mark.parametrize("words", ["0F0 0B0", "0F0 1F0", "1B0 0B0", "0I0 0W0", "0F0[embed] 0F0[layers.0]", "0REMAT0 0B0"])
def test_two_that_follow_from_each_other_do_not_interleave(words: str) -> None:
    """The interpreter goes through them layer by layer in turn: the second would begin before the first has made what it takes."""
    ((a, b),) = loads(words)
    with pytest.raises(ProgramError, match="one of the two needs what the other makes") as caught:
        check(((OVERLAP(a, b),),))
    assert str(OVERLAP(a, b)) in str(caught.value)


def test_a_microbatch_left_out_is_refused() -> None:
    assert "0F3, 0B3" in refused(program(3), microbatches=4) or "[3]" in refused(program(3), microbatches=4)
    assert "there are 2 microbatches" in refused(program(3), microbatches=2)


def test_what_is_far_too_large_is_told_in_a_few_words() -> None:
    for words in ("0F0 0B0 0F999999 0B999999", "0F0 999999F0"):
        with pytest.raises(ProgramError) as caught:
            check(loads(words))
        assert re.search(r" and \d{6,} more", str(caught.value))
        assert len(str(caught.value)) < 1000


def test_a_lowered_program_takes_no_policy() -> None:
    """It would be dropped without a word."""
    done = build(PIPE, 2)
    assert build(PIPE, 2, lambda stages, microbatches: done) == done
    for flag, policies in (("recompute", {"recomputed": parse_recompute("full")}), ("offload", {"offloaded": parse_offload("full")})):
        with pytest.raises(ProgramError, match=f"--{flag} full.*: the program is lowered already"):
            build(PIPE, 2, lambda stages, microbatches: done, **policies)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "why"),
    [(None, "mine gives None for rank 0"), ([["0F0"], []], r"mine gives \['0F0'\] for rank 0"), ((Action("F", 0, 0),), "gives Action")],
)
def test_a_generator_that_makes_no_program_is_told_so(made: object, why: str) -> None:
    def mine(stages: object, microbatches: int) -> object:
        return made

    with pytest.raises(ProgramError, match=f"{why}.*; a program has, for each pipeline rank, a tuple of lf.schedule.Action"):
        build(PIPE, 1, mine)  # type: ignore[arg-type]


def test_ranks_and_stages_must_be_those_of_the_mesh() -> None:
    with pytest.raises(ProgramError, match="for 2 pipeline ranks; mesh dp=2,tp=2 has pp=1"):
        check((program(), program()), LAYOUT, 3)
    with pytest.raises(ProgramError, match="0F0 on rank 0: stage 0 lies on rank 1"):
        check(one_f_one_b((0, 1), 2), lf.layout(tiny(), lf.Mesh(pp=2, dp=1), placement=(1, 0)))
    with pytest.raises(ProgramError, match="1F0 stands on rank 1, other forwards of stage 1 on rank 0: a stage has one rank\nrank 0: 0F0 1F1"):
        check(((Action("F", 0, 0), Action("F", 1, 1)), (Action("F", 1, 0),)))


def test_no_microbatch_is_refused() -> None:
    with pytest.raises(ProgramError, match="microbatches=0 must be"):
        one_f_one_b(1, 0)


def test_a_program_that_cannot_be_lowered_says_who_waits() -> None:
    rows = one_f_one_b(2, 2)
    with pytest.raises(ProgramError, match="no rank can go on: 0B0 on rank 0, 1B1 on rank 1") as caught:
        check((rows[0], tuple(reversed(rows[1]))))
    assert ">>0B0<<" in str(caught.value)
    assert ">>1B1<<" in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("placement", [(0,), (0, 1), (0, 1, 1, 0), (1, 0, 1)])
def test_every_parameter_is_reduced_once_by_each_rank_that_has_it(tied: bool, placement: tuple[int, ...]) -> None:
    layout = lf.layout(tiny(tied), lf.Mesh(pp=max(placement) + 1, dp=1), placement=placement)
    program = build(layout, 2, SCHEDULES["gpipe"].generate)
    from lf.schedule.lower import reduced_layers, tied_paths

    for rank, row in enumerate(program):
        reduced = [p for a in row if a.op == "REDUCE" for p in reduced_layers(layout, rank).get((a.stage, a.segment or ""), ())]
        assert sorted(reduced) == sorted(layout.held(layout.mesh.coords(rank)))
        assert [a.segment for a in row if a.op == "REDUCE" and a.segment in layout.specs] == list(tied_paths(layout, rank))
    assert (len(layout.holders("embed/weight")) > 1) == (tied and placement[0] != placement[-1])


def ops(program: Program) -> list[list[str]]:
    return [[a.op for a in row if a.op in "FBIW"] for row in program]


@pytest.mark.parametrize(
    ("frozen", "want"),
    [
        (("embed", "layers.0"), [["F"], ["F", "B"]]),  # nothing to learn on rank 0: no gradient goes there
        (("layers.1", "head"), [["F", "B"], ["F", "I"]]),  # the gradient passes through rank 1
        (("embed",), [["F", "B"], ["F", "B"]]),
    ],
)
def test_what_does_not_train_is_not_computed(frozen: tuple[str, ...], want: list[list[str]]) -> None:
    layout = lf.layout(tiny(False), lf.Mesh(pp=2, dp=1), frozen=frozen)
    written = trainable(one_f_one_b(2, 1), layout)
    assert ops(written) == want
    program = free(move(add_reduce(written, layout), layout))
    check(program, layout)
    assert any(a.op == "SEND_B" for a in program[1]) == (want[0] != ["F"])
    reduced = {a.segment for row in program for a in row if a.op == "REDUCE"}
    assert reduced == {n for n in LAYERS if n not in frozen}
    with pytest.raises(ProgramError, match=r"0B0|1B0|stays? alive|missing|nothing to send"):
        check(free(move(add_reduce(one_f_one_b(2, 1), lf.layout(tiny(False), lf.Mesh(pp=2, dp=1))))), layout)


def test_recompute_and_offload_are_actions() -> None:
    program = recompute(one_f_one_b((0,), 1), LAYOUT, parse_recompute("segments=mlp;ops=rope"))
    assert draw(program) == (
        "rank 0: 0F0[embed] 0F0[layers.0.attn] 0F0[layers.0.mlp] 0F0[layers.1.attn] 0F0[layers.1.mlp] 0F0[head] 0REMAT0[head: rope] 0B0[head] "
        "0REMAT0[layers.1.mlp] 0B0[layers.1.mlp] 0REMAT0[layers.1.attn: rope] 0B0[layers.1.attn] 0REMAT0[layers.0.mlp] 0B0[layers.0.mlp] "
        "0REMAT0[layers.0.attn: rope] 0B0[layers.0.attn] 0REMAT0[embed: rope] 0B0[embed]"
    )
    away = offload(one_f_one_b((0,), 1), LAYOUT, parse_offload("layers=layers.0;distance=2"))
    assert draw(away) == (
        "rank 0: 0F0[embed] 0F0[layers.0] 0OFFLOAD0[layers.0] 0F0[layers.1] 0F0[head] 0FETCH0[layers.0] 0B0[head] 0B0[layers.1] 0B0[layers.0] "
        "0B0[embed]"
    )
    stays = offload(one_f_one_b((0,), 1), LAYOUT, parse_offload("layers=head"))
    assert not any(a.op in ("OFFLOAD", "FETCH") for a in stays[0]), "nothing lies between the forward and its backward"


def test_overlapped_pairs_are_cut_together() -> None:
    pair = OVERLAP(Action("F", 0, 1), Action("B", 0, 0))
    row = (Action("F", 0, 0), pair, Action("B", 0, 1))
    program = recompute((row,), LAYOUT, parse_recompute("full"))
    assert str(program[0][4]) == "(0F1[embed];0REMAT0[head])OVERLAP_F_REMAT"
    assert len(flat(program[0])) == 4 * 2 + 8 * 2
    check(lower((row,), LAYOUT), LAYOUT)


def test_a_table_that_two_layers_of_a_rank_use_is_reduced_after_both() -> None:
    layout = lf.layout(tiny(True), lf.Mesh(dp=1), placement=(0, 0))
    row = (*(Action("F", s, 0) for s in (0, 1)), *(Action("I", s, 0) for s in (1, 0)), *(Action("W", s, 0) for s in (0, 1)))
    words = draw(add_reduce((row,), layout))
    assert words.index("0REDUCE[embed]") > words.index("1W0[head]")
    check((row,), layout)


def test_a_frozen_table_is_not_summed_over_its_stages() -> None:
    program = build(lf.layout(tiny(True), lf.Mesh(pp=2, dp=1), frozen=("embed/weight",)), 1)
    assert "embed/weight" not in draw(program)


def test_a_weight_gradient_that_is_owed_is_refused_without_a_layout_too() -> None:
    with pytest.raises(ProgramError, match="activations stay alive, there is no W for 0I0"):
        check(((Action("F", 0, 0), Action("I", 0, 0)),))

"""`cost` gives the times that a reader works out by hand, on compute alone and on lowered programs, and names where a program stops."""

from __future__ import annotations

import attrs
import pytest

from lf.chain_layouts import Joint
from lf.config import ConfigError
from lf.schedule.check import check
from lf.schedule.cost import cost, held
from lf.schedule.generate import interleaved, one_f_one_b
from lf.schedule.greedy import greedy_zb
from lf.schedule.ir import OVERLAP, Action, Program, ProgramError
from lf.schedule.lower import lower
from lf.schedule.place import loop, vee
from lf.schedule.text import loads
from lf.schedule.timeline import Timeline
from lf.schedule.zero_bubble import zb_h1, zb_v

TWO = "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"


def at(timeline: Timeline, word: str) -> tuple[float, float]:
    (span,) = [s for row in timeline.rows for s in row if str(s.action) == word]
    return span.start, span.end


def test_1f1b_on_two_ranks_by_hand() -> None:
    t = cost(loads(TWO))
    assert [at(t, w) for w in ("0F0", "0F1", "1F0", "1B0", "1F1", "1B1")] == [(0, 1), (1, 2), (1, 2), (2, 4), (4, 5), (5, 7)]
    assert (at(t, "0B0"), at(t, "0B1"), t.makespan) == ((4, 6), (7, 9), 9)
    assert [t.busy(r) for r in (0, 1)] == [6, 6]
    assert [t.bubble(r) for r in (0, 1)] == [3, 3]
    assert [t.peak(r) for r in (0, 1)] == [2, 1]
    assert t.memory[0] == ((0, 1), (1, 2), (6, 1), (9, 0))


def test_times_by_op_and_by_function_and_a_link() -> None:
    t = cost(loads(TWO), {"F": 2, "B": 3}, link=0.5)
    assert (at(t, "1F0"), at(t, "0B0")) == ((2.5, 4.5), (8, 11))
    slow = cost(loads(TWO), lambda a: 10.0 if a.stage == 1 else 1.0, link=lambda send, source, target: 5.0 if send.op == "SEND_B" else 0.0)
    assert at(slow, "1F0") == (1, 11)
    assert at(slow, "0B0") == (26, 27)
    assert cost(zb_h1(2, 2), {"B": 4}).busy(0) == 2 * (1 + 4)  # I and W are half a B where only B is given


LOWERED = """
0F0 0SEND_F0 0F1 0SEND_F1 0FREE0[SEND_F] 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE[embed]
1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1REDUCE[head]
"""


def test_a_lowered_program_takes_what_its_compute_takes() -> None:
    for link in (0.0, 0.25, 3.0):
        lowered, compute = cost(loads(LOWERED), link=link), cost(loads(TWO), link=link)
        assert lowered.makespan == compute.makespan
        assert at(lowered, "1F1") == at(compute, "1F1")
    assert at(lowered, "0SEND_F0") == (1, 4)  # and rank 0 has gone on meanwhile
    assert at(lowered, "0F1") == (1, 2)
    assert at(lowered, "0FREE0[SEND_F]") == (4, 4)
    assert cost(loads(LOWERED), {"REDUCE": 5}).makespan == cost(loads(TWO)).makespan + 5  # the last backward's


def test_segments_share_the_time_and_the_memory_of_their_stage() -> None:
    whole = cost(loads("0F0 0I0 0W0"))
    cut = cost(loads("0F0[a] 0F0[b] 0I0[b] 0W0[b] 0I0[a] 0W0[a]"))
    assert cut.makespan == whole.makespan == 3
    assert cut.memory[0] == ((0, 0.5), (0.5, 1), (2, 0.5), (3, 0))
    mixed = cost(loads("0F0[a] 0F0[b] 0B0[b] 0I0[a] 0W0[a]"))
    assert mixed.memory[0][-1][1] == 0
    assert cost(loads("0F0[a] 0F0[b] 0REMAT0[b] 0B0[b] 0B0[a]")).busy(0) == 3.5


def test_a_stage_waits_for_all_of_the_backward_behind_it() -> None:
    t = cost(loads("0F0 0B0\n1F0[a] 1F0[b] 1B0[b] 1I0[a] 1W0[a]"))
    assert at(t, "1I0[a]")[1] == at(t, "0B0")[0]


def test_copies_run_beside_the_compute_and_are_waited_for() -> None:
    text = "0F0 0OFFLOAD0 0F1 0B1 0FETCH0 0B0"
    quick, slow = cost(loads(text), {"OFFLOAD": 1, "FETCH": 2}), cost(loads(text), {"OFFLOAD": 5, "FETCH": 2})
    assert (at(quick, "0OFFLOAD0"), at(quick, "0F1"), at(quick, "0FETCH0"), at(quick, "0B0")) == ((1, 2), (1, 2), (4, 6), (6, 8))
    assert (at(slow, "0FETCH0"), at(slow, "0B0")) == ((6, 8), (8, 10))
    assert quick.memory[0] == ((0, 1), (1, 2), (2, 1), (4, 1), (8, 0))
    assert slow.memory[0][2:] == ((4, 1), (6, 1), (10, 0))
    ahead = cost(loads("0F0[a] 0F0[b] 0OFFLOAD0[a] 0FETCH0[a] 0B0[b] 0B0[a]"), {"F": 2, "B": 4, "FETCH": 6})
    assert at(ahead, "0B0[b]") == (2, 4)  # which does not need what is fetched
    assert at(ahead, "0B0[a]")[0] == at(ahead, "0FETCH0[a]")[1]


def test_an_overlap_takes_its_two_or_what_is_said() -> None:
    pair = OVERLAP(Action("F", 0, 1), Action("B", 0, 0))
    program: Program = ((Action("F", 0, 0), pair, Action("B", 0, 1)),)
    assert cost(program).makespan == 6
    assert cost(program, {"OVERLAP": 2}).makespan == 5
    assert cost(program).peak(0) == 2
    assert cost(program).busy(0) == 6


@pytest.mark.parametrize(
    "text",
    [
        "0F0 0F1 0REMAT0 0B0 0REMAT1 0B1",
        "0F0[a] 0F0[b] 0REMAT0[b] 0B0[b] 0B0[a]",
        "0F0 0REMAT0[b] 0B0[b] 0REMAT0[a] 0B0[a]",
        "0F0 0REMAT0[b: mm] 0B0[b] 0B0[a]",
        "0F0[a] 0OFFLOAD0[a] 0F0[b] 0I0[b] 0FETCH0[a] 0W0[b] 0B0[a]",
    ],
)
def test_the_most_held_is_what_check_proves(text: str) -> None:
    t = cost(loads(text))
    assert check(loads(text)) == (t.peak(0),)
    assert t.memory[0][-1][1] == 0


@pytest.mark.parametrize("link", [0.0, 0.25, 3.0])
def test_lowering_takes_no_time(link: float) -> None:
    for program in (interleaved(loop(7, 3), 5), zb_v(vee(3), 6), greedy_zb((0, 1, 1, 2, 0), 4)):
        lowered = cost(lower(program), link=link)
        assert lowered.makespan == cost(program, link=link).makespan
        assert [lowered.peak(r) for r in range(3)] == [*check(program)]


def test_memory_of_a_users_own() -> None:
    t = cost(one_f_one_b(2, 2), memory=lambda a: {"F": 3.0, "B": -3.0}[a.op] if a.stage else 0.0)
    assert [t.peak(r) for r in (0, 1)] == [0, 3]
    assert cost(loads("0F0 0F1")).peak(0) == 0  # nothing is kept where there is no backward


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0 0B0\n1B0 1F0", ["rank 0 is stuck at 0B0: it waits for 1B0", "rank 1 is stuck at 1B0: it waits for 1F0"]),
        ("0F0 0B0\n1F0", ["rank 0 is stuck at 0B0: it waits for 1B0, which is not in the program"]),
        ("0F0 0W0 0I0", ["rank 0 is stuck at 0W0: it waits for 0I0"]),
        ("0F0 0SEND_F0 0RECV_B0 0B0\n1F0 1RECV_F0 1B0 1SEND_B0", ["rank 1 is stuck at 1F0: it waits for 1RECV_F0"]),
        ("0SEND_F0 0F0\n1RECV_F0 1F0", ["rank 0 is stuck at 0SEND_F0: it waits for 0F0", "rank 1 is stuck at 1F0: it waits for 0SEND_F0"]),
        ("0F0\n1RECV_F0 1F0", ["it waits for 0SEND_F0, which is not in the program"]),
    ],
)
def test_a_program_that_cannot_go_on_says_where_each_rank_is(text: str, words: list[str]) -> None:
    with pytest.raises(ProgramError) as caught:
        cost(loads(text))
    for line in words:
        assert line in str(caught.value)
    assert str(caught.value).count("stuck") == len(words) or len(words) == 1


def test_what_is_given_is_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'REMAT'"):
        cost(loads(TWO), {"REMATT": 1})
    with pytest.raises(ProgramError, match="SEND_F takes: give link"):
        cost(loads(TWO), {"SEND_F": 1})
    with pytest.raises(ProgramError, match="F=-1: must be at least 0"):
        cost(loads(TWO), {"F": -1})
    with pytest.raises(ProgramError, match="link=-1"):
        cost(loads(TWO), link=-1)


VISION = Joint("vision.out", "vision", 0, "", 0)


def test_chains_are_apart_but_for_their_joints() -> None:
    program = loads("vision:0F0 vision:0B0\n0F0 0B0")
    assert cost(program).makespan == 3
    joined = cost(loads("vision:0F0 vision:0B0\n0F0 0B0"), joints=[VISION], link=0.5)
    assert [at(joined, w) for w in ("vision:0F0", "0F0", "0B0", "vision:0B0")] == [(0, 1), (1.5, 2.5), (2.5, 4.5), (5, 7)]
    assert cost(loads("vision:0F0\n0F0 0B0"), joints=[VISION]).makespan == 4  # frozen
    with pytest.raises(ProgramError, match=r"joint vision\.out → : stage 1 of chain 'vision' has no forward in the program"):
        cost(program, joints=[attrs.evolve(VISION, source_stage=1)])
    with pytest.raises(ProgramError, match="rank 0 is stuck at 0F0: it waits for vision:0F0"):
        cost(loads("0F0 vision:0F0 vision:0B0 0B0"), joints=[VISION])


def test_a_unit_of_several_microbatches_and_rows() -> None:
    """Two units for three microbatches: the first has microbatch 0, the second 1 and 2; the second is shared by two rows."""
    t = cost(loads("vision:0F0 vision:0F1 vision:0B0 vision:0B1\nvision:0F1 0F0 0F1 0F2 0B0 0B1 0B2 vision:0B1"), {"vision:F": 4}, joints=[VISION])
    assert [at(t, w) for w in ("vision:0F0", "0F0", "0F1", "0F2")] == [(0, 4), (4, 5), (6, 7), (7, 8)]
    assert [at(t, w) for w in ("0B0", "0B2", "vision:0B0")] == [(8, 10), (12, 14), (10, 12)]
    assert [(s.start, s.end) for row in t.rows for s in row if str(s.action) == "vision:0B1"] == [(14, 15), (14, 15)]
    assert held(t, "vision") == ((1.5, 0.5), 2.0)
    assert held(t, "") == ((0, 3), 3)
    assert t.peak(0) == 1.5
    cut = loads("vision:0F0[a] vision:0F0[b] vision:0B0\nvision:0F0[a] vision:0F0[b] vision:0B0")
    assert (cost(cut).makespan, cost(cut, lambda a: 3.0).makespan) == (0.5 + 1, 4.5)  # its segments and rows share a unit


def test_what_rows_that_share_a_unit_each_take_whole() -> None:
    text = loads("vision:0F0 vision:0B0\nvision:0F0 0F0 0B0 vision:0B0")
    times = {"vision:F": 4, "vision:B": 8}
    for fixed, ends in ((0.0, (2, 9)), (0.5, (3, 12)), (1.0, (4, 15))):  # each row takes 4 · (fixed + (1 - fixed) / 2), then 1 + 2, then its B
        t = cost(text, times, joints=[VISION], fixed={"vision": fixed, "": 0.9})  # the main chain shares nothing
        assert (at(t, "0F0")[0], t.makespan) == ends


def test_bridges_take_what_their_absence_does() -> None:
    compute = "vision:0F0 vision:0F1 vision:0B0 vision:0B1\n0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"
    bridged = """
    vision:0F0 0BRIDGE_F0[vision.out] vision:0F1 0BRIDGE_F1[vision.out] 0BRIDGE_B0[vision.out] vision:0B0 0BRIDGE_B1[vision.out] vision:0B1
    0BRIDGE_F0[vision.out] 0F0 0BRIDGE_F1[vision.out] 0F1 0B0 0BRIDGE_B0[vision.out] 0B1 0BRIDGE_B1[vision.out]
    1F0 1B0 1F1 1B1
    """
    for link in (0.0, 0.25, 3.0):
        a, b = (cost(loads(text), link=link, joints=[VISION]) for text in (compute, bridged))
        assert all(at(a, str(s.action)) == at(b, str(s.action)) for row in a.rows for s in row)
    far = cost(loads(compute), link=lambda a, source, target: 10.0 * (a.op == "BRIDGE_B") + source, joints=[VISION])
    assert (at(far, "0F0"), at(far, "0B0"), at(far, "vision:0B0")) == ((1, 2), (8, 10), (21, 23))
    same = loads("vision:0F0 0BRIDGE_F0[vision.out] 0F0 0B0 0BRIDGE_B0[vision.out] vision:0B0")
    assert cost(same, link=5, joints=[VISION]).makespan == 6  # nothing leaves the row
    with pytest.raises(ProgramError, match=r"0BRIDGE_F0\[vision.out\]: no joint is of it; given are none"):
        cost(same)


def test_a_bridge_meets_all_its_rows() -> None:
    """The third row comes late to the bridge, so the other that takes waits."""
    text = "vision:0F0 0BRIDGE_F0[vision.out]\n0BRIDGE_F0[vision.out] 0F0\nhead:0F0 0BRIDGE_F0[vision.out]"
    assert at(cost(loads(text), {"head:F": 7}, link=1, joints=[VISION]), "0F0") == (7, 8)


def test_stages_of_a_shared_unit_pass_on_row_by_row() -> None:
    t = cost(loads("vision:0F0\nvision:0F0\nvision:1F0\nvision:1F0"), {"vision:F": 2}, link=lambda send, source, target: float(target - source))
    assert [t.rows[r][0].start for r in (2, 3)] == [3, 3]


def test_times_of_one_chain() -> None:
    text = "0F0 0B0\nvision:0F0 vision:0I0 vision:0W0\nhead:0F0 head:0B0"
    t = cost(loads(text), {"F": 3, "B": 4, "vision:F": 0.5, "vision:B": 2, "head:I": 5})
    assert [t.busy(r) for r in range(3)] == [7, 2.5, 3 + 5 + 2]


def test_the_order_of_ranks_does_not_matter() -> None:
    program = interleaved((0, 1, 2) * 2, 5)
    assert cost(program).makespan == cost(program[::-1]).makespan


def test_what_computes_waits_for_its_layer_to_be_whole() -> None:
    """GATHERs go one after another, beside the forwards; the sum of a layer has to wait for the last of them."""
    layers = [Action("F", 0, 0, layer) for layer in "ab"]
    gathers = [Action("GATHER", 0, 0, layer, ("F",)) for layer in "ab"]
    program = ((gathers[0], gathers[1], layers[0], Action("REDUCE", 0, segment="a"), layers[1]),)
    times = {"GATHER": 3.0, "F": 1.0, "REDUCE": 2.0}
    timeline = cost(program, lambda a: times[a.op])
    spans = {str(s.action): (s.start, s.end) for s in timeline.rows[0]}
    assert spans["0F0[a]"] == (3.0, 4.0)
    assert spans["0F0[b]"] == (6.0, 7.0)
    assert spans["0REDUCE[a]"] == (6.0, 8.0)

"""Placements of chains beside the main one: every program runs to its end and has each unit's F and B on the rows it stands on, the main rows keep
their order; nested stays near what no program can be below wherever the bubbles have room, and what it holds does not grow with the step."""

from __future__ import annotations

import random
from collections import Counter

import attrs
import pytest

from lf.chain_layouts import Joint
from lf.config import ConfigError
from lf.schedule.beside import Beside, beside
from lf.schedule.cost import cost, held
from lf.schedule.generate import forward_only, gpipe, one_f_one_b
from lf.schedule.ir import OVERLAP, Action, Program, ProgramError
from lf.schedule.named import SCHEDULES
from lf.schedule.nest import least_in_flight
from lf.schedule.placements import Placed, comparison, room
from lf.schedule.plan import plan
from lf.schedule.text import dumps, loads

VISION = Joint("vision.out", "vision", 0, "", 0)
HEAD = Joint("decoder.out", "", 1, "head", 0)


def shown(program: Program) -> list[str]:
    return [line.partition(": ")[2] for line in dumps(program).splitlines()]


def stands(program: Program, chain: str) -> dict[tuple[str, int, int | None], list[int]]:
    """The rows of each (op, stage, unit), ascending."""
    rows: dict[tuple[str, int, int | None], list[int]] = {}
    for r, row in enumerate(program):
        for a in row:
            if a.chain == chain:
                rows.setdefault((a.op, a.stage, a.microbatch), []).append(r)
    return rows


def test_inline_is_right_before_and_after_what_it_feeds() -> None:
    main = one_f_one_b(2, 2)
    assert shown(beside(main, [VISION], {"vision": Beside("inline")})) == [
        "vision:0F0 0F0 vision:0F1 0F1 0B0 vision:0B0 0B1 vision:0B1",
        "1F0 1B0 1F1 1B1",
    ]
    split = beside(loads("0F0 0I0 0W0"), [VISION], {"vision": Beside("inline")})
    assert shown(split) == ["vision:0F0 0F0 0I0 vision:0B0 0W0"]  # it does not wait for W
    deep = [VISION, attrs.evolve(VISION, target_stage=1)]
    assert beside(main, deep, {"vision": Beside("inline")}) == beside(main, [VISION], {"vision": Beside("inline")})
    middle = beside(main, deep[1:], {"vision": Beside("inline")}, times={"vision:F": 5})
    assert shown(middle)[1] == "vision:0F0 1F0 1B0 vision:0B0 vision:0F1 1F1 1B1 vision:0B1"


def test_a_head_is_right_after_what_it_takes_from() -> None:
    program = beside(one_f_one_b(2, 2), [HEAD], {"head": Beside("inline")})
    assert shown(program) == ["0F0 0F1 0B0 0B1", "1F0 head:0F0 head:0B0 1B0 1F1 head:0F1 head:0B1 1B1"]
    own = beside(one_f_one_b(2, 2), [HEAD], {"head": Beside("dedicated")})
    assert shown(own)[2] == "head:0F0 head:0B0 head:0F1 head:0B1"
    both = [VISION, HEAD, Joint("vision.out", "vision", 0, "head", 0)]
    three = beside(one_f_one_b(2, 1), both, {"head": Beside("inline"), "vision": Beside("inline")}, "")
    assert shown(three) == ["vision:0F0 0F0 0B0 vision:0B0", "1F0 head:0F0 head:0B0 1B0"]
    only = beside(one_f_one_b(2, 1), [HEAD, both[2]], {"head": Beside("inline"), "vision": Beside("inline")})
    assert shown(only)[1] == "1F0 vision:0F0 head:0F0 head:0B0 vision:0B0 1B0"


def test_decoupled_is_before_and_after_all_on_all_rows() -> None:
    once = beside(one_f_one_b(2, 2), [VISION], {"vision": Beside("decoupled")})
    assert shown(once) == ["vision:0F0 0F0 0F1 0B0 0B1 vision:0B0", "vision:0F0 1F0 1B0 1F1 1B1 vision:0B0"]
    stages = Beside("decoupled", 2, blocks=(((0,), (1,)), ((2,), (3,))))
    joint = attrs.evolve(VISION, source_stage=1)
    program = beside(one_f_one_b(4, 4), [joint], {"vision": stages})
    assert stands(program, "vision") == {(op, s, u): [2 * s, 2 * s + 1] for op in "FB" for s in (0, 1) for u in (0, 1)}
    assert cost(program, joints=[joint]).makespan == 0.5 + 0.5 + 21 + 1 + 1  # the first unit's way in, the last one's out
    inline = beside(one_f_one_b(4, 2), [joint], {"vision": Beside("inline", blocks=stages.blocks)})
    assert stands(inline, "vision") == {(op, s, u): [2 * s] for op in "FB" for s in (0, 1) for u in (0, 1)}  # the block with row 0, of each stage


def test_dedicated_has_rows_of_its_own() -> None:
    program = beside(one_f_one_b(2, 4), [VISION], {"vision": Beside("dedicated", in_flight=3)})
    assert shown(program)[2] == "vision:0F0 vision:0F1 vision:0F2 vision:0B0 vision:0F3 vision:0B1 vision:0B2 vision:0B3"
    before = Beside("dedicated", blocks=(((0,),), ((1,),)))
    joint = attrs.evolve(VISION, source_stage=1)
    program = beside(one_f_one_b(2, 8), [joint], {"vision": before})
    assert [{a.chain for a in row} for row in program] == [{"vision"}, {"vision"}, {""}, {""}]
    timeline = cost(program, {"vision:F": 0.5, "vision:B": 1}, joints=[joint])
    assert max(held(timeline, "vision")[0]) == 4  # twice what the main program needs
    assert timeline.makespan == 27 + 1 + 2  # what the main one takes, and the first unit's way in and the last one's out


def test_where_nothing_comes_back_there_is_only_the_forward() -> None:
    for kind in ("inline", "decoupled", "nested", "dedicated"):
        program = beside(forward_only(2, 4), [VISION], {"vision": Beside(kind)})
        assert {a.op for row in program for a in row if a.chain == "vision"} == {"F"}


def test_the_main_chain_gets_its_name() -> None:
    main = ((OVERLAP(Action("F", 0, 0), Action("F", 0, 1)), Action("B", 0, 0), Action("B", 0, 1)),)
    joint = attrs.evolve(VISION, target="decoder")
    for kind in ("inline", "nested"):
        program = beside(main, [joint], {"vision": Beside(kind)}, "decoder")
        assert Counter(part.chain for row in program for a in row for part in a.pair or (a,)) == {"decoder": 4, "vision": 4}


def random_case(rng: random.Random) -> tuple[Program, dict[str, Beside], list[Joint], dict[str, float], float, int]:
    """A main program, two chains that feed it, one of them by two joints, and a head."""
    name = rng.choice(["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "greedy", "greedy-zb"])
    p, m = rng.randint(1, 5), rng.randint(1, 12)
    schedule = SCHEDULES[name]
    main = schedule.generate(schedule.place(p, schedule.chunks), m)
    last = max(a.stage for row in main for a in row)
    blocks = (tuple((r,) for r in range(p)), (tuple(range(p)),), tuple((r, r + p // 2) for r in range(p // 2)) or ((0,),))
    kind = rng.choice(["nested", "decoupled", "inline", "dedicated"])
    some = None if kind in ("inline", "dedicated") else (rng.choice(blocks),)
    units = None if kind == "inline" else rng.choice([None, rng.randint(1, m)])
    places = {
        "vision": Beside(kind, units, blocks=some),
        "audio": Beside(rng.choice(["nested", "inline"])),
        "head": Beside(rng.choice(["inline", "dedicated"])),
    }
    joints = [
        VISION,
        Joint("audio.out", "audio", 0, "", 0),
        Joint("audio.out", "audio", 0, "", last),
        Joint("out", "", last, "head", 0),
        *([Joint("audio.out", "audio", 0, "vision", 0)] if units is None and kind in ("nested", "dedicated") else []),
        *([Joint("vision.out", "vision", 0, "head", 0)] if rng.random() < 0.5 else []),
    ]
    times = {f"{chain}:{op}": rng.choice([0.0, 0.1, 0.5, 1.5, 4.0]) for chain in ("vision", "audio", "head") for op in "FB"}
    return main, places, joints, times, rng.choice([0.0, 0.3]), m


@pytest.mark.parametrize("seed", range(120))
def test_any_chains_beside_any_program(seed: int) -> None:
    main, places, joints, times, link, m = random_case(random.Random(seed))
    program = beside(main, joints, places, times=times, link=link)
    cost(program, times, link, joints=joints)  # runs to its end
    assert [row for row in (tuple(a for a in row if not a.chain) for row in program) if row] == [row for row in main if row]
    for chain, place in places.items():
        rows = stands(program, chain)
        count = place.units or (1 if place.kind == "decoupled" else m)
        assert sorted(rows) == sorted((op, 0, u) for op in "FB" for u in range(count))
        for u in range(count):
            assert rows["F", 0, u] == rows["B", 0, u]
            assert len(set(rows["F", 0, u])) == len(rows["F", 0, u])
            for block in (place.blocks or ((),))[0]:
                assert len({r in rows["F", 0, u] for r in block}) <= 1  # a block is on it whole or not at all


@pytest.mark.parametrize("seed", range(40))
def test_no_more_units_in_flight_than_may_be(seed: int) -> None:
    rng = random.Random(seed)
    p, m = rng.randint(1, 5), rng.randint(1, 16)
    main = rng.choice([one_f_one_b, gpipe, SCHEDULES["zb-h1"].generate])(p, m)
    units = rng.choice([m, rng.randint(1, m)])
    times = {"vision:F": rng.choice([0.1, 0.5, 1.5]), "vision:B": rng.choice([0.2, 1.0, 3.0])}
    laid = plan(main, times, 0.0, [VISION], {"": m, "vision": units})
    least = least_in_flight(laid, "vision")
    if units == m and main == one_f_one_b(p, m):
        assert least == min(p, m)
    for few in range(1, units + 3):
        place = {"vision": Beside("nested", units, few)}
        if few < least:
            with pytest.raises(ProgramError, match=f"in_flight={few} the program cannot go on: .* use in_flight={least} or more"):
                beside(main, [VISION], place, times=times)
        else:
            assert held(cost(beside(main, [VISION], place, times=times), times, joints=[VISION]), "vision")[1] <= few + 1e-6


TABLE = [*comparison(ranks=(4, 8)), *comparison(ranks=(16,), steps=(1, 2, 8))]


def test_nested_is_near_the_bound_wherever_the_bubbles_have_room() -> None:
    with_room = [r for r in TABLE if r.kind == "nested" and r.room]
    assert {(r.ranks, r.share) for r in with_room} == {(p, e) for p in (4, 8, 16) for e in (0.1, 0.5, 1.5)} - {(4, 1.5)}
    assert max(r.over for r in with_room) < 0.03  # 0.05 is asked for
    without = [r for r in TABLE if r.kind == "nested" and not r.room]
    assert max(r.over for r in without) < 0.13  # and not far where they have none
    for schedule in ("interleaved", "zb-h1"):
        rows = [*comparison(ranks=(4, 8), steps=(1, 2, 4), schedule=schedule, kinds=("nested",))]
        assert all(r.over < 0.05 for r in rows if r.room or r.share == 0.1)
        assert schedule == "zb-h1" or any(r.room for r in rows)


def by_kind(kind: str) -> dict[tuple[int, int, float], Placed]:
    return {(r.ranks, r.microbatches, r.share): r for r in TABLE if r.kind == kind}


def test_nested_beats_the_others() -> None:
    nested, inline, decoupled = map(by_kind, ("nested", "inline", "decoupled"))
    assert all(nested[k].time <= min(inline[k].time, decoupled[k].time) + 1e-9 for k in nested)
    for (p, m, e), row in decoupled.items():
        assert row.time == pytest.approx(3 * m + 3 * (p - 1) + 3 * e * m / p)  # all of the encoder on top of the main program
        assert row.held == pytest.approx((m / p, m))
    for (p, m, e), row in inline.items():
        assert row.time >= 3 * m * (1 + e)  # its first rank does it all
        assert row.held == (min(p, m), min(p, m))


def test_what_nested_holds_does_not_grow_with_the_step() -> None:
    rows = [*comparison(shares=(0.1, 0.5, 1.5), ranks=(4,), steps=(4, 8, 16, 32), kinds=("nested",))]
    assert {round(r.held[1], 6) for r in rows} == {16}
    assert all(r.held[0] <= 4.5 for r in rows)
    fixed = [*comparison(ranks=(4,), steps=(4, 16), kinds=("nested",), in_flight=8)]
    assert {round(r.held[1], 6) for r in fixed} == {8}


@pytest.mark.parametrize(("ranks", "micro", "share"), [(2, 8, 0.4), (4, 16, 0.4), (4, 16, 1.5)])
def test_nested_shares_units_less_where_sharing_costs(ranks: int, micro: int, share: float) -> None:
    """What does not shrink each row takes: who knows it shares fewer units, and is quicker for it."""
    times, known = {"vision:F": share, "vision:B": 2 * share}, {"vision": 0.7}

    def found(fixed: float) -> tuple[float, int]:
        program = beside(one_f_one_b(ranks, micro), [VISION], {"vision": Beside("nested", fixed=fixed)}, times=times)
        shared = sum(len(rows) > 1 for (op, _, _), rows in stands(program, "vision").items() if op == "F")
        return cost(program, times, joints=[VISION], fixed=known).makespan, shared

    (slow, many), (quick, few) = found(0.0), found(0.7)
    assert quick < slow
    assert few < many


def test_room_by_hand() -> None:
    """1F1B on two ranks is idle 3 on each: rank 0 for 2 before its first B and 1 after it, rank 1 for 1 before its first F and 2 after its last B."""
    main = one_f_one_b(2, 2)
    for units, yes in ((0.3, True), (1.0, False)):  # of two units; the ends are 3·e/2 of 9
        assert room(main, VISION, {"vision:F": units, "vision:B": 2 * units}, tolerance=1.0) is yes
    assert not room(main, VISION, {"vision:F": 0.3, "vision:B": 0.6}, tolerance=0.05)


BLOCKS = (((0,), (1,)),)


@pytest.mark.parametrize(
    ("joints", "places", "words"),
    [
        ([VISION], {"vision": Beside("nestd")}, "did you mean 'nested'"),
        ([VISION], {}, "chain 'vision' has no placement"),
        ([VISION], {"vision": Beside("inline"), "audio": Beside("inline")}, "chain 'audio': no joint is to or from it"),
        ([HEAD], {"head": Beside("nested")}, "chain 'head' takes from chain '', so it cannot be nested"),
        ([HEAD], {"head": Beside("decoupled")}, "chain 'head' takes from chain '', so it cannot be decoupled"),
        ([VISION, attrs.evolve(HEAD, target="vision")], {"vision": Beside("inline")}, "joint .* closes a circle"),
        ([VISION], {"vision": Beside("nested", in_flight=0)}, "chain 'vision': in_flight=0 must be at least 1"),
        ([VISION], {"vision": Beside("nested", in_flight=1)}, "in_flight=1 the program cannot go on: 2 of its units .* use in_flight=2 or more"),
        ([VISION], {"vision": Beside("dedicated", in_flight=1)}, "in_flight=1 the program cannot go on: 2 of its units"),
        ([VISION], {"vision": Beside("inline", in_flight=4)}, "in_flight=4 does not go with inline"),
        ([VISION], {"vision": Beside("nested", fixed=1.5)}, "chain 'vision': fixed=1.5 is a part of a unit's time: give 0 to 1"),
        ([VISION], {"vision": Beside("nested", units=5)}, "chain 'vision': units=5 of 4 microbatches"),
        ([VISION], {"vision": Beside("inline", units=2)}, "units=2, and inline has one for each of the 4 microbatches"),
        ([HEAD], {"head": Beside("dedicated", units=2)}, "chain 'head': units=2"),
        ([VISION], {"vision": Beside("nested", blocks=(((0,), (2,)),))}, "stage 0 would stand on row 2; the program has rows 0 to 1"),
        ([VISION], {"vision": Beside("nested", blocks=(((0,), (0, 1)),))}, "row 0 is in two blocks of stage 0"),
        ([VISION], {"vision": Beside("nested", blocks=((),))}, "each stage needs a block"),
        ([VISION], {"vision": Beside("nested", blocks=(*BLOCKS, *BLOCKS))}, "has 2 stages, nested is for one"),
        ([VISION], {"vision": Beside("decoupled", blocks=(*BLOCKS, ((0, 1),)))}, "stage 0 has 2 blocks and stage 1 has 1"),
        ([VISION], {"vision": Beside("inline", blocks=(((1,),),))}, "inline would stand on row 0, where none of its blocks is"),
        ([attrs.evolve(VISION, target_stage=7)], {"vision": Beside("nested")}, "joint vision.out → : chain '' has no stage 7, but 2 of them"),
        ([attrs.evolve(VISION, source_stage=1)], {"vision": Beside("nested")}, "chain 'vision' has no stage 1, but 1 of them"),
    ],
)
def test_what_cannot_be_placed_is_refused(joints: list[Joint], places: dict[str, Beside], words: str) -> None:
    with pytest.raises((ProgramError, ConfigError), match=words):
        beside(one_f_one_b(2, 4), joints, places)


def test_the_main_program_is_of_compute_alone() -> None:
    with pytest.raises(ProgramError, match="compute of chain 'decoder' alone, and has 0SEND_F0"):
        beside(loads("0F0 0SEND_F0 0RECV_B0 0B0\n1RECV_F0 1F0 1B0 1SEND_B0"), [], {}, "decoder")


def test_inline_beside_a_chain_of_fewer_units() -> None:
    """A unit goes with the one that has its microbatch: all are of the one unit of a chain that is decoupled."""
    joints = (Joint("eyes.out", "eyes", 0, "", 0), Joint("lens.out", "lens", 0, "eyes", 0))
    main = one_f_one_b(2, 4)
    program = beside(main, joints, {"eyes": Beside("decoupled"), "lens": Beside("inline")})
    assert Counter((a.chain, a.op) for row in program for a in row if a.chain == "lens") == {("lens", "F"): 4, ("lens", "B"): 4}
    assert cost(program, joints=joints).makespan > cost(main).makespan

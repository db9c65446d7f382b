"""Programs of several chains: what is wrong with one is found before it runs, and what is accepted runs right."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
from helpers import SEED

import lf
from lf import parity
from lf.chain_layouts import Joint, Layouts, Place, chain_layouts
from lf.models.trio import trio
from lf.models.trio_data import sample
from lf.schedule import Action, Program, ProgramError, build_chains, check, cost, dumps, loads, lower
from lf.schedule.beside import Beside, beside
from lf.schedule.ir import BACKWARD, COMPUTE, flat
from lf.schedule.named import SCHEDULES
from lf.schedule.text import to_csv

MODEL = trio()
PLACES = {"vision": Place(lf.Mesh(dp=2)), "decoder": Place(lf.Mesh(pp=2)), "head": Place(lf.Mesh(dp=1), (1,))}
LAYOUTS = chain_layouts(MODEL, PLACES)
FROZEN = chain_layouts(MODEL, {**PLACES, "vision": attrs.evolve(PLACES["vision"], frozen=("vision.*",))})


def built(kind: str = "inline", layouts: Layouts = LAYOUTS, m: int = 3, **given: Any) -> Program:
    where = layouts if kind != "inline" else chain_layouts(MODEL, {**PLACES, "vision": Place(lf.Mesh(dp=2))})
    return build_chains(where if layouts is LAYOUTS else layouts, m, {"vision": Beside(kind, **given), "head": "inline"})


def find(program: Program, word: str, row: int) -> int:
    return [str(a) for a in program[row]].index(word)


def without(word: str, *rows: int) -> Callable[[Program], Program]:
    return lambda p: tuple(tuple(a for a in row if str(a) != word) if r in (rows or range(len(p))) else row for r, row in enumerate(p))


def moved(word: str, row: int, to: int) -> Callable[[Program], Program]:
    def change(p: Program) -> Program:
        actions = list(p[row])
        actions.insert(to, actions.pop(find(p, word, row)))
        return tuple(tuple(actions) if r == row else other for r, other in enumerate(p))

    return change


def changed(word: str, row: int, **fields: Any) -> Callable[[Program], Program]:
    return lambda p: tuple(
        tuple(attrs.evolve(a, **fields) if r == row and str(a) == word else a for a in actions) for r, actions in enumerate(p)
    )  # fmt: skip


VISUAL = "decoder:0BRIDGE_F1[vision.visual]"
GRADIENT = "decoder:0BRIDGE_B1[vision.visual]"
BROKEN: list[tuple[Callable[[Program], Program], str, str]] = [  # (what is done, what the message names, why)
    (without(VISUAL), "decoder:0F1", "edge vision.visual brings of microbatch 1 has not arrived"),
    (without("decoder:1BRIDGE_F1[vision.deep]", 1), "decoder:", "has not arrived|deadlock"),
    (without(GRADIENT), "vision:0B1|vision:0B", "comes back over edge vision.visual"),
    (without("vision:0F2"), "vision:0", "vision:0"),
    (without("vision:0B0"), "vision:0", "alive|missing|comes before|would come after"),
    (without("head:0B1"), "head:0B1|decoder:1", "alive|not arrived|would come after|its backward head:0B1 has not run"),
    (without("head:0REDUCE[head.embed]"), "head:0REDUCE[head.embed]", "missing"),
    (without("head:0BRIDGE_F0[decoder.hidden]"), "head:0F0", "edge decoder.hidden brings of microbatch 0 has not arrived"),
    (moved(VISUAL, 0, 0), "BRIDGE_F1", "there is nothing to carry"),
    (moved("vision:0F1", 0, 40), "decoder:|vision:0F1", "nothing to carry|has not run|not arrived|deadlock|neither gives nor takes"),
    (changed("vision:0F1", 0, chain="sound"), "sound:0F1", "the model has chains vision, decoder, head"),
    (changed("vision:0F1", 0, stage=1), "vision:1F1", "there are 1 stages"),
    (changed("vision:0F1", 0, microbatch=0), "vision:0F0|BRIDGE_F1", "twice|neither gives nor takes"),
    (changed(VISUAL, 0, segment="vision.sound"), "vision.sound", "no edge brings"),
    (changed(VISUAL, 0, stage=1), "BRIDGE_F1", "no edge brings 'vision.visual' into stage 1"),
    (changed(VISUAL, 0, microbatch=7), "BRIDGE_F7", "there are 3 microbatches"),
    (lambda p: (p[0], (Action("F", 0, 0, chain="head"), *p[1])), "head:0F0", "not arrived|no BRIDGE_F"),
    (lambda p: ((Action("F", 0, 0, chain="head"), *p[0]), p[1]), "head:0F0", "stage 0 lies on rank 1"),
    (lambda p: (p[0], (*p[1], Action("BRIDGE_F", 0, 0, "vision.visual", chain="decoder"))), "BRIDGE_F0", "neither gives nor takes|twice|deadlock"),
    (lambda p: p[:1], "rows", "lie in 2 rows"),
]


@pytest.mark.parametrize(("corrupt", "names", "why"), BROKEN, ids=range(len(BROKEN)))
def test_a_corrupted_program_is_refused(corrupt: Callable[[Program], Program], names: str, why: str) -> None:
    program = built()
    broken = corrupt(program)
    assert broken != program
    with pytest.raises(ProgramError) as caught:
        check(broken, LAYOUTS, 3)
    assert any(name in str(caught.value) for name in names.split("|")), caught.value
    assert any(reason in str(caught.value) for reason in why.split("|")), caught.value


def test_sums_of_a_chain_over_rows_meet() -> None:
    program = built("nested")
    word = "vision:0REDUCE[vision.embed]"
    for row in (0, 1):
        with pytest.raises(ProgramError, match=r"deadlock|missing"):
            check(without(word, row)(program), LAYOUTS, 3)
    early = moved(word, 0, find(program, "vision:0F0", 0) + 1)(program)
    with pytest.raises(ProgramError, match=r"would come after|deadlock"):
        check(early, LAYOUTS, 3)


def test_sums_over_rows_are_in_one_order() -> None:
    program = built("nested")
    at = [i for i, a in enumerate(program[0]) if a.op == "REDUCE" and a.chain == "vision"][-2:]
    row = list(program[0])
    row[at[0]], row[at[1]] = row[at[1]], row[at[0]]
    with pytest.raises(ProgramError, match="deadlock"):
        check((tuple(row), program[1]), LAYOUTS, 3)


def test_nothing_goes_back_to_what_is_frozen() -> None:
    program = built("decoupled", FROZEN)
    words = [str(a) for row in program for a in row]
    assert not [w for w in words if w.startswith("vision:") and "F" not in w]
    assert not [w for w in words if "BRIDGE_B" in w and "vision" in w]
    assert [w for w in words if "BRIDGE_B" in w and "decoder.hidden" in w]
    extra = tuple((*row, Action("BRIDGE_B", 0, 0, "vision.visual", chain="decoder")) for row in program)
    with pytest.raises(ProgramError, match="nothing that trains is behind this edge"):
        check(extra, FROZEN, 3)


def test_a_decoder_that_is_frozen_hands_gradients_on() -> None:
    """Under it a projector learns: it has input gradients and none of its own."""
    layouts = chain_layouts(MODEL, {**PLACES, "decoder": attrs.evolve(PLACES["decoder"], frozen=("decoder.*",))})
    ops = Counter((a.chain, a.op) for row in built("nested", layouts) for a in row)
    assert not {("decoder", op) for op in ("B", "W", "REDUCE")} & ops.keys()
    assert ops["decoder", "I"] == 2 * 3
    assert {("vision", "B"), ("vision", "REDUCE"), ("head", "B")} <= ops.keys()


def test_a_chain_that_stands_nowhere_is_named() -> None:
    for chain in ("vision", "head"):
        compute = tuple(tuple(a for a in row if a.op in COMPUTE and a.segment is None and a.chain != chain) for row in built())
        with pytest.raises(ProgramError, match=f"every forward of chain '{chain}', which stands on no rank"):
            check(compute, LAYOUTS, 3)


def test_units_stand_where_they_can() -> None:
    over = chain_layouts(MODEL, {**PLACES, "vision": Place(lf.Mesh(tp=2))})  # both rows make a unit together
    program = build_chains(over, 2, {"vision": "decoupled", "head": "inline"})
    compute = tuple(tuple(a for a in row if a.op in COMPUTE and a.segment is None) for row in program)
    one = tuple(tuple(a for a in row if r == 0 or a.chain != "vision") for r, row in enumerate(compute))
    with pytest.raises(ProgramError, match="vision:0F0: ranks 0 and 1 compute it together"):
        check(one, over, 2)


@pytest.mark.parametrize("kind", ["inline", "decoupled", "nested", "dedicated"])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "interleaved"])
def test_without_a_layout(kind: str, name: str) -> None:
    """What is drawn and proven before there is any model."""
    joints = (lf.chain_layouts.Joint("eyes.out", "eyes", 0, "", 0), lf.chain_layouts.Joint("eyes.deep", "eyes", 0, "", 1))
    main = SCHEDULES[name].generate(SCHEDULES[name].place(3, SCHEDULES[name].chunks), 5)
    program = beside(main, joints, {"eyes": Beside(kind)})
    assert len(check(program, joints=joints)) == len(program)
    lowered = lower(program, joints=joints)
    assert Counter(a.op for row in lowered for a in row)["BRIDGE_F"] >= 10
    check(lowered, joints=joints)
    assert loads(dumps(lowered)) == lowered
    with pytest.raises(ProgramError, match="no word for it"):
        to_csv(program)
    with pytest.raises(ProgramError):
        check(without("0BRIDGE_F1[eyes.out]")(lowered), joints=joints)


def test_without_a_layout_at_random() -> None:
    """Joints into any stage, one chain into another, heads, evaluations: what `beside` writes is accepted, survives its text, and costs as much when
    it is lowered by hand."""
    found: Counter[str] = Counter()
    for i in range(60):
        rng = random.Random(f"{SEED} {i}")
        schedule, m = SCHEDULES[rng.choice(list(SCHEDULES))], rng.choice((1, 2, 3, 5, 8))
        main = schedule.generate(schedule.place(rng.choice((1, 2, 3, 4)), schedule.chunks), m)
        last = max(a.stage for row in main for a in flat(row))
        joints = [Joint("a.out", "a", 0, "", rng.randrange(last + 1)), Joint("a.deep", "a", 0, "", rng.randrange(last + 1))]
        kind = rng.choice(("inline", "decoupled", "nested", "dedicated"))
        places = {"a": Beside(kind, units=rng.choice((None, min(2, m))) if kind in ("decoupled", "nested") else None)}
        if rng.random() < 0.4:
            joints.append(Joint(".hidden", "", last, "head", 0))
            places["head"] = Beside(rng.choice(("inline", "dedicated")))
        elif rng.random() < 0.4:
            joints.append(Joint("b.out", "b", 0, rng.choice(("a", "")), 0))
            places["b"] = Beside("decoupled")
        if rng.random() < 0.2:
            main = tuple(tuple(a for a in row if a.op == "F") for row in main)
        program = beside(main, joints, places)
        lowered = lower(program, joints=joints)
        assert check(program, joints=joints) == check(lowered, joints=joints), dumps(program)
        assert loads(dumps(lowered)) == lowered
        assert cost(lowered, joints=joints).makespan > 0
        row = rng.choice([r for r, actions in enumerate(lowered) if actions])
        k = rng.randrange(len(lowered[row]))
        left = tuple(actions[:k] + actions[k + 1 :] if r == row else actions for r, actions in enumerate(lowered))
        if missed(left, joints):
            found["refused"] += 1
        else:
            another(lowered, left, lowered[row][k], joints)
        found[kind] += 1
    assert len(found) == 5
    assert found["refused"] >= 50


def missed(program: Program, joints: Sequence[Joint]) -> str:
    """Why it is refused, or nothing."""
    try:
        check(program, joints=joints)
    except ProgramError as error:
        return str(error)
    return ""


def another(whole: Program, left: Program, gone: Action, joints: Sequence[Joint]) -> None:
    """A program without one of its actions is accepted as another one, that is whole, too. Only an F of an evaluation can go so: without a layout
    nothing else says on which rows a unit stands and how many units and stages its chain has, where a backward would say it as well. So the unit
    stands on the other rows alone, or its chain has a unit or a stage less; each microbatch is still worked at, in a unit that is left. All that
    moves is what the compute that is left needs, and nothing else."""
    assert gone.op == "F"
    assert not any(a.op in BACKWARD for row in whole for a in flat(row))
    mine = [a for row in whole for a in row if a.op == "F" and a.chain == gone.chain]
    last = all((a.microbatch or 0) <= (gone.microbatch or 0) for a in mine) or all(a.stage <= gone.stage for a in mine)
    assert mine.count(gone) > 1 or last, f"{gone}\n{dumps(whole)}"
    compute = tuple(tuple(a for a in row if a.op in COMPUTE) for row in left)
    assert [Counter(row) for row in lower(compute, joints=joints)] == [Counter(row) for row in left], f"{gone}\n{dumps(whole)}"


EYES = (Joint("eyes.out", "eyes", 0, "", 0),)
SHARED = """
rank 0: eyes:0F0 eyes:0F1 0F0 0F1 0B0 0B1 eyes:0B1 eyes:0B0
rank 1: eyes:0F0 eyes:0F1 1F0 1F1 1B0 1B1 eyes:0B1 eyes:0B0
"""
AHEAD = """
rank 0: eyes:0F0 eyes:0F1 eyes:0F2 0F0 0F1 0F2 0B0 0B1 0B2 eyes:0B2 eyes:0B1 eyes:0B0
"""


@pytest.mark.parametrize("text", [SHARED, AHEAD], ids=["a unit on two rows", "the last of three units"])
def test_a_forward_that_nothing_else_names_is_no_part(text: str) -> None:
    """In a step its backward names it. An evaluation without it is one in which the other row does the whole unit, or the unit before its
    microbatches; what that one needs may not go."""
    step = loads(text)
    evaluation = tuple(tuple(a for a in row if a.op == "F") for row in step)
    word = "eyes:0F0" if text == SHARED else "eyes:0F2"
    gone = step[0][find(step, word, 0)]
    assert missed(without(word, 0)(lower(step, joints=EYES)), EYES).startswith(f"{attrs.evolve(gone, op='B')} on rank 0: ")
    left = without(word, 0)(lower(evaluation, joints=EYES))
    assert not missed(left, EYES)
    another(lower(evaluation, joints=EYES), left, gone, EYES)
    for m in (0, 1):
        assert missed(without(f"0BRIDGE_F{m}[eyes.out]")(left), EYES).startswith(f"0F{m} on rank 0: what edge eyes.out brings")
    assert missed(without("eyes:0F0")(left), EYES)


def test_a_unit_before_others_does_not_go() -> None:
    evaluation = tuple(tuple(a for a in row if a.op == "F") for row in loads(AHEAD))
    for word in ("eyes:0F0", "eyes:0F1"):
        assert f"missing: {word}" in missed(without(word)(lower(evaluation, joints=EYES)), EYES)


def data(step: int, i: int, multiple: int) -> lf.Batch:
    return sample(MODEL.config, SEED + step, i, 0, multiple)


def runs(program: Program, layouts: Layouts) -> bool:
    def single(one: Layouts, count: int) -> Program:
        return build_chains(one, count, {"vision": "inline", "head": "inline"})

    places = {c: attrs.evolve(p, frozen=tuple(layouts.chains[c].frozen)) for c, p in PLACES.items()}
    return parity.compare_chains(MODEL, places, data, lambda where, count: program, single, microbatches=3, steps=1).ok


def shuffled(rng: random.Random, program: Program) -> Program:
    """One thing changed: an action left out, doubled, moved, or given another number."""
    rows = [list(row) for row in program]
    row = rng.choice([r for r in rows if r])
    i = rng.randrange(len(row))
    what = rng.choice(("drop", "double", "swap", "move", "unit", "row"))
    if what == "drop":
        del row[i]
    elif what == "double":
        row.insert(rng.randrange(len(row)), row[i])
    elif what == "swap" and i:
        row[i - 1 : i + 1] = row[i], row[i - 1]
    elif what == "move":
        row.insert(rng.randrange(max(0, i - 6), min(len(row), i + 6)), row.pop(i))
    elif what == "unit" and row[i].microbatch is not None:
        row[i] = attrs.evolve(row[i], microbatch=rng.randrange(3))
    elif what == "row":
        other = rng.choice(rows)
        other.insert(rng.randrange(len(other) + 1), row.pop(i))
    return tuple(map(tuple, rows))


def case(seed: str) -> str:
    rng = random.Random(seed)
    layouts = rng.choice((LAYOUTS, FROZEN))
    program = built(rng.choice(("inline", "decoupled", "nested")), layouts)
    if rng.random() < 0.3:  # compute alone, which is lowered after the change
        program = tuple(tuple(a for a in row if a.op in COMPUTE and a.segment is None) for row in program)
    for _ in range(rng.choice((1, 1, 2))):
        program = shuffled(rng, program)
    try:
        check(program, layouts, 3)
    except ProgramError as error:
        drawn = str(error)
    else:
        drawn = ""
    if drawn:
        assert "rank " in drawn
        return "refused"
    assert runs(program, layouts), f"{seed}\n{dumps(program)}"
    return "run"


def test_a_sample_of_what_check_accepts_runs_right() -> None:
    found = Counter(case(f"{SEED} {i}") for i in range(40))
    assert found["refused"], found


@pytest.mark.slow
def test_what_check_accepts_runs_right() -> None:
    found = Counter(case(f"{SEED} many {i}") for i in range(1500))
    assert min(found["refused"], found["run"]) > 50, found

"""Programs over shards are proven before they run: a GATHER that is missing, late or doubled, a RELEASE or REDUCE too early; and what `check` lets
pass, changed at random, runs and gives the right gradients."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from chain_steps import MODEL as TRIO
from helpers import SEED, context
from test_mutations import changed, cut

import lf
from lf import box, parity, tree
from lf.chain_layouts import Place, chain_layouts
from lf.models.small import tiny
from lf.schedule import Action, Program, ProgramError, build_chains, check, draw, lower
from lf.schedule.build import build, complete
from lf.schedule.lower import trainable
from lf.schedule.named import SCHEDULES
from lf.schedule.text import from_csv

STAGE = {kind: lf.layout(tiny(False), lf.Mesh(dp=2), sharding=kind) for kind in ("1", "2", "3", "3,keep,ahead=0")}


def of(kind: str, microbatches: int = 2) -> tuple[Action, ...]:
    return build(STAGE[kind], microbatches)[0]


def refused(kind: str, row: Sequence[Action], microbatches: int = 2) -> str:
    with pytest.raises(ProgramError) as caught:
        check((tuple(row),), STAGE[kind], microbatches)
    return str(caught.value)


def place(row: Sequence[Action], op: str, layer: str, nth: int = 0) -> int:
    return [i for i, a in enumerate(row) if (a.op, a.segment) == (op, layer)][nth]


@pytest.mark.parametrize("kind", STAGE)
def test_what_is_built_is_accepted(kind: str) -> None:
    row = of(kind)
    assert check((row,), STAGE[kind], 2) == check((row,), STAGE[kind])
    assert complete((row,), STAGE[kind], 2) == (row,)
    assert Counter(a.segment for a in row if a.op == "GATHER") == Counter(a.segment for a in row if a.op == "RELEASE")


@pytest.mark.parametrize("kind", STAGE)
@pytest.mark.parametrize("nth", [0, -1])
def test_a_gather_that_is_missing(kind: str, nth: int) -> None:
    row = [*of(kind)]
    i = place(row, "GATHER", "layers.1", nth)
    said = refused(kind, row[:i] + row[i + 1 :])
    assert "the parameters of layers.1 lie in shards: there is no GATHER before it" in said or "layers.1 is not whole" in said
    assert ">>" in said


@pytest.mark.parametrize("kind", STAGE)
def test_a_gather_that_is_late(kind: str) -> None:
    row = [*of(kind)]
    use = next(i for i, a in enumerate(row) if a.op == "F" and a.segment in (None, "layers.0"))
    row.insert(use, row.pop(place(row, "GATHER", "layers.0")))  # behind it now
    said = refused(kind, row)
    assert "there is no GATHER before it" in said
    assert ">>" in said


@pytest.mark.parametrize("kind", STAGE)
def test_a_gather_that_stands_twice(kind: str) -> None:
    row = [*of(kind)]
    i = place(row, "GATHER", "head")
    assert "it stands twice" in refused(kind, [*row[:i], row[i], *row[i:]])
    other = Action("GATHER", 0, 1, "head", ("B",))
    if other not in row:
        assert "head is whole already: there is no RELEASE before it" in refused(kind, [*row[: i + 1], other, *row[i + 1 :]])


@pytest.mark.parametrize("kind", STAGE)
def test_a_release_too_early(kind: str) -> None:
    row = [*of(kind)]
    i = place(row, "RELEASE", "layers.0", -1)
    back = max(k for k, a in enumerate(row[:i]) if a.op == "B" and a.segment in (None, "layers.0"))
    row.insert(back, row.pop(i))
    said = refused(kind, row)
    assert "the parameters of layers.0 lie in shards: there is no GATHER before it" in said
    assert ">>" in said


@pytest.mark.parametrize("kind", STAGE)
def test_a_release_that_is_missing_or_without_a_gather(kind: str) -> None:
    row = [*of(kind)]
    i = place(row, "RELEASE", "embed", -1)
    assert "parameters stay whole, there is no RELEASE of 0:embed" in refused(kind, row[:i] + row[i + 1 :])
    other = Action("RELEASE", 0, 1, "embed", ("F",))
    assert "embed is not whole: there is no GATHER before it" in refused(kind, [*row, other] if other not in row else [other, *row])


def test_a_reduce_before_its_gradients() -> None:
    for kind in ("1", "2"):
        row = [*of(kind)]
        i = place(row, "REDUCE", "layers.0")
        back = max(k for k, a in enumerate(row[:i]) if a.op == "B" and a.segment in (None, "layers.0"))
        row.insert(back, row.pop(i))
        said = refused(kind, row)
        assert "would come after it" in said
        assert ">>" in said


def test_a_reduce_that_is_missing_or_stands_twice() -> None:
    row = [*of("2")]
    for nth in (0, -1):
        i = place(row, "REDUCE", "layers.0", nth)
        assert f"missing: {row[i]}; without them gradients would be lost" in refused("2", row[:i] + row[i + 1 :])
        assert "it stands twice" in refused("2", [*row[:i], row[i], *row[i:]])
    whole = Action("REDUCE", 0, segment="layers.0")
    end = place(row, "REDUCE", "layers.0", -1)
    check(((*row[: end + 1], whole, *row[end + 1 :]),), STAGE["2"], 2)  # it has nothing left to sum
    first = place(row, "REDUCE", "layers.0")
    assert "would come after it" in refused("2", [*row[: first + 1], whole, *row[first + 1 :]])
    early = [a for k, a in enumerate(row) if k != first]
    last = place(early, "REDUCE", "layers.0")
    check((tuple(early[:last]) + (whole,) + tuple(early[last + 1 :]),), STAGE["2"], 2)  # once for both
    assert "have been summed before" in refused("2", [*early[:last], whole, *early[last:]])


def test_words_that_name_nothing() -> None:
    row = of("3")
    for a, words in (
        (Action("GATHER", 0, 0, "layers.7", ("F",)), "layers.7"),
        (Action("GATHER", 0, 0, None, ("F",)), "a GATHER is of one layer and names the op that it is for"),
        (Action("RELEASE", 0, 0, "embed"), "a RELEASE is of one layer and names the op that it is for"),
        (Action("GATHER", 0, 5, "embed", ("F",)), "there are 2 microbatches"),
    ):
        assert words in refused("3", (a, *row))
    whole = lf.layout(tiny(False), lf.Mesh(dp=1))
    with pytest.raises(ProgramError, match="no parameter of embed lies in shards here"):
        check(((Action("GATHER", 0, 0, "embed", ("F",)), *build(whole, 2)[0]),), whole, 2)


def test_gathers_are_written_and_read_back() -> None:
    for kind in STAGE:
        program = (of(kind),)
        assert lf.schedule.loads(lf.schedule.dumps(program)) == program
    assert "0GATHER0[layers.0: F]" in draw((of("3"),))


# Rows whose programs differ must gather in one order.


def test_rows_that_gather_in_another_order_are_refused() -> None:
    places = {"vision": Place(lf.Mesh(dp=2), sharding="1"), "decoder": Place(lf.Mesh(pp=2)), "head": Place(lf.Mesh(dp=1), (1,))}
    layouts = chain_layouts(TRIO, places)
    program = build_chains(layouts, 2, {"vision": "nested", "head": "inline"})
    check(program, layouts, 2)
    rows = [list(row) for row in program]
    i, j = [k for k, a in enumerate(rows[1]) if a.op == "GATHER" and a.chain == "vision"][:2]
    rows[1][i], rows[1][j] = rows[1][j], rows[1][i]
    with pytest.raises(ProgramError, match="deadlock, these wait for each other"):
        check(tuple(map(tuple, rows)), layouts, 2)


# At random.

FROZEN = ((), (), ("embed",), ("layers.1", "head"))
KINDS = ("1", "2", "3", "3,keep,ahead=0", "3,ahead=2", "1,reduce=microbatch", "3,reduce=step")


@cache
def wanted(frozen: tuple[str, ...], count: int) -> tuple[lf.layouts.Layout, dict[str, torch.Tensor], list[lf.Batch]]:
    layout = lf.layout(tiny(False), lf.Mesh(dp=1), frozen=frozen)
    batches = parity.random_batches(layout.model, 0, 0, count, 9)
    return layout, gradients(layout, SCHEDULES["1f1b"].generate(1, count), batches)[0], batches


def gradients(layout: Any, program: Program, batches: Sequence[lf.Batch]) -> list[dict[str, torch.Tensor]]:
    def body(axes: Any) -> dict[str, torch.Tensor]:
        ctx, dp = context(axes), axes["dp"]
        fn = lf.train.gradients(layout, program, ctx)
        return dict(tree.items(fn(parity.randomised(layout, ctx, 0), batches[dp.index :: dp.size])[0]))

    return lf.sim.spmd(layout.mesh, body)


def case(seed: int) -> str:
    """What became of it: refused, or right."""
    rng = random.Random(seed)
    name, count, ranks, frozen, kind = rng.choice([*SCHEDULES]), rng.choice((1, 2)), rng.choice((1, 1, 2)), rng.choice(FROZEN), rng.choice(KINDS)
    schedule = SCHEDULES[name]
    layout = lf.layout(tiny(False), lf.Mesh(pp=ranks, dp=2), placement=schedule.place(ranks, schedule.chunks), frozen=frozen, sharding=kind)
    names = [None, *{n for s in layout.model.segments for n in (s.name, s.layer)}]
    try:
        program = trainable(schedule.generate(layout.placement, count), layout)
        program = lower(cut(rng, program, layout) if rng.random() < 0.5 else program, layout)
        program = moved(rng, program) if rng.random() < 0.5 else changed(rng, program, names)
        check(program, layout, count)
    except ProgramError as error:
        where = [word for word in (">>", "missing: ", "stay", "stands on rank", "have no forward") if word in str(error)]
        return "refused" if where else f"{seed} refused without the action: {error}"
    one, want, batches = wanted(frozen, count * 2)
    text = f"seed {seed}, {name}, {kind}, frozen {frozen}\n" + "\n".join(" ".join(map(str, row)) for row in program)
    try:
        have = gradients(layout, program, batches)
    except Exception as error:
        raise AssertionError(f"check accepts what does not run: {error!r}\n{text}") from error
    seen: set[str] = set()
    for rank, grads in enumerate(have):
        seen |= grads.keys()
        for path, g in grads.items():
            for piece, full in zip(layout.specs[path].state_pieces(layout.mesh.coords(rank)), one.specs[path].pieces(one.mesh.coords(0))):
                right = full.view(want[path])[box.slices(piece.box, full.box)]
                torch.testing.assert_close(piece.view(g), right, rtol=1e-9, atol=1e-12, msg=lambda words, path=path: f"{path}: {words}\n{text}")
    assert seen == want.keys(), text
    return "right"


def moved(rng: random.Random, program: Program) -> Program:
    """A GATHER, RELEASE or REDUCE or two moved, mostly not far, doubled or dropped."""
    rows = [list(row) for row in program]
    for _ in range(rng.choice((1, 1, 2))):
        row = rng.choice(rows)
        if not (mine := [i for i, a in enumerate(row) if a.op in ("GATHER", "RELEASE", "REDUCE")]):
            continue
        i, how = rng.choice(mine), rng.choice(("near", "near", "far", "drop", "double"))
        to = rng.randrange(len(row)) if how in ("far", "double") else min(max(i + rng.choice((-3, -2, -1, 1, 2, 3)), 0), len(row) - 1)
        a = row[i] if how == "double" else row.pop(i)
        if how != "drop":
            row.insert(to, a)
    return tuple(map(tuple, rows))


def swept(first: int, count: int) -> None:
    found = Counter(case(seed) for seed in range(first, first + count))
    assert found.keys() == {"refused", "right"}, found
    assert min(found["refused"], found["right"]) > count / 10, found  # else it says nothing


def test_a_sample_of_what_check_accepts_runs_right() -> None:
    swept(int(SEED) * 1000, 30)


@pytest.mark.slow
def test_what_check_accepts_runs_right() -> None:
    swept(0, 1500)


def test_what_torch_pipelining_gathers_is_refused_with_the_way_out() -> None:
    with pytest.raises(ProgramError, match=r"a GATHER is of one layer .* or give the compute alone"):
        check(from_csv("0UNSHARD,0F0,0B0,0REDUCE_GRAD"), STAGE["3"], 1)

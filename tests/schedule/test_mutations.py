"""What `check` accepts runs, and gives the right gradients: programs cut, paired and changed at random, those that it lets pass run and compared.

Each case is one seed; `case(seed)` alone repeats it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED, context

import lf
from lf import parity, tree
from lf.models.small import tiny
from lf.schedule import OVERLAP, Action, Program, ProgramError, check, lower
from lf.schedule.ground import joined
from lf.schedule.ir import COMPUTE, OPS
from lf.schedule.lower import trainable
from lf.schedule.named import SCHEDULES
from lf.schedule.pieces import stages

AGAIN = ((), (), ("rope",), ("swiglu", "rms_norm"))
FROZEN = ((), (), ("embed",), ("layers.1", "head"), ("layers.0.attn", "embed"))


@cache
def wanted(frozen: tuple[str, ...], count: int) -> tuple[dict[str, torch.Tensor], list[lf.Batch]]:
    """The gradients of one rank, a forward and its backward in turn, and the batches that they are of."""
    layout = lf.layout(tiny(False), lf.Mesh(dp=1), frozen=frozen)
    batches = parity.random_batches(layout.model, 0, 0, count, 9)
    return gradients(layout, SCHEDULES["1f1b"].generate(1, count), batches)[0], batches


def gradients(layout: lf.Layout, program: Program, batches: Sequence[lf.Batch]) -> list[dict[str, torch.Tensor]]:
    def body(axes: Any) -> dict[str, torch.Tensor]:
        ctx = context(axes)
        return dict(tree.items(lf.train.gradients(layout, program, ctx)(parity.randomised(layout, ctx, 0), batches)[0]))

    return lf.sim.spmd(layout.mesh, body)


def cut(rng: random.Random, program: Program, layout: lf.Layout) -> Program:
    """By hand and at random: into layers and segments, a B into I and W, something made again or taken away, pairs."""
    known = stages(program, joined(layout))[""]

    def parts(a: Action, before: dict[Any, list[str | None]]) -> Iterator[Action]:
        stage, at = known[a.stage], (a.stage, a.microbatch)
        layers, atoms = list(dict.fromkeys(stage.layers)), list(stage.atoms)
        if a.op == "F":
            before[at] = rng.choice([[None], layers, atoms])
            for name in before[at]:
                yield attrs.evolve(a, segment=name)
                if rng.random() < 0.1:
                    yield attrs.evolve(a, op="OFFLOAD", segment=name)
                    yield attrs.evolve(a, op="FETCH", segment=name)
            return
        for name in reversed(rng.choice([[None], before[at], layers if before[at] == [None] else before[at]])):
            if rng.random() < 0.2:
                yield attrs.evolve(a, op="REMAT", segment=name, ops=rng.choice(AGAIN))
            split = a.op == "B" and rng.random() < 0.3
            yield from (attrs.evolve(a, op=op, segment=name) for op in ("IW" if split else a.op))

    rows = []
    for row in program:
        before: dict[Any, list[str | None]] = {}
        new = [part for a in row for part in (parts(a, before) if a.op != "W" else (a,))]
        for i in [i for i, a in enumerate(new) if a.op == "W" and rng.random() < 0.3]:
            new.insert(rng.randrange(i, len(new)), new.pop(i))
        for _ in range(rng.choice((0, 0, 1, 3))):
            i = rng.randrange(len(new) - 1) if len(new) > 1 else 0
            if len(pair := new[i : i + 2]) == 2 and all(a.op in COMPUTE for a in pair):
                new[i : i + 2] = [OVERLAP(*pair)]
        rows.append(tuple(new))
    return tuple(rows)


def changed(rng: random.Random, program: Program, names: Sequence[str | None]) -> Program:
    """One or two actions moved, doubled, dropped, or of another op, microbatch, stage or segment."""
    rows = [list(row) for row in program]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        row = rng.choice(rows)
        i, to = rng.randrange(len(row)), rng.randrange(len(row))
        how = rng.choice(("move", "next", "drop", "double", "op", "microbatch", "stage", "segment"))
        if how == "next":
            row[i : i + 2] = reversed(row[i : i + 2])
        elif how in ("move", "drop", "double"):
            a = row[i] if how == "double" else row.pop(i)
            if how != "drop":
                row.insert(to, a)
        elif row[i].op != "OVERLAP":
            values = {"op": OPS[:-1], "microbatch": (None, 0, 1, 2), "stage": range(5), "segment": names}
            row[i] = attrs.evolve(row[i], **{how: rng.choice(values[how])})
        if not row:
            row.append(Action("F", 0, 0))
    return tuple(map(tuple, rows))


def case(seed: int) -> str:
    """What became of it: refused, or right."""
    rng = random.Random(seed)
    name, count, ranks, frozen = rng.choice(list(SCHEDULES)), rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.choice(FROZEN)
    schedule = SCHEDULES[name]
    layout = lf.layout(tiny(False), lf.Mesh(pp=ranks, dp=1), placement=schedule.place(ranks, schedule.chunks), frozen=frozen)
    names = [None, "embed/weight", *{n for s in layout.model.segments for n in (s.name, s.layer)}]
    try:
        program = cut(rng, trainable(schedule.generate(layout.placement, count), layout), layout)
        program = changed(rng, lower(program, layout) if rng.random() < 0.7 else changed(rng, program, names), names)
        check(program, layout, count)
    except ProgramError as error:
        where = [word for word in (">>", "missing: ", "stay alive", "stands on rank", "have no forward") if word in str(error)]
        return "refused" if where else f"{seed} refused without the action: {error}"
    want, batches = wanted(frozen, count)
    seen: set[str] = set()
    text = f"seed {seed}, {name}, frozen {frozen}\n" + "\n".join(" ".join(map(str, row)) for row in program)
    try:
        ranks_have = gradients(layout, program, batches)
    except Exception as error:
        raise AssertionError(f"check accepts what does not run: {error!r}\n{text}") from error
    for grads in ranks_have:
        seen |= grads.keys()
        for path, g in grads.items():
            torch.testing.assert_close(g, want[path], rtol=1e-9, atol=1e-12, msg=lambda words, path=path: f"{path}: {words}\n{text}")
    assert seen == want.keys(), text
    return "right"


def swept(first: int, count: int) -> None:
    found = Counter(case(seed) for seed in range(first, first + count))
    assert found.keys() == {"refused", "right"}, found
    assert min(found["refused"], found["right"]) > count / 10, found  # else it says nothing


def test_a_sample_of_what_check_accepts_runs_right() -> None:
    swept(int(SEED) * 1000, 60)


@pytest.mark.slow
def test_what_check_accepts_runs_right() -> None:
    swept(0, 2000)

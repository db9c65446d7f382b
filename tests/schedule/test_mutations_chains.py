"""What `check` accepts of several chains runs, and gives the right gradients: programs of a trio of chains over awkward layouts, cut, paired and
changed at random; those that it lets pass run where a send and a receive block until both have come, and are compared with one rank.

Each case is one seed; `case(seed)` alone repeats it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import attrs
import pytest
import torch
from helpers import SEED

import lf
from lf import box, chain_feed, parity, tree
from lf.axes_sim import SimAxis
from lf.chain_context import chain_context
from lf.chain_layouts import Layouts, Place, chain_layouts
from lf.models.trio import Tower, trio
from lf.models.trio_data import Amounts, sample
from lf.schedule import OVERLAP, Action, Program, ProgramError, build_chains, check, dumps, loads
from lf.schedule.beside import Beside
from lf.schedule.bind import bind
from lf.schedule.feed import Units
from lf.schedule.ir import BACKWARD, COMPUTE, OPS, flat
from lf.schedule.named import SCHEDULES
from lf.schedule.pieces import stages
from lf.schedule.run import run
from lf.segment import Terms

MODEL = trio(vision=Tower(6, 2, lf.models.decoder.Attention(2, 1, 4), 4), tap=0, deep=1)
FEW = Amounts(tokens=24, documents=2)
ONE = lf.Mesh(dp=1)
AGAIN = ((), (), ("rope",), ("swiglu", "rms_norm"))
CHAINS = ("vision", "decoder", "head")


def at(mesh: str, *ranks: int, placement: tuple[int, ...] | None = None) -> Place:
    return Place(lf.Mesh.parse(mesh), ranks or None, placement=placement)


# fmt: off
# vision, decoder, head · placements of vision · schedules
ONE_STAGE, CHUNKS = ("gpipe", "1f1b", "zb-h1"), ("interleaved",)
SAME = ("inline", "decoupled", "nested")
LAYOUTS: list[tuple[tuple[Place, Place, Place], tuple[str, ...], tuple[str, ...]]] = [
    ((at("dp=2"), at("pp=2"), at("dp=1", 1)), SAME, ONE_STAGE),
    ((at("dp=2"), at("pp=2", placement=(0, 1, 0, 1)), at("dp=1", 1)), SAME, CHUNKS),
    ((at("dp=2"), at("pp=2", placement=(0, 1, 1, 0)), at("dp=1", 0)), SAME, ("zb-v",)),
    ((at("tp=2"), at("pp=2"), at("dp=1", 1)), SAME, ONE_STAGE),
    ((at("dp=2"), at("pp=2"), at("tp=2")), SAME, ONE_STAGE),
    ((at("pp=2"), at("dp=2"), at("dp=2")), ("inline", "decoupled"), ("1f1b",)),
    ((at("pp=2"), at("pp=2"), at("dp=2")), ("inline", "decoupled"), ONE_STAGE),
    ((at("pp=2"), at("tp=2"), at("pp=1")), ("inline", "decoupled"), ("1f1b",)),
    ((at("dp=1", 2), at("pp=2", 0, 1), at("dp=1", 1)), ("dedicated",), ONE_STAGE),
    ((at("pp=2", 1, 2), at("dp=1", 0), at("dp=1", 0)), ("dedicated",), ("1f1b",)),
    ((at("dp=2", 0, 1), at("pp=2,tp=2"), at("tp=2", 2, 3)), ("inline",), ("1f1b",)),
    ((at("dp=4"), at("pp=2,dp=2"), at("dp=2", 2, 3)), SAME, ("1f1b",)),
    ((at("pp=2,dp=2"), at("pp=2,tp=2"), at("tp=2", 2, 3)), ("decoupled",), ("zb-h1",)),
]
FROZEN: list[dict[str, tuple[str, ...]]] = [
    {}, {}, {},
    {"vision": ("vision.*",)},
    {"decoder": ("decoder.*",)},
    {"vision": ("vision.embed*", "vision.layers.?.attn", "vision.layers.?.mlp"), "decoder": ("decoder.*",), "head": ("head.*",)},
    {"vision": ("vision.*",), "head": ("head.*",)},
    {"vision": ("vision.embed*", "vision.layers.0*"), "decoder": ("decoder.layers.1*",), "head": ("head.embed*",)},
]
# fmt: on


@cache
def laid(which: int, frozen: int) -> Layouts:
    places, _, _ = LAYOUTS[which]
    return chain_layouts(MODEL, {c: attrs.evolve(p, frozen=FROZEN[frozen].get(c, ())) for c, p in zip(CHAINS, places)})


@cache
def batch(i: int, multiple: int) -> lf.Batch:
    return sample(MODEL.config, SEED, i, 0, multiple, FEW)


def results(layouts: Layouts, program: Program, data: Sequence[Sequence[lf.Batch]]) -> list[tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """Of each rank, its gradients, and the losses of all. An evaluation has no gradients."""

    def body(axes: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        ctx = chain_context(layouts, axes, lf.devices.get("cpu"), "fp64")
        params = parity.randomised(layouts, ctx, 0)
        if any(a.op in BACKWARD for row in program for a in flat(row)):
            grads, metrics = lf.train.gradients(layouts, program, ctx)(params, data)
            return dict(tree.items(grads)), {k: metrics[k].item() for k in ("cross_entropy", "action")}
        bound = bind(lf.schedule.complete(program, layouts, len(data)), layouts, ctx)
        feed = chain_feed.feed(bound.ground, data, ctx)
        terms: Terms = run(bound, params, feed, {}, ctx)[1]
        dealt = [units for c, units in feed.batches.items() if c != "decoder"]
        assert not any(isinstance(units, Units) and units.made for units in dealt)  # gone with their last action
        zero = torch.zeros((), dtype=torch.float64)
        return {}, {k: ctx.axes.world.sum(terms.get("losses", {}).get(k, zero)).item() for k in ("cross_entropy", "action")}

    return lf.sim.spmd(lf.Mesh(dp=layouts.world), body)


@cache
def wanted(frozen: int, multiple: int, count: int, trains: bool) -> tuple[Layouts, dict[str, torch.Tensor], dict[str, float]]:
    """One rank that has all."""
    layouts = chain_layouts(MODEL, {c: Place(ONE, frozen=FROZEN[frozen].get(c, ())) for c in CHAINS})
    program = build_chains(layouts, count, {"vision": "inline", "head": "inline"})
    if not trains:
        program = tuple(tuple(a for a in row if a.op == "F") for row in program)
    ((grads, losses),) = results(layouts, program, [[batch(i, multiple)] for i in range(count)])
    return layouts, grads, losses


def compared(program: Program, layouts: Layouts, frozen: int, count: int) -> None:
    mesh = layouts.chains["decoder"].mesh
    dp, multiple, trains = mesh["dp"], 2 * mesh.cp * mesh.tp, any(a.op in BACKWARD for row in program for a in flat(row))
    one, want, losses = wanted(frozen, multiple, count * dp, trains)
    have = results(layouts, program, [[batch(m * dp + d, multiple) for d in range(dp)] for m in range(count)])
    seen: set[str] = set()
    largest = max((g.abs().max().item() for g in want.values()), default=0.0)
    for rank, (grads, mine) in enumerate(have):
        assert mine == pytest.approx(losses, rel=1e-9)
        seen |= grads.keys()
        for path, g in grads.items():
            for piece, full in zip(layouts.state_pieces(path, rank), one.state_pieces(path, 0)):
                right = full.view(want[path])[box.slices(piece.box, full.box)]
                torch.testing.assert_close(piece.view(g), right, rtol=1e-8, atol=1e-10 * largest, msg=lambda words, path=path: f"{path}: {words}")
    assert seen == want.keys()


def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages as on the strictest device: a send and a receive block where they stand."""

    def send(self: SimAxis, x: torch.Tensor, to: int, what: str) -> Callable[[], None]:
        self._message(self.index, to, x, what, tuple(x.shape), x.dtype)()
        return lambda: None

    def recv(self: SimAxis, shape: Any, dtype: Any, device: Any, source: int, what: str) -> Callable[[], torch.Tensor]:
        got = self._message(source, self.index, None, what, tuple(shape), dtype)()
        return lambda: got

    monkeypatch.setattr(SimAxis, "send", send)
    monkeypatch.setattr(SimAxis, "recv", recv)


def cut(rng: random.Random, program: Program, layouts: Layouts) -> Program:
    """By hand and at random: into layers and segments, a B into I and W, something made again or taken away, pairs."""
    known = stages(program, layouts)

    def parts(a: Action, before: dict[Any, list[str | None]]) -> Iterator[Action]:
        stage, here = known[a.chain][a.stage], (a.chain, a.stage, a.microbatch)
        layers, atoms = list(dict.fromkeys(stage.layers)), list(stage.atoms)
        if a.op == "F":
            before[here] = rng.choice([[None], [None], layers, atoms])
            for name in before[here]:
                yield attrs.evolve(a, segment=name)
                if rng.random() < 0.05:
                    yield attrs.evolve(a, op="OFFLOAD", segment=name)
                    yield attrs.evolve(a, op="FETCH", segment=name)
            return
        for name in reversed(rng.choice([[None], before[here], layers if before[here] == [None] else before[here]])):
            if name is not None and (stage.span(name) or (0, 0))[1] <= stage.stop:
                continue
            if rng.random() < 0.15:
                yield attrs.evolve(a, op="REMAT", segment=name, ops=rng.choice(AGAIN))
            split = a.op == "B" and rng.random() < 0.3
            yield from (attrs.evolve(a, op=op, segment=name) for op in ("IW" if split else a.op))

    rows = []
    for row in program:
        before: dict[Any, list[str | None]] = {}
        new = [part for a in row for part in (parts(a, before) if a.op in ("F", *BACKWARD) else (a,))]
        for i in [i for i, a in enumerate(new) if a.op == "W" and rng.random() < 0.3]:
            new.insert(rng.randrange(i, len(new)), new.pop(i))
        for _ in range(rng.choice((0, 0, 1, 3))):
            i = rng.randrange(len(new) - 1) if len(new) > 1 else 0
            if len(pair := new[i : i + 2]) == 2 and all(a.op in COMPUTE for a in pair):
                new[i : i + 2] = [OVERLAP(*pair)]
        rows.append(tuple(new))
    return tuple(rows)


def standing(rng: random.Random, program: Program) -> Program:
    """A unit of a chain that is dealt stands on other rows, on fewer, on more, or is no unit of its own."""
    chain = rng.choice(("vision", "vision", "head"))
    mine = sorted({a.microbatch for row in program for a in flat(row) if a.chain == chain and a.microbatch is not None})
    if not mine:
        return program
    unit, rows, which = rng.choice(mine), [list(row) for row in program], rng.randrange(4)
    if which == 0:  # the last one goes: its microbatches are for those before it
        rows = [[a for a in row if (a.chain, a.microbatch) != (chain, mine[-1])] for row in rows]
    else:
        a, b = rng.randrange(len(rows)), rng.randrange(len(rows))
        units = [x for x in rows[a] if (x.chain, x.microbatch) == (chain, unit)]
        if which in (1, 2) and a != b:
            rows[a] = [x for x in rows[a] if (x.chain, x.microbatch) != (chain, unit)]
        if which in (2, 3) and a != b:
            forwards = [x for x in units if x.op == "F"]
            rows[b] = [x for x in rows[b] if (x.chain, x.microbatch) != (chain, unit)]
            i = rng.randrange(len(rows[b]) + 1)
            rows[b][i:i] = forwards
            j = rng.randrange(i, len(rows[b]) + 1)
            rows[b][j:j] = [x for x in units if x.op != "F"]
    return tuple(map(tuple, rows))


def changed(rng: random.Random, program: Program, names: Sequence[str | None]) -> Program:
    """One or two actions moved, doubled, dropped, put on another row, or of another op, chain, unit, stage or segment."""
    rows = [list(row) for row in program]
    if not any(rows):
        return program
    bridges = [(r, i) for r, row in enumerate(rows) for i, a in enumerate(row) if a.op.startswith("BRIDGE")]
    sums = [(r, i) for r, row in enumerate(rows) for i, a in enumerate(row) if a.op == "REDUCE"]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        r = rng.choice([r for r, row in enumerate(rows) if row])
        row = rows[r]
        i, to = rng.randrange(len(row)), rng.randrange(len(row))
        how = rng.choice(("move", "near", "near", "next", "next", "drop", "double", "row", "op", "chain", "microbatch", "stage", "segment", "some"))
        if how == "some" and (bridges or sums):
            r, i = rng.choice(rng.choice([of for of in (bridges, sums) if of]))
            row, how = rows[r], rng.choice(("near", "next", "drop"))
            if i >= len(row):
                continue
        if how == "near":
            to = max(0, min(len(row) - 1, i + rng.randrange(-5, 6)))
        if how == "next":
            row[i : i + 2] = reversed(row[i : i + 2])
        elif how in ("move", "near", "drop", "double"):
            a = row[i] if how == "double" else row.pop(i)
            if how != "drop":
                row.insert(to, a)
        elif how == "row":
            other = rng.choice(rows)
            a = row.pop(i)
            other.insert(rng.randrange(len(other) + 1), a)
        elif row[i].op != "OVERLAP" and how != "some":
            values = {"op": OPS[:-1], "microbatch": (None, 0, 1, 2), "stage": range(4), "segment": names, "chain": ("", *CHAINS)}
            row[i] = attrs.evolve(row[i], **{how: rng.choice(values[how])})
        if not any(rows):
            break
    return tuple(map(tuple, rows))


@cache
def built(which: int, frozen: int, count: int, kind: str, schedule: str, units: int | None) -> Program:
    return build_chains(laid(which, frozen), count, {"vision": Beside(kind, units), "head": "inline"}, SCHEDULES[schedule].generate)


def compute(program: Program) -> Program:
    return tuple(tuple(a for a in row if a.op in COMPUTE) for row in program)


def drawn(rng: random.Random) -> tuple[Program, Layouts, int, int, str]:
    """A program, perhaps changed; its layout, what is frozen, how many microbatches, and what it is."""
    which, frozen, count = rng.randrange(len(LAYOUTS)), rng.randrange(len(FROZEN)), rng.choice((1, 2, 3))
    _, kinds, schedules = LAYOUTS[which]
    kind, schedule = rng.choice(kinds), rng.choice(schedules)
    units = rng.choice((None, 2, 1)) if kind in ("decoupled", "nested", "dedicated") and count > 1 else None
    layouts = laid(which, frozen)
    names = [None, "decoder.embed/weight", "vision.visual", "vision.deep", "decoder.hidden"]
    names += sorted({n for c in MODEL.chains.values() for s in c.model.segments for n in (s.name, s.layer)})
    program = built(which, frozen, count, kind, schedule, units)
    if rng.random() < 0.1:
        program = tuple(tuple(a for a in row if a.op == "F") for row in program)
    if rng.random() < 0.5:
        program = cut(rng, compute(program), layouts)
        program = standing(rng, program) if rng.random() < 0.5 else program
        program = changed(rng, program, names) if rng.random() < 0.5 else program
        if rng.random() < 0.7:
            program = lf.schedule.complete(program, layouts, count)
    return changed(rng, program, names), layouts, frozen, count, f"layout {which}, {kind}, {schedule}, units {units}, frozen {FROZEN[frozen]}"


def case(seed: str) -> str:
    """What became of it: refused, right, or evaluated right."""
    rng = random.Random(seed)
    try:
        program, layouts, frozen, count, words = drawn(rng)
        check(program, layouts, count)
    except ProgramError as error:
        if "rank" not in str(error):
            raise AssertionError(f"{seed} refused without the place: {error}") from error
        return "refused"
    except Exception as error:
        raise AssertionError(f"seed {seed!r}: {error!r}") from error
    text = f"seed {seed!r}, {words}\n{dumps(program)}"
    assert loads(dumps(program)) == program, text
    try:
        compared(program, layouts, frozen, count)
    except Exception as error:
        raise AssertionError(f"check accepts what does not run right: {error!r}\n{text}") from error
    return "right" if any(a.op in BACKWARD for row in program for a in flat(row)) else "evaluated"


def test_an_evaluation_keeps_no_batches() -> None:
    for kind in SAME:
        program = built(0, 0, 3, kind, "1f1b", None)
        compared(tuple(tuple(a for a in row if a.op == "F") for row in program), laid(0, 0), 0, 3)


def test_a_sample_of_what_check_accepts_runs_right(monkeypatch: pytest.MonkeyPatch) -> None:
    strict(monkeypatch)
    found = Counter(case(f"{SEED} {i}") for i in range(40))
    assert min(found["refused"], found["right"]) > 4, found  # else it says nothing


@pytest.mark.slow
def test_what_check_accepts_runs_right(monkeypatch: pytest.MonkeyPatch) -> None:
    strict(monkeypatch)
    found = Counter(case(f"many {i}") for i in range(1500))
    assert min(found[k] for k in ("refused", "right", "evaluated")) > 20, found

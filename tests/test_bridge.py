"""Bridges between any two layouts: each row of the target is the logical row, and backward is the transpose of forward."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from helpers import processes
from hypothesis import given, settings
from hypothesis import strategies as st

import lf
from lf.batch import Batch, BatchError
from lf.bridge import Table, assemble, bridge, start
from lf.chain_layouts import Joint, Layouts
from lf.chains import Chain, Chains, Edge, Items, groups, padded
from lf.deal import Dealt, dealt
from lf.segment import Model, Segment
from lf.sim import spmd
from lf.spec import LayoutError

WIDTH = 3
LIKE = (WIDTH, torch.float64, torch.device("cpu"))


def takes(batch: Batch) -> np.ndarray:
    return batch.plan["takes"].numpy()


@attrs.frozen
class Case:
    """A joint from chain "a" to chain "b" in a step, with all that its bridge needs."""

    layouts: Layouts
    joint: Joint
    items: dict[str, list[list[Items]]]
    dealt: dict[str, Dealt]
    batches: list[list[Batch]]

    def tables(self, m: int) -> list[Table]:
        return [bridge(self.layouts, self.joint, r, self.items, self.dealt, self.batches).table(m) for r in range(self.layouts.world)]

    @property
    def messages(self) -> tuple[tuple[int, int, int], ...]:
        """(source, target, rows) of all that travels for all microbatches."""
        tables = [(r, t) for m in range(len(self.batches)) for r, t in enumerate(self.tables(m))]
        return tuple((r, to, sum(b - a for a, b in ranges)) for r, t in tables for to, ranges in t.gives)


def case(seed: int, meshes: dict[str, lf.Mesh], main: str, masked: bool = False, rows: int = 5, most: int = 4, microbatches: int = 3) -> Case:
    """Random numbers of items with random numbers of rows, in random units on random places, each chain over random ranks of the world."""
    rng = random.Random(seed)
    world = max(mesh.size for mesh in meshes.values()) + rng.randrange(2)
    stages = {c: rng.sample(range(mesh.pp), mesh.pp) for c, mesh in meshes.items()}
    chains: Any = {c: SimpleNamespace(mesh=mesh, placement=stages[c]) for c, mesh in meshes.items()}
    layouts = Layouts(None, chains, {c: tuple(rng.sample(range(world), mesh.size)) for c, mesh in meshes.items()}, world, main)
    edge = Edge("a", "out", "b", "b.in", "x", takes if masked else None)
    joint = Joint("a.out", "a", rng.randrange(meshes["a"].pp), "b", rng.randrange(meshes["b"].pp), (edge,))
    counts = [[rng.randrange(most + 1) for _ in range(meshes[main].dp or 1)] for _ in range(microbatches)]
    items: dict[str, list[list[Items]]] = {"a": [], "b": []}
    batches = []
    for row in counts:
        given = [tuple(rng.randrange(rows + 1) for _ in range(n)) for n in row]
        multiple = 2 * meshes["a"].cp * meshes["a"].tp
        whole = [{"out": padded(sum(g), multiple) + rng.randrange(2) * multiple} if main == "a" else {} for g in given]
        items["a"].append([Items(tuple(rng.random() for _ in g), {"out": g}, w) for g, w in zip(given, whole)])
        items["b"].append([Items(tuple(rng.random() for _ in g)) for g in given])
        masks = [[True] * sum(g) + [False] * rng.randrange(9) for g in given]
        for mask in masks:
            rng.shuffle(mask)
        batches.append([Batch({"takes": torch.tensor(mask, dtype=torch.bool)}) for mask in masks])
    hands = {}
    for c in meshes.keys() - {main}:
        units = rng.randint(1, microbatches)
        places = [sorted(rng.sample(range(meshes[c].dp or 1), rng.randint(1, meshes[c].dp or 1))) for _ in range(units)]
        hands[c] = dealt(items[c], units, places)
    return Case(layouts, joint, items, hands, batches)


def addresses(case: Case, chain: str, m: int) -> dict[int, list[tuple[int, int, int, int] | None]]:
    """Written without the code under test: of each rank the address (m, d, item, row) of each of its rows; None: padding."""
    where, end = case.layouts.chains[chain], {"a": case.joint.source_stage, "b": case.joint.target_stage}[chain]
    rows = [[items.rows["out"] for items in row] for row in case.items["a"]]
    mesh, out = where.mesh, {}
    for rank, local in ((r, i) for i, r in enumerate(case.layouts.ranks[chain])):
        at = mesh.coords(local)
        place, part, parts = at["dp"], at["cp"] * mesh.tp + at["tp"], mesh.cp * mesh.tp
        if at["pp"] != where.placement[end]:
            continue
        if chain == case.layouts.main:
            mine = [(m, place, j) for j in range(len(rows[m][place]))]
        else:
            hands = case.dealt[chain]
            unit = next(u for u, group in enumerate(groups(len(hands.microbatches), len(rows))) if m in group)
            if (unit, place) not in hands.shares:
                continue
            mine = [(s.microbatch, s.dp, s.item) for s in hands.shares[unit, place]]
        packed: list[Any] = [(*item, r) for item in mine for r in range(rows[item[0]][item[1]][item[2]])]
        if chain == "b" and chain == case.layouts.main and case.joint.edges[0].takes:
            mask, of = takes(case.batches[m][place]).tolist(), iter(packed)
            tokens = [next(of) if t else False for t in mask]
            lo, hi = part * len(tokens) // parts, (part + 1) * len(tokens) // parts
            out[rank] = [t for t in tokens[lo:hi] if t]
            continue
        total = padded(len(packed), 2 * parts) if chain == "b" or chain != case.layouts.main else case.items["a"][m][place].padded["out"]
        packed += [None] * (total - len(packed))
        out[rank] = packed[part * total // parts : (part + 1) * total // parts]
    return out


def value(*address: int) -> list[float]:
    return [float(1 + sum(x * 11**i for i, x in enumerate(address)) + 0.25 * k) for k in range(WIDTH)]


def run(axes: Any, case: Case, m: int, x: torch.Tensor | None, back: bool = False) -> torch.Tensor | None:
    table = bridge(case.layouts, case.joint, axes.rank, case.items, case.dealt, case.batches).table(m)
    table = table.back if back else table
    parts = start(table, x, axes.world, LIKE)()
    assert table.target is not None or not parts
    return None if table.target is None else assemble(table.target, LIKE, parts)


def forward_and_back(axes: Any, case: Case) -> list[Any]:
    """Of each microbatch the rows that came for ones that tell their address, and random numbers to and fro."""
    out, link = [], axes.world
    if link.size > 1 and hasattr(link, "ways"):
        link.ways = (axes._new_group(link.ranks), axes._new_group(link.ranks))
    for m in range(len(case.batches)):
        given, taken = addresses(case, "a", m).get(axes.rank), addresses(case, "b", m).get(axes.rank)
        x = None if given is None else torch.tensor([[-1.0] * WIDTH if a is None else value(*a) for a in given], dtype=torch.float64).view(-1, WIDTH)
        rng = torch.Generator().manual_seed(100 * m + axes.rank)
        u = None if given is None else torch.randn(len(given), WIDTH, dtype=torch.float64, generator=rng)
        v = None if taken is None else torch.randn(len(taken), WIDTH, dtype=torch.float64, generator=rng)
        y, back = run(axes, case, m, u), run(axes, case, m, v, back=True)
        out.append((run(axes, case, m, x), *(0.0 if p is None or q is None else float((p * q).sum()) for p, q in ((y, v), (back, u)))))
    return out


def same(case: Case, results: list[list[Any]]) -> None:
    for m in range(len(case.batches)):
        want = addresses(case, "b", m)
        for rank, found in enumerate(results):
            assert (found[m][0] is None) == (rank not in want)
            if rank in want:  # of a unit of several microbatches, the rows of this one
                rows = [[0.0] * WIDTH if a is None or a[0] != m else value(*a) for a in want[rank]]
                assert found[m][0].tolist() == rows
        there, back = (sum(found[m][k] for found in results) for k in (1, 2))
        assert there == pytest.approx(back, rel=1e-12, abs=1e-12)


SIDES = st.builds(lambda *sizes: lf.Mesh(*sizes), *(st.integers(1, most) for most in (2, 3, 2, 3)))  # pp, dp, cp, tp


@given(st.integers(0, 10**6), SIDES, SIDES, st.sampled_from("abc"), st.booleans(), st.integers(0, 5))
def test_every_row_arrives_and_backward_is_the_transpose(seed: int, a: lf.Mesh, b: lf.Mesh, main: str, masked: bool, rows: int) -> None:
    """Into the main chain, out of it, or beside it ("c")."""
    meshes = {"a": a, "b": b} | ({"c": lf.Mesh(dp=2)} if main == "c" else {})
    step = case(seed, meshes, main, masked and main == "b", rows)
    same(step, spmd(lf.Mesh(dp=step.layouts.world), forward_and_back, step))


@given(st.integers(0, 10**6), SIDES, SIDES, st.sampled_from("ab"), st.booleans())
def test_what_travels_is_exactly_what_is_not_there(seed: int, a: lf.Mesh, b: lf.Mesh, main: str, masked: bool) -> None:
    step = case(seed, {"a": a, "b": b}, main, masked and main == "b")
    want: dict[tuple[int, int], int] = {}
    for m in range(len(step.batches)):
        holder = {address: r for r, mine in addresses(step, "a", m).items() for address in mine if address}
        for rank, mine in addresses(step, "b", m).items():
            for address in mine:
                if address and address[0] == m and holder[address] != rank:
                    want[holder[address], rank] = want.get((holder[address], rank), 0) + 1
    found: dict[tuple[int, int], int] = {}
    for source, to, n in step.messages:
        assert n > 0
        found[source, to] = found.get((source, to), 0) + n
    assert found == want
    for m in range(len(step.batches)):  # and both sides say the same
        tables = step.tables(m)
        gives = {(r, to): sum(b - a for a, b in ranges) for r, t in enumerate(tables) for to, ranges in t.gives}
        assert gives == {(source, r): sum(b - a for a, b in ranges) for r, t in enumerate(tables) for source, ranges in t.takes}


@settings(max_examples=5)
@given(st.integers(0, 10**6))
def test_one_layout_needs_no_message(seed: int) -> None:
    """Two dealt chains of one layout that are dealt alike: nothing travels, and what lies together is copied at once."""
    step = case(seed, {"a": lf.Mesh(dp=3, tp=2), "b": lf.Mesh(dp=3, tp=2), "c": lf.Mesh(dp=2)}, "c")
    layouts = attrs.evolve(step.layouts, ranks=step.layouts.ranks | {"b": step.layouts.ranks["a"]})
    step = attrs.evolve(step, layouts=layouts, dealt=step.dealt | {"b": step.dealt["a"]})
    assert not step.messages
    for m in range(len(step.batches)):
        assert all(len(t.own) <= 1 for t in step.tables(m))


def test_rows_of_several_microbatches_make_one_unit() -> None:
    """And gradients of several targets are added: here both bring back ones for each row, so that each real row has two."""
    step = case(1, {"a": lf.Mesh(dp=2, tp=2), "b": lf.Mesh(dp=3), "c": lf.Mesh(dp=2)}, "c")
    items = step.items
    hands = {"a": dealt(items["a"], 2, [[0], [1]]), "b": dealt(items["b"], 1, [[0, 1, 2]])}
    step = attrs.evolve(step, dealt=hands)

    def both(axes: Any) -> tuple[Any, Any]:
        there, back, made = [], {0: [], 1: []}, {}
        for m in range(3):
            table = bridge(step.layouts, step.joint, axes.rank, items, hands, step.batches).table(m)
            given = addresses(step, "a", m).get(axes.rank)
            x = None if given is None else torch.tensor([[-1.0] * WIDTH if a is None else value(*a) for a in given], dtype=torch.float64)
            there += start(table, x, axes.world, LIKE)()
            for _ in range(2):
                ones = None if table.target is None else torch.ones(table.target, WIDTH, dtype=torch.float64)
                came = start(table.back, ones, axes.world, LIKE)()
                if table.source is not None:
                    back[hands["a"].unit(m)] += came
                    made[hands["a"].unit(m)] = table.source
        unit = None if (mine := addresses(step, "b", 0).get(axes.rank)) is None else assemble(len(mine), LIKE, there)
        return unit, {u: assemble(n, LIKE, back[u]) for u, n in made.items()}

    results = spmd(lf.Mesh(dp=step.layouts.world), both)
    for rank, mine in addresses(step, "b", 0).items():
        assert results[rank][0].tolist() == [[0.0] * WIDTH if a is None else value(*a) for a in mine]
    for m in (0, 1):  # of units 0 and 1
        for rank, mine in addresses(step, "a", m).items():
            assert results[rank][1][hands["a"].unit(m)][:, 0].tolist() == [0.0 if a is None else 2.0 for a in mine]


def test_what_meets_is_added_in_the_dtype_of_the_one_who_gets_it() -> None:
    """A row that goes to two ranks and stays here, too: its gradient is the sum of three."""
    axis = lf.solo().world
    table = Table("rows", own=(((0, 2), (0, 2)), ((1, 3), (3, 5))), source=3, target=5)
    x = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.bfloat16)
    like = (1, torch.float64, torch.device("cpu"))
    y = assemble(5, like, start(table, x, axis, like)())
    assert y.dtype == torch.float64
    assert y[:, 0].tolist() == [1, 2, 0, 2, 4]
    back = assemble(3, (1, torch.float32, torch.device("cpu")), start(table.back, y, axis, like)())
    assert back.dtype == torch.float32
    assert back[:, 0].tolist() == [1, 4, 4]


def test_messages_are_started_in_one_order_all_over_the_world() -> None:
    """By sender, then by receiver: with messages that block until they are received, nobody waits in a circle."""
    started: list[tuple[str, int]] = []
    link: Any = SimpleNamespace(
        index=3,
        send=lambda x, to, what: started.append(("to", to)) or (lambda: None),
        recv=lambda shape, dtype, device, source, what: started.append(("from", source)) or (lambda: torch.zeros(*shape)),
    )
    one = ((0, 1),)
    table = Table("rows", ((2, one), (5, one)), ((1, one), (7, one)), source=1, target=1)
    start(table, torch.ones(1, WIDTH, dtype=torch.float64), link, LIKE)()
    assert started == [("from", 1), ("to", 2), ("to", 5), ("from", 7)]


def test_empty_everything() -> None:
    step = case(0, {"a": lf.Mesh(dp=2, tp=2), "b": lf.Mesh(dp=2)}, "b", most=0)
    assert not step.messages
    same(step, spmd(lf.Mesh(dp=step.layouts.world), forward_and_back, step))


def test_over_real_processes() -> None:
    step = case(5, {"a": lf.Mesh(dp=2, tp=2), "b": lf.Mesh(pp=2, dp=1, tp=2)}, "b", masked=True, rows=9, most=8)
    assert len(step.messages) > 4
    same(step, processes(step.layouts.world, forward_and_back, step))


def test_a_rank_looks_at_its_peers_only() -> None:
    """Thousands of ranks: a table asks for no place that has no row in common with its own."""
    step = case(0, {"a": lf.Mesh(dp=512, tp=2), "b": lf.Mesh(dp=128, tp=8)}, "b", rows=9, most=16, microbatches=2)
    rank = step.layouts.ranks["a"][0]
    joined = bridge(step.layouts, step.joint, rank, step.items, step.dealt, step.batches)
    table = joined.table(0)
    assert table.source is not None
    assert len(joined.source.known) + len(joined.target.known) <= 64
    assert len(table.gives) <= 64


def broken(step: Case, **of: Any) -> Case:
    """The items of data batch dp=1 of microbatch 2, changed."""
    items = {c: [list(row) for row in rows] for c, rows in step.items.items()}
    for chain, changed in of.items():
        items[chain][2][1] = attrs.evolve(items[chain][2][1], **changed)
    return attrs.evolve(step, items=items)


@pytest.mark.parametrize(
    ("main", "chain", "change", "words"),
    [
        ("c", "a", {"rows": {}}, "says no rows for 'out'"),
        ("c", "a", {"rows": {"out": (1,)}}, "has 2 items of 'a' and says rows of 1 items for 'out'"),
        ("c", "a", {"rows": {"out": (1, -2)}}, "item 1 gives -2 rows of 'out'"),
        ("c", "b", {"cost": (1.0, 1.0, 1.0)}, "2 items of 'a', 3 of 'b'; item j of 'b' takes the rows of item j of 'a'"),
        ("a", "a", {"rows": {"out": (9, 9)}, "padded": {"out": 16}}, "18 rows of 'out' by item, and `padded`, which counts all of them, says 16"),
        ("a", "a", {"rows": {"out": (9, 9)}, "padded": {}}, "18 rows of 'out' by item, and `padded`, which counts all of them, says None"),
    ],
)
def test_plans_that_do_not_fit_are_refused(main: str, chain: str, change: dict[str, Any], words: str) -> None:
    step = case(0, {"a": lf.Mesh(dp=2), "b": lf.Mesh(dp=2)} | ({"c": lf.Mesh(dp=2)} if main == "c" else {}), main)
    two = {c: {"cost": (1.0, 1.0)} for c in "ab"}
    two["a"] |= {"rows": {"out": (1, 2)}, "padded": {"out": 16}}
    two[chain] |= change
    with pytest.raises(BatchError, match=r"edge a\.out → b/b\.in, data batch dp=1 of microbatch 2: ") as error:
        broken(step, **two).tables(0)
    assert words in str(error.value)


def test_tokens_and_rows_that_differ_in_number_are_refused_by_the_ranks_of_the_batch() -> None:
    step = case(3, {"a": lf.Mesh(dp=2), "b": lf.Mesh(dp=2)}, "b", masked=True)
    n = sum(step.items["a"][2][1].rows["out"])
    batches = [list(row) for row in step.batches]
    batches[2][1] = Batch({"takes": torch.ones(n + 1, dtype=torch.bool)})
    rank = step.layouts.ranks["b"][1]
    words = f"edge a.out → b/b.in, data batch dp=1 of microbatch 2: {n + 1} tokens take a row, and the items give {n}"
    with pytest.raises(BatchError, match=words):
        bridge(step.layouts, step.joint, rank, step.items, step.dealt, batches)


def test_a_mask_of_tokens_that_only_some_ranks_know_is_refused() -> None:
    def nothing(items: Any, multiple: int) -> Batch:
        return Batch({})

    def chain(name: str, **of: Any) -> Chain:
        return Chain(Model(None, (Segment(name, name, {}, lambda *args: args, **of),), {}), {"out": 2}, collate=None if name == "main" else nothing)

    chains = {"a": chain("a", outputs=("out",)), "b": chain("b", inputs=("x",)), "main": chain("main", inputs=("x",))}
    to = {name: Edge("a", "out", name, name, "x", takes) for name in ("b", "main")}
    with pytest.raises(LayoutError, match=r"edge a\.out → b/b: `takes` is for edges into the main chain; chain 'b' is dealt its items"):
        Chains(None, chains, tuple(to.values()), "main")
    Chains(None, chains, (attrs.evolve(to["b"], takes=None), to["main"]), "main")


def test_a_tensor_of_other_rows_than_the_plan_is_refused() -> None:
    table = Table("a.out of 3 → b 0", source=3)
    for x, has in ((torch.zeros(2, 1), "2"), (None, "no")):
        with pytest.raises(BatchError, match=f"a.out of 3 → b 0: rank 0 has {has} rows; its plan says 3"):
            start(table, x, lf.solo().world, LIKE)

"""Steps of several chains: by hand, twice, without items, in evaluation, in precisions by chain, with frozen parts, and going on elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from chain_steps import MODEL, OTHERS, PLACES, VISION, Data, chain, context, data, program_of, stepped
from helpers import SEED
from torch import Tensor
from trio_oracle import reference

import lf
from lf import chain_feed, parity, tree
from lf.batch import Batch
from lf.chain_layouts import Layouts, Place, chain_layouts
from lf.chains import Items
from lf.checkpoint import native
from lf.models.trio_data import Amounts, sample
from lf.schedule import Program, build_chains, complete
from lf.schedule.bind import bind
from lf.schedule.generate import forward_only
from lf.schedule.run import run


def one_rank(batches: Data) -> tuple[Any, dict[str, Tensor]]:
    """What the oracle, which knows no program and no bridge, makes of these data batches, and the parameters."""
    layouts = chain_layouts(MODEL, {name: Place(lf.Mesh(dp=1)) for name in PLACES})
    params = parity.randomised(layouts, context(layouts, lf.solo()), SEED)
    return reference(MODEL, params, [[batch] for row in batches for batch in row]), dict(tree.items(params))


def gradients(axes: Any, layouts: Layouts, program: Program, batches: Data, times: int = 1) -> Any:
    ctx = context(layouts, axes)
    fn, params = lf.train.gradients(layouts, program, ctx), parity.randomised(layouts, ctx, SEED)
    grads, metrics = [fn(params, batches) for _ in range(times)][-1]
    return dict(tree.items(grads)), metrics


def close(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Of pieces that are whole on this rank."""
    largest = max(g.abs().max() for g in want.values())
    for path, g in found.items():
        assert (g - want[path]).abs().max() <= 1e-10 * max(want[path].abs().max(), 1e-6 * largest), path


WRITTEN = """
# an encoder by hand: both units of two microbatches first, shared by both ranks; the head beside the last stage
rank 0: vision:0F0 vision:0F1 decoder:0F0 decoder:0F1 decoder:0I0 decoder:0I1 decoder:0W0 decoder:0W1 vision:0B1 vision:0B0
rank 1: vision:0F0 vision:0F1 decoder:1F0 head:0F0 head:0B0 decoder:1B0 decoder:1F1 head:0F1 head:0B1 decoder:1I1 decoder:1W1 vision:0B1 vision:0B0
"""


def test_a_program_written_by_hand_and_one_read_back() -> None:
    layouts, batches = chain_layouts(MODEL, PLACES), data(2)
    want, _ = one_rank(batches)
    whole = complete(lf.schedule.loads(WRITTEN), layouts, 2)
    for program in (whole, lf.schedule.loads(lf.schedule.dumps(whole))):
        for grads, metrics in lf.sim.spmd(lf.Mesh(dp=2), gradients, layouts, program, batches):
            close(grads, want.gradients)
            torch.testing.assert_close(metrics["grad_norm"], torch.as_tensor(want.grad_norm, dtype=torch.float64), rtol=1e-10, atol=0)


def test_a_second_step_knows_nothing_of_the_first() -> None:
    layouts, batches = chain_layouts(MODEL, PLACES), data(3)
    program = program_of(layouts, 3)
    once, twice = (lf.sim.spmd(lf.Mesh(dp=2), gradients, layouts, program, batches, n) for n in (1, 2))
    for (a, _), (b, _) in zip(once, twice):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[path], b[path]) for path in a)


def evaluated(layouts: Layouts, program: Program, batches: Data) -> None:
    """The losses of a program of forwards alone are those of the oracle."""
    want, _ = one_rank(batches)

    def fn(axes: Any) -> Any:
        ctx = context(layouts, axes)
        bound = bind(program, layouts, ctx, name="evaluation")
        grads, terms, finite = run(bound, parity.randomised(layouts, ctx, SEED), chain_feed.feed(bound.ground, batches, ctx), {}, ctx)
        assert not grads
        assert finite.all()
        return terms.get("losses", {})

    found = lf.sim.spmd(lf.Mesh(dp=2), fn)
    for name, s in want.sums.items():
        mine = torch.stack([losses[name] for losses in found if name in losses]).sum()
        torch.testing.assert_close(mine, torch.as_tensor(s, dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["inline", "decoupled", "nested"])
def test_evaluation_has_the_same_losses_and_no_gradient(kind: str) -> None:
    """A program of forwards alone, of all chains."""
    layouts = chain_layouts(MODEL, PLACES)
    evaluated(layouts, build_chains(layouts, 3, {"vision": kind, "head": "inline"}, forward_only), data(3))


@pytest.mark.parametrize(
    ("kind", "gone", "rows"), [("decoupled", "vision:0F0", (0,)), ("decoupled", "vision:0F0", (1,)), ("nested", "vision:0F2", (0, 1))]
)
def test_an_evaluation_without_a_forward_is_another_division(kind: str, gone: str, rows: tuple[int, ...]) -> None:
    """Nothing but its F says that a unit of an evaluation stands on a row, or that it is there. Without it, and with no other change, the other row
    has all items of the unit, or the unit before it those of its microbatch: `check` accepts that, so the losses must be the same."""
    layouts = chain_layouts(MODEL, PLACES)
    whole = build_chains(layouts, 3, {"vision": kind, "head": "inline"}, forward_only)
    program = tuple(tuple(a for a in row if str(a) != gone or r not in rows) for r, row in enumerate(whole))
    assert program != whole
    evaluated(layouts, program, data(3))


def test_rows_that_stages_take_are_known_on_every_rank() -> None:
    """Of what an edge brings to another stage, too: each rank knows as many rows as the rank of that stage with its own coordinates takes."""
    places = {"vision": Place(lf.Mesh(dp=4)), "decoder": Place(lf.Mesh(pp=2, tp=2)), "head": Place(lf.Mesh(tp=2), (2, 3))}
    layouts, batches = chain_layouts(MODEL, places), [[sample(MODEL.config, 0, m, 0, 4)] for m in range(3)]
    program = program_of(layouts, 3, "decoupled")

    def fn(axes: Any) -> Any:
        ctx = context(layouts, axes)
        fed = chain_feed.feed(bind(program, layouts, ctx).ground, batches, ctx)
        here = {k: layouts.coords(j.target, axes.rank) for k, j in enumerate(layouts.joints)}
        return [(k, m, at["tp"], fed.takes(k, m), fed.table(k, m).target) for k, at in here.items() if at for m in range(3)]

    found = [row for rows in lf.sim.spmd(lf.Mesh(dp=4), fn) for row in rows]
    taken = {(k, m, tp): target for k, m, tp, _, target in found if target is not None}
    assert len(taken) == len(layouts.joints) * 3 * 2
    assert any(rows is None for *_, rows in found)
    assert all(takes == taken[k, m, tp] for k, m, tp, takes, _ in found)
    assert any(taken[k, m, 0] != taken[k, m, 1] for k, m, _ in taken)


def bare(batch: Batch) -> Batch:
    """The same without any action; its text and images stay."""
    none = batch.payload["noised"][:0]
    return attrs.evolve(
        batch, plan={**batch.plan, "actions": torch.zeros_like(batch.plan["actions"])}, payload={**batch.payload, "noised": none, "targets": none}
    )


@pytest.mark.parametrize("kind", ["inline", "decoupled", "nested"])
@pytest.mark.parametrize("what", ["no items of the encoder", "no action", "neither", "neither in the second"])
def test_data_without_items(kind: str, what: str) -> None:
    """Of one microbatch, or of the whole step: all ranks go through it, and what nothing reached has a gradient of exact zeros."""
    layouts = chain_layouts(MODEL, PLACES)
    amounts = Amounts(images=0) if "encoder" in what or "neither" in what else None
    batches = data(3, amounts=amounts)
    if what == "neither in the second":
        batches = [data(3)[0], [bare(batches[1][0])], data(3)[2]]
    elif "encoder" not in what:
        batches = [[bare(batch) for batch in row] for row in batches]
    want, _ = one_rank(batches)
    for grads, metrics in lf.sim.spmd(lf.Mesh(dp=2), gradients, layouts, program_of(layouts, 3, kind), batches):
        assert metrics["finite"].all()
        close(grads, want.gradients)
        if amounts and "second" not in what:
            assert all(not g.any() for path, g in grads.items() if path.startswith("vision"))
            assert (metrics["vision_imbalance"], metrics["vision_imbalance_before"]) == (1, 1)
        if what in ("no action", "neither"):
            assert all(not g.any() for path, g in grads.items() if path.startswith("head"))


def test_imbalance_of_a_case_by_hand() -> None:
    """Four images of one microbatch, the long ones first: cut in order two ranks have a + b and c + d, dealt by cost a + d and b + c."""
    layouts, batch = chain_layouts(MODEL, PLACES), data(1)[0][0]
    costs = (9.0, 7.0, 2.0, 1.0)
    n = int((batch.plan["tokens"] == MODEL.config.placeholder).sum())
    assert n >= 1
    model = chain("vision", items=lambda one: Items(costs, dict.fromkeys(VISION.width, (0, 0, 0, n))), collate=four(n))
    seen = stepped(model, batches=[[batch]], m=1)
    for metrics in seen:
        assert metrics["vision_imbalance_before"] == pytest.approx((9 + 7) / (19 / 2))
        assert metrics["vision_imbalance"] == pytest.approx((9 + 1) / (19 / 2))
    assert len({float(metrics["vision_imbalance"]) for metrics in seen}) == 1
    assert layouts.world == len(seen)


def four(rows: int) -> Any:
    """Images of no rows but the last, which has all."""

    def collate(items: Sequence[Any], multiple: int) -> Batch:
        lengths = [MODEL.config.merge * rows if j == 3 else 0 for _, j in items]
        plan = {"patches": torch.tensor([0, 0, 0, MODEL.config.merge * rows])}
        whole = Batch(plan, {"pixels": torch.ones(sum(plan["patches"].tolist()), MODEL.config.features)})
        assert sum(lengths) in (0, MODEL.config.merge * rows)
        return VISION.collate([(whole, j) for _, j in items], multiple)  # type: ignore[misc]

    return collate


def test_each_chain_computes_in_its_own_precision() -> None:
    """vision in float32, the decoder in bfloat16, the head in float32: parameters, what edges bring, and what goes back."""
    seen: dict[str, set[torch.dtype]] = {"visual": set(), "deep": set(), "context": set()}

    def noting(names: tuple[str, ...], plain: Any) -> Any:
        def apply(p: Any, x: Any, batch: Any, ctx: Any) -> Any:
            for name in names:
                seen[name].add(x[name].dtype)
            return plain(p, x, batch, ctx)

        return apply

    model = MODEL
    for name, c in MODEL.chains.items():
        segments = tuple(attrs.evolve(s, apply=noting(s.inputs, s.apply)) if s.inputs else s for s in c.model.segments)
        model = attrs.evolve(model, chains={**model.chains, name: attrs.evolve(c, model=attrs.evolve(c.model, segments=segments))})
    layouts, batches = chain_layouts(model, PLACES), data(3)
    program = program_of(layouts, 3)

    def fn(axes: Any, precision: Any) -> Any:
        ctx = context(layouts, axes, precision)
        init, step = lf.train.make(layouts, lf.optim.sgd(0.1), program, ctx)
        # as a model starts: with weights that are noise, the rounding of bfloat16 now and then moves the norm by a fifth
        state = init(lf.init(layouts, ctx, SEED))
        dtypes = {path: w.dtype for path, w in tree.items(state.params)}
        state, metrics = step(state, batches)
        assert {w.dtype for _, w in tree.items(state.optimizer["master"])} == {torch.float32}
        return dtypes, metrics

    mixed = lf.sim.spmd(lf.Mesh(dp=2), fn, {"vision": "fp32", "decoder": "bf16", "head": "fp32"})
    assert seen == {"visual": {torch.bfloat16}, "deep": {torch.bfloat16}, "context": {torch.float32}}
    exact = lf.sim.spmd(lf.Mesh(dp=2), fn, "fp32")
    for (dtypes, metrics), (_, want) in zip(mixed, exact):
        assert all(dtype == (torch.bfloat16 if path.startswith("decoder") else torch.float32) for path, dtype in dtypes.items())
        for name in ("loss", "grad_norm"):
            torch.testing.assert_close(metrics[name], want[name], rtol=0.02, atol=0)
            assert metrics[name] != want[name]


class Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """The shapes of all tensors that operators make, with memory of their own: no views, nor what shares that of a parameter."""

    def __init__(self, params: dict[str, Tensor]):
        super().__init__()
        self.theirs, self.shapes = {w.untyped_storage().data_ptr() for w in params.values()}, set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            memory = x.untyped_storage() if isinstance(x, Tensor) else None
            if memory is not None and memory.nbytes() == x.numel() * x.itemsize and memory.data_ptr() not in self.theirs:
                self.shapes.add(tuple(x.shape))
        return out


@pytest.mark.parametrize("frozen", ["vision", "decoder", "head"])
def test_nothing_of_the_size_of_a_frozen_leaf_is_ever_made(frozen: str) -> None:
    """Every tensor of a step is looked at: of the shapes that only frozen parameters have, none is there; where they train, all are."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    batches = [[sample(MODEL.config, 0, i)] for i in range(2)]  # by no other seed: an activation may have as many rows as a parameter
    for patterns in ((), (f"{frozen}.*",)):
        places = {name: Place(lf.Mesh(dp=1), frozen=patterns if name == frozen else ()) for name in PLACES}
        layouts = chain_layouts(MODEL, places)
        ctx = context(layouts, lf.solo())
        fn = lf.train.gradients(layouts, program_of(layouts, 2, "inline"), ctx)
        params = parity.randomised(layouts, ctx, SEED)
        with Allocated(dict(tree.items(params))) as seen:
            grads, _ = fn(params, batches)
        assert {path for path, _ in tree.items(grads)} == set(MODEL.params()) - layouts.frozen
        shapes["frozen" if patterns else "trained"] = seen.shapes
    matrices = {spec.param.shape for path, spec in layouts.specs.items() if path in layouts.frozen and len(spec.param.shape) == 2}
    only = matrices - {spec.param.shape for path, spec in layouts.specs.items() if path not in layouts.frozen}
    assert len(only) > 2
    assert only <= shapes["trained"]
    assert not only & shapes["frozen"]


def trained(axes: Any, layouts: Layouts, m: int, first: int, last: int, folder: Path, load: bool, save: bool) -> dict[str, Tensor]:
    """Steps first … last - 1 with AdamW, from a checkpoint or the beginning, and perhaps to one."""
    ctx, dp = context(layouts, axes), layouts.chains["decoder"].mesh["dp"]
    init, step = lf.train.make(layouts, lf.optim.adamw(0.01), program_of(layouts, m, "inline"), ctx)
    state = native.load(folder, layouts, ctx)[0] if load else init(parity.randomised(layouts, ctx, SEED))
    for n in range(first, last):
        state, metrics = step(state, data(m, dp, n))
    if save:
        native.save(folder, layouts, state, ctx, {})
    return {name: metrics[name] for name in ("loss", "cross_entropy", "action", "grad_norm")}


def test_a_state_goes_on_at_other_places(tmp_path: Path) -> None:
    """The layout of every chain, the pipeline and the placement change in the middle; what is learned does not."""
    here, there = chain_layouts(MODEL, {**PLACES, "vision": Place(lf.Mesh(dp=1), (0,))}), chain_layouts(MODEL, OTHERS)
    folder = tmp_path / "state"
    (want, _) = lf.sim.spmd(lf.Mesh(dp=2), trained, here, 4, 0, 5, folder, False, False)
    lf.sim.spmd(lf.Mesh(dp=2), trained, here, 4, 0, 3, folder, False, True)
    for found in lf.sim.spmd(lf.Mesh(dp=2), trained, there, 2, 3, 5, folder, True, False):
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)


def test_a_small_training_learns() -> None:
    layouts, batches = chain_layouts(MODEL, PLACES), data(3)
    program = program_of(layouts, 3)

    def fn(axes: Any) -> list[dict[str, Tensor]]:
        ctx = context(layouts, axes, "fp32")
        init, step = lf.train.make(layouts, lf.optim.adamw(0.01), program, ctx, clip=1.0)
        state, out = init(lf.init(layouts, ctx, SEED)), []
        for _ in range(15):
            state, metrics = step(state, batches)
            out.append(metrics)
        return out

    for seen in lf.sim.spmd(lf.Mesh(dp=2), fn):
        for name in ("cross_entropy", "action"):
            assert seen[-1][name] < 0.9 * seen[0][name]
        assert not any(metrics["skipped"] for metrics in seen)

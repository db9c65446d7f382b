"""The model of three chains: its parts alone, packed, split over tp, and against its own definition."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
import trio_oracle as oracle
from helpers import SEED, draw

import lf
from lf import parity
from lf.batch import IGNORE, Batch, BatchError
from lf.config import ConfigError
from lf.models.trio import TrioConfig, trio
from lf.models.trio_data import sample
from lf.parallel.reduce import reduce_gradients
from lf.schedule.shapes import trace
from lf.sim import spmd

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def collated(model: Any, chain: str, batches: list[Batch], multiple: int = 1) -> Batch:
    """All items of some data batches."""
    c = model.chains[chain]
    return c.collate([(b, j) for b in batches for j in range(len(c.items(b).cost))], multiple)


def test_a_data_batch_and_its_items() -> None:
    model, kinds = trio(), set()
    for m, d in ((m, d) for m in range(3) for d in range(2)):
        batch = sample(model.config, SEED, m, d, 6)
        plan, vision, decoder, head = batch.plan, *(c.items(batch) for c in model.chains.values())
        tokens = plan["tokens"].numpy()
        model.chains["decoder"].model.accepts(batch)
        assert len(tokens) % 6 == 0
        placeholders = int((tokens == model.config.placeholder).sum())
        assert sum(vision.rows["visual"]) == sum(vision.rows["deep"]) == placeholders == sum(plan["patches"].tolist()) // 2
        assert len(decoder.cost) == len(head.cost) == len(plan["actions"])
        assert decoder.padded["hidden"] == len(tokens) >= sum(decoder.rows["hidden"])
        assert not (plan["labels"] == model.config.placeholder).any()
        assert (plan["labels"] != IGNORE).any()
        assert (plan["labels"][sum(decoder.rows["hidden"]) :] == IGNORE).all()
        assert np.argsort(vision.cost, kind="stable").tolist() == np.argsort(plan["patches"].numpy(), kind="stable").tolist()
        kinds.add((bool(len(plan["patches"])), bool(plan["actions"].sum())))
    assert kinds == {(True, True), (False, True), (True, False)}
    a, b = (sample(model.config, SEED, 0, 0, 6) for _ in range(2))
    assert all(torch.equal(x, b.plan[k]) for k, x in a.plan.items())
    assert all(torch.equal(x, b.payload[k]) for k, x in a.payload.items())


def test_costs_are_those_of_the_segments() -> None:
    """By which items are dealt, and by which layers are: one image alone, one sample alone."""
    model = trio()
    batch = sample(model.config, SEED)
    for name in ("vision", "head"):
        chain = model.chains[name]
        of = chain.model.flops
        assert of is not None
        for j, cost in enumerate(chain.items(batch).cost):
            if name == "vision" or batch.plan["actions"][j]:  # no action at all: one row of padding
                assert cost == pytest.approx(of(chain.collate([(batch, j)], 1)))


def test_packing_changes_nothing() -> None:
    """Every image, document and sample alone, against those of a data batch together: the sums of losses, and every gradient."""
    model = trio()
    params, batches = oracle.parameters(model, SEED), oracle.sample_batches(model, SEED, 3, multiple=6)
    packed, alone = oracle.reference(model, params, batches), oracle.one_at_a_time(model, params, batches)
    for k, s in packed.sums.items():
        assert s > 0
        torch.testing.assert_close(s, alone.sums[k], **TOLERANCE)
    for path, g in packed.gradients.items():
        torch.testing.assert_close(g, alone.gradients[path], **TOLERANCE)


def test_every_parameter_learns() -> None:
    model = trio()
    got = oracle.reference(model, oracle.parameters(model, SEED), oracle.sample_batches(model, SEED, 2))
    assert got.gradients.keys() == model.params().keys()
    largest = max(g.abs().max() for g in got.gradients.values())
    for path, g in got.gradients.items():
        assert g.abs().max() > 1e-5 * largest, path
        assert g.isfinite().all()


def test_gradients_are_slopes() -> None:
    """Finite differences along a random direction of each of some parameters, at both ends of each chain and at the edges."""
    model = trio()
    params, batches = oracle.parameters(model, SEED), oracle.sample_batches(model, SEED, 2)
    got, step = oracle.reference(model, params, batches), 1e-6
    for path in (
        "vision.embed/weight", "vision.layers.1.deep/down", "vision.merger/norm", "decoder.embed/weight", "decoder.layers.2.attn/qkv",
        "head.embed/weight", "head.layers.0.cross/context_norm", "head.layers.1.cross/kv", "head.out/weight",
    ):  # fmt: skip
        segment, name = path.split("/")
        direction = draw(path, shape=tuple(params[segment][name].shape))
        ends = []
        for sign in (1, -1):
            moved = {**params, segment: {**params[segment], name: params[segment][name] + sign * step * direction}}
            ends.append(oracle.reference(model, moved, batches).loss)
        slope = (got.gradients[path] * direction).sum()
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-5, atol=1e-7)


def test_rows_of_images_do_not_depend_on_what_is_beside_them() -> None:
    """Items of several data batches in another order, with more padding."""
    model = trio()
    vision, params = model.chains["vision"], oracle.parameters(model, SEED)
    batches = [sample(model.config, SEED, m) for m in range(3)]
    items = [(b, j) for b in batches for j in range(len(b.plan["patches"]))]
    rows = [int(b.plan["patches"][j]) // 2 for b, j in items]
    plain, _ = oracle.run_chain(model, "vision", params, vision.collate(items, 1), {})
    other, _ = oracle.run_chain(model, "vision", params, vision.collate(items[::-1], 12), {})
    assert len(items) > 1
    for name, values in plain.items():
        assert len(values) == sum(rows)
        assert len(other[name]) % 12 == 0
        for a, b in zip(values.split(rows), other[name][: sum(rows)].split(rows[::-1])[::-1]):
            torch.testing.assert_close(a, b, **TOLERANCE)


def test_a_payload_may_be_a_function_of_the_item() -> None:
    """So that only a rank that runs an item reads it."""
    model = trio()
    batch = sample(model.config, SEED)
    for chain, names in (("vision", ["pixels"]), ("head", ["noised", "targets"])):
        plain, asked = collated(model, chain, [batch]), []

        def read(name: str, j: int, chain: str = chain, asked: list[int] = asked) -> torch.Tensor:
            asked.append(j)
            lengths = batch.plan["patches" if chain == "vision" else "actions"].tolist()
            return batch.payload[name].split(lengths)[j]

        lazy = attrs.evolve(batch, payload={n: (lambda j, n=n, read=read: read(n, j)) for n in names})
        lengths = batch.plan["patches" if chain == "vision" else "actions"].tolist()
        last = max(j for j, n in enumerate(lengths) if n)
        got = model.chains[chain].collate([(lazy, last)], 1)
        assert set(asked) == {last}
        for n in names:
            assert torch.equal(got.payload[n], plain.payload[n][sum(lengths[:last]) : sum(lengths)])


def test_a_payload_of_another_shape_is_refused() -> None:
    model = trio()
    batch = sample(model.config, SEED)
    wrong = attrs.evolve(batch, payload={**batch.payload, "pixels": batch.payload["pixels"][:, :3]})
    with pytest.raises(BatchError, match=r"payload 'pixels' of item 0 is \(\d+, 3\); by the plan's 'patches' it has shape \(\d+, 5\)"):
        model.chains["vision"].collate([(wrong, 0)], 1)
    with pytest.raises(BatchError, match="a data batch needs 'patches' in its plan, the rows of each item; it has tokens"):
        model.chains["vision"].items(Batch({"tokens": batch.plan["tokens"]}))


def test_rows_take_the_places_of_placeholders() -> None:
    model = trio()
    params, batch = oracle.parameters(model, SEED), sample(model.config, SEED, multiple=6)
    (edge, deep, *_), ctx = model.edges, oracle.context()
    mask = torch.from_numpy(edge.takes(batch))
    assert edge.takes is deep.takes
    ready = lf.shard_batch(batch, model.chains["decoder"].model, ctx)
    rows = draw("rows", shape=(int(mask.sum()), model.config.decoder.dim))
    embed = model.segment("decoder", edge.segment)
    x, _ = embed.apply(params[embed.name], {"visual": rows}, ready, ctx)
    assert torch.equal(x[mask], rows)
    assert torch.equal(x[~mask], params[embed.name]["weight"][batch.plan["tokens"][~mask]])
    # deep: as if the stream had come with the rows added
    middle = model.segment("decoder", deep.segment)
    got, _ = middle.apply(params[middle.name], {"x": x, "deep": rows}, ready, ctx)
    added = x.clone()
    added[mask] += rows
    want, _ = middle.apply(params[middle.name], {"x": added, "deep": torch.zeros_like(rows)}, ready, ctx)
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_padding_never_counts() -> None:
    """Whatever its rows hold: of the payload, and of what an edge brings."""
    model = trio()
    params, batch, dim = oracle.parameters(model, SEED), sample(model.config, SEED), model.config.decoder.dim
    seen = sum(model.chains["decoder"].items(batch).rows["hidden"])
    rows = {"vision": int(batch.plan["patches"].sum()), "head": int(batch.plan["actions"].sum())}
    for name, n in rows.items():
        plain, padded = collated(model, name, [batch], n), collated(model, name, [batch], 50)
        noise = {k: torch.cat([v[:n], draw(k, shape=(len(v) - n, v.shape[1]), dtype=v.dtype)]) for k, v in padded.payload.items()}
        assert all(len(v) > n for v in noise.values())
        context = draw("context", shape=(seen + 9, dim))
        want, loss = oracle.run_chain(model, name, params, plain, {"context": context[:seen]})
        got, same = oracle.run_chain(model, name, params, attrs.evolve(padded, payload=noise), {"context": context})
        for k in want:
            torch.testing.assert_close(got[k][: n // 2], want[k][: n // 2], **TOLERANCE)
        for k in loss:
            torch.testing.assert_close(same[k], loss[k], **TOLERANCE)


def test_a_unit_without_items() -> None:
    """Padding alone: outputs that are finite, no loss, no gradient, and none of them unused."""
    model = trio()
    params = oracle.parameters(model, SEED)
    for chain, inputs in (("vision", {}), ("head", {"context": torch.zeros(6, model.config.decoder.dim, dtype=torch.float64)})):
        leaves = {s.name: {n: params[s.name][n].clone().requires_grad_() for n in s.params} for s in model.chains[chain].model.segments}
        outputs, losses = oracle.run_chain(model, chain, leaves, model.chains[chain].collate([], 6), inputs)
        assert all(len(v) == 6 and v.isfinite().all() for v in outputs.values())
        assert all(v == 0 for v in losses.values())
        ends = [*outputs.values(), *losses.values()]
        flat = [w for segment in leaves.values() for w in segment.values()]
        assert all((g == 0).all() for g in torch.autograd.grad(ends, flat, [torch.zeros_like(v) for v in ends]))


def test_batches_and_sizes_that_cannot_be_are_refused() -> None:
    model = trio()
    accepts, batch = model.chains["decoder"].model.accepts, sample(model.config, SEED)
    n = int(batch.plan["patches"].sum()) // 2
    fewer = attrs.evolve(batch, plan={**batch.plan, "patches": batch.plan["patches"][1:]})
    with pytest.raises(BatchError, match=f"{n} tokens are the placeholder 36, and the .* images make .* rows: each row needs one"):
        accepts(fewer)
    with pytest.raises(BatchError, match=r"image 0 has .* patches, which is no multiple of merge=2"):
        accepts(attrs.evolve(batch, plan={**batch.plan, "patches": batch.plan["patches"] + 1}))
    with pytest.raises(BatchError, match=r"tokens\[0\] = 37 is outside the vocabulary"):
        accepts(attrs.evolve(batch, plan={**batch.plan, "tokens": batch.plan["tokens"] * 0 + 37}))
    with pytest.raises(ConfigError, match="deep=4 is no layer of 'decoder', which has 4: 0 to 3"):
        trio(deep=4)
    with pytest.raises(ConfigError, match="merge=0"):
        TrioConfig(merge=0)


@attrs.frozen
class Alone:
    coords: dict[str, int]
    outputs: dict[str, torch.Tensor]
    losses: dict[str, torch.Tensor]
    rows: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def alone(axes: Any, model: Any, name: str, batch: Batch, context: int) -> Alone:
    """One chain by hand, on the ranks of tp: its outputs, the gradient of what comes in, and its reduced gradients, where rows that come in and
    gradients of rows that go out are numbers that do not depend on the layout."""
    ctx, chain, dim, tp = lf.Context(axes, lf.devices.get("cpu"), "fp64"), model.chains[name].model, model.config.decoder.dim, axes["tp"]
    where = lf.layout(chain, axes.mesh, whole=False)
    params = {s: {n: w.requires_grad_() for n, w in named.items()} for s, named in parity.randomised(where, ctx, SEED).items()}
    inputs: dict[str, torch.Tensor] = {}
    if name == "decoder":
        takes = torch.from_numpy(model.edges[0].takes(batch))
        mine = takes.chunk(tp.size)[tp.index]  # the row is padded, so shares are equal
        before = int(takes[: tp.index * len(mine)].sum())
        inputs = {k: draw(k, shape=(int(takes.sum()), dim))[before : before + int(mine.sum())] for k in ("visual", "deep")}
    if name == "head":
        inputs = {"context": draw("context", shape=(context, dim)).chunk(tp.size)[tp.index]}
    inputs = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    outputs, losses = oracle.run_chain(model, name, params, batch, inputs, ctx)
    total = sum(losses.values(), torch.zeros((), dtype=torch.float64))
    for k, v in outputs.items():
        total = total + (v * draw(k, "dy", shape=(len(v) * tp.size, dim)).chunk(tp.size)[tp.index]).sum()
    paths = list(where.specs)
    got = torch.autograd.grad(total, [*inputs.values(), *(params[p.split("/")[0]][p.split("/")[1]] for p in paths)])
    grads = dict(zip(paths, got[len(inputs) :]))
    reduce_gradients(list(where.specs.values()), grads, {}, axes)()
    rows = dict(zip(inputs, got))
    sums = {k: axes["tp"].sum(v.detach()) for k, v in losses.items()}
    return Alone(axes.coords, {k: v.detach() for k, v in outputs.items()}, sums, rows, grads)


@pytest.mark.parametrize("chain", ["vision", "decoder", "head"])
@pytest.mark.parametrize("tp", [2, 3, 5])
def test_a_chain_split_over_tp(chain: str, tp: int) -> None:
    """5 is more than the heads of vision, so some ranks have none; 2 and 5 cut groups of the head's query heads in two."""
    model = trio()
    data = [sample(model.config, SEED, m, 0, 30) for m in range(3)]
    batch = data[0] if chain == "decoder" else collated(model, chain, data, 30)
    context = int(batch.plan["cu_seqlens_k"][-1]) if chain == "head" else 0
    (one,), many = (spmd(lf.Mesh(tp=n), alone, model, chain, batch, context) for n in (1, tp))
    for k, v in one.outputs.items():
        torch.testing.assert_close(torch.cat([r.outputs[k] for r in many]), v, **TOLERANCE)
        assert len({len(r.outputs[k]) for r in many}) == 1
    for k, v in one.losses.items():
        torch.testing.assert_close(many[0].losses[k], v, **TOLERANCE)
    for k, v in one.rows.items():
        torch.testing.assert_close(torch.cat([r.rows[k] for r in many]), v, **TOLERANCE)
    where = lf.layout(model.chains[chain].model, lf.Mesh(tp=tp), whole=False)
    whole = lf.layout(model.chains[chain].model, lf.Mesh(dp=1), whole=False)
    for path, spec in where.specs.items():
        held = [(spec.pieces(r.coords), r.gradients[path]) for r in many]
        pairs = parity._pairs(held, whole.specs[path].pieces(lf.Mesh(dp=1).coords(0)), one.gradients[path])
        for a, b in pairs:
            torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda m, path=path: f"{path}: {m}")


def test_shapes_are_known_on_paper() -> None:
    """No segment of vision reads data on the host, and each weight in `products` is that of one product."""
    model = trio()
    batch = collated(model, "vision", [sample(model.config, SEED)], 6)

    def shapes(axes: Any) -> Any:
        ctx = lf.Context(axes, lf.devices.get("cpu"), "fp64")
        return trace(lf.layout(model.chains["vision"].model, axes.mesh, whole=False), batch, ctx)

    for got in spmd(lf.Mesh(tp=3), shapes):
        assert got.products["vision.merger"]["up"][0] == (len(batch.plan["positions"]) // 2, 18)


def test_larger_ones() -> None:
    """As a benchmark makes them."""
    model = trio(attrs.evolve(TrioConfig(), vocab=99, merge=4, vision=attrs.evolve(TrioConfig().vision, dim=16, layers=5), tap=3))
    assert len(model.chains["vision"].model.layers()) == 7
    (batches,) = oracle.sample_batches(model, SEED, 1, tokens=60, documents=5, images=3, rows=6, actions=9)
    assert len(batches[0].plan["actions"]) == 5
    assert np.isfinite(oracle.reference(model, oracle.parameters(model, SEED), [batches]).loss.item())

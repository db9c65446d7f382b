"""Law 1 for sharded state: stages, groups and policies on every kind of mesh and schedule; and the very same numbers as without shards where the
arithmetic is the same."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import pytest
import torch
from chain_steps import MODEL as TRIO
from helpers import SEED, context, draw, processes
from moe_models import ROUTERS, mixture

import lf
from lf import parity, tree
from lf.chain_layouts import Layouts, Place
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.models.small import tiny
from lf.models.trio_data import sample
from lf.parallel.reduce import reduce_gradients
from lf.schedule import SCHEDULES, Action, Program, build_chains, gathered
from lf.schedule.build import build
from lf.schedule.gradients import Gradients
from lf.schedule.ir import flat
from lf.schedule.recompute import parse_offload, parse_recompute
from lf.spec import LayoutError


def shaped(heads: int, kv: int, dim: int, vocab: int = 37, mlp: int = 10, layers: int = 2, tied: bool = True) -> lf.segment.Model:
    return decoder(DecoderConfig(vocab, dim, (Layer(Attention(heads, kv, 4, qk_norm=True), GatedMLP(mlp)),) * layers, tied=tied))


DENSE = {
    "tied": tiny(),
    "untied": tiny(False),
    "fewer rows than ranks": shaped(2, 1, 3, vocab=5, mlp=2),
    "even": shaped(4, 2, 16, vocab=48, mlp=24),
    "one kv head": shaped(6, 1, 15, tied=False),
}
MESHES = ["dp=2", "dp=3", "dp=4", "dp=6", "dp=2,tp=2", "dp=3,tp=2", "dp=2,tp=3", "dp=2,tp=4", "pp=2,dp=2", "pp=3,dp=2", "pp=2,dp=3", "pp=2,dp=2,tp=2"]
FOLDED = ["dp=2,ep=2", "dp=4,ep=2", "dp=3,ep=3", "dp=4,tp=2,ep=2,etp=2", "dp=4,ep=2,etp=2", "dp=2,tp=2,ep=2", "pp=2,dp=4,ep=2", "pp=2,dp=2,tp=2,ep=2"]
KEPT = [("none", "none"), ("full", "none"), ("none", "full;distance=2"), ("full:1", "full"), ("segments=mlp;ops=swiglu,rms_norm", "none")]
FROZEN = ((), (), ("embed",), ("layers.1", "head"), ("layers.0.attn", "*/q_norm"))


def worded(rng: random.Random, dp: int) -> str:
    """A sharding of any kind over so many ranks."""
    stage = rng.choice((1, 2, 3, 3))
    words = [str(stage)]
    if rng.random() < 0.4:
        words.append(f"ranks={rng.choice([k for k in range(1, dp + 1) if dp % k == 0])}")
    if rng.random() < 0.4:
        words.append(f"reduce={rng.choice(('step', 'microbatch'))}")
    if stage == 3 and rng.random() < 0.4:
        words.append("keep")
    if rng.random() < 0.6:
        words.append(f"ahead={rng.choice((0, 2, 3))}")
    return ",".join(words)


def holds(model: lf.segment.Model, mesh: str, rng: random.Random, **more: Any) -> parity.Report:
    """Law 1 there, with what is not said drawn."""
    where = lf.Mesh.parse(mesh).fill()
    name = rng.choice([*SCHEDULES])
    schedule, (again, away) = SCHEDULES[name], rng.choice(KEPT)
    tokens = rng.choice((4, 21))  # of 4 some ranks have none
    asked = {
        "sharding": worded(rng, where["dp"]),
        "microbatches": rng.choice((1, 2, 3)) if where.pp == 1 else where.pp * rng.choice((1, 2)),
        "tokens": tokens,
        "padding": rng.choice((0, 3)),
        "frozen": rng.choice(FROZEN) if tokens > 9 else (),  # of so few tokens gradients of q and k are near nothing beside those that are frozen
        "seed": SEED,
        "steps": 2,
        "placement": schedule.place(where.pp, schedule.chunks),
        **more,
    }
    written = partial(build, generate=schedule.generate, recomputed=parse_recompute(again), offloaded=parse_offload(away))
    report = parity.compare(model, where, program=written, **asked)
    assert report.ok, f"{name}, recompute {again}, offload {away}, {asked}: {report}"
    return report


KINDS = ["1", "2", "3", "1,ranks=2", "3,ranks=2", "2,reduce=step", "3,keep", "3,reduce=step,ahead=0", "1,reduce=microbatch"]


@pytest.mark.parametrize("sharding", KINDS)
def test_law_1_of_each_kind(sharding: str) -> None:
    report = parity.compare(tiny(), lf.Mesh(dp=4), sharding=sharding, microbatches=3, steps=2, seed=SEED)
    assert report.ok, str(report)
    assert all(q.size > 0 for q in report.rows if q.name != "skipped"), "a quantity that is 0 compares nothing"


@pytest.mark.parametrize("mesh", MESHES)
def test_law_1_on_a_mesh(mesh: str) -> None:
    rng = random.Random(f"{SEED} {mesh}")
    holds(DENSE[rng.choice([*DENSE])], mesh, rng)


@pytest.mark.parametrize("i", range(4))
def test_law_1_of_mixtures(i: int) -> None:
    rng = random.Random(f"{SEED} mixture {i}")
    holds(mixture(rng.choice([*ROUTERS]), heads=i % 2), rng.choice(FOLDED), rng, frozen=(), dispatch=rng.choice(("exchange", "gather")))


@pytest.mark.parametrize("sharding", ["2", "1"])
def test_law_1_of_experts_that_no_other_rank_has(sharding: str) -> None:
    """Their state lies in no shards, and their biases are still summed over etp: once, beside sums into shards after each microbatch."""
    report = parity.compare(mixture(), lf.Mesh(dp=2, tp=2, ep=2, etp=2), sharding=sharding, microbatches=2, steps=1, seed=SEED)
    assert report.ok, str(report)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-v"])
def test_law_1_of_schedules(schedule: str) -> None:
    rng, named = random.Random(f"{SEED} {schedule}"), SCHEDULES[schedule]
    report = parity.compare(
        tiny(rng.random() < 0.5), lf.Mesh(pp=2, dp=2), program=partial(build, generate=named.generate), microbatches=4, steps=2, seed=SEED,
        placement=named.place(2, named.chunks), sharding=rng.choice(("2", "3", "3,ahead=2", "3,keep")),
    )  # fmt: skip
    assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", DENSE)
def test_law_1_in_full(mesh: str, model: str) -> None:
    for stage in ("1", "2", "3", "3,keep", "1,reduce=microbatch", "3,reduce=step"):
        for ahead in range(4):
            rng = random.Random(f"{SEED} {mesh} {model} {stage} {ahead}")
            holds(DENSE[model], mesh, rng, sharding=f"{stage},ahead={ahead}")
            holds(DENSE[model], mesh, rng)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", FOLDED)
@pytest.mark.parametrize("router", ROUTERS)
def test_law_1_of_every_folding(mesh: str, router: str) -> None:
    for stage in ("1", "2", "3", "3,keep"):
        rng = random.Random(f"{SEED} {mesh} {router} {stage}")
        for dispatch in ("exchange", "gather"):
            holds(mixture(router, heads=rng.choice((0, 1))), mesh, rng, sharding=stage, frozen=(), dispatch=dispatch)


@pytest.mark.parametrize(("mesh", "sharding"), [("dp=4", "3,ranks=2,ahead=2"), ("pp=2,dp=2", "2")])
def test_law_1_over_processes(mesh: str, sharding: str) -> None:
    report = parity.compare(tiny(), lf.Mesh.parse(mesh), sharding=sharding, steps=2, seed=SEED, spmd=processes)
    assert report.ok, str(report)


def test_law_1_of_experts_over_processes() -> None:
    report = parity.compare(mixture(), lf.Mesh(dp=4, ep=2), sharding="3", steps=1, seed=SEED, spmd=processes)
    assert report.ok, str(report)


def test_a_stage_without_a_parameter() -> None:
    report = parity.compare(tiny(), lf.Mesh(pp=3, dp=2), split=(0, 4, 0), sharding="3", microbatches=3, steps=1, seed=SEED)
    assert report.ok, str(report)


# Several chains, each with a sharding of its own.


def several(places: dict[str, Place], kind: str = "nested", **more: Any) -> None:
    def program(layouts: Layouts, m: int) -> Program:
        return build_chains(layouts, m, {"vision": kind, "head": "inline"})

    def one(layouts: Layouts, m: int) -> Program:
        return build_chains(layouts, m, {"vision": "inline", "head": "inline"})

    def data(step: int, i: int, multiple: int) -> Any:
        return sample(TRIO.config, SEED * 100 + step, i, 0, multiple)

    report = parity.compare_chains(TRIO, places, data, program, one, microbatches=2, steps=2, seed=SEED, **more)
    assert report.ok, str(report)


CHAINS = {
    "one row": {"vision": Place(lf.Mesh(dp=2), sharding="3"), "decoder": Place(lf.Mesh(dp=2), sharding="2"), "head": Place(lf.Mesh(dp=2))},
    "over the pipeline": {  # vision lies in two rows, whose programs differ
        "vision": Place(lf.Mesh(dp=2), sharding="2,reduce=step"), "decoder": Place(lf.Mesh(pp=2)), "head": Place(lf.Mesh(dp=1), (1,)),
    },
    "all, over the pipeline": {
        "vision": Place(lf.Mesh(dp=4), sharding="1"),
        "decoder": Place(lf.Mesh(pp=2, dp=2), sharding="3"),
        "head": Place(lf.Mesh(dp=2), (2, 3), sharding="2"),
    },
    "hybrid": {
        "vision": Place(lf.Mesh(dp=4), sharding="3,ranks=2"),
        "decoder": Place(lf.Mesh(dp=2, tp=2), sharding="3,keep"),
        "head": Place(lf.Mesh(dp=4), sharding="1,ranks=2"),
    },
}  # fmt: skip


@pytest.mark.parametrize("places", CHAINS)
def test_law_1_of_several_chains(places: str) -> None:
    several(CHAINS[places], "inline" if "row" in places or places == "hybrid" else "nested")


def test_rows_whose_programs_differ_cannot_gather_beside_their_compute() -> None:
    places = {**CHAINS["over the pipeline"], "vision": Place(lf.Mesh(dp=2), sharding="3")}
    with pytest.raises(LayoutError, match=r"chain 'vision' lies in several rows of ranks, .* use sharding 1, or 2,reduce=step"):
        several(places)


def test_law_1_of_several_chains_over_processes() -> None:
    several(CHAINS["over the pipeline"], spmd=processes)


# The same arithmetic: the same bits.


def trained(axes: Any, sharding: str, precision: str, microbatches: int, steps: int = 3) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    """Metrics of some steps, and what this rank is the first to keep in the end: pieces and their values. SGD: torch's fused AdamW rounds the last
    elements of a tensor otherwise than the others, so there a cut is seen."""
    ctx, model = context(axes, precision), tiny()
    layout = lf.layout(model, axes.mesh, sharding=sharding)
    init, step = lf.train.make(layout, lf.optim.sgd(0.1), build(layout, microbatches), ctx, clip=None)
    state, seen = init(parity.randomised(layout, ctx, SEED)), []
    dp = axes["dp"]
    for i in range(steps):
        batches = parity.random_batches(model, SEED, i, microbatches * dp.size, 21)
        state, metrics = step(state, batches[dp.index :: dp.size])
        seen.append({k: v for k, v in metrics.items() if k not in ("finite", "grad_norm")})
    return seen, [(piece, piece.view(tree.get(state.optimizer["master"], path))) for path, piece in layout.state_owned(axes.coords)]


@pytest.mark.parametrize(
    ("sharding", "microbatches"), [("1", 3), ("2,reduce=step", 2), ("3,reduce=step", 3), ("3,keep,reduce=step", 2), ("2", 1), ("3,ahead=2", 1)]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shards_change_no_bit(sharding: str, microbatches: int, precision: str) -> None:
    """On dp alone, in simulated ranks, which add up in one order: sums once a step, or of one microbatch, are the same sums. Without clipping: the
    norm is a sum in another order."""
    whole = lf.sim.spmd(lf.Mesh(dp=3), trained, "0", precision, microbatches)
    shards = lf.sim.spmd(lf.Mesh(dp=3), trained, sharding, precision, microbatches)
    logical = {piece.key: values for piece, values in whole[0][1]}
    seen = dict.fromkeys(logical, 0)
    for (metrics, held), (want, _) in zip(shards, whole):
        for a, b in zip(metrics, want):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)
        for piece, values in held:
            assert torch.equal(values, logical[piece.key][lf.box.slices(piece.box, lf.box.whole(piece.shape))]), piece.key
            seen[piece.key] += values.numel()
    assert seen == {key: values.numel() for key, values in logical.items()}


# Gradients that travel in bfloat16.


def carried(axes: Any, transport: str, values: str) -> dict[str, torch.Tensor]:
    """Sums of a layer, which travel together: of each matrix this rank's shard at its place, and zeros elsewhere."""
    layout = lf.layout(shaped(2, 1, 8, layers=1), axes.mesh, sharding=f"1,transport={transport}")
    specs = [spec for path, spec in layout.specs.items() if path.startswith("layers.0.mlp")]

    def given(spec: Any) -> torch.Tensor:
        shape = spec.local_shape(axes.coords)
        if values == "small beside large":
            return torch.full(shape, 1.0 if axes.rank else 256.0)
        return draw("carried", spec.path, axes.rank, shape=shape, dtype=torch.float32)

    shards = {spec.path: torch.zeros(spec.state_shape(axes.coords)) for spec in specs}
    reduce_gradients(specs, {spec.path: given(spec) for spec in specs}, shards, axes, transport)()
    out = {}
    for spec in specs:
        for piece in spec.state_pieces(axes.coords):
            out[piece.key] = torch.zeros(piece.shape)
            out[piece.key][lf.box.slices(piece.box, lf.box.whole(piece.shape))] = piece.view(shards[spec.path])
    return out


@pytest.mark.parametrize("spmd", [lf.sim.spmd, processes], ids=["simulated", "processes"])
def test_what_travels_in_bfloat16_is_added_in_float32(spmd: Any) -> None:
    mesh = lf.Mesh(dp=8) if spmd is lf.sim.spmd else lf.Mesh(dp=3)
    exact, near, odd = (spmd(mesh, carried, *how) for how in (("fp32", "any"), ("bf16", "any"), ("bf16", "small beside large")))
    size = sum(2**-8 * 6 for _ in range(mesh.size))  # no number drawn is larger than 6
    for key in exact[0]:
        a, b, c = (sum(rank[key] for rank in ranks) for ranks in (exact, near, odd))
        assert (c == 256.0 + mesh.size - 1).all(), "added up in bfloat16, which has no 257"
        assert 0 < (a - b).abs().max() <= size, "each addend is rounded once"
        assert (a - b).norm() <= 2**-8 * a.norm()


@pytest.mark.parametrize("sharding", ["1", "2", "3,ranks=2"])
def test_a_step_whose_gradients_travel_in_bfloat16(sharding: str) -> None:
    """Losses of the first step are the same, norms differ by what eight bits make."""
    exact, near = (lf.sim.spmd(lf.Mesh(dp=4), normed, f"{sharding}{more}") for more in ("", ",transport=bf16"))
    for (loss, norm), (other, rounded) in zip(exact, near):
        assert loss == other
        assert norm != rounded
        torch.testing.assert_close(rounded, norm, rtol=2**-8, atol=0)


def normed(axes: Any, sharding: str) -> tuple[torch.Tensor, torch.Tensor]:
    ctx, model = context(axes, "fp32"), tiny()
    layout = lf.layout(model, axes.mesh, sharding=sharding)
    fn = lf.train.gradients(layout, build(layout, 2), ctx)
    batches = parity.random_batches(model, SEED, 0, 2 * axes["dp"].size, 21)
    _, metrics = fn(parity.randomised(layout, ctx, SEED), batches[axes["dp"].index :: axes["dp"].size])
    return metrics["loss"], metrics["grad_norm"]


# What the program of a step has.


def counted(sharding: str, microbatches: int = 3, mesh: str = "dp=2", **more: Any) -> dict[str, int]:
    """How often each op stands in the program of the first rank, for the layer in the middle."""
    layout = lf.layout(tiny(), lf.Mesh.parse(mesh), sharding=sharding)
    row = flat(build(layout, microbatches, **more)[0])
    return {op: sum(a.op == op and a.segment == "layers.0" for a in row) for op in ("GATHER", "RELEASE", "REDUCE")}


@pytest.mark.parametrize(
    ("sharding", "gathers", "reduces"),
    [
        ("0", 0, 1),
        ("1", 1, 1),  # once a step
        ("1,reduce=microbatch", 1, 3),
        ("2", 1, 3),
        ("2,reduce=step", 1, 1),
        ("3,ahead=0", 6, 3),  # for each forward and each backward of three microbatches
        ("3,keep,ahead=0", 3, 3),
        ("3,reduce=step,ahead=0", 6, 1),
    ],
)
def test_how_often_a_layer_travels(sharding: str, gathers: int, reduces: int) -> None:
    assert counted(sharding) == {"GATHER": gathers, "RELEASE": gathers, "REDUCE": reduces}


def test_nothing_is_gathered_where_nothing_is_cut() -> None:
    assert counted("3", mesh="dp=1") == {"GATHER": 0, "RELEASE": 0, "REDUCE": 1}
    assert counted("3,ranks=1", mesh="dp=2")["GATHER"] == 0


@pytest.mark.parametrize("ahead", range(4))
def test_a_layer_is_gathered_so_many_layers_before_its_use(ahead: int) -> None:
    """Of a forward: between the GATHER of a layer and its use stand the forwards of so many others."""
    layout = lf.layout(decoder(DecoderConfig(37, 15, tiny().config.layers * 3, tied=False)), lf.Mesh(dp=2), sharding=f"3,ahead={ahead}")
    row = flat(build(layout, 1)[0])
    forwards = [a.segment for a in row if a.op == "F"]
    start = row.index(next(a for a in row if a.op == "GATHER" and a.segment == "layers.5"))
    use = row.index(Action("F", 0, 0, "layers.5"))
    assert sum(a.op == "F" for a in row[start:use]) == min(ahead, forwards.index("layers.5"))


def test_weights_are_gone_between_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 3: whenever a layer is gathered, no more than it, the one that computes and the one before have memory, and after a step none has."""
    model = decoder(DecoderConfig(37, 15, tiny().config.layers * 3, tied=False))
    kept: list[Any] = []
    held: list[int] = []
    gather = gathered.Gathered.gather

    def taken(of: Any) -> int:
        return sum(x.untyped_storage().nbytes() for x in of.leaves.values())

    def measured(self: Any, paths: Any) -> None:
        gather(self, paths)
        held.append(taken(self))
        if self not in kept:
            kept.append(self)

    monkeypatch.setattr(gathered.Gathered, "gather", measured)

    def look(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(model, axes.mesh, sharding="3,ahead=1")
        fn = lf.train.gradients(layout, build(layout, 2), ctx)
        fn(parity.randomised(layout, ctx, 0), parity.random_batches(model, SEED, 0, 2, 21))

    lf.sim.spmd(lf.Mesh(dp=2), look)
    sizes: dict[str, int] = {}
    for segment in model.segments:
        sizes[segment.layer] = sizes.get(segment.layer, 0) + sum(4 * math.prod(p.shape) for p in segment.params.values())
    assert len(kept) == 2
    left = [taken(of) for of in kept]
    assert left == [0, 0]
    assert max(sizes.values()) < max(held) <= 3 * max(sizes.values())


@pytest.mark.parametrize("sharding", ["2", "3"])
def test_whole_gradients_are_gone_when_most_activations_are_there(sharding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first two pieces of a forward none that was summed into shards before has memory."""
    seen: list[tuple[int, int]] = []
    passed = Gradients.passed

    def measured(self: Gradients) -> None:
        passed(self)
        seen.append((self.passes, sum(x.untyped_storage().nbytes() for x in self.buffers.values())))

    monkeypatch.setattr(Gradients, "passed", measured)
    lf.sim.spmd(lf.Mesh(dp=2), normed, sharding)
    assert any(held for pieces, held in seen if pieces == 1), "nothing has travelled beside the first piece"
    assert {held for pieces, held in seen if pieces > 1} == {0}


@pytest.mark.parametrize("kind", ["1", "3", "3,ranks=2"])
def test_forward_takes_what_is_gathered(kind: str) -> None:
    """37 words and a width of 15 on four ranks: no shard is as long as the next."""
    model = tiny()
    (batch,) = parity.random_batches(model, SEED, 0, 1, 21)

    def loss(axes: Any, sharding: str) -> torch.Tensor:
        ctx = context(axes)
        where = lf.layout(model, axes.mesh, sharding=sharding)
        params = lf.state.gathered(where, parity.randomised(where, ctx, SEED), ctx)
        return lf.forward(model, params, batch, ctx)["losses"]["cross_entropy"]

    assert lf.sim.spmd(lf.Mesh(dp=4), loss, kind) == lf.sim.spmd(lf.Mesh(dp=4), loss, "0")

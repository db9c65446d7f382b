"""How state lies in shards: the words for it, the cut of each parameter, every element kept and counted once; launches that carry many tensors."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from chained import at, laid_out
from helpers import SEED, draw, processes
from hypothesis import given
from hypothesis import strategies as st
from moe_models import mixture

import lf
from lf import parity, tree
from lf.chain_layouts import joined
from lf.config import ConfigError
from lf.mesh import MeshError, shares
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.models.small import tiny
from lf.sharding import Cut, Sharding, cut_dim

WORDS = ["0", "1", "2", "3", "1,ranks=4", "2,reduce=step", "1,reduce=microbatch", "3,keep,ahead=0"]
WORDS += ["3,ranks=2,reduce=step,keep,ahead=2,transport=bf16"]


@pytest.mark.parametrize("words", WORDS)
def test_words_are_read_and_written(words: str) -> None:
    assert str(Sharding.parse(words)) == words
    assert Sharding.parse(Sharding.parse(words)) == Sharding.parse(f" {words.replace(',', ' , ')} ")


def test_what_is_not_said_follows_from_the_stage() -> None:
    assert [Sharding.parse(str(k)).reduce for k in range(4)] == ["step", "step", "microbatch", "microbatch"]
    assert Sharding.parse("3") == Sharding(3, None, "microbatch", False, 1, "fp32")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "begins with a stage, 0 to 3, as in 3,ranks=8; '' is none"),
        ("zero", "'zero' is none"),
        ("4", "sharding stage 4: there are 0 (everything on every rank), 1 (optimizer state in shards)"),
        ("3,rank=8", "did you mean 'ranks'"),
        ("3,ranks=8,ranks=4", "ranks stands twice"),
        ("3,ranks", "'ranks' should read ranks=N"),
        ("3,ranks=two", "'ranks=two' should read ranks=N"),
        ("3,ranks=0", "sharding over ranks=0: must be at least 1"),
        ("3,keep=1", "'keep=1' should read keep"),
        ("2,keep", "keep is of stage 3: in stage 2 parameters stay whole for a step anyway"),
        ("3,reduce=never", "unknown reduce of a sharding 'never'"),
        ("3,transport=fp16", "unknown transport of a sharding 'fp16'"),
        ("0,ranks=2", "sharding ranks is of stages 1 to 3"),
        ("0,transport=bf16", "sharding transport is of stages 1 to 3"),
        ("0,reduce=microbatch", "sharding reduce is of stages 1 to 3"),
        ("0,ahead=2", "sharding ahead is of stages 1 to 3"),
        ("²", "'²' is none"),
        ("3,ranks=²", "'ranks=²' should read ranks=N"),
        (3, "sharding=3: give a Sharding, or its words"),
    ],
)
def test_words_that_say_nothing_are_refused(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sharding.parse(words)
    assert said in str(caught.value)


@pytest.mark.parametrize("given", [{"stage": "3"}, {"stage": True}, {"ranks": "8"}, {"ranks": 2.0}, {"ranks": True}, {"ahead": 1.5}, {"keep": "no"}])
def test_values_of_another_type_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"sharding.* {next(iter(given))}"):
        Sharding(**{"stage": 3} | given)


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ranks=4: it must divide the dp·cp = 6 ranks"):
        lf.layout(tiny(), lf.Mesh(dp=6), sharding="3,ranks=4")
    with pytest.raises(ConfigError, match=r"chain 'eyes': sharding over ranks=3: it must divide the dp·cp = 2 ranks"):
        laid_out(at("dp=2", "dp=2", "dp=2", eyes_sharding="1,ranks=3"))


@given(rows=st.integers(0, 40), n=st.integers(1, 9), data=st.data())
def test_shards_of_rows_follow_one_another(rows: int, n: int, data: st.DataObject) -> None:
    cut = Cut(("dp",), n, data.draw(st.sampled_from([0, None])), data.draw(st.integers(0, n - 1)))
    bounds = [cut.bounds(rows, k) for k in range(n)]
    assert tuple(hi - lo for lo, hi in bounds) == cut.sizes(rows)
    held = [i for lo, hi in bounds for i in range(lo, hi)]
    assert held == [*range(rows)]
    assert cut.sizes(rows) == (shares(rows, n) if cut.dim == 0 else tuple(rows * (k == cut.owner) for k in range(n)))


@pytest.mark.parametrize(
    ("lengths", "n", "dim"),
    [
        ([[8, 4], [6]], 4, 0),  # even on all
        ([[8, 6], [12]], 4, 1),
        ([[33], [15]], 4, 0),  # nearly even
        ([[7], [15]], 4, 1),  # the longest
        ([[7, 30], [6]], 4, 0),  # the shortest of a dim decides
        ([[3], [2]], 4, None),  # too few rows
        ([[0, 8], [4]], 4, 1),  # a rank without any
        ([], 4, None),
    ],
)
def test_the_dim_that_is_cut(lengths: list[list[int]], n: int, dim: int | None) -> None:
    assert cut_dim(lengths, n) == dim


AWKWARD = decoder(DecoderConfig(37, 15, (Layer(Attention(6, 2, 4, qk_norm=True), GatedMLP(3)),) * 3, tied=True))
MODELS = {"dense": tiny(), "untied": tiny(False), "awkward": AWKWARD, "mixture": mixture(heads=1)}
MESHES = ["dp=2", "dp=3", "dp=4", "dp=6", "tp=4,dp=2", "tp=3,dp=4", "pp=2,dp=3,tp=2", "pp=3,dp=4"]
FOLDED = ["dp=4,ep=2", "dp=2,tp=2,ep=2", "dp=4,tp=2,ep=2,etp=2", "dp=8,ep=2,etp=2", "pp=2,dp=4,ep=2"]
KINDS = ["1", "3", "2,ranks=2", "3,ranks=1"]


@pytest.mark.parametrize("model", MODELS)
def test_every_element_is_kept_and_counted_once(model: str) -> None:
    for mesh, kind in itertools.product(MESHES + FOLDED * (model == "mixture"), KINDS):
        if "ranks=2" in kind and lf.Mesh.parse(mesh)["dp"] % 2:
            continue
        layout = lf.layout(MODELS[model], lf.Mesh.parse(mesh), sharding=kind)
        assert parity._covered(joined(layout)).error == 0, (mesh, kind)
        layouts = joined(layout)
        for path, spec in layout.specs.items():
            for rank in range(layout.mesh.size):
                coords = layout.mesh.coords(rank)
                pieces, shape = spec.state_pieces(coords), spec.state_shape(coords)
                shard = torch.zeros(shape)
                for piece in pieces:  # they lie in the shard beside one another, and fill it
                    piece.view(shard).add_(1)
                assert (shard == 1).all(), (path, rank)
                assert (layouts.state_shape(path, rank), layouts.state_pieces(path, rank)) == (shape, pieces)


def test_several_chains_are_cut_each_by_its_own() -> None:
    layouts = laid_out(at("dp=4", "tp=2,dp=2", "dp=4", eyes_sharding="3", words_sharding="1,ranks=2"))
    assert parity._covered(layouts).error == 0
    cuts = {path: spec.cut for path, spec in layouts.specs.items()}
    assert cuts["eyes.0/qkv"].n == 4
    assert cuts["words.0/qkv"].n == 2
    assert cuts["hand.0/up"] is None
    assert cuts["eyes.out/scale"] is None, "a scalar stays whole"


def test_small_tensors_are_spread_over_the_ranks() -> None:
    """Norms of 15 on 16 ranks: none is cut, and no rank has two before all have one."""
    layout = lf.layout(tiny(), lf.Mesh(dp=16), sharding="1")
    owners = [spec.cut.owner for spec in layout.specs.values() if spec.cut and spec.cut.dim is None]
    assert len(owners) > 4
    assert len(set(owners)) == len(owners)


@pytest.mark.parametrize("kind", ["3", "2,ranks=2"])
def test_the_shards_are_those_of_the_whole(kind: str) -> None:
    """The same logical model, and no rank keeps much more than its share."""
    whole = lf.sim.spmd(lf.Mesh(dp=1), lambda axes: lf.init(lf.layout(AWKWARD, axes.mesh), lf.Context(axes, lf.devices.get("cpu")), 5))[0]
    one = lf.layout(AWKWARD, lf.Mesh(dp=1))

    def rank(axes: Any) -> int:
        layout, kept = lf.layout(AWKWARD, axes.mesh, sharding=kind), 0
        params = lf.init(layout, lf.Context(axes, lf.devices.get("cpu")), 5)
        for path, spec in layout.specs.items():
            shard = tree.get(params, path)
            kept += shard.numel()
            for piece, full in zip(spec.state_pieces(axes.coords), one.specs[path].pieces(one.mesh.coords(0))):
                assert torch.equal(piece.view(shard), full.view(tree.get(whole, path))[lf.box.slices(piece.box, full.box)])
        return kept

    kept, total = lf.sim.spmd(lf.Mesh(dp=4), rank), sum(x.numel() for _, x in tree.items(whole))
    n = 4 if kind == "3" else 2
    assert max(kept) < 1.2 * total / n
    assert sum(kept) == total * 4 // n


def test_groups_of_neighbours_and_of_those_between() -> None:
    def asked(axes: Any) -> Any:
        inner, outer = axes.part(("dp", "cp"), 2)
        return (inner.ranks, inner.index), (outer.ranks, outer.index)

    mesh = lf.Mesh(dp=4, tp=2)
    for run in (lf.sim.spmd, processes):
        found = run(mesh, asked)
        assert found[0] == (((0, 2), 0), ((0, 4), 0))
        assert found[3] == (((1, 3), 1), ((3, 7), 0))
        assert found[6] == (((4, 6), 1), ((2, 6), 1))
    with pytest.raises(MeshError, match="has 4 ranks, which 3 does not divide: take a divisor"):
        lf.sim.spmd(mesh, lambda axes: axes.part(("dp",), 3))


SIZES = {"even": (2, 2, 2, 2), "uneven": (3, 1, 4, 2), "one owner": (0, 3, 0, 0), "none at all": (0, 0, 0, 0)}


def many(axes: Any) -> dict[str, torch.Tensor]:
    """Each launch of many tensors, on each kind of group, and next to it what one tensor at a time gives."""
    out: dict[str, torch.Tensor] = {}
    groups = {"dp": axes["dp"], "world": axes.world, "self": axes[()], "pair": axes.part("dp", 2)[0], "between": axes.part("dp", 2)[1]}
    for name, axis in groups.items():
        n, me = axis.size, axis.index
        xs, sizes, dims = [], [], []
        for (kind, each), dim, dtype in itertools.product(SIZES.items(), (0, 1), (torch.float64, torch.float32)):
            shape = [3, 5]
            shape[dim] = each[:n][me]
            xs.append((draw(name, kind, dim, axes.rank, shape=tuple(shape)) * 4).round().to(dtype))
            sizes.append(each[:n])
            dims.append(dim)
        wholes = [axis.all_gather(x, each, dim) for x, each, dim in zip(xs, sizes, dims)]
        for later in (False, True):
            outs = [torch.full_like(w, torch.nan) for w in wholes]
            waited = axis.gather_many(outs, xs, sizes, dims, later=later)
            if later:
                waited()
            for i, (a, b) in enumerate(zip(outs, wholes)):
                assert torch.equal(a, b), (name, later, i)
            parts = [torch.full_like(x, 7.0) for x in xs]
            waited = axis.scatter_many(parts, wholes, sizes, dims, later=later)
            if later:
                waited()
            for i, (a, w, each, dim) in enumerate(zip(parts, wholes, sizes, dims)):
                assert torch.equal(a, axis.reduce_scatter(w, each, dim)), (name, later, i)
            sums = [w.clone() for w in wholes]
            waited = axis.sum_many(sums, later=later)
            if later:
                waited()
            for i, (a, w) in enumerate(zip(sums, wholes)):
                assert torch.equal(a, axis.all_reduce(w)), (name, later, i)
        # into the middle of a larger tensor, as a part of a fused one
        larger = torch.zeros(20, 5)
        axis.gather_many([larger[4:][: 2 * n]], [torch.full((2, 5), 1.0 + me)], [(2,) * n], [0])
        out[name] = larger
    return out


def test_many_tensors_in_one_launch() -> None:
    mesh = lf.Mesh(dp=4)
    simulated, real = lf.sim.spmd(mesh, many), processes(mesh, many)
    for a, b in zip(simulated, real):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert simulated[1]["dp"][:, 0].tolist() == [0.0] * 4 + [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0] + [0.0] * 8


def test_what_ranks_give_must_be_what_the_sizes_say() -> None:
    def wrong(axes: Any) -> None:
        axes["dp"].gather_many([torch.zeros(4, 2)], [torch.zeros(2 + axes.rank, 2)], [(2, 2)], [0])

    with pytest.raises(ValueError, match="gather_many over dp"):
        lf.sim.spmd(lf.Mesh(dp=2), wrong)

    def short(axes: Any) -> None:
        axes["dp"].scatter_many([torch.zeros(2, 2)], [torch.zeros(3, 2)], [(2, 2)], [0])

    for run in (lf.sim.spmd, processes):
        with pytest.raises(ValueError, match=r"scatter_many over dp of 2 ranks: rank . has 3 rows, the sizes say 4"):
            run(lf.Mesh(dp=2), short)


def test_a_random_layout_is_covered() -> None:
    """Odd widths, groups of heads and meshes, drawn."""
    rng = random.Random(f"{SEED} shards")
    for _ in range(6):
        kv = rng.choice((1, 2, 3))
        layer = Layer(Attention(kv * rng.choice((1, 2, 4)), kv, 2 * rng.choice((1, 2)), qk_norm=True), GatedMLP(rng.randint(1, 20)))
        model = decoder(DecoderConfig(rng.randint(2, 70), rng.randint(1, 20), (layer,) * rng.randint(1, 3), tied=rng.random() < 0.5))
        mesh = lf.Mesh(pp=rng.choice((1, 2)), dp=rng.choice((2, 3, 4, 6)), tp=rng.choice((1, 2, 3, 5)))
        words = f"3,ranks={rng.choice([k for k in range(1, mesh['dp'] + 1) if not mesh['dp'] % k])}"
        layout = lf.layout(model, mesh, sharding=words)
        assert parity._covered(joined(layout)).error == 0, (model.config, mesh, words)

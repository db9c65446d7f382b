"""Several chains, each over its own mesh: rows, homes, blocks and places, who holds and who owns what, and every refusal by name."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import attrs
import chained
import helpers
import pytest
import torch
from chained import CHAINS, EDGES, EYES, HAND, WORDS, at, laid_out, segment, three
from hypothesis import given
from hypothesis import strategies as st

import lf
from lf import box, tree
from lf.chain_layouts import Layouts, Place, chain_layouts, joined, runs
from lf.chains import Chain, Chains, Edge, groups, order, padded
from lf.mesh import MeshError
from lf.models.small import tiny
from lf.segment import Model, Objective
from lf.spec import LayoutError

SPLIT = at("tp=4", "pp=2,dp=2", "dp=2", {"eyes": range(4), "words": range(4), "hand": (4, 5)})


def test_rows_are_the_ranks_that_do_the_same() -> None:
    layouts = laid_out(SPLIT)
    assert layouts.world == 6
    assert layouts.rows == ((0, 1), (2, 3), (4, 5))
    assert [layouts.row(r) for r in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [layouts.coords("hand", r) is None for r in range(6)] == [True] * 4 + [False] * 2
    assert layouts.coords("eyes", 3)["tp"] == 3  # type: ignore[index]
    assert [layouts.pp("words", row) for row in range(3)] == [0, 1, None]
    assert str(layouts) == "eyes tp=4 on ranks 0–3; words pp=2,dp=2 on ranks 0–3; hand dp=2 on ranks 4, 5"


def test_rows_of_chains_whose_pipelines_cross() -> None:
    """words has ranks 0 1 | 2 3, eyes 0 2 | 1 3: no two ranks do the same, and rows stand in the order of their first rank."""
    layouts = laid_out(at("pp=2,dp=2", "pp=2,dp=2", "dp=4", {"eyes": (3, 1, 0, 2)}))
    assert layouts.rows == ((0,), (1,), (2,), (3,))
    assert layouts.homes("eyes", 0) == (1, 3)
    assert layouts.homes("words", 0) == (0, 1)
    assert layouts.homes("hand", 0) == (0, 1, 2, 3)
    assert layouts.places("eyes", 0, (0, 1)) == (1,)  # row 0 has stage 1 of eyes
    assert layouts.places("eyes", 0, (1, 3)) == (0, 1)
    assert (layouts.spread("words"), layouts.spread("hand")) == (True, True)


@pytest.mark.parametrize(
    ("eyes", "blocks"),
    [
        ("dp=8", ((0,), (1,), (2,), (3,))),  # of words' pp=4,tp=2 each row has two ranks, so two of eyes
        ("dp=4,tp=2", ((0,), (1,), (2,), (3,))),
        ("dp=2,tp=4", ((0, 1), (2, 3))),
        ("tp=8", ((0, 1, 2, 3),)),
    ],
)
def test_blocks_are_whole_ranks_of_data_parallelism(eyes: str, blocks: tuple[tuple[int, ...], ...]) -> None:
    layouts = laid_out(at(eyes, "pp=4,tp=2", "dp=8"))
    assert layouts.blocks("eyes", 0) == blocks
    assert layouts.blocks("words", 3) == ((3,),)
    dp = layouts.chains["eyes"].mesh["dp"]
    assert [at for b in blocks for at in layouts.places("eyes", 0, b)] == [*range(dp)]
    assert layouts.spread("eyes")
    assert not layouts.spread("words")


def test_blocks_go_on_over_rows_that_share_a_coordinate_with_neither() -> None:
    """dp coordinate 0 of eyes is on ranks 0 and 2, coordinate 1 on 2's row as well: all of it is one block."""
    layouts = laid_out(at("dp=2,tp=2", "pp=3,dp=2", "dp=6", {"eyes": (0, 2, 3, 4)}))
    assert layouts.rows == ((0,), (1,), (2, 3), (4,), (5,))
    assert layouts.blocks("eyes", 0) == ((0, 2, 3),)


def test_one_layout_is_a_chain_without_a_name() -> None:
    where = lf.layout(tiny(), lf.Mesh(pp=2, dp=2), frozen=("embed",))
    layouts = joined(where)
    assert joined(layouts) is layouts
    assert (str(layouts), layouts.rows, layouts.homes("", 1)) == ("pp=2,dp=2", ((0, 1), (2, 3)), (1,))
    assert layouts.specs == where.specs
    assert layouts.frozen == where.frozen
    for rank in range(4):
        coords = where.mesh.coords(rank)
        assert list(layouts.held(rank).items()) == list(where.held(coords).items())
        assert layouts.trained(rank) == where.trained(coords)
        assert layouts.state_owned(rank) == where.state_owned(coords)
        for path, spec in where.held(coords).items():
            assert layouts.state_pieces(path, rank) == spec.pieces(coords)
            assert layouts.local_shape(path, rank) == spec.local_shape(coords)
    assert not layouts.spread("")


MESHES = st.builds(lambda pp, dp, tp: (pp, dp, tp), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4))


@st.composite
def somewhere(draw: st.DrawFn) -> Layouts:
    """Chains on any ranks in any order, so that each rank has one."""
    shapes = {name: draw(MESHES) for name in CHAINS}
    sizes = {name: pp * dp * tp for name, (pp, dp, tp) in shapes.items()}
    world = draw(st.integers(max(sizes.values()), sum(sizes.values())))
    order, ranks, at = draw(st.permutations(range(world))), {}, 0
    for name, size in sizes.items():  # the next ones round the circle: together they reach all
        ranks[name] = tuple(order[(at + i) % world] for i in range(size))
        at += size
    places = {}
    for name, (pp, dp, tp) in shapes.items():
        stages = draw(st.integers(pp, pp + 2))
        spots = draw(st.permutations([*range(pp), *draw(st.lists(st.integers(0, pp - 1), min_size=stages - pp, max_size=stages - pp))]))
        layers = len(CHAINS[name].model.layers())
        cuts = sorted(draw(st.lists(st.integers(0, layers), min_size=stages - 1, max_size=stages - 1)))
        split = [b - a for a, b in zip([0, *cuts], [*cuts, layers])]
        frozen = draw(st.lists(st.sampled_from([s.name for s in CHAINS[name].model.segments]), max_size=2)) if name != "hand" else ()
        places[name] = Place(lf.Mesh(pp=pp, dp=dp, tp=tp), ranks[name], placement=spots, split=split, frozen=frozen)
    return laid_out(places, world)


@given(somewhere())
def test_every_element_is_held_and_is_owned_once(layouts: Layouts) -> None:
    shapes = {p.key: p.shape for spec in layouts.specs.values() for p in spec.pieces(spec.mesh.coords(0))}
    held, owned = ({key: torch.zeros(shape, dtype=torch.int64) for key, shape in shapes.items()} for _ in range(2))
    for rank in range(layouts.world):
        mine = layouts.held(rank)
        assert layouts.trained(rank).keys() == mine.keys() - layouts.frozen
        have = {p.key: p.box for path in mine for p in layouts.state_pieces(path, rank)}
        for path in mine:
            for piece in layouts.state_pieces(path, rank):
                held[piece.key][box.slices(piece.box, box.whole(piece.shape))] += 1
            assert layouts.local_shape(path, rank) == mine[path].local_shape(layouts.coords(layouts.chain_of[path], rank))
        for path, piece in layouts.state_owned(rank):
            assert path in mine
            assert box.intersect(piece.box, have[piece.key]) == piece.box, "it owns what it does not hold"
            owned[piece.key][box.slices(piece.box, box.whole(piece.shape))] += 1
    assert all((n >= 1).all() for n in held.values())
    assert all((n == 1).all() for n in owned.values())


@given(somewhere())
def test_rows_homes_blocks_and_places_agree(layouts: Layouts) -> None:
    assert sorted(r for row in layouts.rows for r in row) == [*range(layouts.world)]
    assert [row[0] for row in layouts.rows] == sorted(row[0] for row in layouts.rows)
    for chain, where in layouts.chains.items():
        for stage, pp in enumerate(where.placement):
            homes = layouts.homes(chain, stage)
            ranks = {r for home in homes for r in layouts.rows[home]}
            assert ranks == {r for r in layouts.ranks[chain] if layouts.coords(chain, r)["pp"] == pp}  # type: ignore[index]
            blocks = layouts.blocks(chain, stage)
            assert sorted(r for b in blocks for r in b) == sorted(homes)
            places = [layouts.places(chain, stage, b) for b in blocks]
            assert sorted(d for p in places for d in p) == [*range(where.mesh["dp"])], "a coordinate in two blocks, or in none"
            for block, mine in zip(blocks, places):  # a block cannot be cut
                assert all(set(mine) & set(layouts.places(chain, stage, [r for r in block if r != one])) for one in block if len(block) > 1)
            assert layouts.spread(chain) or len(homes) == 1


def test_joints_gather_what_travels_once() -> None:
    layouts = laid_out(at("tp=2", "pp=2", "dp=2", words_split="e,2+h"))
    names = [(j.name, j.source_stage, j.target, j.target_stage, [e.segment for e in j.edges]) for j in layouts.joints]
    assert names == [
        ("eyes.late", 0, "words", 0, ["embed"]),
        ("eyes.early", 0, "words", 1, ["words.1"]),
        ("words.said.0", 1, "hand", 0, ["hand.0", "hand.1"]),
    ]
    apart = laid_out(at("tp=2", "pp=2", "pp=2", words_split="e,2+h"))
    assert [(j.target_stage, [e.segment for e in j.edges]) for j in apart.joints if j.target == "hand"] == [(0, ["hand.0"]), (1, ["hand.1"])]


def test_the_same_seed_is_the_same_model() -> None:
    """Every rank of any layout has its boxes of the one model that a single rank draws; of each chain in its own compute dtype."""
    one = laid_out(at())
    (whole,) = chained.world(one, lambda axes: lf.init(one, chained.context(axes, one), 3))
    layouts, compute = laid_out(SPLIT), {"eyes": "fp32", "hand": "fp32"}

    def rank(axes: Any) -> set[str]:
        ctx = chained.context(axes, layouts, compute)
        params = lf.init(layouts, ctx, 3)
        assert [*dict(tree.items(params))] == [*layouts.held(axes.rank)]
        parts = {p.key: p for spec in one.specs.values() for p in spec.pieces(spec.mesh.coords(0))}
        for path, x in tree.items(params):
            assert x.dtype == torch.float32
            for piece in layouts.state_pieces(path, axes.rank):
                want = parts[piece.key].view(tree.get(whole, path))
                assert torch.equal(piece.view(x), want[box.slices(piece.box, box.whole(piece.shape))])
        copy = lf.state.compute_copy(layouts, params, ctx)
        for path, x in tree.items(copy):
            exact = layouts.chain_of[path] in compute
            assert x.dtype == (torch.float32 if exact else torch.bfloat16)
            assert (x is tree.get(params, path)) == exact
        return {*layouts.held(axes.rank)}

    seen = chained.world(layouts, rank)
    assert seen[4] == seen[5] == {"hand.0/up", "hand.1/up"}
    assert "words.0/qkv" in seen[0]
    assert "words.0/qkv" not in seen[2]


def test_a_forward_without_a_program_is_of_one_chain() -> None:
    layouts = laid_out(at())
    with pytest.raises(LayoutError, match="runs one chain; this context has eyes, words, hand"):
        lf.forward(WORDS.model, {}, None, chained.context(lf.solo(), layouts))  # type: ignore[arg-type]


def test_what_runs_on_thousands_of_ranks_is_counted_once() -> None:
    """Rows of 4096 ranks from one look at each rank and chain: nothing grows with its square."""
    looked = Counter[str]()
    layouts = laid_out(at("dp=4096", "pp=2,dp=1024,tp=2", "dp=4096"))

    class Counted(Layouts):
        def coords(self, chain: str, rank: int) -> Any:
            looked[chain] += 1
            return super().coords(chain, rank)

    counted = Counted(**attrs.asdict(layouts, recurse=False))
    assert [len(row) for row in counted.rows] == [2048, 2048]
    assert looked == dict.fromkeys(CHAINS, 4096)
    assert len(counted.places("eyes", 0, (0, 1))) == 4096


# What cannot be.


def some(**chains: Chain) -> dict[str, Chain]:
    return {**CHAINS, **chains}


def changed(edge: int, **fields: Any) -> tuple[Edge, ...]:
    return (*EDGES[:edge], attrs.evolve(EDGES[edge], **fields), *EDGES[edge + 1 :])


def renamed(chain: Chain, at: int, **fields: Any) -> Chain:
    segments = chain.model.segments
    return attrs.evolve(chain, model=attrs.evolve(chain.model, segments=(*segments[:at], attrs.evolve(segments[at], **fields), *segments[at + 1 :])))


def weighed(chain: Chain) -> Chain:
    return attrs.evolve(chain, model=attrs.evolve(chain.model, objectives={"loss": Objective(1.0, lambda batch: torch.zeros(()))}))


BACK = Edge("words", "said.1", "eyes", "eyes.0", "back")
CHAIN_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"chains": {"two eyes": EYES, "words": WORDS, "hand": HAND}}, "chain 'two eyes': a name is of letters, digits and _"),
    "main that is dealt": ({"chains": some(words=attrs.evolve(WORDS, collate=chained.never))}, "chain 'words' is the main chain, which runs"),
    "dealt without collate": ({"chains": some(eyes=attrs.evolve(EYES, collate=None))}, "chain 'eyes' is dealt its items, so it needs `collate`"),
    "main": ({"chains": {"eyes": EYES}, "edges": ()}, "main='words' is no chain of the model; it has eyes"),
    "objective in two": (
        {"chains": some(hand=weighed(HAND), words=weighed(WORDS))},
        "chains 'words' and 'hand' both have an objective 'loss'; give one of them another name",
    ),
    "segment in two": ({"chains": some(hand=renamed(HAND, 0, name="eyes.0"))}, "segment 'eyes.0' is in chains eyes, hand; names are unique"),
    "width": ({"chains": some(eyes=attrs.evolve(EYES, width={"late": 5}))}, "chain 'eyes': segment 'eyes.0' gives 'early', of which the chain"),
    "output twice": ({"chains": some(eyes=renamed(EYES, 0, outputs=("late",)))}, "chain 'eyes': several segments give the output 'late'"),
    "source": ({"edges": changed(0, source="ears")}, "edge ears.late → words/embed: its source 'ears' is no chain of the model; it has eyes, words"),
    "target": ({"edges": changed(0, target="wards")}, "edge eyes.late → wards/embed: its target 'wards' is no chain"),
    "within": ({"edges": changed(0, target="eyes")}, "edge eyes.late → eyes/embed stays in chain 'eyes'"),
    "output": (
        {"edges": changed(1, output="middle")},
        "edge eyes.middle → words/words.1: no segment of chain 'eyes' gives 'middle'; its outputs are early, late",
    ),
    "no outputs": ({"edges": changed(0, source="hand")}, "hand.late → words/embed: no segment of chain 'hand' gives 'late'; its outputs are none"),
    "segment": ({"edges": changed(1, segment="word.1")}, "eyes.early → words/word.1: chain 'words' has no segment 'word.1'; near: words.1, words.0"),
    "input": ({"edges": changed(1, input="seen")}, "edge eyes.early → words/words.1: the segment takes no input 'seen'; it takes deep"),
    "no input": ({"edges": changed(1, segment="head")}, "edge eyes.early → words/head: the segment takes no input 'deep'; it takes none"),
    "input twice": (
        {"edges": (*EDGES, attrs.evolve(EDGES[0], output="early"))},
        "edges eyes.late → words/embed and eyes.early → words/embed both bring 'seen': give one of them another input",
    ),
    "input that nothing brings": ({"edges": EDGES[1:]}, "chain 'words': segment 'embed' wants 'seen', which no edge brings"),
    "circle": (
        {"chains": some(eyes=renamed(EYES, 0, inputs=("back",))), "edges": (*EDGES, BACK)},
        "chains eyes, words, hand wait for each other: edge eyes.late → words/embed closes a circle",
    ),
}


@pytest.mark.parametrize("kind", CHAIN_REFUSALS)
def test_chains_that_cannot_be_are_refused_by_name(kind: str) -> None:
    change, words = CHAIN_REFUSALS[kind]
    with pytest.raises(LayoutError) as caught:
        three(**change)
    assert words in str(caught.value)


FROZEN = {f"{name}_frozen": ("*",) for name in CHAINS}
PLACE_REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"places": {**at(), "word": Place(lf.Mesh())}}, LayoutError, "chain 'word' has a place, and the model has none of that name"),
    "missing": ({"places": {k: v for k, v in at().items() if k != "hand"}}, LayoutError, "chain 'hand' has no place: say which mesh it has"),
    "no rank": ({"places": at(ranks={"eyes": (0, 9)}), "world": 2}, LayoutError, "chain 'eyes': 9 is no rank; they are 0 to 1"),
    "no ranks": ({"places": at(ranks={"eyes": ()}), "world": 2}, LayoutError, "chain 'eyes' has no ranks: name at least one of 0 to 1"),
    "a word": ({"places": at(ranks={"eyes": (0, True)}), "world": 2}, LayoutError, "chain 'eyes': True is no rank; they are 0 to 1"),
    "twice": ({"places": at(ranks={"eyes": (0, 1, 1)}), "world": 2}, LayoutError, "chain 'eyes': rank 1 stands twice in its ranks"),
    "idle": (
        {"places": at(ranks={"eyes": (0,), "words": (1,), "hand": (5,)})},
        LayoutError,
        "no chain lies on ranks 2–4 of 6: give them to one, or use fewer ranks",
    ),
    "mesh": ({"places": at("tp=2,dp=2", "dp=3", "dp=3"), "world": 3}, MeshError, "chain 'eyes': mesh dp=2,tp=2 has pp*dp*cp*tp = 1*2*1*2 = 4 ranks"),
    "divides": ({"places": at("tp=2", "dp=3", "dp=3"), "world": 3}, MeshError, "chain 'eyes': mesh tp=2 needs a multiple of pp*cp*tp = 1*1*2"),
    "axis": ({"places": at("cp=2", "dp=2", "dp=2")}, LayoutError, "chain 'eyes': mesh cp=2: context parallelism (cp=2) is not built yet"),
    "rules": ({"places": at(eyes_rules={"heads": "dp", "embed": "dp"})}, LayoutError, "chain 'eyes': eyes.0/qkv: axes ('heads', 'embed') put mesh"),
    "split": ({"places": at("", "pp=2", "", words_split=(9, 1))}, LayoutError, "chain 'words': split"),
    "placement": ({"places": at("pp=2", "dp=2", "dp=2", eyes_placement=(0, 0))}, LayoutError, "chain 'eyes': 2 stages on ranks (0, 0) leave"),
    "frozen": ({"places": at(hand_frozen=("hnad.0",))}, LayoutError, "chain 'hand': frozen 'hnad.0' names no segment, layer or parameter"),
    "all frozen": ({"places": at(**FROZEN)}, LayoutError, "every parameter of chains eyes, words, hand is frozen: nothing is left to train"),
}


@pytest.mark.parametrize("kind", PLACE_REFUSALS)
def test_places_that_cannot_be_are_refused_by_name(kind: str) -> None:
    asked, raised, words = PLACE_REFUSALS[kind]
    with pytest.raises(raised) as caught:
        chain_layouts(three(), **asked)
    assert words in str(caught.value)


def test_a_chain_may_be_frozen_whole() -> None:
    layouts = laid_out(at(eyes_frozen=("*",)))
    assert layouts.frozen == EYES.model.params().keys()
    assert not layouts.frozen & layouts.trained(0).keys()


def test_edges_that_travel_together_take_the_same_rows() -> None:
    chains = {"eyes": EYES, "words": attrs.evolve(WORDS, collate=chained.never), "hand": attrs.evolve(HAND, collate=None)}
    model = three(chains=chains, edges=changed(3, takes=lambda batch: None), main="hand")  # only the main chain may pick rows
    with pytest.raises(LayoutError, match=re.escape("edges words.said.0 → hand/hand.0 and words.said.0 → hand/hand.1 carry one output to one stage")):
        chain_layouts(model, at())
    chain_layouts(model, at("dp=2", "dp=2", "pp=2"))  # apart they travel each for itself


def test_order_and_groups() -> None:
    assert order(three()) == ("eyes", "words", "hand")
    assert order(Chains(None, {"hand": HAND, "words": WORDS, "eyes": EYES}, EDGES, "words")) == ("eyes", "words", "hand")
    assert [[*g] for g in groups(2, 5)] == [[0, 1], [2, 3, 4]]
    assert groups(4, 4) == tuple(range(m, m + 1) for m in range(4))
    assert (padded(0, 4), padded(4, 4), padded(5, 4)) == (4, 4, 8)
    assert (runs((0, 1, 2, 5, 4, 7, 8)), runs(())) == ("0–2, 5, 4, 7, 8", "")


def test_parameters_of_all_chains_are_found_by_path() -> None:
    model = three()
    assert model.params().keys() == {*EYES.model.params(), *WORDS.model.params(), *HAND.model.params()}
    assert model.giver("words", "said.1") is model.segment("words", "words.1")
    assert model.segment("words", "hand.0") is None
    assert laid_out(SPLIT).chain_of["embed/table"] == "words"


def test_a_model_without_edges_has_no_joints() -> None:
    alone = Chains(None, {"a": Chain(Model(None, (segment("a", "a", {"w": chained.norm(2)}),), {}))}, (), "a")
    layouts = chain_layouts(alone, {"a": Place(lf.Mesh(tp=2, dp=2))})
    assert (layouts.joints, layouts.world, layouts.rows) == ((), 4, ((0, 1, 2, 3),))
    ctx = helpers.context(lf.solo())
    assert ctx.of("") is ctx

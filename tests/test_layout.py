"""Who holds what: layouts that cannot be are refused by name, models whose names clash, too."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from helpers import context

import lf
from lf import box, parity, tree
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder, vocab_part
from lf.models.small import tiny
from lf.segment import Model, Segment, path_of
from lf.spec import Init, LayoutError, Param, Tied


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (lf.Mesh(cp=2), "context parallelism (cp=2) is not built yet; use cp=1"),
        (lf.Mesh(dp=2, ep=2), "ep and etp split experts, and the model has none"),
        (lf.Mesh(dp=2, etp=2), "ep and etp split experts, and the model has none"),
    ],
)
def test_what_is_not_built_is_refused(mesh: lf.Mesh, words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        lf.layout(tiny(), mesh)
    assert words in str(caught.value)


def test_layers_and_their_parameters() -> None:
    layout = lf.layout(tiny(tied=True), lf.Mesh(dp=1, tp=2))
    assert list(layout.layers(0)) == ["embed", "layers.0", "layers.1", "head"]
    assert set(layout.specs) == set(tiny().params())
    assert layout.holders("embed/weight") == (0,)


@pytest.mark.parametrize("rules", [{"heads": "tp"}, {}, {"vocab": "tp", "heads": "tp", "mlp": "tp", "embed": "dp"}])
def test_rules_that_the_segments_do_not_follow_are_refused(rules: dict[str, str]) -> None:
    with pytest.raises(LayoutError, match=r"the rules put .* the model is written for"):
        lf.layout(tiny(), lf.Mesh(dp=2, tp=2), rules)


def test_equal_layers_share_one_function() -> None:
    """Each distinct segment compiles once; names and indices reach no function."""
    by_name = {s.name: s.apply for s in tiny().segments}
    assert by_name["layers.0.attn"] is by_name["layers.1.attn"]
    assert by_name["layers.0.mlp"] is by_name["layers.1.mlp"]


def test_segments_with_one_name_are_refused() -> None:
    a = Segment("a", "a", {}, lambda p, x, b, c: (x, {}))
    with pytest.raises(LayoutError, match=r"\['a'\] stand twice"):
        Model(None, (a, a), {})


def test_a_layer_in_two_places_is_refused() -> None:
    a, b = (Segment(name, name, {}, lambda p, x, b, c: (x, {})) for name in "ab")
    with pytest.raises(LayoutError, match="the segments of a layer must follow one another; those of a have others in between"):
        Model(None, (a, b, attrs.evolve(a, name="c")), {})


def test_a_tie_to_nothing_is_refused() -> None:
    a = Segment("a", "a", {"w": Param((2,), (None,), Init()), "t": Tied("b/w")}, lambda p, x, b, c: (x, {}))
    with pytest.raises(LayoutError, match="a/t is tied to 'b/w', which is no parameter"):
        Model(None, (a,), {})
    assert list(Model(None, (attrs.evolve(a, params={"w": a.params["w"], "t": Tied("a/w")}),), {}).params()) == ["a/w"]


def test_model_configs_that_cannot_be() -> None:
    with pytest.raises(lf.config.ConfigError, match="head_dim=3 must be even"):
        decoder(DecoderConfig(8, 4, (Layer(Attention(2, 1, 3), GatedMLP(4)),)))
    with pytest.raises(lf.config.ConfigError, match="heads=3 must be a multiple of kv_heads=2"):
        decoder(DecoderConfig(8, 4, (Layer(Attention(3, 2, 4), GatedMLP(4)),)))


def test_a_large_vocabulary_splits_in_whole_blocks() -> None:
    part = vocab_part(151936)
    assert part.rows == 151936
    assert all(n % 64 == 0 for n in part.sizes(7)[:-1])
    assert sum(vocab_part(4099).sizes(3)) == 4099  # the last block is short
    assert vocab_part(37).sizes(4) == (9, 9, 9, 10)


def test_forward_refuses_a_pipeline() -> None:
    def body(axes):
        ctx = lf.Context(axes, lf.devices.get("cpu"))
        return lf.forward(tiny(), {}, lf.Batch({}), ctx)

    with pytest.raises(LayoutError, match=r"pp=2: run a program with lf\.schedule\.run"):
        lf.sim.spmd(lf.Mesh(pp=2), body)


def names(layout: lf.layouts.Layout) -> list[str]:
    return ["+".join(layout.layers(s)) for s in range(len(layout.stages))]


@pytest.mark.parametrize(
    ("asked", "stages", "placement"),
    [
        ({}, ["embed+layers.0", "layers.1+head"], (0, 1)),
        ({"stages": 4}, ["embed", "layers.0", "layers.1", "head"], (0, 1, 0, 1)),
        ({"stages": 3}, ["embed", "layers.0", "layers.1+head"], (0, 1, 0)),
        ({"split": "e+1,1+h"}, ["embed+layers.0", "layers.1+head"], (0, 1)),
        ({"split": "e,0,2,h", "stages": 4}, ["embed", "", "layers.0+layers.1", "head"], (0, 1, 0, 1)),
        ({"split": [3, 1]}, ["embed+layers.0+layers.1", "head"], (0, 1)),
        ({"placement": (0, 1, 1, 0)}, ["embed", "layers.0", "layers.1", "head"], (0, 1, 1, 0)),
        ({"placement": (1, 0), "split": (0, 4)}, ["", "embed+layers.0+layers.1+head"], (1, 0)),
    ],
)
def test_stages_and_where_they_lie(asked: dict[str, Any], stages: list[str], placement: tuple[int, ...]) -> None:
    layout = lf.layout(tiny(), lf.Mesh(pp=2), **asked)
    assert (names(layout), layout.placement) == (stages, placement)
    assert [layout.on(r) for r in range(2)] == [tuple(s for s, at in enumerate(placement) if at == r) for r in range(2)]


def test_several_stages_on_one_rank() -> None:
    layout = lf.layout(tiny(), lf.Mesh(dp=2), stages=3)
    assert layout.placement == (0, 0, 0)
    assert layout.held({"pp": 0}) == layout.specs


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"stages": 0}, "stages=0 must be a whole number, at least 1"),
        ({"stages": 3, "split": (2, 2)}, "split (2, 2) is of 2 stages, stages=3 was asked for; leave one of them out"),
        ({"split": (2, 3)}, "split (2, 3): 2 + 3 = 5 for 4 layers, the first and the last included; (2, 2) would do"),
        ({"split": (5, -1)}, "split (5, -1): -1 is no number of layers"),
        ({"split": ()}, "split (): no stage for 4 layers"),
        ({"split": (4,)}, "1 stages on ranks (0,) leave pipeline ranks 1 of mesh pp=2 without a stage; use at least 2 stages"),
        ({"placement": (0, 2)}, "placement (0, 2): 2 is no pipeline rank of mesh pp=2; they are 0 to 1"),
        ({"placement": (0, -1)}, "placement (0, -1): -1 is no pipeline rank"),
        ({"placement": (0, 0, 0)}, "3 stages on ranks (0, 0, 0) leave pipeline ranks 1 of mesh pp=2 without a stage"),
        ({"placement": (0, 1), "split": (1, 1, 2)}, "placement (0, 1) is of 2 stages, split (1, 1, 2) of 3; name the rank of each stage"),
        ({"placement": (0, 1), "stages": 4}, "placement (0, 1) is of 2 stages, stages=4 of 4"),
    ],
)
def test_stages_that_cannot_be_are_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        lf.layout(tiny(), lf.Mesh(pp=2), **asked)
    assert words in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("mesh", "asked"),
    [
        ("pp=2,tp=2", {}),
        ("pp=3,dp=2", {"split": "e,2,h"}),
        ("pp=2", {"placement": (0, 1, 1, 0)}),
        ("pp=3", {"split": (0, 4, 0)}),
        ("pp=4,tp=4", {"split": "0,e,2,h"}),
    ],
)
def test_every_element_is_held_where_it_is_used_and_owned_once(mesh: str, asked: dict[str, Any], tied: bool) -> None:
    layout = lf.layout(tiny(tied), lf.Mesh.parse(mesh), **asked)
    owned = {p.key: torch.zeros(p.shape, dtype=torch.int64) for spec in layout.specs.values() for p in spec.pieces(layout.mesh.coords(0))}
    for rank in range(layout.mesh.size):
        coords = layout.mesh.coords(rank)
        held = layout.held(coords)
        used = {path_of(s, n) for stage in layout.on(coords["pp"]) for s in layout.stages[stage] for n in s.params}
        assert set(held) == used
        assert list(held) == [path for path in layout.specs if path in used]
        for path, piece in layout.state_owned(coords):
            assert path in held
            owned[piece.key][box.slices(piece.box, box.whole(piece.shape))] += 1
    assert all((n == 1).all() for n in owned.values())


def test_a_tied_parameter_belongs_to_the_first_stage_that_uses_it() -> None:
    layout = lf.layout(tiny(), lf.Mesh(pp=3), placement=(2, 1, 0))
    assert layout.holders("embed/weight") == (2, 0)
    assert layout.holders("head/norm") == (0,)
    assert [path for path, _ in layout.state_owned({**layout.mesh.coords(0), "pp": 0}) if "weight" in path] == []
    assert lf.layout(tiny(), lf.Mesh(pp=2), placement=(0, 1, 1, 0)).holders("embed/weight") == (0,)


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["embed"], {"embed/weight"}),
        (["head"], {"embed/weight", "head/norm"}),  # the table that is tied, as a whole
        (["head/weight"], {"embed/weight"}),
        (["layers.0.mlp"], {"layers.0.mlp/norm", "layers.0.mlp/gate_up", "layers.0.mlp/down"}),
        (["layers.*/down", "head/norm"], {"layers.0.mlp/down", "layers.1.mlp/down", "head/norm"}),
        (["layers.[0]"], {path for path in tiny().params() if path.startswith("layers.0")}),
        (["layers.0.*"], {path for path in tiny().params() if path.startswith("layers.0")}),
        ([], set()),
    ],
)
def test_what_is_frozen(patterns: list[str], frozen: set[str]) -> None:
    layout = lf.layout(tiny(), lf.Mesh(pp=2), frozen=patterns)
    assert layout.frozen == frozen
    trained = {path for pp in range(2) for path in layout.trained({"pp": pp})}
    assert trained == set(layout.specs) - frozen


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["layers.2"], "frozen 'layers.2' names no segment, layer or parameter of the model; near: layers."),
        (["embed/wieght"], "frozen 'embed/wieght' names no segment, layer or parameter of the model; near: embed/weight"),
        (["vision.*"], "frozen 'vision.*' names no segment"),
        (["*"], "is every parameter of the model: nothing is left to train"),
        ("embed", "frozen='embed' should be a tuple of names, as ('embed',)"),
    ],
)
def test_names_that_cannot_be_frozen_are_refused(patterns: Any, words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        lf.layout(tiny(), lf.Mesh(dp=1), frozen=patterns)
    assert words in str(caught.value)


def test_products_name_parameters() -> None:
    with pytest.raises(LayoutError, match="segment 'a': products names 'v'; its parameters are w"):
        Segment("a", "a", {"w": Param((2,), (None,), Init())}, lambda p, x, b, c: (x, {}), ("w", "v"))
    assert {s.name: s.products for s in tiny().segments}["layers.0.mlp"] == ("gate_up", "down")


def test_operations_of_a_model_are_those_of_its_segments() -> None:
    batch, model = parity.random_batches(tiny(), 0, 0, 1, 21)[0], tiny()
    assert model.flops is not None
    assert model.flops(batch) == sum(s.flops(batch) for s in model.segments if s.flops)
    assert attrs.evolve(model, segments=(*model.segments[:-1], attrs.evolve(model.segments[-1], flops=None))).flops is None


@pytest.mark.parametrize("mesh", [lf.Mesh(pp=2, tp=2), lf.Mesh(pp=3), lf.Mesh(pp=6)])
@pytest.mark.parametrize("asked", [{}, {"split": "e,1,0,1,0,h"}])
def test_one_seed_is_one_model_on_any_pipeline(mesh: lf.Mesh, asked: dict[str, Any]) -> None:
    (whole,) = lf.sim.spmd(lf.Mesh(dp=1), lambda axes: lf.init(lf.layout(tiny(), axes.mesh), context(axes), 5))
    one = lf.layout(tiny(), lf.Mesh(dp=1))
    layout = lf.layout(tiny(), mesh, **asked)
    for rank, params in enumerate(lf.sim.spmd(mesh, lambda axes: lf.init(layout, context(axes), 5))):
        coords = layout.mesh.coords(rank)
        assert [path for path, _ in tree.items(params)] == list(layout.held(coords))
        for path, spec in layout.held(coords).items():
            for piece, full in zip(spec.pieces(coords), one.specs[path].pieces(one.mesh.coords(0))):
                want = full.view(tree.get(whole, path))[box.slices(piece.box, full.box)]
                assert torch.equal(piece.view(tree.get(params, path)), want), path

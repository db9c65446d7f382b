"""Who holds what: layouts that cannot be are refused by name, models whose names clash, too."""

from __future__ import annotations

import attrs
import pytest

import lf
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder, vocab_part
from lf.models.small import tiny
from lf.segment import Model, Segment
from lf.spec import Init, LayoutError, Param, Tied


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (lf.Mesh(pp=2), "pipeline parallelism (pp=2) is not built yet; use pp=1"),
        (lf.Mesh(cp=2), "context parallelism (cp=2) is not built yet; use cp=1"),
        (lf.Mesh(dp=2, ep=2), "expert parallelism (ep=2) is not built yet; use ep=1"),
        (lf.Mesh(dp=2, etp=2), "expert tensor parallelism (etp=2) is not built yet; use etp=1"),
    ],
)
def test_what_is_not_built_is_refused(mesh: lf.Mesh, words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        lf.layout(tiny(), mesh)
    assert words in str(caught.value)


def test_stages_are_refused() -> None:
    with pytest.raises(LayoutError, match="stages=2: pipeline stages are not built yet; use stages=1"):
        lf.layout(tiny(), lf.Mesh(dp=1), stages=2)


def test_layers_and_their_parameters() -> None:
    layout = lf.layout(tiny(tied=True), lf.Mesh(dp=1, tp=2))
    assert list(layout.layers(0)) == ["embed", "layers.0", "layers.1", "head"]
    assert layout.layer_paths(0)["head"] == ("head/norm",)  # the tied table is the embedding's
    assert lf.layout(tiny(tied=False), lf.Mesh(dp=1)).layer_paths(0)["head"] == ("head/norm", "head/weight")
    assert set(layout.specs) == set(tiny().params())


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

"""The texts of --recompute and --offload: what they choose of a stage, and that a wrong one says what there is."""

from __future__ import annotations

import importlib

import pytest

import lf
from lf.config import ConfigError
from lf.models.small import tiny
from lf.schedule.recompute import OPS, Offload, Recompute, parse_offload, parse_recompute

LAYOUT = lf.layout(tiny(), lf.Mesh(pp=2), split=(2, 2))  # embed, layers.0 | layers.1, head


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("none", [], []),
        ("full", [("embed", ()), ("layers.0", ())], [("layers.1", ()), ("head", ())]),
        ("full:1", [("layers.0", ())], [("layers.1", ())]),
        ("full:9", [("layers.0", ())], [("layers.1", ()), ("head", ())]),
        ("segments=mlp", [("layers.0.mlp", ())], [("layers.1.mlp", ())]),
        ("segments=attn,mlp", [("layers.0", ())], [("layers.1", ())]),
        ("ops=swiglu", [("embed", ("swiglu",)), ("layers.0", ("swiglu",))], [("layers.1", ("swiglu",)), ("head", ("swiglu",))]),
        (
            "segments=mlp; ops=rms_norm",
            [("embed", ("rms_norm",)), ("layers.0.attn", ("rms_norm",)), ("layers.0.mlp", ())],
            [("layers.1.attn", ("rms_norm",)), ("layers.1.mlp", ()), ("head", ("rms_norm",))],
        ),
        ("full:1;ops=swiglu", [("embed", ("swiglu",)), ("layers.0", ())], [("layers.1", ()), ("head", ("swiglu",))]),
    ],
)
def test_what_is_run_again(text: str, first: list, second: list) -> None:
    policy = parse_recompute(text)
    assert [list(policy.chosen(LAYOUT, s)) for s in (0, 1)] == [first, second]
    assert parse_recompute(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "first", "second", "distance"),
    [
        ("none", [], [], 1),
        ("full;distance=2", ["embed", "layers.0"], ["layers.1", "head"], 2),
        ("full:1", ["layers.0"], ["layers.1"], 1),
        ("layers=layers.1,embed;distance=0", ["embed"], ["layers.1"], 0),
        ("full:1;layers=head", ["layers.0"], ["layers.1", "head"], 1),
    ],
)
def test_what_goes_to_the_host(text: str, first: list, second: list, distance: int) -> None:
    policy = parse_offload(text)
    assert [list(policy.chosen(LAYOUT, s)) for s in (0, 1)] == [first, second]
    assert policy.distance == distance
    assert parse_offload(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ful", "unknown part of --recompute 'ful'; did you mean 'full'"),
        ("", "unknown part of --recompute ''"),
        ("full:0", "full is to be a whole number, at least 1, not .0."),
        ("full:two", "full is to be a whole number"),
        ("full=2", "'full=2' should be full or full:K"),
        ("full;ops=swiglu", "leaves nothing for the rest"),
        ("none;full", "none stands alone"),
        ("none:1", "'none:1' should be none"),
        ("ops", "'ops' should be ops=…"),
        ("ops=", "'ops=' should be ops=…"),
        ("ops=swiglu,", "should be ops=…"),
        ("ops=swiglu,swiglu", "swiglu stands twice in ops"),
        ("ops=swiglu;ops=rope", "ops stands twice"),
        ("ops=swigl", "unknown op to recompute 'swigl'; did you mean 'swiglu'.* Known: attention, grouped_linear, permute, rms_norm, rope"),
        ("ops=adamw_update", "unknown op to recompute 'adamw_update'"),
    ],
)
def test_a_wrong_text_says_what_there_is(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_recompute(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("distance=2", "not which go; add full"),
        ("full;layers=head", "full is every layer"),
        ("full;distance=-1", "distance is to be a whole number, at least 0, not .-1."),
        ("full;distance=1,2", "distance is to be a whole number"),
        ("segments=mlp", "unknown part of --offload 'segments'"),
    ],
)
def test_a_wrong_text_for_the_host(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_offload(text)


def test_names_are_those_of_the_model() -> None:
    with pytest.raises(ConfigError, match=r"unknown segment to recompute 'atn'; did you mean 'attn'.* Known: attn, embed, head, mlp"):
        parse_recompute("segments=atn").chosen(LAYOUT, 0)
    with pytest.raises(ConfigError, match=r"unknown layer to offload 'layer.1'; did you mean 'layers.1'"):
        parse_offload("layers=layer.1").chosen(LAYOUT, 0)
    assert Recompute().chosen(LAYOUT, 0) == Offload().chosen(LAYOUT, 0) == ()


def test_ops_are_those_of_the_devices() -> None:
    for name in lf.devices.KNOWN:
        assert {*OPS, "adamw_update", "momentum_update"} == vars(lf.devices.op_table(importlib.import_module(f"lf.devices.{name}"))).keys()
    assert parse_recompute("ops=mine", (*OPS, "mine")).ops == ("mine",)

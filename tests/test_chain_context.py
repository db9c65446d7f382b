"""The context of several chains: each chain's own axes and precision, and what does not fit, refused before any rank waits for another."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from chained import at, laid_out
from helpers import processes

import lf
from lf.axes_meta import MetaAxes
from lf.chain_context import chain_context, precisions
from lf.config import ConfigError
from lf.context import PRECISIONS, Precision
from lf.mesh import Mesh, MeshError
from lf.sim import spmd

CPU = lf.devices.get("cpu")
LAYOUTS = laid_out(at("tp=2", "pp=2,dp=2", "dp=2", {"eyes": (3, 1), "words": (0, 1, 2, 3), "hand": (4, 5)}))


def seen(axes: Any, precision: Any) -> dict[str, Any]:
    ctx = chain_context(LAYOUTS, axes, CPU, precision)
    assert ctx.axes is axes
    assert ctx.precision == ctx.of("words").precision
    assert list(ctx.chains) == ["eyes", "words", "hand"]
    assert all(own.device is CPU and not own.chains for own in ctx.chains.values())
    return {name: own.axes and (own.axes.mesh, own.axes.coords, own.axes.world.ranks, own.precision.compute) for name, own in ctx.chains.items()}


@pytest.mark.parametrize("run", [spmd, processes])
def test_each_chain_has_its_own_axes_and_precision(run: Any) -> None:
    for rank, got in enumerate(run(Mesh(dp=6), seen, {"words": "bf16", "hand": "fp32"})):
        for name, compute in (("eyes", torch.bfloat16), ("words", torch.bfloat16), ("hand", torch.float32)):
            coords, mesh = LAYOUTS.coords(name, rank), LAYOUTS.chains[name].mesh
            assert got[name] == (coords and (mesh, coords, LAYOUTS.ranks[name], compute))


def test_on_paper() -> None:
    assert [seen(MetaAxes(Mesh(dp=6), rank), "fp64") for rank in range(6)] == spmd(Mesh(dp=6), seen, "fp64")


def test_a_chain_that_is_not_named_has_the_precision_of_the_main_one() -> None:
    same = Precision(torch.float16, torch.float32)
    assert precisions(LAYOUTS, same) == dict.fromkeys(LAYOUTS.chains, same)
    assert precisions(LAYOUTS, {"eyes": "fp32"}) == dict.fromkeys(LAYOUTS.chains, PRECISIONS["fp32"])
    assert precisions(LAYOUTS, {"words": same}) == dict.fromkeys(LAYOUTS.chains, same)


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ({"word": "bf16"}, "unknown chain in precision 'word'; did you mean 'words'"),
        ({"eyes": "bf61"}, "unknown precision 'bf61'; did you mean 'bf16'"),
        ({"hand": "fp64"}, "that of 'hand' is torch.float64, that of 'words' torch.float32; change one precision"),
        ({"words": "fp64", "eyes": "bf16"}, "that of 'eyes' is torch.float32, that of 'words' torch.float64"),
    ],
)
def test_what_is_refused(precision: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chain_context(LAYOUTS, Alone(Mesh(dp=6)), CPU, precision)
    assert words in str(caught.value)


@attrs.define
class Alone:
    """Axes that would wait for the others as soon as they are asked for a mesh."""

    mesh: Mesh

    def over(self, mesh: Mesh, ranks: Any) -> Any:
        raise AssertionError("refused too late")


@pytest.mark.parametrize("mesh", [Mesh(dp=4), Mesh(dp=3, tp=2), Mesh(pp=2, dp=3)])
def test_axes_of_another_world_are_refused(mesh: Mesh) -> None:
    with pytest.raises(MeshError) as caught:
        chain_context(LAYOUTS, Alone(mesh), CPU)
    told = f"the chains lie on 6 ranks, and the axes are of mesh {mesh} over {mesh.size}: give those of lf.connect(Mesh(dp=6), device)"
    assert str(caught.value) == told

"""Sums of gradients that travel, on ranks of which some have no gradient."""

from __future__ import annotations

import attrs
import torch

from lf.mesh import Mesh
from lf.parallel.reduce import lies_of
from lf.schedule.gradients import Gradients
from lf.sharding import Cut
from lf.sim import spmd
from lf.spec import Init, Param, spec_of


def test_a_rank_without_a_gradient_meets_the_others_at_the_same_place() -> None:
    """Where shards are summed over groups of shards when they land, a rank that landed them later would be in another collective by then."""
    mesh = Mesh(dp=4)
    spec = attrs.evolve(spec_of("w", Param((4, 2), ("embed", None), Init()), {}, mesh), cut=Cut(("dp", "cp"), 2, 0))

    def body(axes):
        sums = Gradients({"w": torch.zeros(4, 2)}, lies_of([spec], axes.coords), axes, torch.float64, "fp32")
        sums.add("w", torch.ones(4, 2))
        sums.reduce(["w"], [spec])
        sums.add("w", torch.ones(4, 2) if axes.rank < 2 else None)  # of the next microbatch
        axes.world.sum(torch.ones(1))  # as a backward goes on with others
        sums.reduce(["w"], [spec])
        sums.finish()
        return sums.shards["w"].unique().tolist()

    assert spmd(mesh, body) == [[6.0]] * 4

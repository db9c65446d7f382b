"""The context of a model of several chains: that of the world, with one of each chain over its own mesh."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lf.chain_layouts import Layouts
from lf.config import ConfigError, one_of
from lf.context import Context, Precision, precision_of
from lf.mesh import MeshError

Asked = str | Precision


def chain_context(layouts: Layouts, axes: Any, device: ModuleType, precision: Asked | Mapping[str, Asked] = "fp32") -> Context:
    """axes: of all ranks, as of `lf.connect(Mesh(dp=N), device)`; collective over them. precision: of all chains, or by chain; one that is not named
    has that of the main chain, or fp32. All have one master dtype.

    Raises MeshError for axes of another world, ConfigError for a chain that is not there and for masters that differ.
    """
    if axes.mesh.size != layouts.world or axes.mesh["dp"] != layouts.world:
        raise MeshError(
            f"the chains lie on {layouts.world} ranks, and the axes are of mesh {axes.mesh} over {axes.mesh.size}: "
            f"give those of lf.connect(Mesh(dp={layouts.world}), device)"
        )
    each = precisions(layouts, precision)
    chains = {c: Context(axes.over(where.mesh, layouts.ranks[c], where.shard_groups()), device, each[c]) for c, where in layouts.chains.items()}
    return Context(axes, device, each[layouts.main], chains=chains)


def precisions(layouts: Layouts, asked: Asked | Mapping[str, Asked]) -> dict[str, Precision]:
    """The precision of each chain. Raises ConfigError for a chain that is not there and for masters that differ."""
    given = dict(asked) if isinstance(asked, Mapping) else dict.fromkeys(layouts.chains, asked)
    for chain in given:
        one_of("chain in precision", chain, layouts.chains)
    rest = given.get(layouts.main, "fp32")
    each = {chain: precision_of(given.get(chain, rest)) for chain in layouts.chains}
    master = each[layouts.main].master
    if other := next((c for c, p in each.items() if p.master != master), None):
        words = f"that of {other!r} is {each[other].master}, that of {layouts.main!r} {master}"
        raise ConfigError(f"the master copies of all chains have one dtype, in which gradients are summed: {words}; change one precision")
    return each

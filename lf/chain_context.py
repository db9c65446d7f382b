"""The context of a model of several chains: that of the world, with one of each chain over its own mesh."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lf.chain_layouts import Layouts
from lf.config import ConfigError, one_of
from lf.context import Context, Precision
from lf.mesh import MeshError

Asked = str | Precision


def chain_context(layouts: Layouts, axes: Any, device: ModuleType, precision: Asked | Mapping[str, Asked] = "fp32") -> Context:
    """axes: of all ranks, as of `lf.connect(Mesh(dp=N), device)`; collective over them. precision: of all chains, or by chain; one that is not named
    has that of the main chain, or fp32. All have one master dtype.

    Raises MeshError for axes of another world, ConfigError for a chain that is not there and for masters that differ.
    """
    if axes.mesh.size != layouts.world or axes.mesh["dp"] != layouts.world:
        raise MeshError(f"the chains lie on {layouts.world} ranks, the axes are of mesh {axes.mesh}: connect Mesh(dp={layouts.world})")
    asked = dict(precision) if isinstance(precision, Mapping) else dict.fromkeys(layouts.chains, precision)
    for chain in asked:
        one_of("chain in precision", chain, layouts.chains)
    rest = asked.get(layouts.main, "fp32")
    chains = {
        chain: Context(axes.over(where.mesh, layouts.ranks[chain]), device, asked.get(chain, rest)) for chain, where in layouts.chains.items()
    }  # fmt: skip
    masters = {chain: ctx.precision.master for chain, ctx in chains.items()}
    if other := next((c for c, dtype in masters.items() if dtype != masters[layouts.main]), None):
        words = f"{other!r} has {masters[other]}, {layouts.main!r} {masters[layouts.main]}"
        raise ConfigError(f"the master copies of all chains have one dtype, in which gradients are summed: {words}; change one precision")
    return Context(axes, device, chains[layouts.main].precision, chains=chains)

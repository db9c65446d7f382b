"""Steps of the three chains of `trio`: where they lie, their data, and a step from the model to its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from helpers import SEED
from torch import Tensor

import lf
from lf import parity
from lf.batch import Batch
from lf.chain_context import chain_context
from lf.chain_layouts import Layouts, Place, chain_layouts
from lf.chains import Chains
from lf.models.trio import trio
from lf.models.trio_data import Amounts, sample
from lf.schedule import Beside, Program, build_chains

MODEL, CPU = trio(), lf.devices.get("cpu")
PLACES = {"vision": Place(lf.Mesh(dp=2)), "decoder": Place(lf.Mesh(pp=2)), "head": Place(lf.Mesh(dp=1), (1,))}
OTHERS = {"vision": Place(lf.Mesh(tp=2)), "decoder": Place(lf.Mesh(dp=2)), "head": Place(lf.Mesh(tp=2))}
VISION, DECODER, HEAD = (MODEL.chains[name] for name in ("vision", "decoder", "head"))
Data = list[list[Batch]]


def data(m: int, dp: int = 1, step: int = 0, multiple: int = 2, amounts: Amounts | None = None) -> Data:
    """The same data batches for any dp that divides m: data batch i is microbatch i // dp of coordinate i % dp."""
    flat = [sample(MODEL.config, SEED * 100 + step, i, 0, multiple, amounts) for i in range(m * dp)]
    return [flat[i : i + dp] for i in range(0, m * dp, dp)]


def context(layouts: Layouts, axes: Any, precision: Any = "fp64") -> lf.Context:
    return chain_context(layouts, axes, CPU, precision)


def program_of(layouts: Layouts, m: int, kind: Beside | str = "nested") -> Program:
    return build_chains(layouts, m, {"vision": kind, "head": "inline"})


def stepped(
    model: Chains = MODEL, places: dict[str, Place] = PLACES, batches: Data | None = None, program: Callable[[Layouts], Program] | None = None,
    ctx: Callable[[Layouts, Any], lf.Context] = context, m: int = 2,
) -> Any:  # fmt: skip
    """A step on every rank, from the model to its metrics."""
    layouts = chain_layouts(model, places)
    actions = program(layouts) if program else program_of(layouts, m)

    def fn(axes: Any) -> dict[str, Tensor]:
        own = ctx(layouts, axes)
        init, step = lf.train.make(layouts, lf.optim.sgd(0.1), actions, own)
        return step(init(parity.randomised(layouts, own, SEED)), data(m) if batches is None else batches)[1]

    return lf.sim.spmd(lf.Mesh(dp=layouts.world), fn)


def chain(name: str, **fields: Any) -> Chains:
    return attrs.evolve(MODEL, chains={**MODEL.chains, name: attrs.evolve(MODEL.chains[name], **fields)})

"""Broken edges, meshes, placements, programs and data of several chains are refused, as a user meets them: with the chain or the edge named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from chain_steps import CPU, DECODER, MODEL, PLACES, VISION, Data, chain, context, data, program_of, stepped
from torch import Tensor

import lf
from lf.batch import Batch, BatchError
from lf.chain_layouts import Layouts, Place, chain_layouts
from lf.chains import Chains, Items, no_items
from lf.config import ConfigError
from lf.mesh import MeshError
from lf.schedule import Beside, Program, ProgramError, build_chains
from lf.schedule.recompute import parse_recompute
from lf.schedule.shapes import ShapeError
from lf.segment import Objective
from lf.spec import LayoutError


def segment(chain_name: str, name: str, **fields: Any) -> Chains:
    model = MODEL.chains[chain_name].model
    segments = tuple(attrs.evolve(s, **fields) if s.name == name else s for s in model.segments)
    return chain(chain_name, model=attrs.evolve(model, segments=segments))


def planned(**changes: Tensor | None) -> Data:
    """Data whose first plan is changed; None: gone."""
    first, *rest = data(2)
    plan = {k: v for k, v in {**first[0].plan, **changes}.items() if v is not None}
    return [[attrs.evolve(first[0], plan=plan)], *rest]


def paid(**changes: Tensor | None) -> Data:
    """Data whose first payload with images is changed."""
    out = data(2)
    at = next(i for i, row in enumerate(out) if len(row[0].plan["patches"]))
    payload = {k: v for k, v in {**out[at][0].payload, **changes}.items() if v is not None}
    out[at] = [attrs.evolve(out[at][0], payload=payload)]
    return out


def told(of: Callable[[Batch], Items], change: Callable[[Items], dict[str, Any]]) -> Callable[[Batch], Items]:
    return lambda batch: attrs.evolve(of(batch), **change(of(batch)))


def merger(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **more: Any) -> Any:
    """vision.merger with other outputs."""
    plain = next(s for s in VISION.model.segments if s.name == "vision.merger")

    def apply(p: Any, x: Any, batch: Any, ctx: Any) -> Any:
        y, terms = plain.apply(p, x, batch, ctx)
        return y, {**terms, "outputs": change(terms["outputs"]), **{k: {"odd": terms["outputs"]["visual"].sum()} for k in more}}

    return segment("vision", "vision.merger", apply=apply)


def without(op: str, name: str) -> Callable[[Layouts], Program]:
    """A program that has lost the first action of this kind, on every rank."""

    def program(layouts: Layouts) -> Program:
        lost = {a for row in program_of(layouts, 2) for a in row if (a.op, f"{a.chain}.{a.segment}", a.microbatch) == (op, name, 0)}
        return tuple(tuple(a for a in row if a not in lost) for row in program_of(layouts, 2))

    return program


def built(placements: dict[str, Any], **policies: Any) -> Callable[[Layouts], Program]:
    return lambda layouts: build_chains(layouts, 2, placements, **policies)


OTHER_RANKS = {**PLACES, "head": Place(lf.Mesh(dp=1), (0,))}
VISUAL, HIDDEN = "edge vision.visual → decoder/decoder.embed", "edge decoder.hidden → head/head.layers.0.cross"
AT = "data batch dp=0 of microbatch 0"
# what was asked, what is raised, what the message says: the chain or edge first, then what is wrong, then the way out
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    # meshes and contexts
    "mesh": ({"places": {**PLACES, "vision": Place(lf.Mesh(tp=3), (0, 1))}}, MeshError, ("chain 'vision': mesh tp=3 needs a multiple",)),
    "frozen": (
        {"places": {**PLACES, "vision": Place(lf.Mesh(dp=2), frozen=("vison.*",))}},
        LayoutError,
        ("chain 'vision': frozen 'vison.*'", "near: vision"),
    ),
    "a context of one chain": (
        {"ctx": lambda layouts, axes: lf.Context(axes, CPU, "fp64")},
        MeshError,
        ("chains vision, decoder, head", "chain_context"),
    ),
    "a context of another mesh": (
        {"ctx": lambda layouts, axes: context(chain_layouts(MODEL, {**PLACES, "vision": Place(lf.Mesh(tp=2))}), axes)},
        MeshError,
        ("chain 'vision' is laid out over mesh dp=2 on ranks 0, 1", "has mesh tp=2 on ranks 0, 1", "chain_context"),
    ),
    "a context of other ranks": (
        {"ctx": lambda layouts, axes: context(chain_layouts(MODEL, OTHER_RANKS), axes)},
        MeshError,
        ("chain 'head' is laid out over mesh one rank on ranks 1", "chain_context"),
    ),
    "precision": (
        {"ctx": lambda layouts, axes: context(layouts, axes, {"vison": "bf16"})},
        ConfigError,
        ("chain in precision 'vison'", "did you mean 'vision'"),
    ),
    "masters": (
        {"ctx": lambda layouts, axes: context(layouts, axes, {"vision": "fp64"})},
        ConfigError,
        ("that of 'vision' is torch.float64", "change one precision"),
    ),
    # placements
    "placement of none": ({"program": built({"vison": "nested", "head": "inline"})}, ProgramError, ("chain 'vison'", "vision, head")),
    "placement of the main chain": ({"program": built({"decoder": "nested"})}, ProgramError, ("chain 'decoder'", "beside 'decoder'")),
    "no placement": (
        {"program": built({"vision": "nested"})},
        ProgramError,
        ("joint decoder.hidden → head: chain 'head' has no placement", "give it one of"),
    ),
    "a placement that is none": (
        {"program": built({"vision": "netsed", "head": "inline"})},
        ConfigError,
        ("chain 'vision'", "did you mean 'nested'"),
    ),
    "no rows of its own": (
        {"program": built({"vision": "dedicated", "head": "inline"})},
        ProgramError,
        ("chain 'vision'", "ranks 0, 1 of chain 'decoder'", "give it other ranks"),
    ),
    "rows of no main chain": (
        {"places": {**PLACES, "vision": Place(lf.Mesh(dp=1), (2,)), "decoder": Place(lf.Mesh(pp=2), (0, 1))}, "m": 2},
        ProgramError,
        ("chain 'vision' is nested, and lies on ranks 2", "use dedicated"),
    ),
    "inline elsewhere": ({"places": OTHER_RANKS}, ProgramError, ("chain 'head': inline would stand on row 1", "give it blocks with that row")),
    "nested stages": (
        {"places": {**PLACES, "vision": Place(lf.Mesh(pp=2))}},
        ProgramError,
        ("chain 'vision' has 2 stages, nested is for one", "use decoupled"),
    ),
    "units": (
        {"program": built({"vision": Beside("decoupled", units=3), "head": "inline"})},
        ProgramError,
        ("chain 'vision': units=3 of 2", "use 1 to 2"),
    ),
    "in flight": ({"program": built({"vision": Beside("nested", in_flight=0), "head": "inline"})}, ProgramError, ("chain 'vision'", "in_flight")),
    "recompute": (
        {"program": built({"vision": "nested", "head": "inline"}, recomputed={"vison": parse_recompute("full")})},
        ProgramError,
        ("chain 'vison'", "vision, decoder, head"),
    ),
    # programs
    "no BRIDGE_F": (
        {"program": without("BRIDGE_F", "decoder.vision.deep")},
        ProgramError,
        ("edge vision.deep brings of microbatch 0", "no BRIDGE_F before it"),
    ),
    "no BRIDGE_B": (
        {"program": without("BRIDGE_B", "decoder.vision.deep")},
        ProgramError,
        ("over edge vision.deep of microbatch 0", "no BRIDGE_B before it"),
    ),
    # models
    "width": ({"model": chain("vision", width={"visual": 14, "deep": 15})}, ShapeError, (VISUAL, "15) of 'visual'", "chain 'vision' says", "14)")),
    "an output that is not given": ({"model": merger(lambda out: {})}, ShapeError, (VISUAL, "vision.merger of chain 'vision'", "'visual'")),
    "columns of an output": (
        {"model": merger(lambda out: {"visual": torch.cat([out["visual"]] * 2, 1)})},
        ShapeError,
        (VISUAL, "30) of 'visual'", "chain 'vision'"),
    ),
    "dtype of an output": (
        {"model": merger(lambda out: {"visual": out["visual"].float()})},
        ShapeError,
        (VISUAL, "torch.float32", "chain 'vision' computes in torch.float64"),
    ),
    "a loss that nothing weighs": (
        {"model": merger(lambda out: out, losses=True)},
        ProgramError,
        ("vision.merger gives the loss odd", "cross_entropy, action"),
    ),
    "an objective without loss": (
        {"model": chain("vision", model=attrs.evolve(VISION.model, objectives={"seen": Objective(1.0, lambda batch: torch.tensor(1))}))},
        ConfigError,
        ("no segment gives a loss for objective seen",),
    ),
    "collate pads otherwise": (
        {"model": chain("vision", collate=lambda items, multiple: VISION.collate(items, multiple + 1))},  # type: ignore[misc]
        ShapeError,
        (VISUAL, "the plan of chain 'vision' says"),
    ),
    # data
    "fewer microbatches": ({"batches": data(1)}, BatchError, ("2 microbatches; 1 were given",)),
    "one batch": ({"batches": [row[0] for row in data(2)]}, BatchError, ("microbatch 0 is one batch; chain 'decoder' has dp=1",)),
    "two batches": ({"batches": [row * 2 for row in data(2)]}, BatchError, ("microbatch 0 is 2 batches; chain 'decoder' has dp=1",)),
    "no batch": ({"batches": [[None], *data(2)[1:]]}, BatchError, (f"{AT} is None", "leave out payloads")),
    "placeholders": ({"batches": planned(patches=torch.tensor([2] * 40))}, BatchError, (f"{AT}", "tokens are the placeholder")),
    "no actions": ({"batches": planned(actions=None)}, BatchError, ("chain 'decoder'", AT, "needs 'actions' in its plan")),
    "no pixels": ({"batches": paid(pixels=None)}, BatchError, ("chain 'vision', unit", "needs 'pixels' in the payload")),
    "narrow pixels": ({"batches": paid(pixels=torch.zeros(99, 4))}, BatchError, ("chain 'vision', unit", "payload 'pixels'", "it has shape")),
    "rows of fewer items": (
        {"model": chain("vision", items=told(VISION.items, lambda i: {"rows": {k: v[1:] for k, v in i.rows.items()}})), "batches": data(3)[::2]},
        BatchError,
        (VISUAL, AT, "items of 'vision'", "'visual'"),
    ),
    "fewer rows": (
        {
            "model": chain("vision", items=told(VISION.items, lambda i: {"rows": {k: (v[0] + 1, *v[1:]) for k, v in i.rows.items()}})),
            "batches": data(3)[::2],
        },
        BatchError,
        (VISUAL, AT, "each row needs one token"),
    ),
    "items of another number": ({"model": chain("head", items=no_items)}, BatchError, (HIDDEN, AT, "0 of 'head'", "give it an item for each")),
    "padding": ({"model": chain("decoder", items=told(DECODER.items, lambda i: {"padded": {}}))}, BatchError, (HIDDEN, AT, "`padded`")),
    "cost": (
        {"model": chain("vision", items=told(VISION.items, lambda i: {"cost": (-1.0,) * len(i.cost)})), "batches": data(3)[::2]},
        BatchError,
        (f"item 0 of {AT} costs -1.0", "from 0 up"),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_chain_or_the_edge(kind: str) -> None:
    asked, raised, words = REFUSED[kind]
    with pytest.raises(raised) as caught:
        stepped(**asked)
    for part in words:
        assert part in str(caught.value)

"""A model of several components: chains of segments, joined by edges.

    Chains(config, {"vision": Chain(…), "decoder": Chain(…), "head": Chain(…)}, edges, main="decoder")

A *data batch* is what the loader gives for one microbatch m and one dp coordinate d of the main chain. The main chain runs it as it is. Every other
chain runs *items* of it (images, clips, action chunks), which are dealt over that chain's ranks by their cost, whatever its mesh is: `items` says
what there is, from the plan alone, so that every rank deals alike; `collate` packs some of them into the chain's own batch.

An edge carries an output of one chain into a segment of another. What it carries for a data batch is one tensor of rows by `width`, the rows of the
items one after another; who has and who needs which rows follows from the plan, so only those travel. Gradients are summed where edges meet.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np

from lf.batch import Batch
from lf.segment import Model, Segment
from lf.spec import LayoutError, Param

NAME = re.compile("[A-Za-z][A-Za-z0-9_]*")
Item = tuple[Batch, int]
"""A data batch, and the number of an item of it."""


@attrs.frozen
class Items:
    """Of one data batch, what a chain works at. `cost`: of each item, in one unit for all, such as floating-point operations · `rows`: of each
    output of the chain, how many rows each item gives, which lie one after another · `padded`: of the main chain, whose batch is whole: how many
    rows each output has in all, with what follows the last item."""

    cost: tuple[float, ...]
    rows: dict[str, tuple[int, ...]] = attrs.field(factory=dict)
    padded: dict[str, int] = attrs.field(factory=dict)


def no_items(batch: Batch) -> Items:
    return Items(())


def padded(rows: int, multiple: int) -> int:
    """Rows of a batch that is packed: the next multiple, at least one, so that each rank has some and all have as many."""
    return max(1, -(-rows // multiple)) * multiple


@attrs.frozen
class Chain:
    """A component. `width`: of each output its columns; which segment gives it, that segment says (`Segment.outputs`).

    `items(batch)` of a data batch, from its plan · `collate(items, multiple)` → the chain's batch: the items in this order, packed, padded so that
    each output has `padded(its rows, multiple)` rows; also of no items at all. It alone reads the payload, of these items. None: the main chain.
    `reads`: of the main chain, what it reads of the payload.
    """

    model: Model
    width: dict[str, int] = attrs.field(factory=dict)
    items: Callable[[Batch], Items] = no_items
    collate: Callable[[Sequence[Item], int], Batch] | None = None
    reads: tuple[str, ...] = ()


@attrs.frozen
class Edge:
    """`output` of chain `source` becomes `x[input]` of a segment of chain `target`.

    `takes(batch)`: of the target's batch, for each of its rows (tokens) whether it takes a row of the edge, in order: a rank then gets exactly the
    rows for its own tokens; only into the main chain. None: the rows of the items are cut over the target's cp and tp ranks in equal shares, the
    last ones padded by zeros. A target that is dealt gets the rows of its own items: item j of a data batch those of the source's item j.
    """

    source: str
    output: str
    target: str
    segment: str
    input: str
    takes: Callable[[Batch], np.ndarray] | None = None

    def __str__(self) -> str:
        return f"{self.source}.{self.output} → {self.target}/{self.segment}"


@attrs.frozen
class Chains:
    """`main` is the chain that runs the data batches as they are; the others run items of them. Names of segments are unique over all chains:
    parameters are found, saved and frozen by them."""

    config: Any
    chains: dict[str, Chain]
    edges: tuple[Edge, ...]
    main: str

    def __attrs_post_init__(self) -> None:
        refuse_chains(self)

    def segment(self, chain: str, name: str) -> Segment | None:
        return next((s for s in self.chains[chain].model.segments if s.name == name), None)

    def giver(self, chain: str, output: str) -> Segment | None:
        """The segment that gives an output."""
        return next((s for s in self.chains[chain].model.segments if output in s.outputs), None)

    def params(self) -> dict[str, Param]:
        return {path: p for chain in self.chains.values() for path, p in chain.model.params().items()}


def groups(units: int, microbatches: int) -> tuple[range, ...]:
    """The microbatches of the data that each unit of a chain works at, where a step has `units` of that chain."""
    return tuple(range(u * microbatches // units, (u + 1) * microbatches // units) for u in range(units))


def refuse_chains(model: Chains) -> None:
    """Raises LayoutError for chains and edges that cannot be, with their names."""
    chains = model.chains
    for name, chain in chains.items():
        if not NAME.fullmatch(name):
            raise LayoutError(f"chain {name!r}: a name is of letters, digits and _, beginning with a letter: programs are written with it")
        if (chain.collate is None) != (name == model.main):
            what = "is the main chain, which runs the data as it is: leave out" if name == model.main else "is dealt its items, so it needs"
            raise LayoutError(f"chain {name!r} {what} `collate`")
        for segment in chain.model.segments:
            if len(owners := [n for n, c in chains.items() if any(s.name == segment.name for s in c.model.segments)]) > 1:
                raise LayoutError(f"segment {segment.name!r} is in chains {', '.join(owners)}; names are unique over all, as 'vision.norm'")
            for output in segment.outputs:
                if output not in chain.width:
                    raise LayoutError(f"chain {name!r}: segment {segment.name!r} gives {output!r}, of which the chain does not say the width")
                if sum(output in s.outputs for s in chain.model.segments) > 1:
                    raise LayoutError(f"chain {name!r}: several segments give the output {output!r}; give each a name of its own")
    owners_of: dict[str, str] = {}
    for name, chain in chains.items():
        for objective in chain.model.objectives:
            if (first := owners_of.setdefault(objective, name)) != name:
                raise LayoutError(f"chains {first!r} and {name!r} both have an objective {objective!r}; give one of them another name")
    if model.main not in chains:
        raise LayoutError(f"main={model.main!r} is no chain of the model; it has {', '.join(chains)}")
    seen: dict[tuple[str, str, str], Edge] = {}
    for edge in model.edges:
        _refuse_edge(model, edge)
        if other := seen.get((edge.target, edge.segment, edge.input)):
            raise LayoutError(f"edges {other} and {edge} both bring {edge.input!r}: give one of them another input")
        seen[edge.target, edge.segment, edge.input] = edge
    for name, chain in chains.items():
        for segment in chain.model.segments:
            if missing := [i for i in segment.inputs if (name, segment.name, i) not in seen]:
                raise LayoutError(f"chain {name!r}: segment {segment.name!r} wants {missing[0]!r}, which no edge brings")
    order(model)


def _refuse_edge(model: Chains, edge: Edge) -> None:
    for end, name in (("source", edge.source), ("target", edge.target)):
        if name not in model.chains:
            raise LayoutError(f"edge {edge}: its {end} {name!r} is no chain of the model; it has {', '.join(model.chains)}")
    if edge.source == edge.target:
        raise LayoutError(f"edge {edge} stays in chain {edge.source!r}: within a chain, x carries what later segments need")
    if model.giver(edge.source, edge.output) is None:
        there = ", ".join(o for s in model.chains[edge.source].model.segments for o in s.outputs) or "none"
        raise LayoutError(f"edge {edge}: no segment of chain {edge.source!r} gives {edge.output!r}; its outputs are {there}")
    segment = model.segment(edge.target, edge.segment)
    if segment is None:
        names = [s.name for s in model.chains[edge.target].model.segments]
        near = difflib.get_close_matches(edge.segment, names, 3, 0.4) or names[:3]
        raise LayoutError(f"edge {edge}: chain {edge.target!r} has no segment {edge.segment!r}; near: {', '.join(near)}")
    if edge.takes is not None and edge.target != model.main:
        why = f"chain {edge.target!r} is dealt its items, and only the ranks that have them know its tokens"
        raise LayoutError(f"edge {edge}: `takes` is for edges into the main chain; {why}. Leave it out: the rows come in the order of its items")
    if edge.input not in segment.inputs:
        raise LayoutError(f"edge {edge}: the segment takes no input {edge.input!r}; it takes {', '.join(segment.inputs) or 'none'}")


def order(model: Chains) -> tuple[str, ...]:
    """The chains, each after those that it takes from. Raises LayoutError where they go round in a circle."""
    left, out = dict.fromkeys(model.chains), list[str]()
    while left:
        free = next((n for n in left if not any(e.target == n and e.source in left for e in model.edges)), None)
        if free is None:
            edge = next(e for e in model.edges if e.source in left and e.target in left)
            raise LayoutError(f"chains {', '.join(left)} wait for each other: edge {edge} closes a circle; a chain takes from chains before it")
        del left[free]
        out.append(free)
    return tuple(out)

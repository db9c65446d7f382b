"""The pieces of a stage: where autograd is cut, and what an action of one layer or segment covers.

A forward of the whole stage or of a layer is cut at layer boundaries, a forward of one segment at that segment. Without a layout the names that
a program itself uses are all that is known of a stage.
"""

from __future__ import annotations

import attrs

from lf.chain_layouts import Layouts
from lf.chains import order
from lf.schedule.ir import Program, flat
from lf.segment import path_of

WHOLE = ""  # the only piece of a stage whose layers have no names here, or that has none


@attrs.frozen
class Stage:
    """`atoms`: the smallest pieces, in order · `layers`: the layer of each · `inside`: whether it has something that trains · `upstream`: whether
    anything before this stage does · `fed`: whether an edge brings it something whose gradient is wanted."""

    atoms: tuple[str, ...]
    layers: tuple[str, ...]
    inside: tuple[bool, ...]
    upstream: bool
    fed: tuple[bool, ...] = attrs.field()

    @fed.default
    def _nothing(self) -> tuple[bool, ...]:
        return (False,) * len(self.atoms)

    def span(self, segment: str | None) -> tuple[int, int] | None:
        """Atoms [start, stop) of an action with this `segment`; None when there is no such layer or segment."""
        if segment is None:
            return 0, len(self.atoms)
        if segment in self.atoms:
            at = self.atoms.index(segment)
            if self.layers[at] != segment:  # a segment; a layer of one segment may bear its name
                return at, at + 1
        if segment in self.layers:
            at = self.layers.index(segment)
            return at, at + self.layers.count(segment)
        return None

    def pieces(self, segment: str | None) -> tuple[str, ...]:
        """The names of the pieces that a forward with this `segment` leaves: its layers, or the segment itself."""
        span = self.span(segment)
        assert span is not None
        inner = segment is not None and segment not in self.layers
        return (segment,) if inner and segment else tuple(dict.fromkeys(self.layers[slice(*span)]))

    @property
    def stop(self) -> int:
        """The first atom that has a backward; len(atoms) where none has: nothing before it or in it trains."""
        if self.upstream:
            return 0
        return next((i for i, wants in enumerate(zip(self.inside, self.fed)) if any(wants)), len(self.atoms))

    @property
    def live(self) -> bool:
        """Whether what leaves the stage has a gradient that is wanted."""
        return self.stop < len(self.atoms)


def stages(program: Program, layouts: Layouts | None) -> dict[str, tuple[Stage, ...]]:
    """Of each chain, its stages: of a layout, or of the names in a program; then everything trains."""
    return _named(program) if layouts is None else _laid_out(layouts)


def live_outputs(layouts: Layouts) -> dict[tuple[str, str], bool]:
    """(chain, output) → whether its gradient is wanted: something trains where it is made, or before."""
    return _walked(layouts)[1]


def _laid_out(layouts: Layouts) -> dict[str, tuple[Stage, ...]]:
    return _walked(layouts)[0]


def _walked(layouts: Layouts) -> tuple[dict[str, tuple[Stage, ...]], dict[tuple[str, str], bool]]:
    model, known, wanted = layouts.model, dict[str, tuple[Stage, ...]](), dict[tuple[str, str], bool]()
    for chain in order(model) if model else layouts.chains:
        layout, out, live = layouts.chains[chain], [], False
        brought: dict[str, bool] = {}  # segment → whether an edge brings something that is wanted
        for edge in model.edges if model else ():
            if edge.target == chain:
                brought[edge.segment] = brought.get(edge.segment, False) or wanted[edge.source, edge.output]
        for segments in layout.stages:
            upstream, inside, fed = live, [], []
            for segment in segments:
                inside.append(any(path_of(segment, n) not in layout.frozen for n in segment.params))
                fed.append(brought.get(segment.name, False))
                live = live or inside[-1] or fed[-1]
                wanted.update(((chain, output), live) for output in segment.outputs)
            atoms = tuple(s.name for s in segments) or (WHOLE,)
            layers = tuple(s.layer for s in segments) or (WHOLE,)
            out.append(Stage(atoms, layers, tuple(inside) or (False,), upstream, tuple(fed) or (False,)))
        known[chain] = tuple(out)
    return {chain: known[chain] for chain in layouts.chains}, wanted


def _named(program: Program) -> dict[str, tuple[Stage, ...]]:
    forward: dict[tuple[str, int], list[str]] = {}
    back: dict[tuple[str, int], list[str]] = {}
    for row in program:
        for a in flat(row):
            for names, ops in ((forward, ("F",)), (back, ("B", "I", "W"))):
                seen = names.setdefault((a.chain, a.stage), [])
                if a.op in ops and a.segment is not None and a.segment not in seen:
                    seen.append(a.segment)
    out: dict[str, tuple[Stage, ...]] = {}
    for chain, s in sorted(forward):
        # a stage that is forwarded whole may still go back by its layers, the last one first
        atoms = tuple(forward[chain, s] or back[chain, s][::-1] or [WHOLE])
        out[chain] = (*out.get(chain, ()), Stage(atoms, atoms, (True,) * len(atoms), s > 0))
    return out

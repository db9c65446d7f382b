"""The pieces of a stage: where autograd is cut, and what an action of one layer or segment covers.

A forward of the whole stage or of a layer is cut at layer boundaries, a forward of one segment at that segment. Without a layout the names that
a program itself uses are all that is known of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from lf.layouts import Layout
from lf.schedule.ir import Program, flat
from lf.segment import path_of

WHOLE = ""  # the only piece of a stage whose layers have no names here, or that has none


@attrs.frozen
class Stage:
    """`atoms`: the smallest pieces, in order · `layers`: the layer of each · `inside`: whether it has something that trains · `upstream`: whether
    anything before this stage does."""

    atoms: tuple[str, ...]
    layers: tuple[str, ...]
    inside: tuple[bool, ...]
    upstream: bool

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
        return self.inside.index(True) if True in self.inside else len(self.atoms)


def stages(program: Program, layout: Layout | None) -> tuple[Stage, ...]:
    """Of a layout, or of the names in a program: then everything trains."""
    if layout is not None:
        out, upstream = [], False
        for segments in layout.stages:
            inside = tuple(any(path_of(segment, n) not in layout.frozen for n in segment.params) for segment in segments)
            atoms = tuple(segment.name for segment in segments) or (WHOLE,)
            out.append(Stage(atoms, tuple(segment.layer for segment in segments) or (WHOLE,), inside or (False,), upstream))
            upstream = upstream or any(inside)
        return tuple(out)
    forward: dict[int, list[str]] = {}
    back: dict[int, list[str]] = {}
    for row in program:
        for a in flat(row):
            for names, ops in ((forward, ("F",)), (back, ("B", "I", "W"))):
                seen = names.setdefault(a.stage, [])
                if a.op in ops and a.segment is not None and a.segment not in seen:
                    seen.append(a.segment)
    # a stage that is forwarded whole may still go back by its layers, the last one first
    return tuple(_named(forward[s] or back[s][::-1] or [WHOLE], s) for s in sorted(forward))


def _named(names: Sequence[str], stage: int) -> Stage:
    return Stage(tuple(names), tuple(names), (True,) * len(names), stage > 0)

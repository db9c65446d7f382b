"""Where a part of a parameter lies in the files of a family, for those that do not keep one tensor a part.

Experts, which are one stack (E, rows, columns) in the model, lie in files in one of these ways. Of the gate, a part (E, I, H) of gate_up, with up
the other I rows:

    a tensor each        gate_proj [I, H] of each expert     Place("…experts.{}.gate_proj.weight", stack=E)
    fused                gate_up_proj [E, 2I, H]             Place("…experts.gate_up_proj", ((0, 0, I),), 2 * I, dim=1)        up: ((0, I, I),)
    fused, transposed    gate_up_proj [E, H, 2I]             the same, and transposed=True
    row by row in turn   gate_up_proj [E, H, 2I]             the same, transposed=True, step=2                                 up: ((0, 1, I),)
                         gate_up_proj_bias [E, 2I]           Place("…experts.gate_up_proj_bias", ((0, 0, I),), 2 * I, dim=1, step=2)

`down` (E, H, I) is Place("…experts.{}.down_proj.weight", stack=E), Place("…experts.down_proj"), or the latter with transposed=True for [E, I, H].
Everything but `name` is said in dims of the part; what they become on disk is worked out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import attrs
from torch import Tensor

from lf.box import Box


@attrs.frozen
class Cut:
    """A box of a part, and the box of the tensor `name` on disk that has it (`Place.logical` turns the one into the other)."""

    name: str
    part: Box
    disk: Box


@attrs.frozen
class Place:
    """The part is tensor `name` as it is; or, with `runs`, rows of it along dim `dim`, which other parts share.

    runs: (first row in the part, first row on disk, number of rows), in the order of the part, without gaps there.
    rows: how many the tensor on disk has along `dim` · step: how far apart on disk two neighbouring rows of a run are.
    stack: dim 0 of the part is so many tensors `name.format(i)`, each without that dim; 0: it is one tensor.
    transposed: the last two dims are swapped on disk. A `name` of "" is no tensor: files do not hold the part, which starts as a fresh one.
    """

    name: str
    runs: tuple[tuple[int, int, int], ...] = ()
    rows: int = 0
    dim: int = 0
    step: int = 1
    stack: int = 0
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors on disk."""
        if not self.name:
            return ()
        return tuple(self.name.format(i) for i in range(self.stack)) if self.stack else (self.name,)

    def shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each tensor on disk for a part of shape `part`."""
        return self._turned(tuple(self.rows if self.runs and d == self.dim else n for d, n in enumerate(part)))

    def disk(self, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """Rows [lo, hi) of the part as ranges [start, stop) on disk, in order; every `step`-th row of a range is meant, first and last too."""
        for at, there, n in self.runs or ((0, 0, hi),):
            start, stop = max(lo, at), min(hi, at + n)
            if start < stop:
                yield there + (start - at) * self.step, there + (stop - 1 - at) * self.step + 1

    def cuts(self, held: Box) -> Iterator[Cut]:
        """`held`, a box of the part that is not empty, as boxes that lie in one piece on disk."""
        if not self.name:
            return
        if not held:  # a scalar
            yield Cut(self.name, (), ())
            return
        for i in range(*held[0]) if self.stack else (0,):
            of = ((i, i + 1), *held[1:]) if self.stack else held
            name = self.name.format(i) if self.stack else self.name
            if not self.runs:
                yield Cut(name, of, self._turned(of))
                continue
            at = of[self.dim][0]
            for start, stop in self.disk(*of[self.dim]):
                n = -(-(stop - start) // self.step)
                there, here = (tuple(run if d == self.dim else b for d, b in enumerate(of)) for run in ((start, stop), (at, at + n)))
                yield Cut(name, here, self._turned(there))
                at += n

    def logical(self, disk: Tensor) -> Tensor:
        """What the box `disk` of a Cut holds, in the dims of the part: a view."""
        x = disk.mT if self.transposed else disk
        x = x[None] if self.stack else x
        return x[(slice(None),) * self.dim + (slice(None, None, self.step),)] if self.step > 1 else x

    def _turned(self, dims: tuple) -> tuple:
        """What is said of each dim of the part, of each dim on disk."""
        dims = dims[1:] if self.stack else dims
        return (*dims[:-2], dims[-1], dims[-2]) if self.transposed else dims


def places(names: dict[str, str | Place]) -> dict[str, Place]:
    """What a family's `names` give, where a str is short for the Place of that name."""
    return {key: Place(value) if isinstance(value, str) else value for key, value in names.items()}


def forms(family: ModuleType, config: Any) -> dict[str, dict[str, Place]]:
    """{form: {key of a piece: its place}} of what a family has on disk; the first form is the one that is written.

    A family whose releases and tools do not agree has a function `forms(config)` with the `names` of each, as {"each": …, "fused": …}; load takes
    the one that the files have, by names and shapes, and refuses files that could be two of them (lf/checkpoint/weights.py). Without that function
    there is one form, `names(config)`, and nothing to decide.
    """
    told = family.forms(config) if hasattr(family, "forms") else {"": family.names(config)}
    return {form: places(names) for form, names in told.items()}

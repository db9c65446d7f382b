"""Where a part of a parameter lies in the files of a family, for those that do not keep one tensor a part."""

from __future__ import annotations

from collections.abc import Iterator

import attrs


@attrs.frozen
class Place:
    """The part is tensor `name` as it is; or, with `runs`, rows of it along dim `dim`, which other parts share.

    runs: (first row in the part, first row on disk, number of rows), in the order of the part, without gaps there.
    rows: how many the tensor on disk has along `dim`.
    """

    name: str
    runs: tuple[tuple[int, int, int], ...] = ()
    rows: int = 0
    dim: int = 0

    def disk(self, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """Rows [lo, hi) of the part as ranges [start, stop) on disk, in order."""
        for at, there, n in self.runs or ((0, 0, hi),):
            start, stop = max(lo, at), min(hi, at + n)
            if start < stop:
                yield there + start - at, there + stop - at

    def shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor on disk for a part of shape `part`."""
        return tuple(self.rows if self.runs and d == self.dim else n for d, n in enumerate(part))


def places(names: dict[str, str | Place]) -> dict[str, Place]:
    """What a family's `names` give, where a str is short for the Place of that name."""
    return {key: Place(value) if isinstance(value, str) else value for key, value in names.items()}

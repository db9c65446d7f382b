"""The parameters of one rank and chain whose state lies in shards, as its program makes them whole and lets go of them.

A parameter that is used is one tensor all through a step, a leaf that graphs may hold. Between RELEASE and GATHER its storage has no memory. It is
filled through another view, with a version of its own: what a forward has kept is the same when its backward comes, only gone in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.meter import BUFFER, mark
from lf.parallel.reduce import Lies, moved


class Gathered:
    """`leaves`: by path, without memory at first. lies: how each is in shards. shards: of each what this rank keeps, in the dtype that is computed
    in."""

    def __init__(self, lies: Mapping[str, Lies], shards: Mapping[str, Tensor], axes: Any):
        self.lies, self.shards, self.axes = lies, shards, axes
        self.leaves = {path: without_memory(here.shape, shards[path]) for path, here in lies.items()}
        mark(BUFFER, self.leaves)
        self.uses: Counter[str] = Counter()
        self.waits: dict[str, Callable[[], None]] = {}

    def gather(self, paths: Sequence[str]) -> None:
        """Starts to make these whole; `ready` waits. What another layer that uses it has gathered is there already."""
        new = [path for path in paths if not self.uses[path]]
        self.uses.update(paths)
        groups: dict[tuple[tuple[str, ...], int], list[str]] = {}
        for path in new:
            cut = self.lies[path].cut
            with_memory(self.leaves[path])
            groups.setdefault((cut.axes, cut.n), []).append(path)
        for (names, n), mine in groups.items():
            moves = [m for p in mine for m in moved(self.lies[p], self.leaves[p].data, self.shards[p])]
            outs, xs, sizes, dims = zip(*moves)
            wait = self.axes.part(names, n)[0].gather_many(outs, xs, sizes, dims, later=True)
            self.waits.update(dict.fromkeys(mine, wait))

    def ready(self, paths: Sequence[str]) -> None:
        """Returns when these are whole."""
        for path in paths:
            if wait := self.waits.pop(path, None):
                wait()
                self.waits = {other: w for other, w in self.waits.items() if w is not wait}

    def release(self, paths: Sequence[str]) -> None:
        """Lets go of what nobody else uses."""
        self.ready(paths)
        self.uses.subtract(paths)
        for path in paths:
            if not self.uses[path]:
                self.leaves[path].untyped_storage().resize_(0)


def without_memory(shape: Sequence[int], like: Tensor) -> Tensor:
    """A contiguous tensor of this shape, of the dtype and on the device of `like`, whose storage is empty."""
    out = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    out.untyped_storage().resize_(0)
    return out


def with_memory(x: Tensor) -> None:
    """Gives the storage of a contiguous tensor its memory, whose content is nothing yet."""
    x.untyped_storage().resize_(x.numel() * x.element_size())

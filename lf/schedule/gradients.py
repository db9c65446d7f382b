"""The sums of gradients of one rank and chain in a step.

A sum is one buffer in the master dtype, to which the backward of each microbatch adds; weight gradients of products go straight into it. It gets its
memory when a backward first adds to it. A REDUCE sums it over ranks: in place where every rank keeps all of it, else into the shard that this rank
keeps, and the buffer has no memory again until the next microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.meter import GRADIENT, mark
from lf.parallel.reduce import Lies, reduce_gradients
from lf.schedule.gathered import with_memory, without_memory
from lf.spec import Spec

FLYING = 1  # layers whose sums travel when the next one's begins: more would hold the memory of more whole gradients


class Gradients:
    """leaves: the parameters, by path; lies: of those in shards, how; dtype: the master's."""

    def __init__(self, leaves: Mapping[str, Tensor], lies: Mapping[str, Lies], axes: Any, dtype: torch.dtype, transport: str):
        self.leaves, self.lies, self.axes, self.dtype, self.transport = leaves, lies, axes, dtype, transport
        self.buffers: dict[str, Tensor] = {}
        self.live: set[str] = set()  # buffers that have memory
        self.shards: dict[str, Tensor] = {}
        self.flying: list[tuple[frozenset[str], Callable[[], None]]] = []
        self.passes = 0  # pieces of forwards since the last REDUCE

    def buffer(self, path: str) -> Tensor:
        """The buffer, perhaps without memory yet: what a product is told to add to."""
        if path not in self.buffers:
            self.buffers[path] = without_memory(self.leaves[path].shape, self.leaves[path].new_empty(0, dtype=self.dtype))
            mark(GRADIENT, self.buffers[path])
        return self.buffers[path]

    def opened(self, path: str) -> Tensor:
        """The buffer, with zeros where nothing was added to it."""
        buffer = self.buffer(path)
        if path not in self.live:
            self._with_memory(path)
            buffer.zero_()
        return buffer

    def add(self, path: str, g: Tensor | None) -> None:
        if g is None:
            self._landed(path)  # here on all ranks, whether one has a gradient or not: what is left of a sum may meet other ranks
            return
        if path in self.live:
            self.buffers[path] += g
        else:
            self.buffer(path)
            self._with_memory(path)
            self.buffers[path].copy_(g)

    def _with_memory(self, path: str) -> None:
        self._landed(path)
        with_memory(self.buffers[path])
        self.live.add(path)

    def _landed(self, path: str) -> None:
        """Returns when no sum of it is on its way."""
        while any(path in paths for paths, _ in self.flying):
            self._land()

    def reduce(self, paths: Sequence[str], specs: Sequence[Spec]) -> None:
        """Starts the sums over ranks of these, `specs` those of them that others have a part in. One that no loss has reached is zeros here: the
        others may have more."""
        for path in paths:
            self.opened(path)
        if not specs:
            return
        self.passes = 0
        cut = [spec for spec in specs if spec.cut]
        if cut:
            while len(self.flying) > FLYING:
                self._land()
        shards = {s.path: self.leaves[s.path].new_empty(self.lies[s.path].state_shape, dtype=self.dtype) for s in cut}
        mark(GRADIENT, shards)
        wait = reduce_gradients(specs, self.buffers, shards, self.axes, self.transport, self.lies)
        self.live -= shards.keys()  # who adds to one again waits first

        def land() -> None:
            wait()
            for path, shard in shards.items():
                self.buffers[path].untyped_storage().resize_(0)
                if path in self.shards:
                    self.shards[path] += shard
                else:
                    self.shards[path] = shard

        self.flying.append((frozenset(spec.path for spec in specs), land))

    def summed(self, path: str) -> bool:
        """Whether all that was added to a sum is in a shard, or on its way there."""
        return path not in self.live and (path in self.shards or any(path in paths for paths, _ in self.flying))

    def _land(self) -> None:
        self.flying.pop(0)[1]()

    def passed(self) -> None:
        """A piece of a forward is done. What has travelled beside two of them is waited for: the whole gradients that it comes from are not to be
        there when most activations are."""
        self.passes += 1
        if self.passes == 2:
            self.finish()

    def finish(self) -> None:
        """Waits for all sums."""
        while self.flying:
            self._land()

    def replace(self, path: str, total: Tensor) -> None:
        """`total` in the place of a sum that `result` would give."""
        (self.shards if path in self.shards else self.buffers)[path] = total

    def result(self) -> dict[str, Tensor]:
        """What this rank keeps of each sum."""
        return {**{path: self.buffers[path] for path in self.buffers if path in self.live}, **self.shards}

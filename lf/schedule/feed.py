"""What the units of one step work at, on one rank: their batches, and which rows go where between chains. All of it follows from the plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch

from lf.batch import Batch
from lf.bridge import Bridge, Table


class Units(Mapping[int, Batch]):
    """The batches of a chain's units, each made when it is first asked for and gone when it is dropped: what many units read is not all there at
    once. Of a chain with an objective they are all made before the first action, which counts them."""

    def __init__(self, make: Mapping[int, Callable[[], Batch]]):
        self.make, self.made = make, dict[int, Batch]()

    def __getitem__(self, unit: int) -> Batch:
        if unit not in self.made:
            self.made[unit] = self.make[unit]()
        return self.made[unit]

    def __iter__(self) -> Iterator[int]:
        return iter(self.make)

    def __len__(self) -> int:
        return len(self.make)

    def drop(self, unit: int) -> None:
        self.made.pop(unit, None)


@attrs.frozen(eq=False, slots=False)
class Feed:
    """`batches`: of each chain that this rank is on, of each unit that it has a part in, the batch, on its device · `bridges`: of each joint, by
    number · `imbalance`: of each chain that is dealt its items, that of the ranks' work, in order and as it is dealt."""

    device: torch.device
    batches: Mapping[str, Mapping[int, Batch]]
    bridges: tuple[Bridge, ...] = ()
    imbalance: Mapping[str, tuple[float, float]] = attrs.field(factory=dict)
    _tables: dict[tuple[int, int], Table] = attrs.field(factory=dict, init=False, repr=False)  # worked out when they are first asked for

    @staticmethod
    def of(batches: Sequence[Batch]) -> Feed:
        """Of a model of one chain: a unit is a microbatch."""
        return Feed(next(iter(batches[0].plan.values())).device, {"": dict(enumerate(batches))})

    def table(self, joint: int, microbatch: int) -> Table:
        at = joint, microbatch
        if at not in self._tables:
            self._tables[at] = self.bridges[joint].table(microbatch)
        return self._tables[at]

    def takes(self, joint: int, microbatch: int) -> int:
        """Rows that this rank's coordinates take of the unit of a microbatch, whichever stage takes them."""
        bridge = self.bridges[joint]
        end, coords = bridge.target, bridge.target.layouts.coords(bridge.joint.target, bridge.rank)
        assert coords is not None
        bounds = end.packed(microbatch, coords["dp"])[1]
        part = coords["cp"] * end.layouts.chains[end.chain].mesh.tp + coords["tp"]
        return bounds[part + 1] - bounds[part]

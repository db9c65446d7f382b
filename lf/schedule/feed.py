"""What the units of one step work at, on one rank: their batches, and which rows go where between chains. All of it follows from the plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch

from lf.batch import Batch


@attrs.frozen(eq=False)
class Feed:
    """`batches`: of each chain that this rank is on, of each unit that it has a part in, the batch, on its device."""

    device: torch.device
    batches: Mapping[str, Mapping[int, Batch]]

    @staticmethod
    def of(batches: Sequence[Batch]) -> Feed:
        """Of a model of one chain: a unit is a microbatch."""
        return Feed(next(iter(batches[0].plan.values())).device, {"": dict(enumerate(batches))})

"""What a part of a layer is made of, before it has a name: the fields of a `Segment`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from lf.batch import Batch
from lf.segment import Apply
from lf.spec import Param, Tied


class Block(NamedTuple):
    """One for all layers that are alike: that they share `apply` is what "each distinct segment compiles once" hangs on."""

    params: Mapping[str, Param | Tied]
    apply: Apply
    products: tuple[str, ...] = ()
    flops: Callable[[Batch], float] | None = None
    host: bool = False

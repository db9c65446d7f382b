"""What lasts through a step on one rank, by kind, from the layout alone: known to the byte before anything is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lf import tree
from lf.chain_layouts import Layouts
from lf.context import precision_of
from lf.tree import Tree

Init = Callable[[Tree, torch.device], Tree]


def state_bytes(optimizer: Any, precision: str) -> int:
    """Bytes that an optimizer keeps for each element of a parameter, the master among them."""
    one = {"a": {"w": torch.zeros(1, dtype=precision_of(precision).master)}}
    return sum(x.element_size() for branch in optimizer.init(one, torch.device("cpu")).values() for path, x in tree.items(branch) if path == "a/w")

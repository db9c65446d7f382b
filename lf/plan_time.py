"""How long what a rank does would take on a device that is only described: operations at a share of its peak, bytes at a share of its links.

    compute       operations of products / (peak · share)  +  bytes of all else / (bandwidth · share)
    collectives   what a rank sends / the rate of its axis: the node's links where a node has the whole group; else the network, which n neighbours of
                  the group in one node use together when they gather or sum (a ring passes each node once), and each by itself for what an all-to-all
                  sends to other nodes
    messages      bytes of what a stage gives / the rate to the next one

What goes on beside what is `lf.schedule.cost`'s affair: sums of gradients and gathers of parameters run beside the computation, collectives of tp, cp
and ep inside of a layer do not. Launches, latencies and ranks that wait for slower ones are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch

from lf.devices.described import Described
from lf.mesh import Mesh


@attrs.frozen
class Achieved:
    """Shares of what a device's description says: products of its peak, memory of its bandwidth, links of its links and network. They are stated, not
    known: with these, dense steps on one H100 take what they took there, and NCCL's rings reach about this (docs/plan.md); give your own where you
    have measured."""

    products: float = 0.55
    memory: float = 0.55
    links: float = 0.75


Sent = tuple[str, str]
"""The name of an axis, and what is done over it."""


@attrs.frozen
class Work:
    """What is done. flops: of products · moved: bytes that all else reads and writes · sent: bytes that this rank sends, by axis and kind."""

    flops: float = 0.0
    moved: float = 0.0
    sent: Mapping[Sent, float] = attrs.field(factory=dict)

    def __add__(self, other: Work) -> Work:
        sent = {key: self.sent.get(key, 0.0) + other.sent.get(key, 0.0) for key in (*self.sent, *other.sent)}
        return Work(self.flops + other.flops, self.moved + other.moved, sent)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.moved * times, {key: n * times for key, n in self.sent.items()})

    def __sub__(self, other: Work) -> Work:
        sent = {key: left for key, n in self.sent.items() if (left := n - other.sent.get(key, 0.0))}
        return Work(self.flops - other.flops, self.moved - other.moved, sent)


@attrs.frozen
class Rates:
    """Seconds of work on a mesh of described devices. compute: the dtype of products. Raises ConfigError for a value that is needed and not known."""

    mesh: Mesh
    device: Described
    compute: torch.dtype
    achieved: Achieved = Achieved()

    def computing(self, work: Work) -> float:
        products = work.flops / (self.device.peak(self.compute) * self.achieved.products) if work.flops else 0.0
        return products + (work.moved / (self.device.need("bandwidth") * self.achieved.memory) if work.moved else 0.0)

    def sending(self, work: Work) -> dict[str, float]:
        """By the name of the axis."""
        out: dict[str, float] = {}
        for (axis, kind), n in work.sent.items():
            out[axis] = out.get(axis, 0.0) + n * self.per_byte(axis, kind)
        return out

    def seconds(self, work: Work) -> float:
        """One after another."""
        return self.computing(work) + sum(self.sending(work).values())

    def per_byte(self, axis: str, kind: str = "") -> float:
        """Seconds for a byte that a rank sends over an axis, as it is called in `lf.axes`: dp·cp, and dp·cp/8 and dp·cp%8 for parts of it."""
        size, together = self.group(axis)
        if size == 1:
            return 0.0
        link, share = (self.device.need("link") if together > 1 else 0.0), self.achieved.links
        if together == size:
            return 1 / (link * share)
        network = self.device.need("network")
        if kind == "all_to_all":
            inside = (together - 1) / (size - 1)
            return ((inside / link if inside else 0.0) + (1 - inside) / network) / share
        together = 1 if axis == "pp" else together  # a message has one sender and one receiver
        return 1 / (min(link, together * network) * share) if together > 1 else 1 / (network * share)

    def group(self, axis: str) -> tuple[int, int]:
        """(ranks of the group, how many of them lie in one node: the last axis of a mesh is the fastest)."""
        name, mark, n = next(((name, mark, int(n)) for mark in "/%" for name, found, n in [axis.partition(mark)] if found), (axis, "", 1))
        axes = tuple(name.split("·"))
        size = math.prod(self.mesh[a] for a in axes)
        if size == 1:
            return 1, 1
        node, stride, together = int(self.device.need("node")), 1, 1
        for a in reversed(self.mesh.grid(axes)):
            if a in axes:
                together *= max(1, min(self.mesh[a], node // stride))
            stride *= self.mesh[a]
        if mark == "/":
            return n, min(n, together)
        if mark == "%":
            return size // n, max(1, together // n)
        return size, together

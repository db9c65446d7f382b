"""What edges carry, on one rank, as a program is run: from what a unit has made to what another one takes, and the gradient of that, back.

A BRIDGE_F starts the messages of one microbatch; the forward that takes them waits, and puts what has come for its unit into one tensor. Several
edges of a joint bring the same tensor, so their gradients are added before they go back; those of several joints are added where they come from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lf.bridge import Rows, assemble, start
from lf.context import wide
from lf.schedule.bind import Bound, Piece
from lf.schedule.feed import Feed
from lf.schedule.graphs import tap
from lf.schedule.ir import Action
from lf.schedule.move import SLACK
from lf.schedule.shapes import Brought, ShapeError

At = tuple[str, int, int]  # chain, stage, unit
Wait = Callable[[], list[Rows]]


class Edges:
    """`made`: what a unit has made for edges, by output, until the last BRIDGE_F that carries it · `arriving`: of each joint and unit that takes ·
    `fed`: of each unit, by joint, while its forward runs · `gradients`: of what it was fed, until the last BRIDGE_B · `returning`: those that come
    back, of each unit and output."""

    def __init__(self, bound: Bound, feed: Feed, ctx: Any):
        self.on, self.feed, self.ctx = bound.ground, feed, ctx
        self.link = ctx.axes.links() if self.on.joints else None
        self.made: dict[At, dict[str, Tensor]] = {}
        self.rows: dict[tuple[At, str], int] = {}
        self.arriving: dict[tuple[int, At], list[Wait]] = {}
        self.fed: dict[At, dict[int, Tensor]] = {}
        self.gradients: dict[At, dict[int, Tensor]] = {}
        self.returning: dict[tuple[At, str], list[Wait]] = {}
        self.carried: dict[tuple[str, At], int] = {}  # how many of its bridges have run
        self.sends: deque[Wait] = deque()

    def brought(self, chain: str) -> Callable[[int, int], Mapping[int, Tensor]]:
        """brought(stage, unit): what edges bring to a unit, by joint; waits for what has not come yet."""

        def brought(stage: int, unit: int) -> Mapping[int, Tensor]:
            at = chain, stage, unit
            if at not in self.fed:
                m, dtype = self.on.group(chain, unit)[0], self.ctx.of(chain).precision.compute
                self.fed[at] = {
                    k: self.together(self.arriving.pop((k, at)), self.feed.table(k, m).target, k, dtype) for k in self.on.into(chain, stage)
                }  # fmt: skip
            return self.fed[at]

        return brought

    def widths(self, chain: str) -> Callable[[int], Mapping[str, Brought]]:
        """widths(unit): the shape and dtype of what edges bring, by segment and input, to all stages of the chain."""

        def widths(unit: int) -> Mapping[str, Brought]:
            m, out = self.on.group(chain, unit)[0], dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]()
            for k, joint in enumerate(self.on.joints):
                for edge in joint.edges if joint.target == chain else ():
                    shape = self.feed.takes(k, m), self.width(k)
                    out.setdefault(edge.segment, {})[edge.input] = shape, self.ctx.of(chain).precision.compute
            return out

        return widths

    def width(self, k: int) -> int:
        layouts, edge = self.on.layouts, self.on.joints[k].edges[0]
        assert layouts is not None
        assert layouts.model is not None
        return layouts.model.chains[edge.source].width[edge.output]

    def output(self, k: int) -> str:
        return self.on.joints[k].edges[0].output

    def giving(self, at: At, output: str) -> int:
        """A joint that carries an output of a stage."""
        return next(k for k in self.on.out(at[0], at[1]) if self.output(k) == output)

    def together(self, waits: list[Wait], rows: int | None, k: int, dtype: torch.dtype) -> Tensor:
        """All that has come for a unit, from every microbatch and joint."""
        assert rows is not None
        return assemble(rows, (self.width(k), dtype, self.feed.device), [part for wait in waits for part in wait()])

    def take(self, at: At, piece: Piece, carry: dict[str, Tensor]) -> dict[str, Tensor]:
        """Puts aside what a piece has made for edges; returns the carry."""
        for name in piece.outputs:
            if tap(name) not in carry:
                edge = self.on.joints[self.giving(at, name)].edges[0]
                raise ShapeError(f"edge {edge}: {piece.name} of chain {at[0]!r} says that it gives {name!r}, and its terms have no such output")
            self.made.setdefault(at, {})[name] = carry.pop(tap(name))
        return carry

    def done(self, at: At) -> None:
        """The forward of a unit's stage has ended; what is needed again its pieces have."""
        self.fed.pop(at, None)

    def forward(self, a: Action) -> None:
        """BRIDGE_F"""
        k, m, source, target = self.ends(a)
        table, joint, x = self.feed.table(k, m), self.on.joints[k], None
        if table.source is not None:
            x = self.made[source][self.output(k)]
            if x.shape != (table.source, self.width(k)):
                edge = joint.edges[0]
                raise ShapeError(
                    f"edge {edge}: segment gives {tuple(x.shape)} of {edge.output!r} on this rank; the plan of chain {edge.source!r} says "
                    f"{(table.source, self.width(k))}: rows in equal shares over its cp and tp ranks, by its width"
                )
            if x.dtype != (dtype := self.ctx.of(joint.source).precision.compute):
                raise ShapeError(f"edge {joint.edges[0]}: segment gives {x.dtype}; chain {joint.source!r} computes in {dtype}, which edges carry")
            self.rows[source, self.output(k)] = table.source
        wait = start(table, x, self.link, (self.width(k), self.ctx.of(joint.source).precision.compute, self.feed.device))
        if table.target is not None:
            self.arriving.setdefault((k, target), []).append(wait)
        else:
            self.sent(wait)
        if x is not None and self.last("F", source, [self.on.out(source[0], source[1])]):
            del self.made[source]

    def backward(self, a: Action) -> None:
        """BRIDGE_B"""
        k, m, source, target = self.ends(a)
        table, joint = self.feed.table(k, m).back, self.on.joints[k]
        dx = None if table.source is None else self.gradients[target][k]
        wait = start(table, dx, self.link, (self.width(k), self.ctx.of(joint.target).precision.compute, self.feed.device))
        if table.target is not None:
            self.returning.setdefault((source, self.output(k)), []).append(wait)
        else:
            self.sent(wait)
        live = [j for j in self.on.into(target[0], target[1]) if self.on.live[j]]
        if dx is not None and self.last("B", target, [live]):
            del self.gradients[target]

    def ends(self, a: Action) -> tuple[int, int, At, At]:
        k, m = self.on.bridge(a), a.microbatch
        assert k is not None
        assert m is not None
        source, target = self.on.ends(k, m)
        return k, m, source, target  # type: ignore[return-value]

    def last(self, kind: str, at: At, joints: list[Any]) -> bool:
        """Whether all bridges of what a unit gives have run."""
        n = self.carried[kind, at] = self.carried.get((kind, at), 0) + 1
        if n < sum(map(len, joints)) * len(self.on.group(at[0], at[2])):
            return False
        del self.carried[kind, at]
        return True

    def sent(self, wait: Wait) -> None:
        """What was sent lives until it has left: when SLACK more have been sent, nobody waits for it."""
        self.sends.append(wait)
        if len(self.sends) > SLACK:
            self.sends.popleft()()

    def returned(self, at: At, piece: Piece) -> dict[str, Tensor]:
        """The gradients of what a piece has made for edges."""
        out = {}
        for name in piece.outputs:
            if (waits := self.returning.pop((at, name), None)) is not None:
                k = self.giving(at, name)
                out[tap(name)] = self.together(waits, self.rows.pop((at, name)), k, wide(self.ctx.of(at[0]).precision.compute))
        return out

    def give_back(self, at: At, piece: Piece, dy: dict[str, Tensor]) -> dict[str, Tensor]:
        """Puts aside the gradients of what edges have brought to a piece; returns the others."""
        mine = self.gradients.setdefault(at, {})
        for f in piece.fed:
            if (g := dy.pop(f.name, None)) is not None:
                mine[f.joint] = mine[f.joint] + g if f.joint in mine else g
        return dy

    def gone_back(self, at: At) -> None:
        """The backward of a unit's stage has ended."""
        if at in self.gradients and not self.gradients[at]:  # nothing that was brought wants a gradient
            del self.gradients[at]

    def settle(self, a: Action) -> None:
        """Waits for what an F takes, so that what is measured is the action."""
        assert a.microbatch is not None
        at = a.chain, a.stage, a.microbatch
        if a.op == "F" and any((k, at) in self.arriving for k in self.on.into(a.chain, a.stage)):
            self.brought(a.chain)(a.stage, a.microbatch)

    def finish(self) -> None:
        while self.sends:
            self.sends.popleft()()

    def left(self) -> list[Any]:
        return [*self.made, *self.arriving, *self.fed, *self.gradients, *self.returning]

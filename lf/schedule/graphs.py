"""One piece at a time: a forward from a cut of autograd to the next one, and the backward of that.

What a forward leaves is a `Kept`: its input and the ends of its graph. Gradients of weights go into sums, which get their memory when they are first
added to (gradients.py). Parameters that lie in shards are whole between a GATHER and its RELEASE (gathered.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from lf.batch import Batch
from lf.parallel.product import W, probe_of
from lf.schedule.bind import BoundChain, Piece
from lf.schedule.compiled import Fed, LayerFn
from lf.schedule.gathered import Gathered
from lf.schedule.gradients import Gradients
from lf.schedule.shapes import Brought, Shapes
from lf.schedule.slots import Slots, entry
from lf.schedule.vjp import ends, vjp
from lf.segment import Terms

Values = tuple[dict[str, Tensor | W], ...]  # of each segment, its parameters by name


@attrs.define
class Kept:
    """What the forward of a piece leaves for its backward. `x`: where it is to be made again, its input, or the slots of that · `inputs`: what the
    gradients of its input are those of, with what edges have brought · `ends`: where the gradients of its outputs and then of its losses come in;
    none where it has not run or leads to nothing that trains · `slots`: where a later action moves or makes again what the graph keeps."""

    piece: Piece
    x: dict[str, Any] = attrs.field(factory=dict)
    inputs: dict[str, Tensor] = attrs.field(factory=dict)
    ends: tuple[GradientEdge, ...] = ()
    slots: Slots | None = None
    outputs: Sequence[str] = ()
    losses: Sequence[str] = ()
    probes: tuple[tuple[Tensor, Tensor], ...] = ()


class Graphs:
    """The graphs of one rank and chain in one step, the parameters that they begin at (`leaves`, by path; those in shards are of `whole`) and the
    sums of their gradients (`grads`). `batches`: of the units that this rank has a part in. `brought(stage, unit)`: what edges bring, joint number →
    Tensor; `widths(unit)`: the shapes of that throughout the chain, by segment.

    The input of a piece is the carry, and under names of their own what edges bring to its segments; its output the carry and what edges take.
    """

    def __init__(
        self, bound: BoundChain, params: dict[str, Any], batches: Mapping[int, Batch], seeds: Mapping[str, Tensor], device: torch.device,
        brought: Callable[[int, int], Mapping[int, Tensor]], widths: Callable[[int], Mapping[str, Brought]],
    ):  # fmt: skip
        self.bound, self.batches, self.seeds, self.ctx, self.device = bound, batches, seeds, bound.ctx, device
        self.brought, self.widths = brought, widths
        self.whole = Gathered(bound.lies, {path: lookup(params, path) for path in bound.lies}, bound.ctx.axes)
        self.leaves = {
            path: (self.whole.leaves[path] if path in bound.lies else lookup(params, path).detach()).requires_grad_(bound.trains and trained)
            for path, trained in bound.trained.items()
        }
        self.grads = Gradients(self.leaves, bound.lies, bound.ctx.axes, self.ctx.precision.master, bound.layout.sharding.transport)
        self.given: dict[tuple[int, str], Values] = {}
        self.known: dict[int, Shapes] = {}

    def run(self, fn: LayerFn, values: Values, piece: Piece, x: dict[str, Tensor], m: int, ctx: Any) -> tuple[dict[str, Tensor], Terms]:
        """(what leaves the piece, its losses, and its sums by segment/name)"""
        fed: Fed = ()
        self.whole.ready(piece.gathered)
        if piece.fed:
            names = {f.name for f in piece.fed}
            fed = tuple({f.input: x[f.name] for f in piece.fed if f.segment == i} for i in range(len(piece.names)))
            x = {k: v for k, v in x.items() if k not in names}
        y, losses, outputs, sums = fn(values, _unwrap(x), self.batches[m], ctx, fed)
        terms = {"losses": losses, "sums": {f"{piece.names[i][0]}/{name}": value for (i, name), value in sums.items()}}
        if not piece.outputs:
            return _wrap(y), terms
        return {**_wrap(y), **{tap(name): outputs[name] for name in piece.outputs if name in outputs}}, terms

    def fed(self, piece: Piece, carry: dict[str, Tensor], m: int) -> dict[str, Tensor]:
        """The input of a piece."""
        brought = self.brought(piece.stage, m)
        return {**carry, **{f.name: brought[f.joint] for f in piece.fed}}

    def make(self, piece: Piece, carry: dict[str, Tensor], m: int, again: Sequence[str] = ()) -> tuple[Kept, dict[str, Tensor], Terms]:
        """Runs a piece from a cut: its input is a leaf of a graph of its own. `again`: ops that a REMAT will run again."""
        away, ctx, kept = (piece.stage, m, piece.name) in self.bound.away, self.ctx, Kept(piece)
        split = (piece.stage, m, piece.name) in self.bound.split
        values, kept.probes = self.probed(piece, m) if split else (self.summed(piece), ())
        fn, x = piece.fn["probe" if split else "acc"], {k: v.detach() for k, v in carry.items()}
        live = dict.fromkeys(x, piece.upstream) | {f.name: f.live for f in piece.fed}
        wanted = [k for k, v in x.items() if live[k] and v.is_floating_point()]
        if again or away:
            slots = kept.slots = Slots(self.storages(m), again)
            ctx = attrs.evolve(ctx, ops=slots.table(ctx.ops)) if again else ctx
            for k in wanted:
                kept.inputs[k], x[k] = entry(x[k])
            with slots.filing():
                y, terms = self.run(fn, values, piece, x, m, ctx)
        else:
            kept.inputs = {k: x[k].requires_grad_() for k in wanted}
            y, terms = self.run(fn, values, piece, x, m, ctx)
        outputs = [(k, v) for k, v in y.items() if v.requires_grad]
        weighed = [(k, v) for k, v in terms["losses"].items() if v.requires_grad]
        kept.outputs, kept.losses = [k for k, _ in outputs], [k for k, _ in weighed]
        kept.ends = ends([v for _, v in (*outputs, *weighed)])
        return kept, {k: v.detach() for k, v in y.items()}, {kind: {k: v.detach() for k, v in mine.items()} for kind, mine in terms.items()}

    def pass_by(self, piece: Piece, carry: dict[str, Tensor], m: int, keeps: bool) -> tuple[Kept, dict[str, Tensor], Terms]:
        """Runs a piece without a graph. `keeps`: its input stays, for it to be made again."""
        kept = Kept(piece, dict(carry) if keeps else {})
        if keeps and (piece.stage, m, piece.name) in self.bound.away:
            kept.slots = Slots(self.storages(m))
            kept.x = {k: kept.slots.file(v) for k, v in carry.items()}
        with torch.no_grad():
            values: Values = tuple({n: self.leaves[path] for n, path, _ in params} for _, params in piece.names)
            y, terms = self.run(piece.fn["plain"], values, piece, carry, m, self.ctx)
        return kept, y, terms

    def storages(self, m: int) -> frozenset[int]:
        """What never leaves the device: the parameters, and what many layers use of a batch."""
        tensors = [*self.leaves.values(), *tree_leaves([self.batches[m].plan, self.batches[m].payload, self.batches[m].derived])]
        return frozenset(t.untyped_storage()._cdata for t in tensors)

    def summed(self, piece: Piece) -> Values:
        """What each segment gets where B follows: a weight of a product comes with the sum that its gradient is added to."""
        at = piece.stage, piece.name
        if at not in self.given or self.bound.compiled:
            # .data: a version counter of its own, which a compiler looks at: other microbatches add to the sum in between
            self.given[at] = self.values_of(piece, lambda segment, n, path: W(self.leaves[path], self.grads.buffer(path).data))
        return self.given[at]

    def probed(self, piece: Piece, m: int) -> tuple[Values, tuple[tuple[Tensor, Tensor], ...]]:
        """What each segment gets where I and W follow: the weight of a product comes with probes; and these."""
        seen = self.shapes(m).products if piece.products else {}
        probes = {(s, n): probe_of(seen[s][n], self.device) for s, n, _ in piece.products}
        return self.values_of(piece, lambda segment, n, path: W(self.leaves[path], probe=probes[segment, n])), tuple(probes.values())

    def values_of(self, piece: Piece, product: Callable[[str, str, str], W]) -> Values:
        return tuple(
            {n: product(segment, n, path) if w and self.leaves[path].requires_grad else self.leaves[path] for n, path, w in params}
            for segment, params in piece.names
        )

    def shapes(self, m: int) -> Shapes:
        """Of what travels and of what products see, for this microbatch."""
        if m not in self.known:
            self.known[m] = self.bound.shapes(self.batches[m], self.widths(m))
        return self.known[m]

    def back(self, kept: Kept, dy: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[str, Tensor, Tensor]]]:
        """Adds a piece's weight gradients; returns the gradient of its input and what its W multiplies."""
        piece, inputs = kept.piece, kept.inputs
        self.whole.ready(piece.gathered)
        if not kept.probes:
            for _, _, path in piece.products:
                self.grads.opened(path)
        plain = [self.leaves[p] for p in piece.leaves]
        # a weight with a sum of its own stands here for its product to stay in the backward; its gradient is None. One that is used plainly, too
        # (a tied table under a head that predicts further ahead), stands in `plain` already, and what it gets there counts once.
        summed = [path for _, _, path in piece.products if path not in piece.leaves]
        rest = [t for pair in kept.probes for t in pair] or [self.leaves[path] for path in summed]
        wanted = [*inputs.values(), *plain, *rest]
        got = vjp(kept.ends, [*map(dy.get, kept.outputs), *(self.seeds[k] for k in kept.losses)], wanted)
        for path, g in zip(piece.leaves, got[len(inputs) :]):
            self.grads.add(path, g)
        factors: list[tuple[str, Tensor, Tensor]] = []
        if kept.probes:
            pairs = iter(got[len(inputs) + len(plain) :])
            for _, _, path in piece.products:
                rows, dz = next(pairs), next(pairs)
                if rows is not None and dz is not None:
                    factors.append((path, rows, dz))
        else:
            for path, g in zip(summed, got[len(inputs) + len(plain) :]):
                self.grads.add(path, g)
        return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(inputs.items(), got)}, factors


# A carry is a tensor or a dict of tensors; between pieces it is always a dict.
_ONLY = "x"


def _wrap(x: Any) -> dict[str, Tensor]:
    return x if isinstance(x, dict) else {_ONLY: x}


def _unwrap(x: dict[str, Tensor]) -> Any:
    return x[_ONLY] if len(x) == 1 and _ONLY in x else x


def tap(name: str) -> str:
    """What a piece's output for edges is called beside the carry, which has no such names."""
    return f">{name}"


def lookup(params: dict[str, Any], path: str) -> Tensor:
    segment, _, name = path.partition("/")
    return params[segment][name]

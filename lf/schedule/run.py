"""The interpreter: it runs any program over any layout, one rank's actions in their order. There is no other training step.

Its state is what forwards have kept and what awaits its W, values on their way, what was sent, all of it written once, taken once and gone at the
end; and the gradient sums. Autograd is cut between pieces, which are
layers, or segments where a program goes into layers: a forward keeps, for each, its input and the ends of its graph; a backward walks the pieces
from the last to the first. Parameters, activations and messages are touched by the program's actions and by nothing else. Where memory runs out,
the error says in which action and layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.batch import Batch
from lf.parallel.product import weight_gradient
from lf.schedule.bind import Bound, BoundChain, summed
from lf.schedule.edges import Edges
from lf.schedule.feed import Feed, Units
from lf.schedule.graphs import Graphs, Kept, lookup
from lf.schedule.ir import Action, ProgramError, flat
from lf.schedule.memory import memory_is_full, out_of_memory
from lf.schedule.slots import got
from lf.segment import Segment, Terms, path_of

Carry = dict[str, Any]  # name → Tensor, or a function that waits for one
At = tuple[str, int, int]  # chain, stage, unit


def run(
    bound: Bound, params: dict[str, Any], feed: Feed | Sequence[Batch], seeds: Mapping[str, Tensor], ctx: Any, clock: Any = None
) -> tuple[dict[str, Tensor], Terms, Tensor]:
    """(gradients of Σ_k seeds[k] · Σ losses_k by path, reduced over the ranks that hold them; terms summed over microbatches; finite).

    params: {segment: {name: Tensor}}, the compute copy. feed: what this rank's units work at; of a model of one chain, its microbatches, as
    `shard_batch` leaves them. seeds: objective → λ_k / N_k, a scalar. Gradients come in the master dtype, terms as this rank's own sums (P over all
    ranks). finite, (microbatches,) bool: whether the losses of each microbatch on this rank, and the gradient at the first layer of its stages, were
    finite. `clock`: takes down when each action begins and ends. Without any backward in the program nothing is kept and there are no gradients.
    """
    feed = feed if isinstance(feed, Feed) else Feed.of(feed)
    with torch.set_grad_enabled(bound.trains):
        return _interpret(_Rank(bound, params, feed, seeds, ctx), clock)


def _interpret(rank: _Rank, clock: Any) -> tuple[dict[str, Tensor], Terms, Tensor]:
    bound, do, position = rank.bound, rank.handlers(), rank.ctx.axes.position
    position.start(bound.number)
    for i, a in enumerate(bound.actions):
        position.at(i)
        try:
            if clock is None:
                do[a.op](a)
            else:
                rank.settle(a)
                start = clock.moment()
                do[a.op](a)
                clock(i, start, clock.moment())
            if i in bound.last:
                rank.drop(*bound.last[i])
        except RuntimeError as error:
            if memory_is_full(error):
                what, name, share = rank.doing
                raise out_of_memory(error, f"{what} {name}, action {a}", share, rank.gradients()) from error
            raise
    position.done()
    return rank.results()


class _Rank:
    """One rank's run of one program."""

    def __init__(self, bound: Bound, params: dict[str, Any], feed: Feed, seeds: Mapping[str, Tensor], ctx: Any):
        self.device, self.bound, self.seeds, self.ctx, self.feed = feed.device, bound, seeds, ctx, feed
        self.edges = Edges(bound, feed, ctx)
        self.graphs = {
            c: Graphs(of, params, feed.batches[c], seeds, feed.device, self.edges.brought(c), self.edges.widths(c)) for c, of in bound.chains.items()
        }  # fmt: skip
        self.pipes = {c: of.ctx.axes.pipe() for c, of in bound.chains.items()}
        self.terms: Terms = {}
        self.kept: dict[At, list[Kept]] = {}
        self.owed: dict[At, list[tuple[str, list[tuple[str, Tensor, Tensor]]]]] = {}  # piece, (path, rows, dy) of its products
        self.values: dict[tuple[str, At], Carry] = {}
        self.sent: dict[tuple[str, At], list[Callable[[], None]]] = {}
        self.doing = ("the start of", "the program", 0.0)  # what with which piece, and the share of the stage's layers whose forward has begun
        self.streams = ctx.device.copy_streams() if any(of.away for of in bound.chains.values()) else None
        self.seen: dict[tuple[str, int], list[Tensor]] = {}  # of each unit, numbers that are finite if it is

    def handlers(self) -> dict[str, Callable[[Action], None]]:
        compute = {"F": self.forward, "B": self.backward, "I": self.backward, "W": self.weights, "REMAT": self.remat}
        do: dict[str, Callable[[Action], None]] = {op: _to_the_end(fn) for op, fn in compute.items()}

        def overlap(a: Action) -> None:
            """Layer by layer in turn, so that what one waits for travels while the other computes."""
            turns = deque(compute[part.op](part) for part in a.pair)
            while turns:
                turn = turns.popleft()
                if next(turn, turn) is not turn:
                    turns.append(turn)

        do |= {"SEND_F": self.send, "SEND_B": self.send, "RECV_F": self.recv, "RECV_B": self.recv, "FREE": self.free, "REDUCE": self.reduce}
        do |= {"GATHER": self.gather, "RELEASE": self.release}
        do |= {"BRIDGE_F": self.edges.forward, "BRIDGE_B": self.edges.backward}
        return do | {"OVERLAP": overlap, "OFFLOAD": self.copy, "FETCH": self.copy}

    def drop(self, chain: str, unit: int) -> None:
        """What a unit works at is not needed any more."""
        batches = self.feed.batches[chain]
        if isinstance(batches, Units):
            batches.drop(unit)

    def gradients(self) -> dict[str, Tensor]:
        return {path: g for graphs in self.graphs.values() for path, g in graphs.grads.result().items()}

    def results(self) -> tuple[dict[str, Tensor], Terms, Tensor]:
        self.finish_sums()
        self.edges.finish()
        if left := [*self.kept, *self.owed, *self.values, *self.sent, *self.edges.left()]:
            raise AssertionError(f"the program left values alive: {left}")  # `check` proves that this cannot be
        return self.gradients(), self.terms, self.finite()

    def finite(self) -> Tensor:
        """Whether all that was seen of each microbatch is."""
        on = self.bound.ground
        rows: list[list[Tensor]] = [[] for _ in range(on.count)]
        for (chain, unit), numbers in self.seen.items():
            for m in on.group(chain, unit):
                rows[m] += numbers
        width, zero = max(1, *map(len, rows)), torch.zeros((), dtype=self.ctx.precision.master, device=self.device)
        numbers = [x.to(self.ctx.precision.master) for row in rows for x in (*row, *[zero] * (width - len(row)))]
        return torch.isfinite(torch.stack(numbers).view(-1, width)).all(1)

    def note(self, at: At, numbers: Sequence[Tensor]) -> None:
        self.seen.setdefault((at[0], at[2]), []).extend(numbers)

    def forward(self, a: Action) -> Iterator[None]:
        at, chain, graphs = _at(a), self.bound.chains[a.chain], self.graphs[a.chain]
        c, s, m = at
        pieces = chain.pieces[s, a.segment]
        carry = _here(self.values.pop(("F", at), {}))
        for i, piece in enumerate(pieces):
            self.doing = "the forward of", piece.name, (i + 1) / len(pieces)
            keeps = self.bound.trains and piece.back
            again = chain.again.get((s, m, piece.name)) if keeps else None
            x = graphs.fed(piece, carry, m) if piece.fed else carry
            if keeps and again != ():
                kept, carry, terms = graphs.make(piece, x, m, again or ())
            else:
                kept, carry, terms = graphs.pass_by(piece, x, m, keeps)
            losses = terms["losses"]
            if piece.outputs:
                carry = self.edges.take(at, piece, carry)
            if losses and self.bound.trains and (unknown := losses.keys() - self.seeds.keys()):
                names = f"{', '.join(sorted(unknown))}, which no objective weighs; there are {', '.join(self.seeds) or 'none'}"
                raise ProgramError(f"{piece.name} gives the loss {names}")
            if keeps:
                self.kept.setdefault(at, []).append(kept)
            _add_terms(self.terms, terms)
            if losses:
                self.note(at, [*losses.values()])
            graphs.grads.passed()
            yield
        where, to = chain.placement, s + 1
        if (s, a.segment) not in chain.final:
            self.values["F", at] = carry  # the next piece of this stage takes it
            return
        self.edges.done(at)
        if to < len(where):
            self.values[("F", (c, to, m)) if where[to] == chain.rank else ("out F", at)] = carry

    def settle(self, a: Action) -> None:
        """Waits for what the action takes, so that what is measured is the action."""
        for part in flat((a,)):
            if part.op in ("F", "B", "I"):
                where = ("F" if part.op == "F" else "B", _at(part))
                if where in self.values:
                    self.values[where] = _here(self.values[where])
                self.edges.settle(part)

    def backward(self, a: Action) -> Iterator[None]:
        """B, and I, which leaves the factors of the products' weight gradients to W."""
        at, chain, graphs = _at(a), self.bound.chains[a.chain], self.graphs[a.chain]
        c, s, m = at
        covered, pieces = chain.spans[s, a.segment], self.kept.get(at, [])
        dy = _here(self.values.pop(("B", at), {}))
        while pieces and pieces[-1].piece.name in covered:  # a piece's activations go as soon as its backward is done
            kept = pieces.pop()
            self.doing = "the backward of", kept.piece.name, 1.0
            dy, factors = graphs.back(kept, dy | self.edges.returned(at, kept.piece) if kept.piece.outputs else dy)
            if factors:
                self.owed.setdefault(at, []).append((kept.piece.name, factors))
            if not (pieces and pieces[-1].piece.upstream):  # as far back as a gradient comes
                self.note(at, [x for g in dy.values() if g.numel() for x in torch.aminmax(g)])  # one kernel; NaN is both
            if kept.piece.fed:
                dy = self.edges.give_back(at, kept.piece, dy)
            yield
        if pieces:
            self.values["B", at] = dy  # the piece before takes it
            return
        self.kept.pop(at, None)
        self.edges.gone_back(at)
        where, to = chain.placement, s - 1
        if chain.known[s].upstream:
            self.values[("B", (c, to, m)) if where[to] == chain.rank else ("out B", at)] = dy

    def weights(self, a: Action) -> Iterator[None]:
        at, covered, graphs = _at(a), self.bound.chains[a.chain].spans[a.stage, a.segment], self.graphs[a.chain]
        left = []
        for name, factors in self.owed.pop(at, []):
            if name not in covered:
                left.append((name, factors))
                continue
            self.doing = "the weight gradients of", name, 1.0
            for path, rows, dy in factors:
                weight_gradient(graphs.grads.opened(path), rows, dy)
            yield
        if left:
            self.owed[at] = left

    def remat(self, a: Action) -> Iterator[None]:
        """The forward of what was not kept, once more; its losses have been counted, and its outputs have gone."""
        at, covered = _at(a), self.bound.chains[a.chain].spans[a.stage, a.segment]
        pieces = self.kept[at]
        for i, kept in enumerate(pieces):
            if kept.piece.name in covered:
                self.doing = "the second forward of", kept.piece.name, 1.0
                if a.ops and kept.slots is not None:
                    self.graphs[a.chain].whole.ready(kept.piece.gathered)
                    kept.slots.remat()
                else:
                    pieces[i], _, _ = self.graphs[a.chain].make(kept.piece, {k: got(v) for k, v in kept.x.items()}, at[2])
                yield

    def copy(self, a: Action) -> None:
        """OFFLOAD and FETCH: they start copies; who needs one waits."""
        covered = self.bound.chains[a.chain].spans[a.stage, a.segment]
        for kept in self.kept[_at(a)]:
            self.doing = "the copy of", kept.piece.name, 1.0
            if kept.piece.name in covered and kept.slots is not None:
                (kept.slots.offload if a.op == "OFFLOAD" else kept.slots.fetch)(self.ctx.device, self.streams)

    def send(self, a: Action) -> None:
        kind, (c, s, m) = a.op[-1], _at(a)
        self.doing = "the message of", f"stage {s}", 1.0
        to, pipe = self.bound.chains[c].placement[s + 1 if kind == "F" else s - 1], self.pipes[c]
        carry = self.values.pop((f"out {kind}", (c, s, m)))
        self.sent[a.op, (c, s, m)] = [pipe.send(carry[k], to, f"{s}{kind}{m} {k}") for k in sorted(carry)]

    def recv(self, a: Action) -> None:
        """Shapes do not travel: they follow from the config and the batch."""
        kind, (c, s, m) = a.op[-1], _at(a)
        at, source = (s, s - 1) if kind == "F" else (s + 1, s + 1)
        self.doing = "the message to", f"stage {s}", 1.0
        like = self.graphs[c].shapes(m).inputs[at]
        if kind == "B":
            like = {k: (shape, dtype) for k, (shape, dtype) in like.items() if dtype.is_floating_point}
        place, device, pipe = self.bound.chains[c].placement[source], self.device, self.pipes[c]
        self.values[kind, (c, s, m)] = {k: pipe.recv(*like[k], device, place, f"{source}{kind}{m} {k}") for k in sorted(like)}

    def free(self, a: Action) -> None:
        assert a.segment is not None
        for wait in self.sent.pop((a.segment, _at(a))):
            wait()

    def gather(self, a: Action) -> None:
        assert a.segment is not None
        self.doing = "the parameters of", a.segment, 1.0
        self.graphs[a.chain].whole.gather(self.bound.chains[a.chain].gathered[a.stage, a.segment])

    def release(self, a: Action) -> None:
        assert a.segment is not None
        self.graphs[a.chain].whole.release(self.bound.chains[a.chain].gathered[a.stage, a.segment])

    def reduce(self, a: Action) -> None:
        assert a.segment is not None
        chain, grads = self.bound.chains[a.chain], self.graphs[a.chain].grads
        if a.segment in chain.tied:
            self.finish_sums()
            grads.replace(a.segment, self.sum_over(chain, a.segment, grads.result()[a.segment], self.pipes[a.chain]))
            return
        self.doing = "the sum of gradients of", a.segment, 1.0
        paths = chain.reduced[a.stage, a.segment]
        if a.microbatch is not None:
            paths = tuple(p for p in paths if chain.layout.specs[p].cut)
        else:  # what is left: of those in shards, what no REDUCE of a microbatch has summed
            paths = tuple(p for p in paths if not chain.layout.specs[p].cut or not grads.summed(p))
        grads.reduce(paths, [s for p in paths if summed(s := chain.layout.specs[p])])

    def sum_over(self, chain: BoundChain, path: str, mine: Tensor, pipe: Any) -> Tensor:
        """The sum of a gradient over the pipeline ranks that hold it, by messages to the first of them and back: a group of processes for each such
        set would have to be made by all ranks in one order."""
        holders = chain.tied[path]
        first, like = holders[0], (mine.shape, mine.dtype, self.device)
        if chain.rank != first:
            sent = pipe.send(mine, first, f"{path} part")
            total = pipe.recv(*like, first, f"{path} sum")()
            sent()
            return total
        for h in holders[1:]:
            mine += pipe.recv(*like, h, f"{path} part")()
        for sent in [pipe.send(mine, h, f"{path} sum") for h in holders[1:]]:
            sent()
        return mine

    def finish_sums(self) -> None:
        for graphs in self.graphs.values():
            graphs.grads.finish()


def run_forward(segments: Sequence[Segment], params: dict[str, Any], batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    """The segments one after another, without gradients: (the last x, terms)."""
    x: Any = {}
    terms: Terms = {}
    with torch.no_grad():
        for segment in segments:
            x, new = segment.apply({n: lookup(params, path_of(segment, n)) for n in segment.params}, x, batch, ctx)
            _add_terms(terms, {kind: values for kind, values in new.items() if kind != "sums"})  # those count for a step
    return x, terms


def _to_the_end(turns: Callable[[Action], Iterator[None]]) -> Callable[[Action], None]:
    def do(a: Action) -> None:
        for _ in turns(a):
            pass

    return do


def _here(carry: Carry) -> dict[str, Tensor]:
    """The tensors, once they have arrived."""
    return {k: v() if callable(v) else v for k, v in carry.items()}


def _add_terms(total: Terms, new: Terms) -> None:
    for kind, values in new.items():
        for name, value in values.items():
            sums = total.setdefault(kind, {})
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def _at(a: Action) -> At:
    assert a.microbatch is not None
    return a.chain, a.stage, a.microbatch

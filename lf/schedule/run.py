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
from lf.parallel.reduce import reduce_gradients
from lf.schedule.bind import Bound
from lf.schedule.graphs import Graphs, Kept, lookup
from lf.schedule.ir import Action, ProgramError, flat
from lf.schedule.memory import memory_is_full, out_of_memory
from lf.schedule.slots import got
from lf.segment import Segment, Terms, path_of

Carry = dict[str, Any]  # name → Tensor, or a function that waits for one


def run(
    bound: Bound, params: dict[str, Any], batches: Sequence[Batch], seeds: Mapping[str, Tensor], ctx: Any, clock: Any = None
) -> tuple[dict[str, Tensor], Terms, Tensor]:
    """(gradients of Σ_k seeds[k] · Σ losses_k by path, reduced over the ranks that hold them; terms summed over microbatches; finite).

    params: {segment: {name: Tensor}}, the compute copy. seeds: objective → λ_k / N_k, a scalar. Gradients come in the master dtype, terms as
    this rank's own sums (P over all ranks). finite, (microbatches,) bool: whether the losses of each microbatch on this rank, and the gradient
    at the first layer of its stages, were finite. `clock`: takes down when each action begins and ends. Without any backward in the program
    nothing is kept and there are no gradients.
    """
    with torch.set_grad_enabled(bound.trains):
        return _interpret(_Rank(bound, params, batches, seeds, ctx), clock)


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
        except RuntimeError as error:
            if memory_is_full(error):
                what, name, share = rank.doing
                raise out_of_memory(error, f"{what} {name}, action {a}", share, rank.graphs.grads) from error
            raise
    position.done()
    return rank.results()


class _Rank:
    """One rank's run of one program."""

    def __init__(self, bound: Bound, params: dict[str, Any], batches: Sequence[Batch], seeds: Mapping[str, Tensor], ctx: Any):
        self.device = next(iter(batches[0].plan.values())).device
        self.bound, self.seeds, self.ctx, self.pipe = bound, seeds, ctx, ctx.axes.pipe()
        self.graphs = Graphs(bound, params, batches, seeds, ctx, self.device)
        self.terms: Terms = {}
        self.kept: dict[tuple[int, int | None], list[Kept]] = {}
        self.owed: dict[tuple[int, int | None], list[tuple[str, list[tuple[str, Tensor, Tensor]]]]] = {}  # piece, (path, rows, dy) of its products
        self.values: dict[tuple[str, int, int | None], Carry] = {}
        self.sent: dict[tuple[str, int, int | None], list[Callable[[], None]]] = {}
        self.waits: list[Callable[[], None]] = []
        self.doing = ("the start of", "the program", 0.0)  # what with which piece, and the share of the stage's layers whose forward has begun
        self.streams = ctx.device.copy_streams() if bound.away else None
        self.seen: list[list[Tensor]] = [[] for _ in batches]  # of each microbatch, numbers that are finite if it is

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
        return do | {"OVERLAP": overlap, "OFFLOAD": self.copy, "FETCH": self.copy}

    def results(self) -> tuple[dict[str, Tensor], Terms, Tensor]:
        self.finish_sums()
        if left := [*self.kept, *self.owed, *self.values, *self.sent]:
            raise AssertionError(f"the program left values alive: {left}")  # `check` proves that this cannot be
        return self.graphs.grads, self.terms, self.finite()

    def finite(self) -> Tensor:
        """Whether all that was seen of each microbatch is."""
        width, zero = max(1, *map(len, self.seen)), torch.zeros((), dtype=self.ctx.precision.master, device=self.device)
        numbers = [x.to(self.ctx.precision.master) for row in self.seen for x in (*row, *[zero] * (width - len(row)))]
        return torch.isfinite(torch.stack(numbers).view(-1, width)).all(1)

    def forward(self, a: Action) -> Iterator[None]:
        s, m = at = a.stage, a.microbatch
        assert m is not None
        pieces = self.bound.pieces[s, a.segment]
        carry = _here(self.values.pop(("F", s, m), {}))
        for i, piece in enumerate(pieces):
            self.doing = "the forward of", piece.name, (i + 1) / len(pieces)
            keeps = self.bound.trains and piece.back
            again = self.bound.again.get((s, m, piece.name)) if keeps else None
            if keeps and again != ():
                kept, carry, losses = self.graphs.make(piece, carry, m, again or ())
            else:
                kept, carry, losses = self.graphs.pass_by(piece, carry, m, keeps)
            if losses and self.bound.trains and (unknown := losses.keys() - self.seeds.keys()):
                names = f"{', '.join(sorted(unknown))}, which no objective weighs; there are {', '.join(self.seeds) or 'none'}"
                raise ProgramError(f"{piece.name} gives the loss {names}")
            if keeps:
                self.kept.setdefault(at, []).append(kept)
            if losses:
                _add_terms(self.terms, {"losses": losses})
                self.seen[m] += losses.values()
            yield
        where, to = self.bound.placement, s + 1
        if (s, a.segment) not in self.bound.final:
            self.values["F", s, m] = carry  # the next piece of this stage takes it
        elif to < len(where):
            self.values[("F", to, m) if where[to] == self.bound.rank else ("out F", s, m)] = carry

    def settle(self, a: Action) -> None:
        """Waits for what the action takes, so that what is measured is the action."""
        for part in flat((a,)):
            where = ("F" if part.op == "F" else "B", part.stage, part.microbatch)
            if part.op in ("F", "B", "I") and where in self.values:
                self.values[where] = _here(self.values[where])

    def backward(self, a: Action) -> Iterator[None]:
        """B, and I, which leaves the factors of the products' weight gradients to W."""
        s, m = at = a.stage, a.microbatch
        assert m is not None
        covered, pieces = self.bound.spans[s, a.segment], self.kept.get(at, [])
        dy = _here(self.values.pop(("B", s, m), {}))
        while pieces and pieces[-1].piece.name in covered:  # a piece's activations go as soon as its backward is done
            kept = pieces.pop()
            self.doing = "the backward of", kept.piece.name, 1.0
            dy, factors = self.graphs.back(kept, dy)
            if factors:
                self.owed.setdefault(at, []).append((kept.piece.name, factors))
            if not (pieces and pieces[-1].piece.upstream):  # as far back as a gradient comes
                self.seen[m] += [x for g in dy.values() if g.numel() for x in torch.aminmax(g)]  # one kernel; NaN is both
            yield
        if pieces:
            self.values["B", s, m] = dy  # the piece before takes it
            return
        self.kept.pop(at, None)
        known, where, to = self.bound.known, self.bound.placement, s - 1
        if known[s].upstream:
            self.values[("B", to, m) if where[to] == self.bound.rank else ("out B", s, m)] = dy

    def weights(self, a: Action) -> Iterator[None]:
        at, covered = (a.stage, a.microbatch), self.bound.spans[a.stage, a.segment]
        left = []
        for name, factors in self.owed.pop(at, []):
            if name not in covered:
                left.append((name, factors))
                continue
            self.doing = "the weight gradients of", name, 1.0
            for path, rows, dy in factors:
                weight_gradient(self.graphs.sum_of(path), rows, dy)
            yield
        if left:
            self.owed[at] = left

    def remat(self, a: Action) -> Iterator[None]:
        """The forward of what was not kept, once more; its losses have been counted."""
        at, covered = (a.stage, a.microbatch), self.bound.spans[a.stage, a.segment]
        assert a.microbatch is not None
        pieces = self.kept[at]
        for i, kept in enumerate(pieces):
            if kept.piece.name in covered:
                self.doing = "the second forward of", kept.piece.name, 1.0
                if a.ops and kept.slots is not None:
                    kept.slots.remat()
                else:
                    pieces[i], _, _ = self.graphs.make(kept.piece, {k: got(v) for k, v in kept.x.items()}, a.microbatch)
                yield

    def copy(self, a: Action) -> None:
        """OFFLOAD and FETCH: they start copies; who needs one waits."""
        covered = self.bound.spans[a.stage, a.segment]
        for kept in self.kept[a.stage, a.microbatch]:
            self.doing = "the copy of", kept.piece.name, 1.0
            if kept.piece.name in covered and kept.slots is not None:
                (kept.slots.offload if a.op == "OFFLOAD" else kept.slots.fetch)(self.ctx.device, self.streams)

    def send(self, a: Action) -> None:
        kind, s, m = a.op[-1], a.stage, a.microbatch
        self.doing = "the message of", f"stage {s}", 1.0
        to = self.bound.placement[s + 1 if kind == "F" else s - 1]
        carry = self.values.pop((f"out {kind}", s, m))
        self.sent[a.op, s, m] = [self.pipe.send(carry[k], to, f"{s}{kind}{m} {k}") for k in sorted(carry)]

    def recv(self, a: Action) -> None:
        """Shapes do not travel: they follow from the config and the batch."""
        kind, s, m = a.op[-1], a.stage, a.microbatch
        assert m is not None
        at, source = (s, s - 1) if kind == "F" else (s + 1, s + 1)
        self.doing = "the message to", f"stage {s}", 1.0
        like = self.graphs.shapes(m).inputs[at]
        if kind == "B":
            like = {k: (shape, dtype) for k, (shape, dtype) in like.items() if dtype.is_floating_point}
        place, device = self.bound.placement[source], self.device
        self.values[kind, s, m] = {k: self.pipe.recv(*like[k], device, place, f"{source}{kind}{m} {k}") for k in sorted(like)}

    def free(self, a: Action) -> None:
        assert a.segment is not None
        for wait in self.sent.pop((a.segment, a.stage, a.microbatch)):
            wait()

    def reduce(self, a: Action) -> None:
        assert a.segment is not None
        if a.segment in self.bound.tied:
            self.finish_sums()
            self.graphs.grads[a.segment] = self.sum_over(self.bound.tied[a.segment], a.segment)
            return
        paths, specs = self.bound.reduced[a.stage, a.segment]
        self.doing = "the sum of gradients of", a.segment, 1.0
        for path in paths:  # a parameter that no loss reached: its sum over the holders is still a collective that all must join
            self.graphs.sum_of(path)
        if specs:
            self.waits.append(reduce_gradients(specs, self.graphs.grads, self.ctx.axes))

    def sum_over(self, holders: tuple[int, ...], path: str) -> Tensor:
        """The sum of a gradient over the pipeline ranks that hold it, by messages to the first of them and back: a group of processes for each such
        set would have to be made by all ranks in one order."""
        mine, first, pipe = self.graphs.grads[path], holders[0], self.pipe
        like = (mine.shape, mine.dtype, self.device)
        if self.bound.rank != first:
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
        while self.waits:
            self.waits.pop(0)()


def run_forward(segments: Sequence[Segment], params: dict[str, Any], batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    """The segments one after another, without gradients: (the last x, terms)."""
    x: Any = {}
    terms: Terms = {}
    with torch.no_grad():
        for segment in segments:
            x, new = segment.apply({n: lookup(params, path_of(segment, n)) for n in segment.params}, x, batch, ctx)
            _add_terms(terms, new)
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

"""One live axis over real processes: a group of ranks and the raw collectives on it, which carry no gradient.

Every collective takes the sizes that each rank gives or gets. They are always known beforehand (from the spec or from the batch's plan), so
no shape travels, and what a backend cannot do unevenly is padded here and nowhere else. `later=True` starts the collective and returns a
function that waits for it and gives the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Later = Callable[[], Tensor]
# torch 2.13 renamed these two; older ones have the names that stand second
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Axis:
    """A group of ranks, in the order of the mesh: `.size`, `.index` (this rank's place), `.ranks` (of the world), `.name`."""

    def __init__(self, group: dist.ProcessGroup | None, ranks: tuple[int, ...], rank: int, name: str):
        self.group, self.ranks, self.name = group, ranks, name
        ascending = sorted(ranks)  # so torch numbers them in their group; a mesh over ranks in another order has its places in that one
        self._slot = None if ascending == list(ranks) else [ascending.index(r) for r in ranks]  # of each place, its number in the group
        self.size, self.index = len(ranks), ranks.index(rank)
        self.ways: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None  # messages up and down the places, see Axes.pipe

    def sum(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)

    def max(self, x: Tensor) -> Tensor:
        return self.all_reduce(x, "max")

    def all_reduce(self, x: Tensor, op: str = "sum", later: bool = False, spend: bool = False) -> Any:
        """x of every rank added (or the largest), element by element. `spend`: x is the caller's own, and the sum may take its place."""
        if self.size == 1:
            return at_once(x.detach(), later)
        out = x.detach() if spend and x.is_contiguous() else x.detach().clone(memory_format=torch.contiguous_format)
        work = self._start(dist.all_reduce, out, OPS[op])
        return _finish(work, lambda: out, later)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        """The ranks' x joined along `dim`, where rank j has sizes[j]."""
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "all_gather", x.shape[dim], sizes[self.index])
        rows, n = x.detach().movedim(dim, 0).contiguous(), max(sizes)
        if n * self.size != sum(sizes):  # pad to the longest: backends gather equal pieces only
            rows = torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])
        out = rows.new_empty(n * self.size, *rows.shape[1:])
        work = self._start(_gather, out, rows)

        def result() -> Tensor:
            even = n * self.size == sum(sizes) and (self._slot is None or not n)
            joined = out if even else torch.cat([piece[:k] for piece, k in zip(self._by_place(out.split(n)), sizes)]) if n else out
            return joined.movedim(0, dim).contiguous()

        return _finish(work, result, later)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int], dim: int = 0, later: bool = False) -> Any:
        """The sum over ranks of x, of which rank j keeps its sizes[j] along `dim`."""
        if self.size == 1:
            return at_once(x.detach(), later)
        check_rows(self, "reduce_scatter", x.shape[dim], sum(sizes))
        rows, n = x.detach().movedim(dim, 0).contiguous(), max(sizes)
        if n * self.size != sum(sizes) or self._slot is not None:
            padded = rows.new_zeros(self.size, n, *rows.shape[1:])
            for slot, piece in zip(self._by_place(padded), rows.split(list(sizes))):
                slot[: len(piece)] = piece
            rows = padded.flatten(0, 1)
        out = rows.new_empty(n, *rows.shape[1:])
        work = self._start(_scatter, out, rows)
        return _finish(work, lambda: out[: sizes[self.index]].movedim(0, dim).contiguous(), later)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int], dim: int = 0, join: int | None = None, later: bool = False
    ) -> Any:
        """send[j] of `dim` goes to rank j; recv[j] of `join` (default: `dim`) comes from it; joined in the order of the ranks."""
        join = dim if join is None else join
        if self.size == 1:
            return at_once(x.detach(), later)
        dim, join = dim % x.dim(), join % x.dim()
        check_rows(self, "all_to_all", x.shape[dim], sum(send))
        shape = list(x.shape)
        if join != dim:
            check_rows(self, "all_to_all", x.shape[join], recv[self.index])
            shape[dim] = send[self.index]
        shapes = [[k if d == join else n for d, n in enumerate(shape)] for k in recv]
        pieces = self._by_slot(x.detach().split(list(send), dim))
        flat = torch.cat([p.reshape(-1) for p in pieces])
        counts = self._by_slot([int(torch.Size(s).numel()) for s in shapes])
        out = flat.new_empty(sum(counts))
        work = self._start(dist.all_to_all_single, out, flat, list(counts), [p.numel() for p in pieces])

        def result() -> Tensor:
            if join == dim == 0 and self._slot is None:  # they lie as they are to be
                return out.view(sum(recv), *x.shape[1:])
            return torch.cat([piece.view(s) for piece, s in zip(self._by_place(out.split(list(counts))), shapes)], join)

        return _finish(work, result, later)

    def gather_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        """Fills each of `outs` with the ranks' xs joined along its dim, where rank j has sizes[i][j] rows of tensor i: one launch for all. What is
        even along dim 0 travels from and to where it lies; the rest is packed. `later`: a function that waits until all are filled."""
        if self.size == 1:
            for out, x in zip(outs, xs):
                out.copy_(x)
            return _nothing if later else None
        into, given, odd = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor, Sequence[int], int]]()
        for out, x, each, dim in zip(outs, xs, sizes, dims):
            check_rows(self, "gather_many", x.shape[dim], each[self.index])
            if not out.numel():
                continue
            if self._as_it_lies(out, x, each, dim):
                into.append(out)
                given.append(x.detach())
                continue
            n = max(each) * (out.numel() // sum(each))
            flat = x.new_zeros(n)
            flat[: x.numel()].view(x.shape).copy_(x.detach())
            whole = x.new_empty(n * self.size)
            odd.append((out, whole, each, dim))
            into.append(whole)
            given.append(flat)
        work = self._launched(into, given, "allgather_into_tensor_coalesced")

        def wait() -> None:
            work()
            for out, whole, each, dim in odd:
                self._unpack(whole, out, each, dim)

        return wait if later else wait()

    def scatter_many(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], dims: Sequence[int], later: bool = False
    ) -> Any:
        """Fills each of `outs` with this rank's rows, sizes[i][index] of tensor i along its dim, of the sum over ranks of xs[i]: one launch for all,
        packed as in `gather_many`. `later`: a function that waits until all are filled."""
        if self.size == 1:
            for out, x in zip(outs, xs):
                out.copy_(x)
            return _nothing if later else None
        into, given, odd = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor]]()
        for out, x, each, dim in zip(outs, xs, sizes, dims):
            check_rows(self, "scatter_many", x.shape[dim], sum(each))
            if not x.numel():
                continue
            if self._as_it_lies(x, out, each, dim):
                into.append(out)
                given.append(x.detach())
                continue
            n = max(each) * (x.numel() // sum(each))
            packed = x.new_zeros(self.size, n)
            self._pack(x.detach(), packed, each, dim)
            into.append(x.new_empty(n))
            given.append(packed.view(-1))
            odd.append((out, into[-1]))
        work = self._launched(into, given, "reduce_scatter_tensor_coalesced")

        def wait() -> None:
            work()
            for out, flat in odd:
                out.copy_(flat[: out.numel()].view(out.shape))

        return wait if later else wait()

    def sum_many(self, xs: Sequence[Tensor], later: bool = False) -> Any:
        """Adds up each tensor over ranks, in place: one launch for all. They are contiguous. `later`: a function that waits until all are."""
        xs = [x for x in xs if x.numel()]
        if self.size == 1 or not xs:
            return _nothing if later else None
        group, works = self._group(), []
        for each in _by_dtype(xs):
            works.append(group.allreduce_coalesced(each, dist.AllreduceCoalescedOptions()))
        return _all(works) if later else _all(works)()

    def _pack(self, x: Tensor, packed: Tensor, sizes: Sequence[int], dim: int) -> None:
        """packed (ranks, n): a row for what of x goes to each rank, which may be longer."""
        for row, piece in zip(self._by_place(packed), x.split(list(sizes), dim)):
            row[: piece.numel()].view(piece.shape).copy_(piece)

    def _unpack(self, packed: Tensor, out: Tensor, sizes: Sequence[int], dim: int) -> None:
        """packed (ranks · n,): what has come from each rank, as `_pack` puts it."""
        for piece, row in zip(out.split(list(sizes), dim), self._by_place(packed.chunk(self.size))):
            piece.copy_(row[: piece.numel()].view(piece.shape))

    def _as_it_lies(self, whole: Tensor, x: Tensor, sizes: Sequence[int], dim: int) -> bool:
        """Whether shards of a tensor are even and each a range of its memory, in the order of the group."""
        even = dim == 0 and len(set(sizes)) == 1 and sizes[0] > 0
        return even and self._slot is None and whole.is_contiguous() and x.is_contiguous()

    def _launched(self, into: list[Tensor], given: list[Tensor], name: str) -> Callable[[], None]:
        launch, works = getattr(self._group(), name), []
        for each in _by_dtype(into):
            chosen = [g for g in given if g.dtype == each[0].dtype]
            works.append(launch(each, chosen))

        def wait() -> None:
            assert len(given) == len(into)  # held here, they live until they have left
            _all(works)()

        return wait

    def _start(self, collective: Callable[..., Any], *args: Any) -> Any:
        return collective(*args, group=self.group, async_op=True)

    def _group(self) -> Any:
        assert self.group is not None
        return self.group

    def shift(self, x: Tensor, k: int) -> Tensor:
        """x of the rank k places before this one on the ring; all of one shape."""
        if k % self.size == 0:
            return x.detach()
        x, out = x.detach().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        to, source = self.ranks[(self.index + k) % self.size], self.ranks[(self.index - k) % self.size]
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, to, self.group), dist.P2POp(dist.irecv, out, source, self.group)]
        ):
            work.wait()
        return out

    def send(self, x: Tensor, to: int, what: str) -> Callable[[], None]:
        """Starts sending x to place `to`, which must receive it in the same order; the function returned waits until it has left. `what` says
        what it is: simulated ranks compare it."""
        x = x.detach().contiguous()
        if not x.numel():
            return _nothing
        work = dist.isend(x, self.ranks[to], self._way(self.index, to))

        def wait() -> None:
            assert x.numel()  # held here, it lives until it has left
            assert work is not None
            work.wait()

        return wait

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int, what: str) -> Later:
        """Starts receiving what place `source` sends; the function returned waits for it."""
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
        if not out.numel():
            return lambda: out
        work = dist.irecv(out, self.ranks[source], self._way(source, self.index))
        return _finish(work, lambda: out, later=True)  # type: ignore[return-value]

    def _way(self, source: int, to: int) -> dist.ProcessGroup:
        assert self.ways is not None, "Axes.pipe and Axes.links make them"
        return self.ways[source > to]

    def _by_place(self, things: Any) -> Any:
        """What stands in the order of the group, in the order of the mesh."""
        return things if self._slot is None else [things[slot] for slot in self._slot]

    def _by_slot(self, things: Any) -> Any:
        """What stands in the order of the mesh, in the order of the group."""
        return things if self._slot is None else [things[self._slot.index(i)] for i in range(self.size)]

    def barrier(self) -> None:
        """Every rank of the group has come this far."""
        self.all_reduce(torch.zeros(1))


def check_rows(axis: Any, what: str, got: int, want: int) -> None:
    if got != want:
        raise ValueError(f"{what} over {axis.name} of {axis.size} ranks: rank {axis.ranks[axis.index]} has {got} rows, the sizes say {want}")


def _nothing() -> None:
    """What waits for a message without content."""


def _by_dtype(xs: Sequence[Tensor]) -> list[list[Tensor]]:
    out: dict[torch.dtype, list[Tensor]] = {}
    for x in xs:
        out.setdefault(x.dtype, []).append(x)
    return [*out.values()]


def _all(works: Sequence[Any]) -> Callable[[], None]:
    def wait() -> None:
        for work in works:
            work.wait()

    return wait


def at_once(x: Any, later: bool) -> Any:
    return (lambda: x) if later else x


def _finish(work: Any, result: Later, later: bool) -> Tensor | Later:
    def wait() -> Tensor:
        work.wait()
        return result()

    return wait if later else wait()

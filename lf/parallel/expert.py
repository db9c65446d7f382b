"""The ways of a token to the ranks of its experts and back.

    exchange   each row travels to the ranks that have its expert, and back                4·k·t·D·(ep-1)/ep elements a rank, forward and backward
    gather     every rank of the expert group gets all rows, and gives back its share of   4·(n-1)·t·D, n = ep·etp ranks: less where k ≥ n
               each token's sum

A rank first tells the others of its expert group how many rows each expert gets from it, E + 1 numbers, and waits for theirs: the only time that
the host waits for the device. On paper (`lf/axes_meta.py`) all experts get equally many.

t this rank's tokens · D width · k experts of a token · E experts · e experts of this rank · n rows of this rank's experts, sorted by expert

Between sending and returning a tree of tensors says what went where: it can cross from one segment to the next. Counts lie on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lf.mesh import shares
from lf.paper import assume
from lf.parallel.redistribute import P, R, S, exchange, exchange_later, redistribute
from lf.spec import Part

Sent = dict[str, Tensor]


def send_by_exchange(h_tD: Tensor, ids_tk: Tensor, weights_tk: Tensor, experts: int, ctx: Any) -> Sent:
    """rows (n, D), and `counts` (e,) of them for each expert of this rank. ids: E where a token goes nowhere."""
    ep, etp, k = ctx.axes["ep"], ctx.axes["etp"], ids_tk.shape[1]
    table = counted(ids_tk, experts, ctx)[..., 1:]
    mine = slice(*Part("", experts).bounds(ep.index, ep.size))
    own = table[ep.index, etp.index]
    order = ids_tk.flatten().argsort(stable=True)[: int(own.sum())]  # by expert; the last ones go nowhere
    send = [int(part.sum()) for part in own.split(list(shares(experts, ep.size)))]
    arrive = table[:, :, mine]  # from (ep, etp), by expert
    recv, sizes = arrive[:, etp.index].sum(1).tolist(), arrive.sum((0, 2)).tolist()
    rows = exchange(ctx.ops.permute(h_tD, order, k), send, recv, ep)
    rows = redistribute(rows, etp, S(0, sizes), R)  # of the tokens of all ranks of etp: each has columns of the same experts
    kept = {"order": order, "weights": weights_tk, "counts": arrive.sum((0, 1))}
    kept |= {"send": torch.tensor(send), "recv": torch.tensor(recv), "sizes": torch.tensor(sizes)}
    if ep.size * etp.size == 1:  # they lie by expert already
        return {"rows": rows, **kept}
    into = sorted_by_expert(arrive.transpose(0, 1).flatten(0, 1), h_tD.device)
    return {"rows": ctx.ops.permute(rows, into, 1), "into": into, **kept}


def back_by_exchange(c: Sent, ctx: Any) -> Callable[[], Tensor]:
    """The rows start on their way back; the function waits for them and gives each token's weighted sum, (t, D)."""
    ep, etp, weights_tk = ctx.axes["ep"], ctx.axes["etp"], c["weights"]
    y = ctx.ops.permute(c["rows"], c["into"].argsort(), 1) if "into" in c else c["rows"]  # a permutation's inverse
    y = redistribute(y, etp, P, S(0, c["sizes"].tolist()))
    done = exchange_later(y, c["recv"].tolist(), c["send"].tolist(), ep)
    return lambda: ctx.ops.unpermute(done(), c["order"], weights_tk)


def send_by_gather(h_tD: Tensor, ids_tk: Tensor, weights_tk: Tensor, experts: int, ctx: Any) -> Sent:
    """As `send_by_exchange`."""
    ep, group, k = ctx.axes["ep"], ctx.axes["ep", "etp"], ids_tk.shape[1]
    table = counted(ids_tk, experts, ctx)
    sizes = table[..., 0].flatten().tolist()
    first, stop = Part("", experts).bounds(ep.index, ep.size)
    counts = table[..., 1 + first : 1 + stop].sum((0, 1))
    h_TD, weights_Tk = (redistribute(x, group, S(0, sizes), R) for x in (h_tD, weights_tk))
    ids_Tk = group.all_gather(ids_tk, sizes)
    elsewhere = (ids_Tk < first) | (ids_Tk >= stop)
    order = ids_Tk.masked_fill(elsewhere, experts).flatten().argsort(stable=True)[: int(counts.sum())]
    rows = ctx.ops.permute(h_TD, order, k)
    return {"rows": rows, "order": order, "weights": weights_Tk, "counts": counts, "sizes": torch.tensor(sizes)}


def back_by_gather(c: Sent, ctx: Any) -> Callable[[], Tensor]:
    """As `back_by_exchange`; there is nothing to wait for."""
    y_TD = ctx.ops.unpermute(c["rows"], c["order"], c["weights"])
    return lambda: redistribute(y_TD, ctx.axes["ep", "etp"], P, S(0, c["sizes"].tolist()))


STYLES = {"exchange": (send_by_exchange, back_by_exchange), "gather": (send_by_gather, back_by_gather)}
"""How rows travel, by name: (there, back)."""


def counted(ids_tk: Tensor, experts: int, ctx: Any) -> Tensor:
    """(ep, etp, 1 + E) on the host: of each rank of the expert group its tokens, then how many rows it has for each expert."""
    group, (t, k) = ctx.axes["ep", "etp"], ids_tk.shape
    shape = (ctx.axes["ep"].size, ctx.axes["etp"].size, 1 + experts)
    mine = ids_tk.new_zeros(2 + experts)  # the last: rows that go nowhere
    mine[0] = t
    mine.scatter_add_(0, ids_tk.flatten() + 1, torch.ones_like(ids_tk.flatten()))
    table = group.all_gather(mine[None, :-1], [1] * group.size)
    if ids_tk.is_meta:
        assume("every token goes to all of its experts, every expert gets equally many, and every rank has as many tokens")
        return torch.tensor([t, *shares(t * k, experts)]).expand(shape)
    return table.cpu().view(shape)


def sorted_by_expert(blocks: Tensor, device: torch.device) -> Tensor:
    """(n,): the place of each row when rows that came as blocks (source, expert) are put expert by expert. blocks: rows in each, on the host."""
    starts = (blocks.flatten().cumsum(0) - blocks.flatten()).view_as(blocks).T.flatten()
    lengths = blocks.T.flatten()
    n = int(lengths.sum())
    shift = starts - (lengths.cumsum(0) - lengths)  # of a block, from its new place to where it came
    shift, lengths = (x.to(device, non_blocking=True) for x in (shift, lengths))
    return torch.arange(n, device=device) + shift.repeat_interleave(lengths, output_size=n)


def each(values: Tensor, counts: Tensor, n: int) -> Tensor:
    """(n, …): of each row the value of its expert. values (e, …)."""
    return values.repeat_interleave(counts.to(values.device), 0, output_size=n)

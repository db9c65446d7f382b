"""Evaluation: the loss of held-out rows, and nothing is learned.

    loss = Σ_k λ_k · (Σ over all rows of objective k's sum) / (Σ of its counts)        one division for each objective, no mean of means
    perplexity = e^cross-entropy

So the result does not depend on how rows are dealt into microbatches and over ranks. Ranks without a row left take one that is all padding: they
join the same collectives and add nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from lf.batch import IGNORE, Batch
from lf.config import ConfigError
from lf.data.batches import pack
from lf.data.stream import Row, Rows
from lf.layouts import Layout
from lf.schedule.bind import Bound, bind
from lf.schedule.check import check
from lf.schedule.generate import forward_only
from lf.schedule.lower import lower
from lf.schedule.run import run
from lf.state import compute_copy, shard_batch
from lf.tree import Tree

NAME = re.compile(r"[\w.-]+")


@attrs.frozen
class HeldOut:
    """`n` rows: rows(0) … rows(n - 1). They may be of unequal length."""

    rows: Rows
    n: int


def named(words: Sequence[str], flag: str = "--eval", taken: Sequence[str] = ()) -> dict[str, str]:
    """('held=texts/held', …) → {name: path}. Raises ConfigError for a word that does not read so, and for a name that stands twice or is taken."""
    out: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path or not NAME.fullmatch(name):
            raise ConfigError(f"{flag} {word!r} should read NAME=path, with a name of letters, digits, '_', '.' and '-'")
        if name in out:
            raise ConfigError(f"{flag}: the name {name!r} stands twice")
        if name in taken:
            raise ConfigError(f"{flag} {word!r}: the name {name!r} is that of another set; give this one another name")
        out[name] = path
    return out


def make(layout: Layout, sets: Mapping[str, HeldOut], micro_batch: int, ctx: Any) -> Callable[[Tree], dict[str, float]]:
    """fn(params) -> {"eval/NAME/loss": …, "eval/NAME/OBJECTIVE": …, "eval/NAME/perplexity": …} for each set, equal on every rank. Collective.

    params: a tree as lf.forward takes it. perplexity is there where the model has an objective cross_entropy. Raises ConfigError for a name
    that is none and for a set without rows.
    """
    for name, held in sets.items():
        if not NAME.fullmatch(name):
            raise ConfigError(f"evaluation set {name!r}: a name is made of letters, digits, '_', '.' and '-'")
        if held.n < 1:
            raise ConfigError(f"evaluation set {name!r} has no rows; give more text, or leave it out")
    if micro_batch < 1:
        raise ConfigError(f"micro_batch={micro_batch} must be at least 1")

    program = lower(forward_only(layout.placement, 1), layout)
    check(program, layout, 1)
    bound = bind(program, layout, ctx, name="evaluation")

    def fn(params: Tree) -> dict[str, float]:
        out, compute = {}, compute_copy(layout, params, ctx)
        for name, held in sets.items():
            values = _means(layout, bound, compute, held, micro_batch, ctx)
            if "cross_entropy" in values:
                values["perplexity"] = _exp(values["cross_entropy"])
            out.update({f"eval/{name}/{k}": v for k, v in values.items()})
        return out

    return fn


def _means(layout: Layout, bound: Bound, params: Tree, held: HeldOut, micro_batch: int, ctx: Any) -> dict[str, float]:
    model, dp = layout.model, ctx.axes["dp"]
    losses, counts = [], []
    for batch in _batches(held, micro_batch, 2 * layout.mesh.cp * layout.mesh.tp, dp):
        model.accepts(batch)
        _, terms, finite = run(bound, params, [shard_batch(batch, model, ctx)], {}, ctx)
        zero = torch.zeros((), dtype=ctx.precision.master, device=finite.device)  # of an objective whose loss other stages give
        losses.append(torch.stack([terms.get("losses", {}).get(k, zero).to(zero.dtype) for k in model.objectives]))
        counts.append(torch.stack([o.count(batch) for o in model.objectives.values()]))
    # Sums of many small numbers are taken at once: torch adds them pairwise, a running sum would lose the last ones.
    sums = ctx.axes.world.sum(torch.stack(losses).sum(0))
    # A plan is the same on every rank of its dp coordinate, so each count is summed over dp alone.
    total = dp.sum(torch.stack(counts).sum(0).to(sums.device)).clamp_min(1)
    means = dict(zip(model.objectives, (sums / total).tolist()))
    return {"loss": sum(o.weight * means[k] for k, o in model.objectives.items()), **means}


def _batches(held: HeldOut, micro_batch: int, multiple: int, dp: Any) -> Iterator[Batch]:
    """Microbatch i of coordinate d holds the rows from (i·dp + d)·micro_batch; the same number of microbatches on every rank."""
    for first in range(0, held.n, micro_batch * dp.size):
        at = first + dp.index * micro_batch
        yield pack([held.rows(k) for k in range(at, min(at + micro_batch, held.n))] or [_padding(held.rows(0))], multiple)


def _padding(row: Row) -> Row:
    """As long as a row, and nothing of it counts."""
    n = len(row.tokens)
    return Row(np.zeros(n, np.int64), np.full(n, IGNORE, np.int64), np.zeros(1, np.int64))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf

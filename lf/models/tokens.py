"""The ends of a language model, and what all its layers know of a packed row: which tokens this rank has, where they stand.

T all tokens of the tp group · t this rank's tokens · D width · V vocabulary rows of this rank
"""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
from torch import Tensor

from lf.batch import IGNORE, Batch, BatchError
from lf.mesh import shares
from lf.ops.attention import document_of
from lf.ops.rope import Rope, rope_table
from lf.parallel.linear import column_linear
from lf.parallel.redistribute import I, S, Type, redistribute
from lf.parallel.vocab import vocab_cross_entropy, vocab_embedding
from lf.segment import Terms
from lf.spec import Part


def vocab_part(vocab: int) -> Part:
    """Shares of a large vocabulary are whole blocks of 64 rows, which matrix units like; the rows of a tiny one are dealt out singly."""
    unit = 64 if vocab >= 4096 else 1
    return Part("", -(-vocab // unit), unit, rows=vocab)


def accepts(vocab: int, batch: Batch) -> None:
    """Raises BatchError when a token or label is outside the vocabulary: split over ranks, no rank would have it and none would notice."""
    plan = {name: values.numpy() for name, values in batch.plan.items() if values.device.type == "cpu"}  # numpy: the device is not asked
    for name in ("tokens", "labels"):
        ids = plan.get(name, np.empty(0, np.int64))
        wrong = (ids < 0) | (ids >= vocab)
        if name == "labels":
            wrong &= ids != IGNORE
        if wrong.any():
            at = int(wrong.argmax())
            raise BatchError(f"{name}[{at}] = {ids[at]} is outside the vocabulary of {vocab} (an ignored label is {IGNORE})")


def valid_labels(batch: Batch) -> Tensor:
    """How many tokens have a label."""
    if "labels" not in batch.plan:
        raise BatchError(f"a batch to learn from needs labels in its plan; it has {', '.join(batch.plan)}")
    return (batch.plan["labels"] != IGNORE).sum()


def token_shares(batch: Batch, axis: Any) -> Type:
    """How the tokens of a packed row lie over tp."""
    return S(0, shares(batch.plan["tokens"].shape[0], axis.size))


def own(x_T: Tensor, batch: Batch, ctx: Any) -> Tensor:
    """Of something of each token of the row, that of this rank's tokens."""
    tp = ctx.axes["tp"]
    sizes = token_shares(batch, tp).sizes
    assert sizes is not None
    return x_T.split(sizes)[tp.index]


def embed(words: Part, p: dict[str, Tensor], x: Any, batch: Batch, ctx: Any) -> tuple[Tensor, Terms]:
    tp = ctx.axes["tp"]
    first, _ = words.bounds(tp.index, tp.size)
    return vocab_embedding(batch.plan["tokens"], p["weight"], first, tp, token_shares(batch, tp)), {}


def tables(ropes: tuple[tuple[Rope, int], ...], batch: Batch, ctx: Any) -> Batch:
    """The batch with cos and sin of its positions for each kind of rotary position in the model, under ("rope", its number)."""
    positions, edges = batch.plan["positions"], batch.plan["cu_seqlens"]
    lengths = edges.diff()[document_of(edges, positions.shape[0]) - 1]
    found = {("rope", i): rope_table(positions, lengths, d, r, ctx.precision.compute) for i, (r, d) in enumerate(ropes)}
    return attrs.evolve(batch, derived={**batch.derived, **found})


def head(words: Part, eps: float, p: dict[str, Tensor], x_tD: Tensor, batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    """The sum of the cross-entropy where the batch has labels; the logits (T, vocabulary), the same on every rank of tp, where it has none."""
    tp = ctx.axes["tp"]
    seq = token_shares(batch, tp)
    z_TV = column_linear(ctx.ops.rms_norm(x_tD, p["norm"], eps), p["weight"], tp, seq)
    if "labels" not in batch.plan:
        return redistribute(z_TV, tp, S(1, words.sizes(tp.size)), I), {}
    first, _ = words.bounds(tp.index, tp.size)
    return {}, {"losses": {"cross_entropy": vocab_cross_entropy(z_TV, batch.plan["labels"], first, tp, seq)}}


# Floating-point operations of one microbatch, forward and backward; they read the plan on the host. A product of n tokens with a matrix of a·b
# elements is 2·n·a·b operations, and its backward twice that; the embedding is a lookup. A query that sees c keys makes 2·2·c·heads·head_dim
# (scores, weighted values); a causal document of n tokens has n(n+1)/2 such pairs, within a window fewer. As in PaLM (Chowdhery et al. 2022,
# appendix B), but with the lengths of the documents; nothing recomputed counts.


def embed_flops(batch: Batch) -> float:
    return 0.0


def matrix_flops(elements: int, batch: Batch) -> float:
    """Of products with matrices of so many elements in all."""
    return float(3 * 2 * int(batch.plan["cu_seqlens"][-1]) * elements)

"""Multi-token prediction: after the layers, heads that each say one token further ahead (DeepSeek-V3 §2.2, arXiv 2412.19437).

    h0 = the final norm of what the layers give;  head k (from 0) at token i:
    x  = join · [norm_embed(embedding of token i+k+1) ; norm_hidden(h_k)]  →  a layer of the decoder  →  h_{k+1} = norm(x)
    its loss is the cross-entropy of the model's own head on h_{k+1} with token i+k+2

Embedding, final norm and head are the model's own. All of them as their weight over the number of heads. Tokens so near the end of their document
that there is no token i+k+1 get token 0 and have no label; nothing else sees them, they come last.

t this rank's tokens · T all tokens of the tp group · D width. Between its segments the carry is {"trunk": what the layers give, "x": the head's own},
in a batch without labels the trunk alone: nothing is predicted further ahead than the next token there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lf.batch import IGNORE, Batch
from lf.models.block import Block
from lf.models.tokens import matrix_flops, token_shares
from lf.ops.attention import document_of
from lf.parallel.linear import column_linear
from lf.parallel.product import product
from lf.parallel.vocab import vocab_cross_entropy, vocab_embedding
from lf.segment import Apply, Terms
from lf.spec import Init, Param, Part, Tied, constant


def ahead(x_T: Tensor, n: int, batch: Batch, fill: int) -> Tensor:
    """(T,): of each token what x has n tokens later in the same document, else `fill`."""
    document = document_of(batch.plan["cu_seqlens"], len(x_T))
    # beyond the end of the row: a document that there is not
    later, there = (torch.nn.functional.pad(v, (0, n), value=w)[n:] for v, w in ((x_T, fill), (document, -1)))
    return later.where(there == document, fill)


def labels_ahead(n: int, batch: Batch) -> Tensor:
    """How many tokens have a label n tokens further on."""
    return (ahead(batch.plan["labels"], n, batch, IGNORE) != IGNORE).sum()


def enter(k: int, words: Part, dim: int, eps: float, matrix: Init) -> Block:
    """The first segment of head k."""
    gain = Param((dim,), ("embed",), constant(1.0))
    params: dict[str, Param | Tied] = {"embed": Tied("embed/weight"), "norm_embed": gain, "norm_hidden": gain}
    params["join"] = Param((dim, 2 * dim), ("embed", None), matrix)
    if k == 0:
        params["norm"] = Tied("head/norm")
    return Block(params, partial(enter_block, k, words, eps), ("join",), partial(matrix_flops, 2 * dim * dim))


def inside(block: Block) -> Block:
    """A segment of the layer between."""
    return block._replace(apply=partial(beside_trunk, block.apply))


def leave(k: int, last: bool, words: Part, dim: int, vocab: int, eps: float, tied: bool) -> Block:
    """The last segment of head k; of the last head, the trunk alone goes on."""
    params: dict[str, Param | Tied] = {"norm": Param((dim,), ("embed",), constant(1.0)), "weight": Tied("embed/weight" if tied else "head/weight")}
    return Block(params, partial(leave_block, k, last, words, eps), ("weight",), partial(matrix_flops, dim * vocab))


def enter_block(k: int, words: Part, eps: float, p: dict[str, Tensor], x: Any, batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    c = x if isinstance(x, dict) else {"trunk": x}
    if "labels" not in batch.plan:
        return {"trunk": c["trunk"]}, {}
    tp, norm = ctx.axes["tp"], ctx.ops.rms_norm
    first, _ = words.bounds(tp.index, tp.size)
    seq = token_shares(batch, tp)
    next_tD = vocab_embedding(ahead(batch.plan["tokens"], k + 1, batch, 0), p["embed"], first, tp, seq)
    h_tD = norm(c["trunk"], p["norm"], eps) if k == 0 else c["x"]
    x_tD = product(torch.cat([norm(next_tD, p["norm_embed"], eps), norm(h_tD, p["norm_hidden"], eps)], -1), p["join"])
    return {"trunk": c["trunk"], "x": x_tD}, {}


def beside_trunk(apply: Apply, p: dict[str, Tensor], c: dict[str, Tensor], batch: Batch, ctx: Any) -> tuple[Any, Terms]:
    mine = {name: v for name, v in c.items() if name != "trunk"}
    if not mine:
        return c, {}
    y, terms = apply(p, mine["x"] if mine.keys() == {"x"} else mine, batch, ctx)
    return {"trunk": c["trunk"], **(y if isinstance(y, dict) else {"x": y})}, terms


def leave_block(
    k: int, last: bool, words: Part, eps: float, p: dict[str, Tensor], c: dict[str, Tensor], batch: Batch, ctx: Any
) -> tuple[Any, Terms]:
    if "labels" not in batch.plan:
        return (c["trunk"] if last else c), {}
    tp = ctx.axes["tp"]
    seq = token_shares(batch, tp)
    h_tD = ctx.ops.rms_norm(c["x"], p["norm"], eps)
    z_TV = column_linear(h_tD, p["weight"], tp, seq)
    first, _ = words.bounds(tp.index, tp.size)
    loss = vocab_cross_entropy(z_TV, ahead(batch.plan["labels"], k + 1, batch, IGNORE), first, tp, seq)
    return (c["trunk"] if last else {"trunk": c["trunk"], "x": h_tD}), {"losses": {objective(k): loss}}


def objective(k: int) -> str:
    """The name of head k's loss."""
    return f"mtp_{k}"

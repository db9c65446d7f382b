"""A batch is a plan (small, whole, the same on every rank that reads it) and a payload (large, read only where it is consumed).

For a language model the plan is, with T the length of one packed row:

    tokens      (T,)    int64   token ids; 0 where padded
    labels      (T,)    int64   the next token of the same document; IGNORE at the end of a document and in padding
    positions   (T,)    int64   place in the document, from 0 again at each document
    cu_seqlens  (≥ documents + 1,)  int32   starts of the documents, then T until the end: of few lengths (`pack` takes powers of two), so that
                        little recompiles and no kernel is given many documents without a token
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:  # what only names IGNORE or reads rows needs no torch
    from torch import Tensor

IGNORE = -100


class BatchError(ValueError):
    """A batch that a model cannot take."""


@attrs.frozen
class Batch:
    """One microbatch: one packed row. `derived`: what the model works out from it once for all its layers (`Model.prepare`); never given."""

    plan: dict[str, Tensor]
    payload: dict[str, Tensor] = attrs.field(factory=dict)
    derived: dict[Any, Any] = attrs.field(factory=dict)

"""Floating-point operations of `trio`, forward and backward, worked out on the host from the plan: as in lf/models/decoder.py.

`merged`, `packed` and `cross` are of a segment and one microbatch; `image` and `sample` of one item, by which items are dealt. `c`: a `TrioConfig`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lf.batch import Batch
from lf.models.attention import Attention


def merged(merge: int, elements: int, batch: Batch) -> float:
    """Of products with matrices of so many elements in all, where `merge` rows are one."""
    return float(3 * 2 * (int(batch.plan["cu_seqlens"][-1]) // merge) * elements)


def packed(a: Attention, dim: int, batch: Batch) -> float:
    """Of attention in which all of a document see all of it."""
    lengths = np.diff(batch.plan["cu_seqlens"].numpy()).astype(np.float64)
    return float(3 * (2 * lengths.sum() * (2 * a.heads + 2 * a.kv_heads) * a.head_dim * dim + 4 * (lengths**2).sum() * a.heads * a.head_dim))


def cross(a: Attention, dim: int, context: int, batch: Batch) -> float:
    edges = batch.plan["cu_seqlens"].numpy()
    q = np.diff(edges).astype(np.float64)
    k = np.diff(batch.plan["cu_seqlens_k"].numpy()).astype(np.float64)
    return float(3 * a.head_dim * (4 * q.sum() * a.heads * dim + 4 * k.sum() * a.kv_heads * context + 4 * (q * k).sum() * a.heads))


def image(c: Any, patches: int) -> float:
    """Forward and backward of one image through all of vision."""
    t, a = c.vision, c.vision.mixer
    layer = 2 * patches * t.dim * ((2 * a.heads + 2 * a.kv_heads) * a.head_dim + 3 * t.inner) + 4 * patches**2 * a.heads * a.head_dim
    merger = 2 * (patches // c.merge) * (c.merge * t.dim + c.decoder.dim) * t.inner
    return float(3 * (2 * patches * c.features * t.dim + t.layers * layer + 2 * merger))


def sample(c: Any, actions: int, tokens: int) -> float:
    """Forward and backward of one document's actions through all of the head."""
    t, a = c.head, c.head.mixer
    queries = 2 * actions * t.dim * (2 * a.heads * a.head_dim + 3 * t.inner)
    layer = queries + 4 * tokens * c.decoder.dim * a.kv_heads * a.head_dim + 4 * actions * tokens * a.heads * a.head_dim
    return float(3 * (4 * actions * c.action_dim * t.dim + t.layers * layer))

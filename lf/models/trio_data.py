"""What the chains of `trio` run: items of data batches, how they are packed, and random data.

A data batch is a packed row of T tokens with D documents, then padding; N images, a run of placeholder tokens each, and actions of each document:

    tokens, labels, positions, cu_seqlens       as in lf/batch.py; an image of n patches is n / merge placeholders in a row
    patches  (N,)  int64   of each image, in the order of the row; multiples of `merge`
    actions  (D,)  int64   rows of each document, perhaps none: an item of the head is a document

Its payload is rows of all items, one after another, or a function that gives those of one: payload["pixels"](j) → (patches of image j, features).

    pixels   (ΣN patches, features)          noised, targets  (ΣD actions, action_dim)

A batch that `collate_images` or `collate_samples` makes has, with R rows, of which those behind the last item are padding:

    positions (R,)  cu_seqlens (≥ items + 1,)   as above
    patches, actions  (items,)                  rows of each item
    slots     (items, longest)  int64           the rows of each item, then -1
    cu_seqlens_k, slots_k                       of the head: the same for the rows of the decoder that each item sees
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from lf.batch import IGNORE, Batch, BatchError
from lf.chains import Item, Items, padded
from lf.rng import generator


def lengths_of(batch: Batch, name: str) -> np.ndarray:
    """Rows of each item, from the plan."""
    if name not in batch.plan:
        raise BatchError(f"a data batch needs {name!r} in its plan, the rows of each item; it has {', '.join(batch.plan)}")
    return batch.plan[name].numpy()


def documents_of(batch: Batch) -> np.ndarray:
    """Tokens of each document that is no padding."""
    return np.diff(batch.plan["cu_seqlens"].numpy())[: len(lengths_of(batch, "actions"))]


def images(merge: int, flops: Callable[[int], float], batch: Batch) -> Items:
    """The items of the encoder. `flops` of an image of so many patches."""
    patches = lengths_of(batch, "patches").tolist()
    rows = tuple(n // merge for n in patches)
    return Items(tuple(map(flops, patches)), {"visual": rows, "deep": rows})


def documents(batch: Batch) -> Items:
    """The items of the decoder, which runs them all: its rows are those of the documents, then padding."""
    lengths = documents_of(batch).tolist()
    return Items(tuple(map(float, lengths)), {"hidden": tuple(lengths)}, {"hidden": len(batch.plan["tokens"])})


def samples(flops: Callable[[int, int], float], batch: Batch) -> Items:
    """The items of the head. `flops` of so many actions that see so many rows of the decoder."""
    return Items(tuple(map(flops, lengths_of(batch, "actions").tolist(), documents_of(batch).tolist())))


def collate_images(merge: int, features: int, items: Sequence[Item], multiple: int) -> Batch:
    lengths = [int(lengths_of(batch, "patches")[j]) for batch, j in items]
    rows = padded(sum(lengths) // merge, multiple) * merge
    plan = {**edges(lengths, rows), "patches": torch.tensor(lengths, dtype=torch.int64), "slots": slots(lengths)}
    return Batch(plan, {"pixels": _read(items, "pixels", "patches", rows, features)})


def collate_samples(action_dim: int, items: Sequence[Item], multiple: int) -> Batch:
    lengths = [int(lengths_of(batch, "actions")[j]) for batch, j in items]
    seen = [int(documents_of(batch)[j]) for batch, j in items]
    rows, rows_k = padded(sum(lengths), multiple), padded(sum(seen), multiple)
    plan = {
        **edges(lengths, rows),
        "actions": torch.tensor(lengths, dtype=torch.int64),
        "slots": slots(lengths),
        "cu_seqlens_k": edges(seen, rows_k)["cu_seqlens"],
        "slots_k": slots(seen),
    }
    return Batch(plan, {name: _read(items, name, "actions", rows, action_dim) for name in ("noised", "targets")})


def edges(lengths: Sequence[int], rows: int) -> dict[str, Tensor]:
    """positions and cu_seqlens of documents, and of the padding behind them, which is one more."""
    starts = np.cumsum([0, *lengths])
    cu_seqlens = np.full(max(1 << len(starts).bit_length(), 16), rows, np.int32)
    cu_seqlens[: len(starts)] = starts
    positions = np.arange(rows) - np.repeat(starts, np.diff(starts, append=rows))
    return {"positions": torch.from_numpy(positions), "cu_seqlens": torch.from_numpy(cu_seqlens)}


def slots(lengths: Sequence[int]) -> Tensor:
    """(items, longest, at least 1) int64: the rows of each item, then -1."""
    out = np.full((len(lengths), max([1, *lengths])), -1, np.int64)
    for i, (start, n) in enumerate(zip(np.cumsum([0, *lengths]).tolist(), lengths)):
        out[i, :n] = np.arange(start, start + n)
    return torch.from_numpy(out)


def _read(items: Sequence[Item], name: str, lengths: str, rows: int, width: int) -> Tensor:
    """(rows, width): the payload of these items, then zeros."""
    parts: list[Any] = [torch.zeros(0, width)]
    for batch, j in items:
        if name not in batch.payload:
            raise BatchError(f"item {j} needs {name!r} in the payload of its data batch; it has {', '.join(batch.payload) or 'none'}")
        values: Any = batch.payload[name]
        start, n = int(lengths_of(batch, lengths)[:j].sum()), int(lengths_of(batch, lengths)[j])
        parts.append(values(j) if callable(values) else values[start : start + n])
        if parts[-1].shape != (n, width):
            raise BatchError(f"payload {name!r} of item {j} is {tuple(parts[-1].shape)}; by the plan's {lengths!r} it has shape {(n, width)}")
    whole = torch.cat(parts)
    return torch.cat([whole, whole.new_zeros(rows - len(whole), width)])


@attrs.frozen
class Amounts:
    """How much is in a random data batch: about `tokens` tokens in `documents` documents, each with up to `images` images of up to `rows` rows
    (before they are merged: `merge` times as many patches), and up to `actions` actions."""

    tokens: int = 24
    documents: int = 3
    images: int = 2
    rows: int = 3
    actions: int = 3


def sample(config: Any, seed: int, m: int = 0, d: int = 0, multiple: int = 1, amounts: Amounts | None = None) -> Batch:
    """Random data of microbatch m of dp coordinate d, for a `TrioConfig`, padded to a multiple of `multiple` tokens (2·cp·tp of the decoder).

    No two have as many of anything. Of three data batches that follow one another in m + d, the second has no image and the third no action; in
    the others, too, some documents have none.
    """
    a, g = amounts or Amounts(), generator(seed, "trio", m, d)
    kind = (m + d) % 3
    weights = g.random(a.documents) + 0.3
    lengths = np.maximum((weights / weights.sum() * (a.tokens + g.integers(0, 4))).astype(np.int64), 2)
    words, labels, patches = [], [], list[int]()
    for i, n in enumerate(lengths.tolist()):
        count = 0 if kind == 1 else 1 + int(g.integers(0, max(a.images, 1))) if i == 0 else int(g.integers(0, a.images + 1))
        text, mine = _document(config, n, g.integers(1, a.rows + 1, count).tolist() if a.images else [], g)
        words.append(text)
        patches += [config.merge * k for k in mine]
        labels.append(np.append(text[1:], IGNORE))
    actions = np.zeros(a.documents, np.int64) if kind == 2 else g.integers(0, a.actions + 1, a.documents)
    if kind != 2:
        actions[0] = max(a.actions, 1)
    tokens, targets = np.concatenate(words), np.concatenate(labels)
    targets[(targets == config.placeholder) | (g.random(len(targets)) < 0.2)] = IGNORE
    if not (targets != IGNORE).any():
        targets[0] = 0
    length, longest = -(-len(tokens) // multiple) * multiple, int(lengths.max())
    # padding is documents of its own, none longer than the others
    filling = [min(longest, length - at) for at in range(len(tokens), length, longest)]
    plan = {
        "tokens": torch.from_numpy(np.pad(tokens, (0, length - len(tokens)))),
        "labels": torch.from_numpy(np.pad(targets, (0, length - len(tokens)), constant_values=IGNORE)),
        **edges([*lengths.tolist(), *filling], length),
        "patches": torch.tensor(patches, dtype=torch.int64),
        "actions": torch.from_numpy(actions),
    }
    shapes = {"pixels": (sum(patches), config.features), "noised": (int(actions.sum()), config.action_dim)}
    shapes["targets"] = shapes["noised"]
    return Batch(plan, {name: torch.from_numpy(g.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()})


def _document(config: Any, n: int, rows: list[int], g: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """n tokens, the others drawn, among them images of so many rows, cut where n is less, as many as there is room for; and those."""
    rows = [min(k, n - 1) for k in rows]
    fit = [k for k, upto in zip(rows, np.cumsum(rows).tolist()) if upto <= n - 1]
    text = g.integers(0, config.placeholder, n - sum(fit))
    at = np.sort(g.integers(0, len(text) + 1, len(fit)))
    return np.insert(text, np.repeat(at, fit), config.placeholder), fit

"""What `lf.models.trio` computes, as one ordinary autograd graph on one rank: no program, no layout, no message, no cut of autograd.

`reference` runs the chains of each data batch one after another and hands outputs over by plain indexing. `one_at_a_time` gives every image, every
document and every sample a batch of its own: that packing does not matter is what it checks, and with it masks, rows and padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor

import lf
from lf import parity, tree
from lf.batch import Batch
from lf.chains import Chains, order
from lf.models.trio_data import Amounts, sample
from lf.segment import path_of


@attrs.frozen
class Reference:
    """`sums`: of each objective over all data · `counts`: its normaliser · `losses`: sum / count · `loss`: weighed together · `gradients`: of `loss`,
    by path · `grad_norm`: of all of them."""

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    losses: dict[str, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]
    grad_norm: Tensor


def context() -> lf.Context:
    return lf.Context(lf.solo(), lf.devices.get("cpu"), "fp64")


def parameters(model: Chains, seed: int) -> dict[str, Any]:
    """{segment: {name: Tensor}} in float64: what `lf.parity.randomised` gives under any layout, whole."""
    ctx, out = context(), {}
    for chain in model.chains.values():
        out |= parity.randomised(lf.layout(chain.model, lf.Mesh(dp=1), whole=False), ctx, seed)
    return out


def sample_batches(model: Chains, seed: int, microbatches: int, dp: int = 1, multiple: int = 1, **amounts: int) -> list[list[Batch]]:
    """batches[m][d]: random data."""
    return [[sample(model.config, seed, m, d, multiple, Amounts(**amounts)) for d in range(dp)] for m in range(microbatches)]


def run_chain(
    model: Chains, name: str, params: dict[str, Any], batch: Batch, inputs: dict[str, Tensor], ctx: Any = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(outputs, losses) of one chain and one batch, as `items` are collated. inputs: the rows of each input, for all segments that take it."""
    ctx, chain = ctx or context(), model.chains[name].model
    batch = lf.shard_batch(batch, chain, ctx)
    x: Any = {}
    outputs: dict[str, Tensor] = {}
    losses: dict[str, Tensor] = {}
    for s in chain.segments:
        if s.inputs:
            x = {**({"x": x} if isinstance(x, Tensor) else x), **{i: inputs[i] for i in s.inputs}}
        x, terms = s.apply({n: tree.get(params, path_of(s, n)) for n in s.params}, x, batch, ctx)
        outputs |= terms.get("outputs", {})
        losses |= terms.get("losses", {})
    return outputs, losses


def reference(model: Chains, params: dict[str, Any], batches: Sequence[Sequence[Batch]]) -> Reference:
    """All data batches, batches[m][d], on one rank: images of one batch together, its row, its samples together; one backward."""
    return _backward(model, params, batches, _together)


def one_at_a_time(model: Chains, params: dict[str, Any], batches: Sequence[Sequence[Batch]]) -> Reference:
    return _backward(model, params, batches, _apart)


def _backward(model: Chains, params: dict[str, Any], batches: Sequence[Sequence[Batch]], forward: Any) -> Reference:
    leaves = tree.map(lambda w: w.detach().clone().requires_grad_(), params)
    objectives = {k: o for chain in order(model) for k, o in model.chains[chain].model.objectives.items()}
    data = [batch for row in batches for batch in row]
    sums = {k: torch.zeros((), dtype=torch.float64) for k in objectives}
    for batch in data:
        for losses in forward(model, leaves, batch):
            for k, s in losses.items():
                sums[k] = sums[k] + s
    counts = {k: torch.stack([o.count(b) for b in data]).sum() for k, o in objectives.items()}
    losses = {k: s / counts[k].clamp_min(1) for k, s in sums.items()}
    loss = torch.stack([o.weight * losses[k] for k, o in objectives.items()]).sum()
    paths = [path for path, _ in tree.items(leaves)]
    got = torch.autograd.grad(loss, [w for _, w in tree.items(leaves)], allow_unused=True)
    grads = {p: torch.zeros_like(tree.get(params, p)) if g is None else g for p, g in zip(paths, got)}
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    values = {k: v.detach() for k, v in sums.items()}, counts, {k: v.detach() for k, v in losses.items()}
    return Reference(*values, loss.detach(), grads, norm)


def _collated(model: Chains, chain: str, batch: Batch, items: Sequence[int]) -> Batch:
    collate = model.chains[chain].collate
    assert collate is not None
    return collate([(batch, j) for j in items], 1)


def _spans(batch: Batch) -> list[tuple[int, int]]:
    """Where the documents lie that are no padding."""
    edges = batch.plan["cu_seqlens"].tolist()
    return list(pairwise(edges))[: len(batch.plan["actions"])]


def _together(model: Chains, params: dict[str, Any], batch: Batch) -> list[dict[str, Tensor]]:
    images, spans = range(len(batch.plan["patches"])), _spans(batch)
    there = int(batch.plan["patches"].sum()) // model.config.merge
    seen, _ = run_chain(model, "vision", params, _collated(model, "vision", batch, images), {})
    told, losses = run_chain(model, "decoder", params, batch, {k: v[:there] for k, v in seen.items()})
    context = torch.cat([told["hidden"][a:b] for a, b in spans])
    _, more = run_chain(model, "head", params, _collated(model, "head", batch, range(len(spans))), {"context": context})
    return [losses, more]


def _apart(model: Chains, params: dict[str, Any], batch: Batch) -> list[dict[str, Tensor]]:
    out, image = [], 0
    for i, (a, b) in enumerate(_spans(batch)):
        tokens = batch.plan["tokens"][a:b]
        missing, rows = int((tokens == model.config.placeholder).sum()), []
        while missing:  # the images of this document: until their rows have filled its placeholders
            n = int(batch.plan["patches"][image]) // model.config.merge
            seen, _ = run_chain(model, "vision", params, _collated(model, "vision", batch, [image]), {})
            rows.append({k: v[:n] for k, v in seen.items()})
            missing, image = missing - n, image + 1
        empty = torch.zeros(0, model.config.decoder.dim, dtype=torch.float64)
        inputs = {k: torch.cat([empty, *(r[k] for r in rows)]) for k in ("visual", "deep")}
        plan = {
            "tokens": tokens,
            "labels": batch.plan["labels"][a:b],
            "positions": torch.arange(b - a),
            "cu_seqlens": torch.tensor([0, b - a, b - a], dtype=torch.int32),
        }
        told, losses = run_chain(model, "decoder", params, Batch(plan), inputs)
        _, more = run_chain(model, "head", params, _collated(model, "head", batch, [i]), {"context": told["hidden"]})
        out += [losses, more]
    assert image == len(batch.plan["patches"])
    return out

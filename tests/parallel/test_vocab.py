"""A vocabulary over several ranks against torch's own embedding and cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import draw

from lf.batch import IGNORE
from lf.mesh import Mesh, shares
from lf.parallel.redistribute import S
from lf.parallel.vocab import vocab_cross_entropy, vocab_embedding
from lf.rng import generator
from lf.sim import spmd
from lf.spec import Part

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
VOCABS = [8, 13, 2, 1]  # even, uneven, and fewer words than ranks: some have no column


def whole_numbers(key: str, n: int, size: int) -> torch.Tensor:
    return torch.from_numpy(generator("test", key).integers(0, n, size))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab", VOCABS)
def test_embedding(vocab: int, ranks: int) -> None:
    ids, w, dy = whole_numbers("ids", vocab, 11), draw("w", shape=(vocab, 3)), draw("dy", shape=(11, 3))
    table = w.clone().requires_grad_()
    wanted = F.embedding(ids, table)
    (want_dw,) = torch.autograd.grad(wanted, table, dy)
    part, rows = Part("", vocab), shares(11, ranks)

    def body(axes):
        tp = axes["tp"]
        first, last = part.bounds(tp.index, tp.size)
        mine = w[first:last].clone().requires_grad_()
        h = vocab_embedding(ids, mine, first, tp, S(0, rows))
        return h.detach(), torch.autograd.grad(h, mine, dy.split(rows)[tp.index])[0]

    h, dw = zip(*spmd(Mesh(tp=ranks, dp=1), body))
    assert torch.equal(torch.cat(h), wanted.detach())
    torch.testing.assert_close(torch.cat(dw), want_dw, **CLOSE)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("labels", ["some ignored", "all ignored", "all valid"])
@pytest.mark.parametrize("scale", [1.0, 400.0])  # large logits overflow where the largest is not taken off
def test_cross_entropy(vocab: int, ranks: int, labels: str, scale: float) -> None:
    tokens = 9
    z, y = draw("z", shape=(tokens, vocab)) * scale, whole_numbers("y", vocab, tokens)
    ignored = {"some ignored": torch.arange(tokens) % 3 == 1, "all ignored": torch.ones(tokens, dtype=torch.bool)}.get(labels)
    if ignored is not None:
        y = y.masked_fill(ignored, IGNORE)
    leaf = z.clone().requires_grad_()
    wanted = F.cross_entropy(leaf, y, ignore_index=IGNORE, reduction="sum")
    (want_dz,) = torch.autograd.grad(wanted, leaf)
    part, rows = Part("", vocab), shares(tokens, ranks)

    def body(axes):
        tp = axes["tp"]
        first, last = part.bounds(tp.index, tp.size)
        mine = z[:, first:last].clone().requires_grad_()
        loss = vocab_cross_entropy(mine, y, first, tp, S(0, rows))
        return loss.detach(), torch.autograd.grad(loss, mine)[0]

    loss, dz = zip(*spmd(Mesh(tp=ranks, dp=1), body))
    torch.testing.assert_close(sum(loss), wanted.detach(), **CLOSE)  # each token's loss on one rank: a plain sum
    torch.testing.assert_close(torch.cat(dz, 1), want_dz, **CLOSE)
    own = [F.cross_entropy(zr, yr, ignore_index=IGNORE, reduction="sum") for zr, yr in zip(z.split(rows), y.split(rows)) if len(yr)]
    torch.testing.assert_close(torch.stack([x for x, n in zip(loss, rows) if n]), torch.stack(own), **CLOSE)


def test_cross_entropy_is_computed_in_float32_at_least() -> None:
    def body(axes):
        z = (draw("z", shape=(4, 8)) * 3).to(torch.bfloat16).requires_grad_()
        loss = vocab_cross_entropy(z, torch.arange(4), 0, axes["tp"], S(0))
        wanted = F.cross_entropy(z.float(), torch.arange(4), reduction="sum")
        torch.testing.assert_close(loss, wanted)
        return loss.dtype, torch.autograd.grad(loss, z)[0].dtype

    assert spmd(Mesh(dp=1), body) == [(torch.float32, torch.bfloat16)]

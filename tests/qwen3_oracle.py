"""transformers' Qwen3 with random weights, and what it says about a packed batch: the oracle for mathematics and files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lf
from lf import box, tree
from lf.models.families import qwen3

os.environ["HF_HUB_OFFLINE"] = "1"

SHAPES = {
    "vocab_size": 37, "hidden_size": 15, "intermediate_size": 10, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "rms_norm_eps": 1e-5,
}


def oracle(tied: bool, **changes: Any) -> Any:
    """A tiny Qwen3ForCausalLM, awkward to split, with no parameter left at its initial value (norm gains of 1 would let a slip pass)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 50000.0}
    config = Qwen3Config(**{**SHAPES, "tie_word_embeddings": tied, "rope_parameters": rope, **changes})
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data = (0.3 if p.ndim > 1 else 0.2) * torch.randn(p.shape, generator=generator) + (p.ndim == 1)
    return model


def said(model: Any, batch: lf.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of all tokens, sum of the cross-entropy), each document run by itself."""
    ends = [int(n) for n in batch.plan["cu_seqlens"].unique()]
    logits = torch.cat([model(batch.plan["tokens"][None, a:b]).logits[0] for a, b in itertools.pairwise(ends)])
    return logits, F.cross_entropy(logits, batch.plan["labels"], reduction="sum")


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """What stands on disk, by name."""
    return {name: p for name, p in model.named_parameters() if name != "lm_head.weight" or not model.config.tie_word_embeddings}


def assert_pieces(local: Any, layout: Any, coords: dict[str, int], whole: dict[str, torch.Tensor], atol: float, rtol: float = 0.0) -> None:
    """Every piece of this rank's tree is the same box of the whole tensor."""
    names = qwen3.names(layout.model.config)
    for path, spec in layout.specs.items():
        for piece in spec.pieces(coords):
            want = whole[names[piece.key]]
            got = piece.view(tree.get(local, path))
            torch.testing.assert_close(
                got, want[box.slices(piece.box, box.whole(piece.shape))].to(got.dtype), atol=atol, rtol=rtol, msg=lambda m, k=piece.key: f"{k}: {m}"
            )


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

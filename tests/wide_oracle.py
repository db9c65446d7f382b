"""Models of transformers in float64 throughout: what their code casts to float32 (norms, routers, softmax, rotary tables) stays wide."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import lf

BIAS = "e_score_correction_bias"
SHARED = ("modeling_rope_utils", "modeling_layers")


class Wide:
    """The module torch, in which float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def wide(name: str) -> Iterator[None]:
    """Within, the classes of transformers.models.`name` compute in float64."""
    modules: list[ModuleType] = [importlib.import_module(f"transformers.{shared}") for shared in SHARED]
    modules.append(importlib.import_module(f"transformers.models.{name}.modeling_{name}"))
    narrow = torch.Tensor.float
    for module in modules:
        module.torch = Wide()  # type: ignore[attr-defined]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = narrow  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch  # type: ignore[attr-defined]


def randomised(model: Any, seed: int = 3) -> Any:
    """No parameter and no selection bias is left at its initial value, and routers prefer some experts. bfloat16 holds each value exactly."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith(BIAS))]:
        scale = 1.5 if name.endswith(("gate.weight", "router.weight")) else 0.3 if p.ndim > 1 else 0.2
        new = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64) + (p.ndim == 1 and "norm" in name)
        p.data = new.to(torch.bfloat16).to(p.dtype)
    return model.eval()


def gradients(model: Any, folder: Any) -> dict[str, torch.Tensor]:
    """{name on disk: gradient}: they are saved in the place of the weights, so transformers says where each belongs."""
    for p in model.parameters():
        p.data, p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
    model.save_pretrained(folder)
    return {name: g for name, g in load_file(folder / "model.safetensors").items() if not name.endswith(BIAS)}


def said(model: Any, batch: lf.Batch, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of all tokens, sum of the cross-entropy), each document run by itself."""
    ends = [int(n) for n in batch.plan["cu_seqlens"].unique()]
    logits = torch.cat([model(batch.plan["tokens"][None, a:b], use_cache=False, **more).logits[0] for a, b in itertools.pairwise(ends)])
    return logits, F.cross_entropy(logits, batch.plan["labels"], reduction="sum")

"""Weights in 8 bits (e4m3) with a scale for each block of 128 × 128: as DeepSeek-V3 is released (arXiv 2412.19437 §3.3), and Qwen3, MiniMax-M2, ….

    X                F8_E4M3 (…, m, n)
    X_scale_inv      F32, BF16 or F8_E8M0 (…, ⌈m/128⌉, ⌈n/128⌉); in spite of its name the weights are X · X_scale_inv; blocks at the edge are smaller

config.json says so in `quantization_config`. The weights are that product rounded to float32, once: as float32 they are what the format means.
"""

from __future__ import annotations

import math
import re
from typing import Any

import attrs
import torch
from torch import Tensor

from lf.box import Box
from lf.config import ConfigError

FIELD, SCALE = "quantization_config", "_scale_inv"
CODE = "F8_E4M3"
SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": getattr(torch, "float8_e8m0fnu", None)}
"""What scales may be on disk; F8_E8M0, powers of two, from torch 2.7 on."""

LARGEST = 448.0  # of e4m3
BLOCK = (128, 128)
KEPT = re.compile(r"(.*\.)?(embed_tokens|tok_embeddings|lm_head|output|gate|router|shared_expert_gate|eh_proj|shared_head\.head)\.weight")
"""Matrices that such releases leave in more bits: tables, routers, gates of one row, and what joins the halves of MTP. `gate` is no gate_proj."""


@attrs.frozen
class Scheme:
    """Of a folder: the rows and columns of a block, and the modules that are left in more bits, by name, first or last part of the name."""

    block: tuple[int, int] = BLOCK
    kept: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        """Whether the config says that the tensor of this name is not in 8 bits."""
        module = name.rpartition(".")[0]
        return any(module == k or module.startswith(f"{k}.") or module.endswith(f".{k}") for k in self.kept)


def scheme(values: dict[str, Any]) -> Scheme | None:
    """Of a parsed config.json; None where it says nothing of fp8: other kinds are for the families to refuse. Raises ConfigError for fp8 of a kind
    that is not read."""
    q = values.get(FIELD)
    if not isinstance(q, dict) or q.get("quant_method") != "fp8":
        return None
    block, kept = q.get("weight_block_size"), q.get("modules_to_not_convert") or []
    bad = [f"{k}={q[k]!r}" for k, good in (("fmt", ("e4m3", "float8_e4m3fn")), ("activation_scheme", ("dynamic",))) if q.get(k, good[0]) not in good]
    sizes = [n for n in block if isinstance(n, int) and not isinstance(n, bool) and n > 0] if isinstance(block, list) else []
    if len(sizes) != 2 or sizes != block:
        bad.append(f"weight_block_size={block!r}, which should be two whole numbers above 0, as [128, 128]")
    if not (isinstance(kept, list) and all(isinstance(k, str) for k in kept)):
        bad.append(f"modules_to_not_convert={kept!r}, which should be a list of names")
    if bad:
        raise ConfigError(f"{FIELD} of fp8 with {', '.join(bad)}: not supported; e4m3 in blocks, with activations scaled as they come (dynamic), is")
    return Scheme((sizes[0], sizes[1]), tuple(kept))


def described(kept: list[str]) -> dict[str, Any]:
    """The `quantization_config` of what `quantise` writes. kept: the modules whose matrices are in more bits."""
    out = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}
    return {**out, "modules_to_not_convert": kept}


def takes(name: str) -> bool:
    """Whether a matrix on disk is written in 8 bits. By its name, for that is all that a reader of the format has: `modules_to_not_convert` lists
    names, and what a reader leaves in more bits by itself (tables, routers) it knows by theirs. Nothing in the model goes by it."""
    return not KEPT.fullmatch(name)


def scales_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, ...]:
    return (*shape[:-2], *(math.ceil(n / b) for n, b in zip(shape[-2:], block)))


def scales_box(held: Box, block: tuple[int, int]) -> Box:
    """The scales that a box of the weights needs."""
    return (*held[:-2], *((lo // b, math.ceil(hi / b)) for (lo, hi), b in zip(held[-2:], block)))


def dequantise(w8: Tensor, scales: Tensor, held: Box, block: tuple[int, int]) -> Tensor:
    """The weights in float32. w8: the box `held`; scales: those of `scales_box`."""
    rows, columns = (torch.arange(lo, hi) // b - lo // b for (lo, hi), b in zip(held[-2:], block))
    return w8.to(torch.float32) * scales.to(torch.float32)[..., rows, :][..., columns]


def quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    """(w8, scales) of float32 weights (…, m, n): a block's scale is its largest magnitude over 448, 1 where it is all zeros; to the nearest, ties to
    even. Raises ValueError for weights that are not finite, which would spoil their whole block."""
    if not torch.isfinite(w).all():
        raise ValueError("it has values that are not finite, and one spoils its whole block in 8 bits; write it without fp8")
    (m, n), (a, b) = w.shape[-2:], BLOCK
    rows, columns = (torch.arange(k) // size for k, size in ((m, a), (n, b)))
    padded = torch.nn.functional.pad(w.abs(), (0, -n % b, 0, -m % a))
    most = padded.unflatten(-2, (-1, a)).unflatten(-1, (-1, b)).amax((-3, -1))
    scales = most / LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    w8 = (w / scales[..., rows, :][..., columns]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return w8, scales

"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split: dim i turns with dim i + d/2, as in the files of Llama and Qwen.

Position p turns pair i by the angle p · f_i, where f_i = theta^(-2i/d) at first. To read longer texts than a model was trained on, f is changed:

    linear    f / factor                                          (Chen et al. 2023, arXiv 2306.15595: position interpolation)
    dynamic   theta grows with the document: f of theta · (factor·n/L - factor + 1)^(d/(d-2)) for a document of n > L tokens ("dynamic NTK")
    llama3    f / factor where the wavelength 2π/f is above L/low_freq, f where it is below L/high_freq, and between them a ramp in L/wavelength
              (Llama 3.1)
    yarn      f / factor where a pair turns fewer than beta_slow times in L tokens, f where it turns more than beta_fast times, a ramp in i
              between; cos and sin times 0.1·ln(factor) + 1                 (Peng et al. 2023, arXiv 2309.00071, §3.2 to 3.4)

L is the length trained on, `original_len`. t tokens · d dims that turn (all of a head, or its first ones: partial rotary)
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from lf.config import ConfigError, one_of
from lf.context import wide

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@attrs.frozen
class Rope:
    """How positions turn pairs of dims. `dim`: the first dims of a head that turn (None: all). A field that the kind has no use for stays as it is.

    yarn: `attention_factor` multiplies cos and sin. None: 0.1·ln(factor) + 1, or, where both mscales are given, the quotient
    (0.1·mscale·ln(factor) + 1) / (0.1·mscale_all_dim·ln(factor) + 1). `truncate`: the ramp starts and ends at whole pairs.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    dim: int | None = None
    original_len: int | None = None
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __attrs_post_init__(self) -> None:
        one_of("kind of rotary positions", self.kind, KINDS)
        if not (self.theta > 0 and self.factor >= 1):
            raise ConfigError(f"rotary positions: theta={self.theta} must be above 0, and factor={self.factor} at least 1")
        if self.dim is not None and (self.dim < 2 or self.dim % 2):
            raise ConfigError(f"rotary positions: dim={self.dim} must be even, and at least 2: positions turn pairs")
        if self.kind in ("dynamic", "llama3", "yarn") and not (self.original_len or 0) > 0:
            raise ConfigError(f"rotary positions of kind {self.kind!r} need original_len, the length trained on, above 0; it is {self.original_len}")
        if self.kind == "llama3" and not 0 < self.low_freq < self.high_freq:
            raise ConfigError(f"rotary positions: low_freq={self.low_freq} must be above 0 and below high_freq={self.high_freq}")
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError(f"rotary positions: beta_slow={self.beta_slow} must be above 0, and at most beta_fast={self.beta_fast}")


def frequencies(r: Rope, dim: int, dtype: torch.dtype, device: torch.device, lengths: Tensor | None = None) -> Tensor:
    """The angle per position of each pair, (dim/2,); of kind dynamic (t, dim/2), from the length of each token's document."""
    i = torch.arange(0, dim, 2, device=device).to(dtype) / dim
    if r.kind == "dynamic":
        assert lengths is not None
        # so that the slowest pair, f ~ theta^-(d-2)/d, turns through n tokens as far as it did through L / factor at first
        stretch = (r.factor * lengths.to(dtype) / _original(r)).clamp_min(r.factor) - (r.factor - 1)
        # a whole context of one pair has no slowest other: its theta has no effect
        return r.theta**-i * stretch[:, None] ** (-i * (dim / max(dim - 2, 1)))
    f = r.theta**-i
    if r.kind == "linear":
        return f / r.factor
    if r.kind == "llama3":
        turns = _original(r) * f / (2 * math.pi)  # L / wavelength
        kept = ((turns - r.low_freq) / (r.high_freq - r.low_freq)).clamp(0, 1)
        return f * (kept + (1 - kept) / r.factor)
    if r.kind == "yarn":
        low, high = (_pair_that_turns(n, r, dim) for n in (r.beta_fast, r.beta_slow))
        if r.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, device=device).to(dtype) - low) / (high - low if high != low else 0.001)
        kept = 1 - ramp.clamp(0, 1)
        return f * (kept + (1 - kept) / r.factor)
    return f


def _original(r: Rope) -> int:
    assert r.original_len is not None
    return r.original_len


def _pair_that_turns(times: float, r: Rope, dim: int) -> float:
    """i where L · theta^(-2i/dim) = 2π · times."""
    return dim * math.log(_original(r) / (times * 2 * math.pi)) / (2 * math.log(r.theta))


def magnitude(r: Rope) -> float:
    """What cos and sin are multiplied by: √(1/temperature) of the softmax, on q and on k (YaRN §3.4)."""
    if r.kind != "yarn":
        return 1.0
    if r.attention_factor is not None:
        return r.attention_factor
    if r.mscale and r.mscale_all_dim:
        return _mscale(r.factor, r.mscale) / _mscale(r.factor, r.mscale_all_dim)
    return _mscale(r.factor, 1.0)


def _mscale(factor: float, m: float) -> float:
    return 0.1 * m * math.log(factor) + 1.0


def rope_table(positions: Tensor, lengths: Tensor, head_dim: int, r: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin (t, d/2) of position · frequency, worked out in at least float32 and returned in `dtype`.

    positions (t,): place in the document. lengths (t,): tokens of the document, as far as they are in this row.
    """
    wider = wide(dtype)
    f = frequencies(r, r.dim or head_dim, wider, positions.device, lengths)
    angle, m = positions.to(wider)[:, None] * f, magnitude(r)
    return (angle.cos() * m).to(dtype), (angle.sin() * m).to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (t, heads, head dim), cos and sin (t, d/2) in the dtype of x → x with each pair (i, i + d/2) of its first d dims turned by its angle."""
    turned = 2 * cos.shape[-1]
    if turned == x.shape[-1]:
        a, b = x.chunk(2, -1)
        rest = ()
    else:
        a, b, *rest = x.split([turned // 2, turned // 2, x.shape[-1] - turned], -1)  # type: ignore[assignment]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, *rest], -1)

"""Learning rates as functions of the step, a device scalar: reading it never makes the host wait."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lf.config import ConfigError
from lf.optim.base import Rate


def constant(lr: float) -> Rate:
    return lambda step: torch.full((), lr, device=step.device)


def warmup_cosine(lr: float, warmup: int, steps: int, final: float = 0.1) -> Rate:
    """Rises linearly over `warmup` steps to lr, then falls along half a cosine to final·lr at the last of `steps`.

    lr(s) = lr · (s+1)/warmup for s < warmup, else lr · (final + (1-final) · (1 + cos(π·(s-warmup)/(steps-1-warmup)))/2)
    (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, without restarts).
    """
    if not 0 <= warmup <= steps:
        raise ConfigError(f"warmup={warmup} must lie between 0 and steps={steps}")
    if lr < 0 or not 0 <= final <= 1:
        raise ConfigError(f"lr={lr} must not be negative, and final={final} must lie between 0 and 1")

    def rate(step: Tensor) -> Tensor:
        s = step.to(torch.float32)
        rising = (s + 1) / max(warmup, 1)
        done = ((s - warmup) / max(steps - 1 - warmup, 1)).clamp(0, 1)
        falling = final + (1 - final) * (1 + torch.cos(math.pi * done)) / 2
        return lr * torch.where(s < warmup, rising, falling)

    return rate

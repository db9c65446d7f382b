"""Learning rates as functions of the step, a device scalar: reading it never makes the host wait.

All rise linearly over `warmup` steps, lr(s) = lr · (s+1)/warmup, and then go their own way down to `final`·lr at the last of `steps`, where they
stay. With d the share of the way down that is done, from 0 to 1:

    cosine      final + (1-final) · (1 + cos(π·d))/2     half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, without restarts)
    linear      1 - (1-final) · d
    wsd         1, and in the last `decay` steps linear  warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395; Hägele et al. 2024, 2405.18392)
    constant    1
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lf.config import ConfigError, one_of
from lf.optim.base import Rate

SCHEDULES = ("constant", "cosine", "linear", "wsd")


def schedule(name: str, lr: float, warmup: int, steps: int, final: float = 0.1, decay: float = 0.1) -> Rate:
    """The rate of this name, one of SCHEDULES. `decay`: how long wsd falls, below 1 a share of `steps`, else so many steps.

    Raises ConfigError for an unknown name and for numbers that cannot be.
    """
    if one_of("lr_schedule", name, SCHEDULES) == "wsd":
        return warmup_stable_decay(lr, warmup, steps, final, decay)
    _within(lr, warmup, steps, final)  # also where a constant rate would not use them
    if name == "constant":
        return constant(lr, warmup)
    return (warmup_cosine if name == "cosine" else warmup_linear)(lr, warmup, steps, final)


def constant(lr: float, warmup: int = 0) -> Rate:
    return _warmed(lr, warmup, torch.ones_like)


def warmup_cosine(lr: float, warmup: int, steps: int, final: float = 0.1) -> Rate:
    """lr(s) = lr · (final + (1-final) · (1 + cos(π·(s-warmup)/(steps-1-warmup)))/2) after the warm-up."""
    _within(lr, warmup, steps, final)
    return _warmed(lr, warmup, lambda s: final + (1 - final) * (1 + torch.cos(math.pi * _done(s, warmup, steps))) / 2)


def warmup_linear(lr: float, warmup: int, steps: int, final: float = 0.1) -> Rate:
    """lr(s) = lr · (1 - (1-final) · (s-warmup)/(steps-1-warmup)) after the warm-up."""
    _within(lr, warmup, steps, final)
    return _warmed(lr, warmup, lambda s: 1 - (1 - final) * _done(s, warmup, steps))


def warmup_stable_decay(lr: float, warmup: int, steps: int, final: float = 0.1, decay: float = 0.1) -> Rate:
    """lr after the warm-up, and in the last steps linearly down: `decay` below 1 is their share of `steps` (rounded), else their number.

    A run that stops before it falls can go on with a larger `steps`: until there the rate does not depend on it.
    """
    _within(lr, warmup, steps, final)
    if not 0 <= decay < math.inf or (decay >= 1 and decay != int(decay)):
        raise ConfigError(f"decay={decay} must be a share of the steps, from 0 to below 1, or a whole number of steps")
    falling = round(decay * steps) if decay < 1 else int(decay)
    if warmup + falling > steps:
        raise ConfigError(f"warmup={warmup} and a decay of {falling} steps are more than steps={steps}; make one of them shorter")
    start = steps - falling - 1  # the last step at the full rate
    return _warmed(lr, warmup, lambda s: 1 - (1 - final) * (_done(s, start, steps) if falling else torch.zeros_like(s)))


def _within(lr: float, warmup: int, steps: int, final: float) -> None:
    if not 0 <= warmup <= steps:
        raise ConfigError(f"warmup={warmup} must lie between 0 and steps={steps}: warm up for fewer, or take more")
    if not (0 <= lr < math.inf and 0 <= final <= 1):
        raise ConfigError(f"lr={lr} must not be negative, and final={final} must lie between 0 and 1")


def _done(s: Tensor, start: int, steps: int) -> Tensor:
    """How much of the way from step `start` to the last of `steps` is done at s, from 0 to 1."""
    return ((s - start) / max(steps - 1 - start, 1)).clamp(0, 1)


def _warmed(lr: float, warmup: int, falling: Callable[[Tensor], Tensor]) -> Rate:
    def rate(step: Tensor) -> Tensor:
        s = step.to(torch.float32)
        rising = (s + 1) / max(warmup, 1)
        return lr * torch.where(s < warmup, rising, falling(s))

    return rate

"""Optimizers as pairs of pure functions over trees."""

from lf.optim.adamw import adamw
from lf.optim.base import Optimizer
from lf.optim.ema import ema
from lf.optim.groups import groups, times
from lf.optim.lr import constant, schedule, warmup_cosine, warmup_linear, warmup_stable_decay
from lf.optim.muon import muon
from lf.optim.named import named
from lf.optim.on_host import on_host
from lf.optim.sgd import sgd

__all__ = [
    "Optimizer",
    "adamw",
    "constant",
    "ema",
    "groups",
    "muon",
    "named",
    "on_host",
    "schedule",
    "sgd",
    "times",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]

"""Optimizers as pairs of pure functions over trees."""

from lf.optim.adamw import adamw
from lf.optim.base import Optimizer
from lf.optim.lr import constant, warmup_cosine
from lf.optim.sgd import sgd

__all__ = ["Optimizer", "adamw", "constant", "sgd", "warmup_cosine"]

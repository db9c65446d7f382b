"""An optimizer in the words of the scripts' flags."""

from __future__ import annotations

from lf.config import ConfigError, one_of
from lf.optim.adamw import adamw
from lf.optim.base import Optimizer, Rate
from lf.optim.ema import ema as averaged
from lf.optim.muon import muon
from lf.optim.on_host import on_host
from lf.optim.sgd import sgd

OPTIMIZERS = ("adamw", "muon", "sgd")


def named(
    name: str,
    rate: Rate,
    weight_decay: float = 0.1,
    moments: str = "fp32",
    ema: float | None = None,
    offload: float | None = None,
    muon_way: str | None = None,
    seed: int = 0,
) -> Optimizer:
    """`moments`: fp32 or bf16, rounded by chance · `ema`: the decay of an average of the weights that is kept beside them · `offload`: the share of
    layers whose state lies in the host's memory · `muon_way`: who makes Muon's products (default: "owner").

    Raises ConfigError for a word that says nothing here: Muon's of another optimizer, and sgd with moments in bf16, for it has none."""
    one_of("optimizer", name, OPTIMIZERS)
    if muon_way is not None and name != "muon":
        raise ConfigError(f"muon_way={muon_way!r} is of Muon, and the optimizer is {name}; leave it out, or take muon")
    if name == "sgd" and moments != "fp32":
        raise ConfigError(f"moments={moments!r}: sgd has none; leave it out, or take adamw or muon")
    if name == "sgd" and offload is not None and ema is None:
        raise ConfigError(f"offload={offload}: sgd keeps nothing but the weights, which stay on the device; leave it out")
    if name == "sgd":
        out = sgd(rate)
    elif name == "adamw":
        out = adamw(rate, weight_decay=weight_decay, moments=moments, seed=seed)
    else:
        out = muon(rate, weight_decay=weight_decay, way=muon_way or "owner", moments=moments, seed=seed)
    out = out if ema is None else averaged(out, ema)
    return out if offload is None else on_host(out, offload)

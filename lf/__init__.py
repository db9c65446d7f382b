"""lf trains large models as stateless functions, sharding specs and programs, straight on torch.distributed.

Names are loaded when first used, so `import lf` is quick and loads no kernel, no Hugging Face library and no GPU library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; the table below is what runs
    from lf import (
        checkpoint,
        cli,
        config,
        console,
        context,
        data,
        devices,
        drift,
        evaluate,
        expert_picture,
        log,
        loop,
        memory,
        meter,
        models,
        optim,
        parity,
        pictures,
        pipeline,
        plan,
        ramp,
        record,
        runs,
        schedule,
        signals,
        sim,
        split,
        train,
        tree,
    )
    from lf.axes import connect, solo
    from lf.batch import IGNORE, Batch
    from lf.chain_layouts import Place
    from lf.chains import Chain, Chains, Edge
    from lf.checkpoint import hf
    from lf.context import Context
    from lf.layouts import layout
    from lf.mesh import Mesh
    from lf.parallel.redistribute import I, P, R, S, exchange, redistribute, shift
    from lf.pictures import show
    from lf.state import State, forward, init, shard_batch

_MODULES = (
    *("checkpoint", "cli", "config", "console", "context", "data", "devices", "drift", "evaluate", "expert_picture", "log", "loop", "memory"),
    *("meter", "models", "optim", "parity", "pictures", "pipeline", "plan", "ramp", "record", "runs", "schedule", "signals", "sim", "split", "train"),
    "tree",
)
_NAMES = {
    "lf.axes": ("connect", "solo"),
    "lf.batch": ("IGNORE", "Batch"),
    "lf.chain_layouts": ("Place",),
    "lf.chains": ("Chain", "Chains", "Edge"),
    "lf.context": ("Context",),
    "lf.layouts": ("layout",),
    "lf.mesh": ("Mesh",),
    "lf.parallel.redistribute": ("I", "P", "R", "S", "exchange", "redistribute", "shift"),
    "lf.pictures": ("show",),
    "lf.state": ("State", "forward", "init", "shard_batch"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["hf", *_MODULES, *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"lf.{name}")
    elif name == "hf":
        value = importlib.import_module("lf.checkpoint.hf")
    else:
        raise AttributeError(f"module 'lf' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

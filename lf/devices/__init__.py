"""One plain module per device, with the same names in each; chosen by name, never guessed.

    NAME       as given to --device                BACKEND   torch.distributed's backend
    FLOAT64    whether float64 can be used         OPS       name of an op → where its fastest function here lives
    found()    what of this device the machine has, in words, or ''
    torch_device(local_rank) -> torch.device
    peak_flops(dtype) -> float | None    floating-point operations a second at most, where that is known
    memory_peak() -> int, memory_limit() -> int    bytes held at most so far, and bytes that may be held
"""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace

from lf.cluster import count_devices
from lf.config import ConfigError, one_of

KNOWN = ("cpu",)
PLANNED = ("cuda", "kunlun")


def get(name: str | None) -> ModuleType:
    """The device's module. Raises ConfigError that tells what this machine has when no name, or an unknown one, is given."""
    if not name:
        found = {n: words for n in KNOWN if (words := _module(n).found())}
        later = {n: f"{count}; not built yet" for n in PLANNED if (count := count_devices(n, {}))}  # all there are, not only those of this job
        have = ", ".join(f"{n} ({words})" for n, words in {**found, **later}.items())
        raise ConfigError(f"no device named; found here: {have}. Add {' or '.join(f'--device {n}' for n in found)}")
    if name in PLANNED:
        raise ConfigError(f"device {name!r} is not built yet; use --device cpu")
    return _module(one_of("device", name, KNOWN))


def op_table(device: ModuleType) -> SimpleNamespace:
    """The device's ops as attributes: ops.attention(...)."""
    return SimpleNamespace(**{name: _function(place) for name, place in device.OPS.items()})


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"lf.devices.{name}")


def _function(place: str) -> object:
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)

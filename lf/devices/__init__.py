"""One plain module per device, with the same names in each; chosen by name, never guessed.

    NAME       as given to --device                BACKEND   torch.distributed's backend
    FLOAT64    whether float64 can be used         OPS       name of an op → where its fastest function here lives
    found()    what of this device the machine has, in words, or ''
    missing()  why it cannot be used here, or ''
    no_compiler()              why torch.compile cannot work on it here, or ''
    torch_device(local_rank) -> torch.device
    select(local_rank)          this process works on that device from now on
    peak_flops(dtype)           floating-point operations a second of one device at most, None where unknown
    memory_peak()               bytes taken up at most so far by this process; memory_total(): that there are
    memory_now()                bytes that tensors take up now, None where that is not known
    moment(), seconds(a, b)     when the work so far is done, and the time between two such moments, to be read once both have passed
    copy_streams()              where copies to and from the host's memory run beside the computation; given to the two below
    copy_out(sources, chunk, streams) -> (pieces of each, after)    starts copying (n,) bytes each to the host's memory, in pieces of at most
                                `chunk`; the sources may be dropped at once; after(): the current stream waits for all of it
    copy_in(pieces, device, after, streams) -> ((n,) bytes, wait)   starts copying one source's pieces back, once `after` them; wait(): the
                                current stream waits for them
    copy_beside(pairs, way, after, streams) -> wait     starts copying (to, from) of equal shapes, once `after` them, to the host's memory (way 0) or
                                from it (1); wait(): the current stream waits for them
"""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace

from lf.cluster import count_devices
from lf.config import ConfigError, one_of

KNOWN = ("cpu", "cuda")
PLANNED = ("kunlun",)


def get(name: str | None) -> ModuleType:
    """The device's module. Raises ConfigError that tells what this machine has when no name, or an unknown one, is given."""
    if not name:
        found = {n: words for n in KNOWN if (words := _module(n).found())}
        # all there are, not only those of this job
        others = {n: count for n in (*KNOWN, *PLANNED) if n not in found and (count := count_devices(n, {}))}
        unused = {n: f"{count}; {'not built yet' if n in PLANNED else _module(n).missing()}" for n, count in others.items()}
        have = ", ".join(f"{n} ({words})" for n, words in {**found, **unused}.items())
        raise ConfigError(f"no device named; found here: {have}. Add {' or '.join(f'--device {n}' for n in found)}")
    if name in PLANNED:
        raise ConfigError(f"device {name!r} is not built yet; use {' or '.join(f'--device {n}' for n in KNOWN)}")
    device = _module(one_of("device", name, KNOWN))
    if why := device.missing():
        raise ConfigError(f"device {name!r} cannot be used here: {why}. Use --device cpu, or an environment whose torch is made for it (LF_PYTHON)")
    return device


def op_table(device: ModuleType) -> SimpleNamespace:
    """The device's ops as attributes: ops.attention(...)."""
    return SimpleNamespace(**{name: _function(place) for name, place in device.OPS.items()})


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"lf.devices.{name}")


def _function(place: str) -> object:
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)

"""What is known of a kind of device without having one: for a plan (`lf.plan`), not for a run.

Each value says where it was read. What no datasheet gives is None: a plan that needs it says which and by what it can be given, and never guesses.
Rates are per device and of dense arithmetic; links are one way, which is half of what a datasheet adds up for both.

`measured` finds the same of the device at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import attrs
import torch

from lf.config import ConfigError, one_of

GB, TB, TERA = 1e9, 1e12, 1e12
KINDS = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@attrs.frozen
class Value:
    """A number and where it was read."""

    amount: float
    source: str


@attrs.frozen
class Described:
    """A kind of device. memory: bytes · bf16, fp8, fp32, fp64: floating-point operations a second at most, of products · bandwidth: of its memory,
    bytes a second · link: to another device of its node, one way · node: devices of a node · network: to a device of another node, one way, where
    all of a node send at once · note: what else is to be known. None: unknown."""

    name: str
    memory: Value | None = None
    bf16: Value | None = None
    fp8: Value | None = None
    fp32: Value | None = None
    fp64: Value | None = None
    bandwidth: Value | None = None
    link: Value | None = None
    node: Value | None = None
    network: Value | None = None
    note: str = ""

    def need(self, name: str) -> float:
        """The value of this name. Raises ConfigError where it is not known."""
        value: Value | None = getattr(self, name)
        if value is None:
            note = f" ({self.note})" if self.note else ""
            raise ConfigError(
                f"device {self.name}: {name} is not known{note}; give it, as attrs.evolve(device, {name}=Value(…, 'my measurement')), or plan with "
                "lf.devices.described.measured(device, axes) on such a machine"
            )
        return value.amount

    def peak(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second at most of products in this dtype. Raises ConfigError where that is not known."""
        return self.need(KINDS[dtype])

    def with_(self, **values: float) -> Described:
        """The same with these values, of the user's own knowledge."""
        given: dict[str, Any] = {name: Value(amount, "given") for name, amount in values.items()}
        return attrs.evolve(self, **given)


def _each(source: str, **amounts: float) -> dict[str, Any]:
    return {name: Value(amount, source) for name, amount in amounts.items()}


_H100 = "NVIDIA H100 datasheet (2023), SXM5; half of what it gives with sparsity"
_H200 = "NVIDIA H200 datasheet (2024), SXM; half of what it gives with sparsity"
_B200 = "NVIDIA Blackwell architecture technical brief (2024), HGX B200, dense"
_A100 = "NVIDIA A100 datasheet (2021), 80 GB SXM, dense"
_TOGETHER = "half of the 900 GB/s both ways of NVLink 4, "

DESCRIBED = {
    "h100": Described(
        "h100",
        **_each(_H100, bf16=989.4 * TERA, fp8=1978.9 * TERA),
        **_each("NVIDIA H100 datasheet (2023), SXM5", bandwidth=3.35 * TB, fp32=67 * TERA, fp64=67 * TERA),
        **_each("read by torch from an H100 80GB HBM3, of which the datasheet says 80 GB", memory=85_017_493_504),
        **_each(_TOGETHER + "NVIDIA H100 datasheet (2023)", link=450 * GB),
        **_each("NVIDIA DGX H100 datasheet (2023): 8 devices, 8 adapters of 400 Gb/s", node=8, network=50 * GB),
    ),
    "h200": Described(
        "h200",
        **_each(_H200, bf16=989.4 * TERA, fp8=1978.9 * TERA),
        **_each("NVIDIA H200 datasheet (2024), SXM", bandwidth=4.8 * TB, fp32=67 * TERA, fp64=67 * TERA),
        **_each("read by nvidia-smi from an H200, of which the datasheet says 141 GB: 143771 MiB", memory=143771 * 2**20),
        **_each(_TOGETHER + "NVIDIA H200 datasheet (2024)", link=450 * GB),
        **_each("NVIDIA DGX H200 datasheet (2024): 8 devices, 8 adapters of 400 Gb/s", node=8, network=50 * GB),
    ),
    "b200": Described(
        "b200",
        **_each(_B200, bf16=2250 * TERA, fp8=4500 * TERA, fp32=80 * TERA, fp64=40 * TERA),
        **_each("NVIDIA DGX B200 datasheet (2024): 1440 GB and 64 TB/s for 8 devices", memory=180 * GB, bandwidth=8 * TB),
        **_each("NVIDIA DGX B200 datasheet (2024): half of 14.4 TB/s both ways for 8 devices", link=900 * GB),
        **_each("NVIDIA DGX B200 datasheet (2024): 8 devices, 8 adapters of 400 Gb/s", node=8, network=50 * GB),
    ),
    "a100": Described(
        "a100",
        **_each(_A100, bf16=312 * TERA, fp32=19.5 * TERA, fp64=19.5 * TERA, memory=80 * GB, bandwidth=2.039 * TB),
        **_each("half of the 600 GB/s both ways of NVLink 3, NVIDIA A100 datasheet (2021)", link=300 * GB),
        **_each("NVIDIA DGX A100 datasheet (2020): 8 devices, 8 adapters of 200 Gb/s", node=8, network=25 * GB),
        note="it has no fp8 products",
    ),
    "p800": Described(
        "p800",
        **_each("PaddlePaddle's installation page for XPU P800: 98304 MiB", memory=98304 * 2**20),
        **_each("PaddlePaddle's installation page for XPU P800: 8 devices", node=8),
        note="Kunlun has published no datasheet with it",
    ),
}
"""By name. Of fp32 the rate is that of plain float32, not of TF32."""


def described(name: str) -> Described:
    """The device of this name, one of DESCRIBED. Raises ConfigError for another."""
    return DESCRIBED[one_of("device to plan for", name.lower(), DESCRIBED)]


def measured(device: ModuleType, axes: Any = None, local_rank: int = 0, size: int = 0) -> Described:
    """What this machine's device does, each the best of several runs: products of `size` (default: as large as is quick here), copies, and, with
    axes of several ranks, an all-reduce over all of them as `network`, and as `link` where one node has them. Collective over these ranks.

    device: of `lf.devices.get`. A rate of products is what is achieved, so that a plan with it needs no share of a peak (`Achieved(1, 1)`).
    """
    at, accelerator = device.torch_device(local_rank), device.NAME != "cpu"
    n = size or (8192 if accelerator else 768)
    source = "measured here"
    out: dict[str, Any] = {"memory": Value(float(device.memory_total()), source)}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=at).to(dtype) for _ in range(2))
        out[KINDS[dtype]] = Value(2.0 * n**3 / _best(partial(torch.mm, a, b), device), f"{source}: torch.mm of {n}³ in {KINDS[dtype]}")
    x, y = (torch.empty(n * n * 8, dtype=torch.uint8, device=at) for _ in range(2))
    out["bandwidth"] = Value(2.0 * len(x) / _best(partial(x.copy_, y), device), f"{source}: a copy, read and written")
    if axes is not None and axes.world.size > 1:
        x, ranks = torch.ones(n * n, device=at), axes.world.size
        moved = 2.0 * (ranks - 1) / ranks * x.numel() * x.element_size()
        rate = Value(moved / _best(partial(axes.world.all_reduce, x), device), f"{source}: all-reduce over {ranks} ranks, as much as each sends")
        out |= {"link": rate, "network": rate, "node": Value(float(ranks), source)}
    return Described(device.NAME, **out)


def _best(fn: Callable[[], Any], device: ModuleType, times: int = 5) -> float:
    """Seconds of one call, the quickest of several after one that warms up."""
    fn()
    found = []
    for _ in range(times):
        start = device.moment()
        fn()
        found.append(device.seconds(start, device.moment()))
    return max(min(found), 1e-9)

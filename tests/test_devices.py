"""Devices are named, never guessed; their op tables and contexts; law 7: each op has a readable twin of the same signature."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from helpers import context

import lf
import lf.kernels
import lf.ops
from lf.config import ConfigError
from lf.context import PRECISIONS, Precision

NAMES = ("NAME", "BACKEND", "FLOAT64", "OPS")
FUNCTIONS = (
    *("found", "missing", "no_compiler", "torch_device", "select", "peak_flops", "memory_peak", "memory_total"),
    *("memory_now", "moment", "seconds", "copy_streams", "copy_out", "copy_in", "copy_beside"),
)


def test_every_device_has_the_same_names() -> None:
    for name in (*lf.devices.KNOWN, "paper"):
        device = importlib.import_module(f"lf.devices.{name}")
        assert name == device.NAME
        assert all(hasattr(device, n) for n in NAMES)
        assert [inspect.signature(getattr(device, n)) for n in FUNCTIONS] == [inspect.signature(getattr(lf.devices.cpu, n)) for n in FUNCTIONS]


def test_the_twins_are_a_table_like_a_devices() -> None:
    for name in (*lf.devices.KNOWN, "paper"):
        assert importlib.import_module(f"lf.devices.{name}").OPS.keys() == lf.ops.OPS.keys()
    assert lf.devices.op_table(lf.ops).rope is importlib.import_module("lf.ops.rope").rope


def test_no_name_says_what_is_here() -> None:
    with pytest.raises(ConfigError, match=r"no device named; found here: cpu \(\d+ cores\).* Add .*--device cpu"):
        lf.devices.get(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where CUDA is")
def test_an_accelerator_that_cannot_be_used_is_told(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what the machine has, not what this job may use
    monkeypatch.setattr(lf.cluster.glob, "glob", lambda pattern: [f"/dev/x{i}" for i in range(8 if "nvidia" in pattern else 2)])
    with pytest.raises(ConfigError, match=r"cpu \(\d+ cores\), cuda \(8; torch .*CUDA.*\), kunlun \(2; not built yet\)\. Add --device cpu$"):
        lf.devices.get(None)
    with pytest.raises(ConfigError, match=r"device 'cuda' cannot be used here: torch .*CUDA.* Use --device cpu"):
        lf.devices.get("cuda")


def test_peaks_of_cards_and_none_where_unknown(monkeypatch) -> None:
    from lf.devices import cpu, cuda

    for name, peak in (("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA X9", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert cuda.peak_flops(torch.bfloat16) == peak
        assert cuda.peak_flops(torch.float32) is None
    assert cpu.peak_flops(torch.bfloat16) is None
    assert 0 < cpu.memory_peak() < cpu.memory_total()


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown device 'cpux'; did you mean 'cpu'"):
        lf.devices.get("cpux")


def public(package: ModuleType) -> dict[str, Callable[..., object]]:
    """The functions that the modules of a package define and do not hide."""
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return {n: f for m in modules for n, f in inspect.getmembers(m, inspect.isfunction) if f.__module__ == m.__name__ and n[0] != "_"}


def test_every_op_and_every_kernel_has_a_readable_twin_of_the_same_signature() -> None:
    """That both give the same values: tests/ops."""
    twins, kernels = public(lf.ops), public(lf.kernels)
    assert kernels
    for name in lf.devices.KNOWN:
        table = vars(lf.devices.op_table(importlib.import_module(f"lf.devices.{name}")))
        assert all(callable(function) for function in table.values())
        for op, function in {**table, **kernels}.items():
            assert inspect.signature(function) == inspect.signature(twins[op]), op


def test_precisions() -> None:
    ctx = context(lf.solo(), "bf16")
    assert ctx.precision == Precision(torch.bfloat16, torch.float32)
    assert all(p.master == torch.promote_types(p.compute, torch.float32) for p in PRECISIONS.values())
    with pytest.raises(ConfigError, match="unknown precision 'bf17'; did you mean 'bf16'"):
        context(lf.solo(), "bf17")

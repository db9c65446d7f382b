"""Devices are named, never guessed; their op tables and contexts; law 7: each op has a readable twin of the same signature."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import context

import lf
from lf.config import ConfigError
from lf.context import PRECISIONS, Precision

NAMES = ("NAME", "BACKEND", "FLOAT64", "OPS", "found", "torch_device")


def test_every_device_has_the_same_names() -> None:
    for name in lf.devices.KNOWN:
        device = lf.devices.get(name)
        assert name == device.NAME
        assert all(hasattr(device, n) for n in NAMES)


def test_no_name_says_what_is_here() -> None:
    with pytest.raises(ConfigError, match=r"no device named; found here: cpu \(\d+ cores\).* Add .*--device cpu"):
        lf.devices.get(None)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown device 'cpux'; did you mean 'cpu'"):
        lf.devices.get("cpux")


def test_ops_are_functions_with_the_signature_of_their_twin() -> None:
    twins = {"attention": "lf.ops.attention.attention"}
    for name, function in vars(lf.devices.op_table(lf.devices.get("cpu"))).items():
        assert callable(function), name
        if name in twins:
            assert list(inspect.signature(function).parameters) == list(inspect.signature(lf.devices._function(twins[name])).parameters)


def test_precisions() -> None:
    ctx = context(lf.solo(), "bf16")
    assert ctx.precision == Precision(torch.bfloat16, torch.float32)
    assert all(p.master == torch.promote_types(p.compute, torch.float32) for p in PRECISIONS.values())
    with pytest.raises(ConfigError, match="unknown precision 'bf17'; did you mean 'bf16'"):
        context(lf.solo(), "bf17")

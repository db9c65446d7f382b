"""Devices as their datasheets describe them: each value with its source, what is unknown named, and the one at hand measured."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from helpers import processes

import lf
from lf.config import ConfigError
from lf.devices import cuda
from lf.devices.described import DESCRIBED, Described, Value, described, measured

FIELDS = [f.name for f in attrs.fields(Described) if f.name not in ("name", "note")]


@pytest.mark.parametrize("name", DESCRIBED)
def test_each_value_has_a_source(name: str) -> None:
    device = described(name.upper())
    assert device.name == name
    values = [value for field in FIELDS if (value := getattr(device, field)) is not None]
    assert len(values) >= 2
    assert all(isinstance(v, Value) and v.amount > 0 and len(v.source) > 20 for v in values)


def test_they_are_those_that_a_run_on_such_a_card_counts_with() -> None:
    for name, card in (("h100", "H100"), ("h200", "H200"), ("b200", "B200"), ("a100", "A100")):
        assert described(name).peak(torch.bfloat16) == cuda.PEAKS[card]


def test_what_is_unknown_is_named_and_may_be_given() -> None:
    kunlun = described("p800")
    assert kunlun.need("memory") == 98304 * 2**20
    for field in ("bf16", "fp8", "fp32", "bandwidth", "link", "network"):
        with pytest.raises(ConfigError, match=rf"device p800: {field} is not known \(Kunlun has published no datasheet with it\); give it"):
            kunlun.need(field)
    assert kunlun.with_(bf16=1e14).peak(torch.bfloat16) == 1e14
    with pytest.raises(ConfigError, match=r"device a100: fp8 is not known.*no fp8"):
        described("a100").need("fp8")
    with pytest.raises(ConfigError, match="did you mean 'h200'"):
        described("h20")


def test_this_machine_is_measured() -> None:
    device = measured(lf.devices.get("cpu"), size=64)
    assert device.need("memory") == lf.devices.get("cpu").memory_total()
    for field in ("bf16", "fp32", "bandwidth"):
        assert 1e6 < device.need(field) < 1e16
        assert "measured here" in getattr(device, field).source
    with pytest.raises(ConfigError, match="device cpu: link is not known"):
        device.need("link")


def _linked(axes: Any) -> float:
    return measured(lf.devices.get("cpu"), axes, size=64).need("network")


def test_ranks_measure_what_is_between_them() -> None:
    assert all(1e3 < rate < 1e13 for rate in processes(2, _linked))

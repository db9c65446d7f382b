"""Configs: near names in errors, JSON and back, what differs."""

from __future__ import annotations

import json

import attrs
import pytest

from lf.config import ConfigError, at_least, differing, from_dict, one_of, read, to_dict


@attrs.frozen
class Inner:
    width: int = 3


@attrs.frozen
class Config:
    name: str
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)
    clip: float | None = None


def test_json_and_back(tmp_path) -> None:
    config = Config("a", Inner(7), (3,), 0.5)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    assert read(Config, file) == config
    assert from_dict(Config, {"name": "b"}) == Config("b")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nam": "a"}, "unknown field in config: 'nam'; did you mean 'name'? Known: clip, inner, name, sizes"),
        ({"zzz": 1}, "unknown field in config: 'zzz'. Known: "),
        ({"name": "a", "inner": {"width": "x"}}, "width"),
        ({}, "name"),
    ],
)
def test_a_wrong_field_is_named(values: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, values)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_no_config(tmp_path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="config"):
        read(Config, file)
    with pytest.raises(ConfigError, match="cannot read config"):
        read(Config, tmp_path / "none.json")


def test_at_least_names_every_flag() -> None:
    at_least(7, Inner(7), "width")
    with pytest.raises(ConfigError, match=r"^--width 3: must be at least 4$"):
        at_least(4, Inner(), "width")
    with pytest.raises(ConfigError, match=r"^--clip nan: must be at least 0$"):
        at_least(0, Config("a", clip=float("nan")), "clip")


def test_one_of() -> None:
    assert one_of("device", "cpu", ("cpu", "gpu")) == "cpu"
    with pytest.raises(ConfigError, match="unknown device 'cpuu'; did you mean 'cpu'"):
        one_of("device", "cpuu", ("cpu", "gpu"))


def test_differing() -> None:
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == {"b": (2, 3), "c": (None, 4)}
    assert differing({"a": 1}, {"a": 1}) == {}

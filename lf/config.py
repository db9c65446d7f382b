"""Small helpers for frozen attrs configs: near names in errors, JSON and back, and what differs between two."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import cattrs

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be, or does not match."""


def one_of(what: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is one of `known`. Raises ConfigError with the near one and the list otherwise."""
    known = sorted(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown {what} {name!r}{hint or '.'} Known: {', '.join(known)}")


def at_least(limit: float, config: Any, *names: str) -> None:
    """Raises ConfigError that names every one of these fields whose value is below `limit`, by its flag."""
    if wrong := [f"--{name.replace('_', '-')} {value}" for name in names if not (value := getattr(config, name)) >= limit]:
        raise ConfigError(f"{', '.join(wrong)}: must be at least {limit}")


def to_dict(config: Any) -> dict[str, Any]:
    return cattrs.unstructure(config)


def from_dict(kind: type[T], values: dict[str, Any], where: str = "config") -> T:
    """An attrs config of type `kind`. Raises ConfigError that names an unknown field, with the near one, or a value of the wrong type."""
    fields = [a.name for a in attrs.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            one_of(f"field in {where}:", name, fields)
    try:
        return cattrs.structure(values, kind)
    except Exception as error:
        raise ConfigError(f"{where}: {'; '.join(cattrs.transform_error(error))}") from None


def read(kind: type[T], path: str | Path) -> T:
    """The config in a JSON file."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} should be a JSON object, is a {type(values).__name__}")
    return from_dict(kind, values, str(path))


def differing(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{field: (old, new)} where two configs differ; a field that one lacks counts, as None there."""
    return {k: (old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k)}

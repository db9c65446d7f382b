"""Small helpers for frozen attrs configs: near names in errors, JSON and back, and what differs between two."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import attrs
import cattrs

T = TypeVar("T")
NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


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


def between(low: float, high: float, config: Any, *names: str) -> None:
    """Raises ConfigError that names every one of these fields whose value does not lie between the two, themselves excluded; None passes."""
    given = {name: getattr(config, name) for name in names}
    if wrong := [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None and not low < value < high]:
        raise ConfigError(f"{', '.join(wrong)}: must lie between {low} and {high}")


def to_dict(config: Any) -> dict[str, Any]:
    return cattrs.unstructure(config)


def parse(text: str) -> Any:
    """What a JSON text says. Raises ValueError where it is none, and for a name that stands twice in an object: one of the two would be lost."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice; remove one")
    return out


def from_dict(kind: type[T], values: dict[str, Any], where: str = "config") -> T:
    """An attrs config of type `kind`. Raises ConfigError that names an unknown field, with the near one, or a value of the wrong type."""
    fields = [a.name for a in attrs.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            one_of(f"field in {where}:", name, fields)
    try:
        return _strict().structure(values, kind)
    except Exception as error:
        raise ConfigError(f"{where}: {'; '.join(cattrs.transform_error(error, format_exception=_words))}") from None


def _words(error: BaseException, kind: type | None) -> str:
    return str(error) if isinstance(error, TypeError) else cattrs.v.format_exception(error, kind)


def _strict() -> cattrs.Converter:
    """cattrs would make 15 of 15.5 and of "15", True of "no", and three words of one: here nothing but a whole number is a float as well."""
    converter = cattrs.Converter()

    def only(*kinds: type) -> Callable[[Any, type], Any]:
        def structure(value: Any, kind: type) -> Any:
            if type(value) not in kinds:
                raise TypeError(f"{value!r} is no {NAMES[kind]}")
            return kind(value)

        return structure

    def many(value: Any, kind: Any) -> Any:
        kinds = get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{value!r} is no list")
        if kinds[1:] == (...,):
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise TypeError(f"{value!r} has {len(value)} entries, not {len(kinds)}")
        return tuple(converter.structure(one, its) for one, its in zip(value, kinds))

    converter.register_structure_hook_func(lambda kind: get_origin(kind) is tuple, many)
    for kind, kinds in {int: (int,), float: (float, int), bool: (bool,), str: (str,)}.items():
        converter.register_structure_hook(kind, only(*kinds))
    return converter


def read(kind: type[T], path: str | Path) -> T:
    """The config in a JSON file."""
    try:
        values = parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} should be a JSON object, is a {type(values).__name__}")
    return from_dict(kind, values, str(path))


def differing(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{field: (old, new)} where two configs differ; a field that one lacks counts, as None there."""
    return {k: (old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k)}

"""Fields of a config.json."""

from __future__ import annotations

from typing import Any

MOST = 2**31 - 1  # of a whole number: nothing in a model is counted further
LAYERS = 10_000  # of a model at most: each is planned and checked before anything is made


def yes(values: dict[str, Any], name: str, bad: list[str], default: bool = False) -> bool:
    """values[name] if it is true or false; otherwise the default, and a line in `bad`. Missing or null: `default`."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        bad.append(f"{name}={value!r} should be true or false")
        return default
    return default if value is None else value


def number(
    values: dict[str, Any], name: str, kind: type[int] | type[float], bad: list[str], default: float | None = None, most: int = MOST
) -> Any:
    """values[name] if it is a number above 0 of this kind, a whole one up to `most`; otherwise None, and a line in `bad`.

    Missing or null: `default` if there is one."""
    value = values.get(name)
    if value is None and default is not None:
        return kind(default)
    if name not in values:
        bad.append(f"{name} is missing")
    elif isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < float("inf"):
        bad.append(f"{name}={value!r} should be a {'whole ' if kind is int else ''}number above 0")
    elif kind is int and value > most:
        bad.append(f"{name}={value!r} is more than {most}; is it a mistake?")
    else:
        return kind(value)
    return None


def whole(values: dict[str, Any], name: str, bad: list[str], default: int | None = 0) -> Any:
    """values[name] if it is a whole number, 0 or more; otherwise None, and a line in `bad`. Missing or null: `default`; without one it is missing."""
    value = values.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        bad.append(f"{name}={value!r} should be a whole number from 0 to {MOST}" if name in values else f"{name} is missing")
        return None
    return value


def weight(values: dict[str, Any], name: str, bad: list[str], default: float = 0.0) -> Any:
    """values[name] if it is a number, 0 or more; otherwise None, and a line in `bad`. Missing or null: `default`."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        bad.append(f"{name}={value!r} should be a number, 0 or more")
        return None
    return float(value)

"""Fields of a config.json."""

from __future__ import annotations

from typing import Any


def number(values: dict[str, Any], name: str, kind: type[int] | type[float], bad: list[str], default: float | None = None) -> Any:
    """values[name] if it is a number above 0 of this kind; otherwise None, and a line in `bad`. Missing or null: `default` if there is one."""
    value = values.get(name)
    if value is None and default is not None:
        return kind(default)
    if name not in values:
        bad.append(f"{name} is missing")
    elif isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < float("inf"):
        bad.append(f"{name}={value!r} should be a {'whole ' if kind is int else ''}number above 0")
    else:
        return kind(value)
    return None

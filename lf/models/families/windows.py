"""Sliding windows of a family: how a config.json says which layers have one.

    read(values, layers) -> the window of each layer      write(those) -> fields of config.json      each ConfigError where it cannot
"""

from __future__ import annotations

from typing import Any

from lf.config import ConfigError
from lf.models.families.fields import number, whole, yes

Windows = tuple[int | None, ...]


def no_windows(values: dict[str, Any], layers: int) -> Windows:
    return (None,) * layers


def write_no_windows(windows: Windows) -> dict[str, Any]:
    if set(windows) - {None}:
        raise ConfigError(f"it has no sliding windows; the model has one of {next(w for w in windows if w)}")
    return {}


def last_layers_slide(values: dict[str, Any], layers: int) -> Windows:
    """Qwen2 and Qwen3: `layer_types`, or from layer `max_window_layers` on; only where `use_sliding_window` is true."""
    bad: list[str] = []
    used = yes(values, "use_sliding_window", bad)
    window = number(values, "sliding_window", int, bad) if used else None
    if bad:
        raise ConfigError(f"use_sliding_window=True, and {bad[0]}" if used else bad[0])
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 28)
        if window and (isinstance(first, bool) or not isinstance(first, int) or first < 0):
            raise ConfigError(f"max_window_layers={first!r} should be a whole number, 0 or more")
        return tuple(window if window and i >= first else None for i in range(layers))
    if not isinstance(kinds, list) or (other := sorted({str(k) for k in kinds} - {"full_attention", "sliding_attention"})):
        what = ", ".join(map(repr, other)) if isinstance(kinds, list) else repr(kinds)
        raise ConfigError(f"layer_types has {what}, not supported; 'full_attention' and 'sliding_attention' are")
    if layers and len(kinds) != layers:
        raise ConfigError(f"layer_types lists {len(kinds)} layers, num_hidden_layers={layers}")
    if window is None and "sliding_attention" in kinds:
        raise ConfigError("layer_types has 'sliding_attention', but no window is in use: set use_sliding_window=true and sliding_window")
    return tuple(window if k == "sliding_attention" else None for k in kinds)


def write_last_layers_slide(windows: Windows) -> dict[str, Any]:
    sizes = set(windows) - {None}
    if len(sizes) > 1:
        raise ConfigError(f"its sliding windows are all of one size; the model has {', '.join(map(str, sorted(s for s in sizes if s)))}")
    fields: dict[str, Any] = {"use_sliding_window": bool(sizes), "sliding_window": next(iter(sizes), None)}
    first = next((i for i, w in enumerate(windows) if w), len(windows))
    fields["max_window_layers"] = first
    if not all(windows[first:]):  # older tools know only a first layer from which all slide
        fields["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return fields


def all_layers_slide(values: dict[str, Any], layers: int, missing: int | None = 4096) -> Windows:
    """Mistral: `sliding_window` in every layer; null is none, and a file without the field means what the class takes."""
    window, bad = values.get("sliding_window", missing), list[str]()
    if window is not None and number({"sliding_window": window}, "sliding_window", int, bad) is None:
        raise ConfigError(bad[0])
    alike = "sliding_attention" if window else "full_attention"
    if (kinds := values.get("layer_types")) is not None and not (isinstance(kinds, list) and all(kind == alike for kind in kinds)):
        raise ConfigError(f"layer_types={kinds!r} with sliding_window={window}: not supported, all layers are alike")
    return (window,) * layers


def write_all_layers_slide(windows: Windows) -> dict[str, Any]:
    if len(set(windows)) != 1:
        raise ConfigError("all its layers have one sliding window or none; those of the model differ")
    return {"sliding_window": windows[0]}


def all_layers_slide_if_used(values: dict[str, Any], layers: int) -> Windows:
    """Qwen3-MoE: `sliding_window` in every layer where `use_sliding_window` is true."""
    bad: list[str] = []
    used = yes(values, "use_sliding_window", bad)
    if bad:
        raise ConfigError(bad[0])
    return all_layers_slide(values if used else {}, layers, missing=4096 if used else None)


def write_all_layers_slide_if_used(windows: Windows) -> dict[str, Any]:
    return {"use_sliding_window": windows[0] is not None, **write_all_layers_slide(windows)}


def every_second_slides(values: dict[str, Any], layers: int) -> Windows:
    """GPT-OSS: `layer_types`, or every second layer from the first on; `sliding_window` tokens."""
    kinds = values.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    return last_layers_slide({"sliding_window": 128, **values, "use_sliding_window": True, "layer_types": kinds}, layers)


def every_second_slides_first(values: dict[str, Any], layers: int) -> Windows:
    """Qwen2-MoE: `layer_types`, or every second layer of the first `max_window_layers`; only where `use_sliding_window` is true."""
    bad: list[str] = []
    used, first = yes(values, "use_sliding_window", bad), whole(values, "max_window_layers", bad, 28)
    if bad:
        raise ConfigError(bad[0])
    kinds = ["sliding_attention" if used and i % 2 == 0 and i < first else "full_attention" for i in range(layers)]
    return last_layers_slide({"sliding_window": 4096, **values, "layer_types": values.get("layer_types") or kinds}, layers)


def write_listed(windows: Windows) -> dict[str, Any]:
    """Fields that list the layers with a window."""
    fields = write_last_layers_slide(windows)
    return {**fields, "layer_types": ["sliding_attention" if w else "full_attention" for w in windows]}

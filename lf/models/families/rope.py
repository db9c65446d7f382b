"""Rotary positions in a config.json: the keys of transformers 4 (rope_theta, rope_scaling, partial_rotary_factor) and 5 (rope_parameters).

What transformers makes of a missing key holds here as well: theta 10000 in most classes, L (`original_max_position_embeddings`)
max_position_embeddings. Partial rotary positions are read and written as `partial_rotary_factor`; which families have them, `Dialect.partial` says.
"""

from __future__ import annotations

import math
from typing import Any

import attrs

from lf.config import ConfigError
from lf.models.families.fields import number, yes
from lf.ops.rope import KINDS, Rope

FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq",
        "high_freq_factor": "high_freq",
        "original_max_position_embeddings": "original_len",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_len",
        **{name: name for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")},
    },
}
"""Kind → {key in the file: field of Rope}."""
REQUIRED = {"linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


def read_rope(values: dict[str, Any], head_dim: int | None, max_len: int | None, bad: list[str], theta: float = 10000.0) -> Any:
    """The Rope that a config.json asks for; None, and lines in `bad`, where it cannot be built. theta: where the file says none."""
    before = len(bad)
    found = [("", {k: values[k] for k in ("rope_theta", "partial_rotary_factor") if values.get(k) is not None})]
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            bad.append(f"{name}={rope!r} should be an object")
            continue
        given = {k: v for k, v in rope.items() if v is not None}
        if "type" in given:
            given.setdefault("rope_type", given.pop("type"))
        found.append((name + ".", given))
    merged: dict[str, Any] = {}
    for prefix, given in found:
        for key, value in given.items():
            if key in merged and merged[key] != value:
                bad.append(f"{key}={merged[key]!r} and {prefix}{key}={value!r}: these should be equal")
            merged.setdefault(key, value)
    kind = merged.pop("rope_type", "default")
    if kind == "mrope":
        kind = "mrope (positions of images)"
    if kind not in KINDS:
        bad.append(f"rope_type={kind!r} is not supported; {', '.join(KINDS)} are")
        return None
    made: dict[str, Any] = {"kind": kind, "theta": number(merged, "rope_theta", float, bad, theta)}
    merged.pop("rope_theta", None)
    if (part := merged.pop("partial_rotary_factor", 1)) != 1 and head_dim:
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part < 1:
            bad.append(f"partial_rotary_factor={part!r} should lie above 0, and be 1 at most")
        else:
            made["dim"] = int(head_dim * part)
    known = FIELDS[kind]
    if unknown := sorted(merged.keys() - known.keys() - ({"original_max_position_embeddings"} if kind == "dynamic" else set())):
        bad.append(f"rotary positions of kind {kind!r} have no {', '.join(f'{k}={merged[k]!r}' for k in unknown)}")
    for key in REQUIRED.get(kind, ()):
        if key not in merged:
            bad.append(f"rotary positions of kind {kind!r} need {key}")
    for key, field in known.items():
        if key == "truncate":
            made[field] = yes(merged, key, bad, default=True)
        elif key in merged:
            made[field] = number(merged, key, int if field == "original_len" else float, bad)
    if kind in ("llama3", "yarn"):
        made["original_len"] = number(values, "original_max_position_embeddings", int, bad, made.get("original_len", max_len))
    if kind == "dynamic":
        made["original_len"] = max_len  # as transformers, which looks at nothing else
    if kind == "yarn" and "factor" not in made and max_len and made.get("original_len"):
        made["factor"] = max_len / made["original_len"]
    if len(bad) > before:
        return None
    try:
        return Rope(**made)
    except ConfigError as error:
        bad.append(str(error))
        return None


def write_rope(r: Rope, head_dim: int, max_len: int) -> dict[str, Any]:
    """The fields that say it, old and new. Raises ConfigError where a file cannot."""
    if r.kind == "dynamic" and r.original_len != max_len:
        raise ConfigError(f"rotary positions of kind 'dynamic' stretch beyond max_len={max_len}; those of the model beyond {r.original_len}")
    plain = Rope()
    scaling: dict[str, Any] = {"rope_type": r.kind}
    for key, field in FIELDS[r.kind].items():
        value = getattr(r, field)
        if value != getattr(plain, field) or key in ("factor", *REQUIRED.get(r.kind, ())):
            scaling[key] = value
    if unsaid := [a.name for a in attrs.fields(Rope) if a.name not in SAID | set(FIELDS[r.kind].values()) and _differs(a.name, r, plain)]:
        raise ConfigError(f"rotary positions of kind {r.kind!r} have no {', '.join(unsaid)}")
    part = {} if r.dim in (None, head_dim) else {"partial_rotary_factor": _share(r.dim, head_dim)}
    return {
        "rope_theta": r.theta,
        "rope_scaling": None if r.kind == "default" else {**scaling, "type": r.kind},
        "rope_parameters": {**scaling, "rope_theta": r.theta, **part},
        **part,
    }


def _share(dim: int | None, head_dim: int) -> float:
    """The factor that readers, who cut off what is left of head_dim · factor, take for `dim`: int(44 · (30 / 44)) is 29."""
    assert dim is not None
    share = dim / head_dim
    return share if int(head_dim * share) == dim else math.nextafter(share, 1)


SAID = {"kind", "theta", "dim", "original_len"}


def _differs(name: str, r: Rope, plain: Rope) -> bool:
    return bool(getattr(r, name) != getattr(plain, name))

"""Families of models on disk: each a short module that reads its config.json and maps its tensor names.

    read(values) -> DecoderConfig   from a parsed config.json; ConfigError that names every field that is missing or cannot be built
    write(config) -> dict           the config.json of a model; ConfigError where the family cannot say it
    names(config) -> dict           {key of a piece (`Spec.pieces`): name of the tensor on disk, or `Place` where it shares one with others}
    forms(config) -> dict           {form: its names} where files come in several, the one that is written first (`place.forms`); not in every module
    copies(config) -> dict          {name of a tensor that may be on disk as well: name of the one that it must equal}, as a tied head
    derived(name) -> bool           whether a tensor on disk follows from the config and is not read
    unused(name, config) -> str     why lf leaves a tensor on disk alone on purpose, or ''; load says so. A module without it leaves none
    separable(config) -> dict       {how names of tensors begin: the way out where files have none of these}; not in every module
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import attrs

from lf.config import ConfigError, one_of
from lf.models.decoder import MTP, DecoderConfig, Layer
from lf.models.families import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    internlm2,
    llama,
    mimo,
    minimax_m2,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from lf.models.families.ffn import STEERS
from lf.models.moe import MoE
from lf.models.router import Router

FAMILIES: dict[str, ModuleType] = {
    "llama": llama, "internlm2": internlm2, "mimo": mimo, "mistral": mistral, "phi3": phi3, "qwen2": qwen2, "qwen3": qwen3,
    "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe, "mixtral": mixtral, "deepseek_v2": deepseek_v2, "deepseek_v3": deepseek_v3,
    "minimax_m2": minimax_m2, "glm4_moe": glm4_moe, "gpt_oss": gpt_oss,
}  # fmt: skip
"""`model_type` of a config.json → its family."""
ALIASES = {"kimi_k2": "deepseek_v3"}
"""Further names of the same class."""
SPARSE = "its sparse attention, which chooses the tokens that a query sees, is not built yet"
REFUSED = {"deepseek_v32": SPARSE, "glm_moe_dsa": SPARSE}
"""What is known and not built, and why."""


def read(values: dict[str, Any]) -> Any:
    """The config of a model from its parsed config.json. Raises ConfigError for an unknown `model_type`, and what its family refuses."""
    if "model_type" not in values:
        raise ConfigError(f"config.json names no model_type; known: {', '.join(FAMILIES)}")
    kind = values["model_type"]
    if isinstance(kind, str) and kind in REFUSED:
        raise ConfigError(f"model_type={kind!r} is not supported: {REFUSED[kind]}")
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    return FAMILIES[one_of("model_type", kind, FAMILIES)].read(values)


def of(config: Any) -> ModuleType:
    """The family that writes a model with this config: its own (`config.family`), or the first that can.

    Raises ConfigError with the reason of each that was asked when none can.
    """
    reasons = []
    own = getattr(config, "family", "")
    for name in [one_of("family", own, FAMILIES)] if own else FAMILIES:
        family = FAMILIES[name]
        try:
            family.write(config)
        except ConfigError as error:
            reasons.append(f"{name}: {error}")
        else:
            return family
    raise ConfigError("no family on disk has such a model:\n  " + "\n  ".join(reasons))


def bare(config: DecoderConfig) -> DecoderConfig:
    """The config with what changes nothing about what the weights mean at its default: how fresh ones start, what steers training alone (weights of
    losses, capacity, …), and what is only passed on to files."""
    plain: dict[str, Any] = {a.name: a.default for a in attrs.fields(Router) if a.name in STEERS}

    def of(layer: Layer) -> Layer:
        f = layer.ffn
        return attrs.evolve(layer, ffn=attrs.evolve(f, router=attrs.evolve(f.router, **plain))) if isinstance(f, MoE) else layer

    further = MTP(tuple(map(of, config.mtp.layers))) if config.mtp else None
    return DecoderConfig(config.vocab, config.dim, tuple(map(of, config.layers)), norm_eps=config.norm_eps, tied=config.tied, mtp=further)

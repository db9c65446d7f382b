"""GLM-4.5 and 4.6: grouped-query attention that turns half of each head, and the mixtures of DeepSeek-V3 (GLM-4.5 team 2025, arXiv 2508.06471).

The head that predicts further ahead is a layer after the last, as in DeepSeek-V3. Its config.json has no weight for a loss of the routers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lf.models.decoder import DecoderConfig
from lf.models.families import common, deepseek, ffn
from lf.models.families.fields import yes


def bias(values: dict[str, Any], bad: list[str]) -> common.Bias:
    """`attention_bias`: of q, k and v."""
    return yes(values, "attention_bias", bad), False


def write_bias(bias: common.Bias) -> dict[str, Any]:
    return {**common.write_fixed_bias((False, bias[1])), "attention_bias": bias[0]}


DIALECT = common.Dialect(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    qk_norm="use_qk_norm",
    bias=bias,
    write_bias=write_bias,
    ffns=partial(deepseek.read, choice=partial(deepseek.by_sigmoid, scale=1.0, groups=1, top_groups=1), first=1),
    write_ffns=deepseek.write,
    kv_heads=8,
    max_len=131072,
    partial=True,
    further="num_nextn_predict_layers",
)


def read(values: dict[str, Any]) -> DecoderConfig:
    """The config in a parsed config.json. A file that does not say how much of a head turns means half of it."""
    rope = values.get("rope_parameters")
    said = "partial_rotary_factor" in values or (isinstance(rope, dict) and "partial_rotary_factor" in rope)
    return common.read(DIALECT, values if said else {"partial_rotary_factor": 0.5, **values})


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a model."""
    return {"partial_rotary_factor": 1.0, **common.write(DIALECT, config)}


names, copies, derived = partial(common.names, mixture=ffn.experts), common.copies, common.derived
forms = partial(common.forms, mixture=ffn.experts)
unused, separable = common.further_heads, common.separable

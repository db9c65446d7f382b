"""Latent attention in a config.json and on disk, as in DeepSeek's families."""

from __future__ import annotations

from typing import Any

from lf.config import ConfigError
from lf.models.families.fields import number, yes
from lf.models.families.place import Place
from lf.models.families.rope import read_rope, write_rope
from lf.models.latent import Latent

SIZES = {
    "heads": "num_attention_heads",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
    "kv_rank": "kv_lora_rank",
    "q_rank": "q_lora_rank",
}
NAMES = {
    "q": "q_proj.weight",
    "q_down": "q_a_proj.weight",
    "q_down_bias": "q_a_proj.bias",
    "q_norm": "q_a_layernorm.weight",
    "q_up": "q_b_proj.weight",
    "kv_norm": "kv_a_layernorm.weight",
    "kv_up": "kv_b_proj.weight",
    "out": "o_proj.weight",
    "out_bias": "o_proj.bias",
}


def read(values: dict[str, Any], max_len: int | None, bad: list[str]) -> Latent | None:
    """The mixer; None where something is `bad`."""
    whole = "q_lora_rank" in values and values["q_lora_rank"] is None  # queries are made straight from the residual stream
    made = {name: number(values, field, int, bad) for name, field in SIZES.items() if not (whole and name == "q_rank")}
    heads = made["heads"]
    if values.get("num_key_value_heads", heads) not in (heads, None):
        bad.append(f"num_key_value_heads={values['num_key_value_heads']!r} is not supported; keys are made for each of num_attention_heads={heads}")
    rope = read_rope(values, made["rope_dim"], max_len, bad)
    if rope is not None and rope.dim is not None:
        bad.append(f"a partial_rotary_factor that turns {rope.dim} dims is not supported; all of qk_rope_head_dim={made['rope_dim']} turn")
    interleaved, bias = yes(values, "rope_interleave", bad, default=True), yes(values, "attention_bias", bad)
    try:
        return None if bad else Latent(**made, rope=rope, interleaved=interleaved, bias=bias)
    except ConfigError as error:
        bad.append(str(error))
        return None


def write(a: Latent, max_len: int) -> dict[str, Any]:
    return {
        **{field: getattr(a, name) for name, field in SIZES.items()},
        "num_key_value_heads": a.heads,
        **write_rope(a.rope, a.rope_dim, max_len),
        "rope_interleave": a.interleaved,
        "attention_bias": a.bias,
    }


def names(a: Latent) -> dict[str, str | Place]:
    """Where it lies within a layer; what it has not does no harm."""
    out: dict[str, str | Place] = {"attn/norm": "input_layernorm.weight"}
    out |= {f"attn/{ours}": f"self_attn.{theirs}" for ours, theirs in NAMES.items()}
    rows = a.kv_rank + a.rope_dim
    for key, name in (("kv_down", "weight"), ("kv_down_bias", "bias")):
        there = f"self_attn.kv_a_proj_with_mqa.{name}"
        out |= {
            f"attn/{key}/latent": Place(there, ((0, 0, a.kv_rank),), rows),
            f"attn/{key}/rope": Place(there, ((0, a.kv_rank, a.rope_dim),), rows),
        }
    return out

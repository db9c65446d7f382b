"""Qwen3, dense: grouped-query attention with an RMS norm over each head of q and k, no biases (Qwen team 2025, arXiv 2505.09388).

A config.json means what `Qwen3ForCausalLM` of transformers makes of it. A value that changes the mathematics and that this family cannot build
is refused by name; fields that the reference never looks at are left alone.
"""

from __future__ import annotations

from typing import Any

from lf.config import ConfigError
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer

ARCHITECTURE = "Qwen3ForCausalLM"
COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "is_causal": (True, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "use_sliding_window": (False, None),
}
"""Fields that change the mathematics, and the values that are built."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = {
    "attn/norm": "input_layernorm",
    "attn/qkv/q": "self_attn.q_proj",
    "attn/qkv/k": "self_attn.k_proj",
    "attn/qkv/v": "self_attn.v_proj",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "attn/out": "self_attn.o_proj",
    "mlp/norm": "post_attention_layernorm",
    "mlp/gate_up/gate": "mlp.gate_proj",
    "mlp/gate_up/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def read(values: dict[str, Any]) -> DecoderConfig:
    """The config in a parsed config.json, with the keys of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Raises ConfigError that lists every field that is missing, is of the wrong kind, or has a value that is not built.
    """
    bad: list[str] = []
    counts = {name: _number(values, name, int, bad) for name in COUNTS}
    eps = _number(values, "rms_norm_eps", float, bad)
    theta = _rope_theta(values, bad)
    max_len = _number({"max_position_embeddings": 32768, **values}, "max_position_embeddings", int, bad)
    std = _number({"initializer_range": 0.02, **values}, "initializer_range", float, bad)
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        bad.append(f"tie_word_embeddings={tied!r} should be true or false")
    for name, good in ONLY.items():
        if name in values and values[name] not in good:
            bad.append(f"{name}={values[name]!r} is not supported; only {good[0]!r} is")
    if (made := values.get("architectures")) and ARCHITECTURE not in made:
        bad.append(f"architectures={made!r} is not supported; only {ARCHITECTURE} is")
    if kinds := values.get("layer_types"):
        if other := sorted({str(k) for k in kinds} - {"full_attention"}):
            bad.append(f"layer_types has {', '.join(map(repr, other))}, not supported; only 'full_attention' is")
        elif counts["num_hidden_layers"] and len(kinds) != counts["num_hidden_layers"]:
            bad.append(f"layer_types lists {len(kinds)} layers, num_hidden_layers={counts['num_hidden_layers']}")
    if bad:
        raise ConfigError("config.json of qwen3: " + "; ".join(bad))
    vocab, dim, inner, layers, heads, kv_heads, head_dim = counts.values()
    layer = Layer(Attention(heads, kv_heads, head_dim, theta), GatedMLP(inner))
    return DecoderConfig(vocab, dim, (layer,) * layers, norm_eps=eps, tied=tied, init_std=std, embed_std=std, max_len=max_len)


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a model, with the keys of transformers 4 and of 5. Raises ConfigError when its layers are not all alike."""
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"a {type(config).__name__} is no DecoderConfig")
    if len(set(config.layers)) != 1:
        raise ConfigError(f"its layers must all be alike; of {len(config.layers)} layers, {len(set(config.layers))} kinds were given")
    attention, inner = config.layers[0].mixer, config.layers[0].ffn.dim
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "intermediate_size": inner,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": attention.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
        "max_position_embeddings": config.max_len,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "use_cache": True,
    }


def names(config: DecoderConfig) -> dict[str, str]:
    """{key of a piece: name of its tensor on disk}; a tied head is not on disk."""
    out = {"embed/weight": EMBEDDING}
    for i in range(len(config.layers)):
        out |= {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}.weight" for ours, theirs in LAYER.items()}
    out["head/norm"] = "model.norm.weight"
    return out if config.tied else out | {"head/weight": HEAD}


def copies(config: DecoderConfig) -> dict[str, str]:
    """{name that may be on disk as well: name of the tensor that it must equal}: some tools write a tied head out."""
    return {HEAD: EMBEDDING} if config.tied else {}


def derived(name: str) -> bool:
    """The table of rotary frequencies, which old files hold, follows from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _number(values: dict[str, Any], name: str, kind: type[int] | type[float], bad: list[str]) -> Any:
    """values[name] if it is a number above 0 of this kind; otherwise None, and a line in `bad`."""
    value: Any = values.get(name)
    if name not in values:
        bad.append(f"{name} is missing")
    elif isinstance(value, bool) or not isinstance(value, (int, kind)) or not value > 0:
        bad.append(f"{name}={value!r} should be a {'whole ' if kind is int else ''}number above 0")
    else:
        return kind(value)
    return None


def _rope_theta(values: dict[str, Any], bad: list[str]) -> Any:
    """The base of the rotary positions; any scaling of them goes to `bad`."""
    found = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            bad.append(f"{name}={rope!r} should be an object")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        more = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
        if kind != "default" or more:
            bad.append(f"{name}={rope!r} is not supported; only rope_type 'default' without further keys is")
        if rope.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
    if len(set(map(str, map(_plain, found.values())))) > 1:
        bad.append("; ".join(f"{k}={v!r}" for k, v in found.items()) + ": these should be equal")
    return _number({"rope_theta": next(iter(found.values()))} if found else {}, "rope_theta", float, bad)


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value

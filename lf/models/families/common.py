"""What the families that look like Llama on disk share: one reader, one writer and one table of names, told apart by a `Dialect`.

A config.json means what the class of transformers makes of it. A value that changes the mathematics and that lf cannot build is refused by name;
fields that the reference never looks at are left alone, but for partial_rotary_factor: other readers do, so it is refused where the class does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from lf.config import ConfigError
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, attentions
from lf.models.families.fields import LAYERS, number, yes
from lf.models.families.rope import read_rope, write_rope

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = {
    "attn/norm": "input_layernorm.weight",
    "attn/qkv/q": "self_attn.q_proj.weight",
    "attn/qkv/k": "self_attn.k_proj.weight",
    "attn/qkv/v": "self_attn.v_proj.weight",
    "attn/out": "self_attn.o_proj.weight",
    "mlp/norm": "post_attention_layernorm.weight",
    "mlp/gate_up/gate": "mlp.gate_proj.weight",
    "mlp/gate_up/up": "mlp.up_proj.weight",
    "mlp/down": "mlp.down_proj.weight",
}
QKV_BIAS = {
    "attn/qkv_bias/q": "self_attn.q_proj.bias",
    "attn/qkv_bias/k": "self_attn.k_proj.bias",
    "attn/qkv_bias/v": "self_attn.v_proj.bias",
}
OUT_BIAS = {"attn/out_bias": "self_attn.o_proj.bias"}
QK_NORM = {"attn/q_norm": "self_attn.q_norm.weight", "attn/k_norm": "self_attn.k_norm.weight"}

ONLY: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "is_causal": (True, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
}
"""Fields that change the mathematics in every family, and the values that are built."""

Bias = tuple[bool, bool]
Windows = tuple[int | None, ...]


@attrs.frozen
class Dialect:
    """How one family differs. `head_dim`, `kv_heads`, `max_len`: what the class takes when the field is missing; None: hidden_size /
    num_attention_heads, and num_attention_heads.

    bias(values, bad) -> whether there are biases: (of q, k and v; of the matrix out), and write_bias(those) -> fields of config.json, or ConfigError
    where the family has no such biases. windows(values, layers) -> the sliding window of each layer, and write_windows(those) -> fields, or
    ConfigError. only: further fields with one value that is built.
    partial: whether the class turns only a share of each head where the file says so; the others do not look at it, so it is refused there.
    more: fields that are written as they stand.
    """

    name: str
    architecture: str
    qk_norm: bool
    bias: Callable[[dict[str, Any], list[str]], Bias]
    write_bias: Callable[[Bias], dict[str, Any]]
    windows: Callable[[dict[str, Any], int], Windows]
    write_windows: Callable[[Windows], dict[str, Any]]
    head_dim: int | None = None
    kv_heads: int | None = None
    max_len: int = 2048
    partial: bool = False
    only: dict[str, tuple[Any, ...]] = attrs.field(factory=dict)
    more: dict[str, Any] = attrs.field(factory=dict)


def read(d: Dialect, values: dict[str, Any]) -> DecoderConfig:
    """The config in a parsed config.json, with the keys of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Raises ConfigError that lists every field that is missing, is of the wrong kind, or has a value that is not built.
    """
    bad: list[str] = []
    vocab, dim, inner, heads = (
        number(values, name, int, bad) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    )
    count = number(values, "num_hidden_layers", int, bad, most=LAYERS)
    kv_heads = number(values, "num_key_value_heads", int, bad, heads if "num_key_value_heads" in values else d.kv_heads or heads)
    head_dim = number(values, "head_dim", int, bad, d.head_dim or (dim // heads if dim and heads else None))
    eps = number(values, "rms_norm_eps", float, bad)
    max_len = number(values, "max_position_embeddings", int, bad, d.max_len)
    std = number(values, "initializer_range", float, bad, 0.02)
    tied = yes(values, "tie_word_embeddings", bad)
    rope = read_rope(values, head_dim, max_len, bad)
    if rope is not None and rope.dim is not None and not d.partial:
        bad.append(f"a partial_rotary_factor that turns {rope.dim} of head_dim={head_dim} is not supported; {d.architecture} turns whole heads")
    for name, good in {**ONLY, **d.only}.items():
        if name in values and values[name] not in good:
            bad.append(f"{name}={values[name]!r} is not supported; only {good[0]!r} is")
    if (made := values.get("architectures")) and not (isinstance(made, list) and d.architecture in made):
        bad.append(f"architectures={made!r} is not supported; only {d.architecture} is")
    windows: Windows = ()
    try:
        windows = d.windows(values, count or 0)
    except ConfigError as error:
        bad.append(str(error))
    qkv_bias, out_bias = d.bias(values, bad)
    if bad:
        raise ConfigError(f"config.json of {d.name}: " + "; ".join(bad))
    plain = Attention(heads, kv_heads, head_dim, rope, d.qk_norm, qkv_bias, out_bias)
    layers = tuple(Layer(attrs.evolve(plain, window=w), GatedMLP(inner)) for w in windows)
    return DecoderConfig(vocab, dim, layers, norm_eps=eps, tied=tied, init_std=std, embed_std=std, max_len=max_len, family=d.name)


def write(d: Dialect, config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a model, with the keys of transformers 4 and of 5. Raises ConfigError where this family has no such model."""
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"a {type(config).__name__} is no DecoderConfig")
    mixers = attentions(config)
    alike = {attrs.evolve(layer, mixer=attrs.evolve(a, window=None)) for layer, a in zip(config.layers, mixers)}
    if len(alike) != 1:
        raise ConfigError(f"its layers must all be alike but for their windows; of {len(config.layers)} layers, {len(alike)} kinds were given")
    a, inner = mixers[0], config.layers[0].ffn.dim
    if a.rope.dim not in (None, a.head_dim) and not d.partial:
        raise ConfigError(f"its rotary positions are of whole heads; those of the model turn {a.rope.dim} of {a.head_dim} dims")
    if a.qk_norm != d.qk_norm:
        raise ConfigError(f"its layers {'have' if d.qk_norm else 'have no'} norms of q and k; those of the model {'do' if a.qk_norm else 'do not'}")
    return {
        "architectures": [d.architecture],
        "model_type": d.name,
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "intermediate_size": inner,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **write_rope(a.rope, a.head_dim, config.max_len),
        "max_position_embeddings": config.max_len,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # none, or the classes take ids of their own releases
        **d.write_bias((a.qkv_bias, a.out_bias)),
        **d.write_windows(tuple(mixer.window for mixer in mixers)),
        **d.more,
    }


def names(config: DecoderConfig) -> dict[str, str]:
    """{key of a piece: name of its tensor on disk}; a tied head is not on disk."""
    out = {"embed/weight": EMBEDDING}
    for i, a in enumerate(attentions(config)):
        keys = LAYER | (QKV_BIAS if a.qkv_bias else {}) | (OUT_BIAS if a.out_bias else {}) | (QK_NORM if a.qk_norm else {})
        out |= {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in keys.items()}
    out["head/norm"] = "model.norm.weight"
    return out if config.tied else out | {"head/weight": HEAD}


def copies(config: DecoderConfig) -> dict[str, str]:
    """{name that may be on disk as well: name of the tensor that it must equal}: some tools write a tied head out."""
    return {HEAD: EMBEDDING} if config.tied else {}


def derived(name: str) -> bool:
    """The table of rotary frequencies, which old files hold, follows from the config."""
    return name.endswith("rotary_emb.inv_freq")


# What a Dialect is made of.


def no_bias(values: dict[str, Any], bad: list[str]) -> Bias:
    return False, False


def qkv_bias(values: dict[str, Any], bad: list[str]) -> Bias:
    return True, False


def one_bias(values: dict[str, Any], bad: list[str]) -> Bias:
    """`attention_bias`: all four matrices or none."""
    return (yes(values, "attention_bias", bad),) * 2


def write_one_bias(bias: Bias) -> dict[str, Any]:
    if bias[0] != bias[1]:
        raise ConfigError("q, k, v and the matrix out have biases all or none of them; those of the model only in part")
    return {"attention_bias": bias[0]}


def write_fixed_bias(bias: Bias, wanted: Bias = (False, False)) -> dict[str, Any]:
    """For a family whose classes do not ask."""
    if bias != wanted:
        parts = [name for name, has in zip(("q, k and v", "the matrix out"), wanted) if has]
        raise ConfigError(f"it has biases on {' and '.join(parts) or 'no matrix'}; the model has others")
    return {}


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

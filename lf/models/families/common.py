"""What the families that look like Llama on disk share: one reader, one writer and one table of names, told apart by a `Dialect`.

A config.json means what the class of transformers makes of it. A value that changes the mathematics and that lf cannot build is refused by name;
fields that the reference never looks at are left alone, but for partial_rotary_factor: other readers do, so it is refused where the class does not.

What only steers training (weights of losses, the rate of selection biases, capacity, that of further heads) is written where the family has a field
for it, and is left out where it has none: the weights mean the same without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs

from lf.config import ConfigError
from lf.models.decoder import MTP, Attention, DecoderConfig, Layer
from lf.models.families import ffn, mla
from lf.models.families.ffn import FFNs, dense, refuse_unsaid, write_dense
from lf.models.families.fields import LAYERS, number, whole, yes
from lf.models.families.place import Place
from lf.models.families.rope import read_rope, write_rope
from lf.models.families.windows import Windows, no_windows, write_no_windows
from lf.models.latent import Latent
from lf.models.moe import MoE

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ATTENTION = {
    "attn/norm": "input_layernorm.weight",
    "attn/qkv/q": "self_attn.q_proj.weight",
    "attn/qkv/k": "self_attn.k_proj.weight",
    "attn/qkv/v": "self_attn.v_proj.weight",
    "attn/qkv_bias/q": "self_attn.q_proj.bias",
    "attn/qkv_bias/k": "self_attn.k_proj.bias",
    "attn/qkv_bias/v": "self_attn.v_proj.bias",
    "attn/q_norm": "self_attn.q_norm.weight",
    "attn/k_norm": "self_attn.k_norm.weight",
    "attn/sinks": "self_attn.sinks",
    "attn/out": "self_attn.o_proj.weight",
    "attn/out_bias": "self_attn.o_proj.bias",
}
"""Those that a model has."""
MLP = {
    "mlp/norm": "post_attention_layernorm.weight",
    "mlp/gate_up/gate": "mlp.gate_proj.weight",
    "mlp/gate_up/up": "mlp.up_proj.weight",
    "mlp/down": "mlp.down_proj.weight",
}
NOWHERE: dict[str, str | Place] = {"route/fraction": Place("")}
"""Of a mixture: how the tokens of the last step were spread, for a loss."""
FURTHER = {
    "enter/norm_embed": "enorm.weight",
    "enter/norm_hidden": "hnorm.weight",
    "enter/join": "eh_proj.weight",
    "leave/norm": "shared_head.norm.weight",
}
"""Of a head that predicts further ahead, beside its layer."""

ONLY: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "is_causal": (True, None),
    "mlp_bias": (False, None),
}
"""Fields that change the mathematics in every family, and the values that are built."""

Bias = tuple[bool, bool]
Mixture = Callable[[MoE], dict[str, str | Place]]


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


@attrs.frozen
class Dialect:
    """How one family differs. `head_dim`, `kv_heads`, `max_len`: what the class takes when the field is missing; None: hidden_size /
    num_attention_heads, and num_attention_heads. theta: of rotary positions, likewise.

    qk_norm: whether q and k are normalised, or the field that says it; qk_norm_all: over all heads together. sinks: whether heads have them.
    bias(values, bad) -> whether there are biases: (of q, k and v; of the matrix out), and write_bias(those) -> fields of config.json, or ConfigError
    where the family has no such biases. windows(values, layers) -> the sliding window of each layer, and write_windows(those) -> fields, or
    ConfigError. ffns(values, layers, bad) -> the feed-forward part of each layer, and write_ffns(those) -> fields, or ConfigError.
    latent: its attention is latent, and what is said of the other has no use. further: the field that says how many heads predict further ahead; "":
    the family has none. only: further fields with one value that is built.
    partial: whether the class turns only a share of each head where the file says so; the others do not look at it, so it is refused there.
    more: fields that are written as they stand.
    """

    name: str
    architecture: str
    qk_norm: bool | str = False
    bias: Callable[[dict[str, Any], list[str]], Bias] = no_bias
    write_bias: Callable[[Bias], dict[str, Any]] = write_fixed_bias
    windows: Callable[[dict[str, Any], int], Windows] = no_windows
    write_windows: Callable[[Windows], dict[str, Any]] = write_no_windows
    ffns: Callable[[dict[str, Any], int, list[str]], FFNs] = dense
    write_ffns: Callable[[FFNs], dict[str, Any]] = write_dense
    head_dim: int | None = None
    kv_heads: int | None = None
    max_len: int = 2048
    theta: float = 10000.0
    partial: bool = False
    further: str = ""
    latent: bool = False
    qk_norm_all: bool = False
    sinks: bool = False
    only: dict[str, tuple[Any, ...]] = attrs.field(factory=dict)
    more: dict[str, Any] = attrs.field(factory=dict)


def read(d: Dialect, values: dict[str, Any]) -> DecoderConfig:
    """The config in a parsed config.json, with the keys of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Raises ConfigError that lists every field that is missing, is of the wrong kind, or has a value that is not built.
    """
    bad: list[str] = []
    vocab, dim = (number(values, name, int, bad) for name in ("vocab_size", "hidden_size"))
    count = number(values, "num_hidden_layers", int, bad, most=LAYERS)
    eps = number(values, "rms_norm_eps", float, bad)
    max_len = number(values, "max_position_embeddings", int, bad, d.max_len)
    std = number(values, "initializer_range", float, bad, 0.02)
    tied = yes(values, "tie_word_embeddings", bad)
    further = whole(values, d.further, bad) if d.further else 0
    mixers: tuple[Attention | Latent, ...]
    if d.latent:
        mixers = () if (a := mla.read(values, max_len, bad)) is None else (a,) * (count or 0)
    else:
        mixers = read_attention(d, values, dim, max_len, count or 0, bad)
    ffns = d.ffns(values, count or 0, bad)
    for name, good in {**ONLY, **d.only}.items():
        if name in values and values[name] not in good:
            bad.append(f"{name}={values[name]!r} is not supported; only {good[0]!r} is")
    if (quantised := values.get("quantization_config")) is not None:
        bad.append(f"quantization_config={quantised!r} is not supported; weights as they are, or in 8 bits by blocks (lf/checkpoint/fp8.py), are")
    if (made := values.get("architectures")) and not (isinstance(made, list) and d.architecture in made):
        bad.append(f"architectures={made!r} is not supported; only {d.architecture} is")
    if bad:
        raise ConfigError(f"config.json of {d.name}: " + "; ".join(bad))
    layers = tuple(map(Layer, mixers, ffns))
    mtp = MTP((layers[-1],) * further) if further else None
    return DecoderConfig(vocab, dim, layers, norm_eps=eps, tied=tied, init_std=std, embed_std=std, max_len=max_len, family=d.name, mtp=mtp)


def read_attention(d: Dialect, values: dict[str, Any], dim: int | None, max_len: int | None, layers: int, bad: list[str]) -> tuple[Attention, ...]:
    """The mixer of each layer; none where something is `bad`."""
    heads = number(values, "num_attention_heads", int, bad)
    kv_heads = number(values, "num_key_value_heads", int, bad, heads if "num_key_value_heads" in values else d.kv_heads or heads)
    head_dim = number(values, "head_dim", int, bad, d.head_dim or (dim // heads if dim and heads else None))
    rope = read_rope(values, head_dim, max_len, bad, d.theta)
    if rope is not None and rope.dim is not None and not d.partial:
        bad.append(f"a partial_rotary_factor that turns {rope.dim} of head_dim={head_dim} is not supported; {d.architecture} turns whole heads")
    norm = yes(values, d.qk_norm, bad) if isinstance(d.qk_norm, str) else d.qk_norm
    qkv_bias, out_bias = d.bias(values, bad)
    try:
        windows = d.windows(values, layers)
        if bad:
            return ()
        plain = Attention(heads, kv_heads, head_dim, rope, norm, qkv_bias, out_bias, qk_norm_all=d.qk_norm_all, sinks=d.sinks)
        return tuple(attrs.evolve(plain, window=w) for w in windows)
    except ConfigError as error:
        bad.append(str(error))
        return ()


def write(d: Dialect, config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a model, with the keys of transformers 4 and of 5. Raises ConfigError where this family has no such model."""
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"a {type(config).__name__} is no DecoderConfig")
    mixers, ffns = tuple(layer.mixer for layer in config.layers), tuple(layer.ffn for layer in config.layers)
    if (kinds := len({attrs.evolve(a, window=None) if isinstance(a, Attention) else a for a in mixers})) != 1:
        raise ConfigError(f"its layers must all be alike but for their windows; of {len(mixers)} layers, {kinds} kinds were given")
    heads = config.mtp.layers if config.mtp else ()
    if heads and (not d.further or set(heads) != {config.layers[-1]}):
        has = "a layer like the last of the model each" if d.further else "no place in its files"
        raise ConfigError(f"heads that predict further ahead have {has}; those of the model are {len(heads)}")
    fields = {
        "architectures": [d.architecture],
        "model_type": d.name,
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": len(config.layers),
        **write_mixers(d, mixers, config.max_len),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_len,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # none, or the classes take ids of their own releases
        **d.write_ffns(ffns),
        **({d.further: len(heads)} if d.further else {}),
        **d.more,
    }
    refuse_unsaid(ffns, partial(d.ffns, fields))
    return fields


def write_mixers(d: Dialect, mixers: tuple[Attention | Latent, ...], max_len: int) -> dict[str, Any]:
    a = mixers[0]
    if isinstance(a, Latent) != d.latent:
        raise ConfigError(f"it has {'latent' if d.latent else 'grouped-query'} attention; that of the model is {type(a).__name__}")
    if isinstance(a, Latent):
        return mla.write(a, max_len)
    if a.rope.dim not in (None, a.head_dim) and not d.partial:
        raise ConfigError(f"its rotary positions are of whole heads; those of the model turn {a.rope.dim} of {a.head_dim} dims")
    if not isinstance(d.qk_norm, str) and a.qk_norm != d.qk_norm:
        raise ConfigError(f"its layers {'have' if d.qk_norm else 'have no'} norms of q and k; those of the model {'do' if a.qk_norm else 'do not'}")
    if a.qk_norm_all != d.qk_norm_all:
        raise ConfigError(f"its norms of q and k are over {'all heads together' if d.qk_norm_all else 'each head'}; those of the model are not")
    if a.sinks != d.sinks:
        raise ConfigError(f"its heads have {'' if d.sinks else 'no '}sinks; those of the model {'have' if a.sinks else 'have none'}")
    windows = tuple(mixer.window for mixer in mixers if isinstance(mixer, Attention))
    return {
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        **write_rope(a.rope, a.head_dim, max_len),
        **({d.qk_norm: a.qk_norm} if isinstance(d.qk_norm, str) else {}),
        **d.write_bias((a.qkv_bias, a.out_bias)),
        **d.write_windows(windows),
    }


def names(config: DecoderConfig, mixture: Mixture | None = None) -> dict[str, str | Place]:
    """{key of a piece: its place on disk}; a tied head is not on disk. mixture: those of a mixture of experts, without the layer.

    Layers of further heads come after the others, and hold names of their own besides."""
    out: dict[str, str | Place] = {"embed/weight": EMBEDDING}
    for i, (layer_name, layer) in enumerate(config.all_layers.items()):
        a = layer.mixer
        keys: dict[str, str | Place] = mla.names(a) if isinstance(a, Latent) else {**ATTENTION}
        keys |= MLP if mixture is None or not isinstance(layer.ffn, MoE) else mixture(layer.ffn) | NOWHERE
        keys |= FURTHER if i >= len(config.layers) else {}
        out |= {f"{layer_name}.{ours}": within(f"model.layers.{i}.", theirs) for ours, theirs in keys.items()}
    out["head/norm"] = "model.norm.weight"
    return out if config.tied else out | {"head/weight": HEAD}


def forms(config: DecoderConfig, mixture: Mixture, fused: Mixture = ffn.fused) -> dict[str, dict[str, str | Place]]:
    """The releases have a tensor for each matrix of each expert; transformers 5 holds them in two, and writes these where it is asked to."""
    return {"each": names(config, mixture), "fused": names(config, fused)}


def within(prefix: str, place: str | Place) -> str | Place:
    if isinstance(place, str):
        return prefix + place
    return attrs.evolve(place, name=prefix + place.name) if place.name else place


def copies(config: DecoderConfig) -> dict[str, str]:
    """{name that may be on disk as well: name of the tensor that it must equal}: some tools write a tied head out, and heads that predict further
    ahead come with the embedding and the head again."""
    head = EMBEDDING if config.tied else HEAD
    out = {HEAD: EMBEDDING} if config.tied else {}
    for k in range(len(config.mtp.layers) if config.mtp else 0):
        there = f"model.layers.{len(config.layers) + k}"
        out |= {f"{there}.embed_tokens.weight": EMBEDDING, f"{there}.shared_head.head.weight": head}
    return out


def derived(name: str) -> bool:
    """The table of rotary frequencies, which old files hold, follows from the config."""
    return name.endswith("rotary_emb.inv_freq")


def separable(config: DecoderConfig) -> dict[str, str]:
    """{how names of tensors begin: what to do where files have none of these}, of each head that predicts further ahead."""
    heads = len(config.mtp.layers) if config.mtp else 0
    field = f"num_nextn_predict_layers={heads} in config.json"
    why = f"{field} speaks of heads that predict further ahead, which transformers drops as it saves; say 0 there"
    return {f"model.layers.{len(config.layers) + k}.": why for k in range(heads)}


def further_heads(name: str, config: DecoderConfig) -> str:
    """Why a tensor of a layer after the last is left alone: the model has been built without the heads that the files have."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    beyond = config.mtp is None and layer is not None and int(layer[1]) >= len(config.layers)
    return "heads that predict further ahead, which the model is built without" if beyond else ""

"""Phi-3 with short contexts: Llama with q, k and v in one matrix on disk, gate and up in another, and rotary positions on a share of each head
(Abdin et al. 2024, arXiv 2404.14219; the share: Phi-4-mini, arXiv 2503.01743). Its LongRoPE is not built.
"""

from __future__ import annotations

from typing import Any

from lf.config import ConfigError
from lf.models.decoder import DecoderConfig, attentions
from lf.models.families import common, windows
from lf.models.families.place import Place

DIALECT = common.Dialect(
    "phi3",
    "Phi3ForCausalLM",
    qk_norm=False,
    bias=common.no_bias,
    write_bias=common.write_fixed_bias,
    windows=lambda values, layers: windows.all_layers_slide(values, layers, missing=None),
    write_windows=windows.write_all_layers_slide,
    max_len=4096,
    partial=True,
    only={"attention_bias": (False, None), "resid_pdrop": (0, None), "embd_pdrop": (0, None)},
    more={"resid_pdrop": 0.0, "embd_pdrop": 0.0},
)


def read(values: dict[str, Any]) -> DecoderConfig:
    return _plain(common.read(DIALECT, values))


def write(config: DecoderConfig) -> dict[str, Any]:
    return common.write(DIALECT, _plain(config))


def _plain(config: Any) -> Any:
    """Raises ConfigError where positions are scaled: the class of transformers takes some of these kinds for others."""
    if isinstance(config, DecoderConfig) and (kinds := {layer.mixer.rope.kind for layer in config.layers} - {"default"}):
        raise ConfigError(f"rotary positions of kind {', '.join(map(repr, sorted(kinds)))} are not supported in phi3; only 'default' is")
    return config


def names(config: DecoderConfig) -> dict[str, str | Place]:
    """{key of a piece: its place on disk}."""
    out: dict[str, str | Place] = {**common.names(config)}
    for i, (layer, a) in enumerate(zip(config.layers, attentions(config))):
        inner, there = layer.ffn.dim, f"model.layers.{i}"
        kv = a.kv_heads * a.head_dim
        out |= _joined(f"layers.{i}.attn/qkv", f"{there}.self_attn.qkv_proj.weight", {"q": a.heads * a.head_dim, "k": kv, "v": kv})
        out |= _joined(f"layers.{i}.mlp/gate_up", f"{there}.mlp.gate_up_proj.weight", {"gate": inner, "up": inner})
    return out


def _joined(key: str, name: str, rows: dict[str, int]) -> dict[str, Place]:
    """Parts that lie one after another in one tensor."""
    firsts, total = {}, 0
    for part, n in rows.items():
        firsts[part], total = total, total + n
    return {f"{key}/{part}": Place(name, ((0, firsts[part], n),), total) for part, n in rows.items()}


copies, derived = common.copies, common.derived

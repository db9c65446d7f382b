"""InternLM2 and 2.5: Llama's mathematics under other names, with q, k and v in one matrix (InternLM team 2024, arXiv 2403.17297)."""

from __future__ import annotations

from typing import Any

from lf.models.families.place import Place

LAYER = {
    "attn/norm": "attention_norm",
    "attn/out": "attention.wo",
    "mlp/norm": "ffn_norm",
    "mlp/gate_up/gate": "feed_forward.w1",
    "mlp/gate_up/up": "feed_forward.w3",
    "mlp/down": "feed_forward.w2",
}


def names(config: Any) -> dict[str, str | Place]:
    """{key of a piece: its place on disk}. The rows of `wqkv` are grouped by kv head: its query heads, its key, its value."""
    out: dict[str, str | Place] = {"embed/weight": "model.tok_embeddings.weight"}
    for i, layer in enumerate(config.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        out |= {f"{ours}.{key}": f"{theirs}.{name}.weight" for key, name in LAYER.items()}
        out |= {f"{ours}.attn/qkv/{part}": place for part, place in wqkv(f"{theirs}.attention.wqkv.weight", layer.mixer).items()}
    out["head/norm"] = "model.norm.weight"
    return out if config.tied else out | {"head/weight": "output.weight"}


def wqkv(name: str, a: Any) -> dict[str, Place]:
    """Where q, k and v of an attention lie in one matrix of rows [q … q | k | v] for each kv head."""
    d, group = a.head_dim, a.heads // a.kv_heads
    rows, block = (a.heads + 2 * a.kv_heads) * d, (group + 2) * d
    start = {"q": (0, group * d), "k": (group * d, d), "v": (group * d + d, d)}  # in the block of a kv head, and how many rows
    return {part: Place(name, tuple((g * n, g * block + at, n) for g in range(a.kv_heads)), rows) for part, (at, n) in start.items()}


def copies(config: Any) -> dict[str, str]:
    """{name that may be on disk as well: name of the tensor that it must equal}: some tools write a tied head out."""
    return {"output.weight": "model.tok_embeddings.weight"} if config.tied else {}


def derived(name: str) -> bool:
    """The table of rotary frequencies, which old files hold, follows from the config."""
    return name.endswith("rotary_emb.inv_freq")

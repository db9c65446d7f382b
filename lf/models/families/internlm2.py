"""InternLM2 and 2.5: Llama's mathematics under other names, with q, k and v in one matrix (InternLM team 2024, arXiv 2403.17297).

transformers has no class for it: its own code comes with the release.
"""

from __future__ import annotations

from typing import Any

from lf.config import ConfigError
from lf.models.decoder import Attention, DecoderConfig, attentions
from lf.models.families import common, windows
from lf.models.families.place import Place

DIALECT = common.Dialect(
    "internlm2",
    "InternLM2ForCausalLM",
    qk_norm=False,
    bias=common.no_bias,
    write_bias=common.write_fixed_bias,
    windows=windows.no_windows,
    write_windows=windows.write_no_windows,
    only={"bias": (False,)},
    more={
        "bias": False,
        "auto_map": {
            "AutoConfig": "internlm/internlm2_5-7b--configuration_internlm2.InternLM2Config",
            "AutoModel": "internlm/internlm2_5-7b--modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "internlm/internlm2_5-7b--modeling_internlm2.InternLM2ForCausalLM",
        },
    },
)
ROPES = ("default", "linear", "dynamic")

LAYER = {
    "attn/norm": "attention_norm",
    "attn/out": "attention.wo",
    "mlp/norm": "ffn_norm",
    "mlp/gate_up/gate": "feed_forward.w1",
    "mlp/gate_up/up": "feed_forward.w3",
    "mlp/down": "feed_forward.w2",
}


def read(values: dict[str, Any]) -> DecoderConfig:
    """The config in a parsed config.json. A file without `bias` means that there are biases: it is refused as one that says so."""
    return common.read(DIALECT, {"bias": True, **values})


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a model. The code that comes with the releases takes only the old keys of rotary positions, and no others beside them."""
    out = common.write(DIALECT, config)
    a = attentions(config)[0]
    if a.rope.kind not in ROPES or a.rope.dim not in (None, a.head_dim):
        raise ConfigError(f"its rotary positions are {', '.join(ROPES)}, of whole heads; those of the model are {a.rope}")
    if a.head_dim * a.heads != config.dim:
        raise ConfigError(f"its head_dim is the width over the heads, {config.dim}/{a.heads}; that of the model is {a.head_dim}")
    scaling = None if a.rope.kind == "default" else {"type": a.rope.kind, "factor": a.rope.factor}
    return {k: v for k, v in out.items() if k not in ("rope_parameters", "head_dim")} | {"rope_scaling": scaling}


def names(config: DecoderConfig) -> dict[str, str | Place]:
    """{key of a piece: its place on disk}. The rows of `wqkv` are grouped by kv head: its query heads, its key, its value."""
    out: dict[str, str | Place] = {"embed/weight": "model.tok_embeddings.weight"}
    for i, a in enumerate(attentions(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        out |= {f"{ours}.{key}": f"{theirs}.{name}.weight" for key, name in LAYER.items()}
        out |= {f"{ours}.attn/qkv/{part}": place for part, place in wqkv(f"{theirs}.attention.wqkv.weight", a).items()}
    out["head/norm"] = "model.norm.weight"
    return out if config.tied else out | {"head/weight": "output.weight"}


def wqkv(name: str, a: Attention) -> dict[str, Place]:
    """Where q, k and v of an attention lie in one matrix of rows [q … q | k | v] for each kv head."""
    d, group = a.head_dim, a.heads // a.kv_heads
    rows, block = (a.heads + 2 * a.kv_heads) * d, (group + 2) * d
    start = {"q": (0, group * d), "k": (group * d, d), "v": (group * d + d, d)}  # in the block of a kv head, and how many rows
    return {part: Place(name, tuple((g * n, g * block + at, n) for g in range(a.kv_heads)), rows) for part, (at, n) in start.items()}


def copies(config: DecoderConfig) -> dict[str, str]:
    """{name that may be on disk as well: name of the tensor that it must equal}: some tools write a tied head out."""
    return {"output.weight": "model.tok_embeddings.weight"} if config.tied else {}


def derived(name: str) -> bool:
    """The table of rotary frequencies, which old files hold, follows from the config."""
    return name.endswith("rotary_emb.inv_freq")

"""Qwen3, dense: grouped-query attention with an RMS norm over each head of q and k, no biases in the releases (Qwen team 2025, arXiv 2505.09388)."""

from functools import partial

from lf.models.families import common, windows

DIALECT = common.Dialect(
    "qwen3",
    "Qwen3ForCausalLM",
    qk_norm=True,
    bias=common.one_bias,
    write_bias=common.write_one_bias,
    windows=windows.last_layers_slide,
    write_windows=windows.write_last_layers_slide,
    head_dim=128,
    kv_heads=32,
    max_len=32768,
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = common.names, common.copies, common.derived

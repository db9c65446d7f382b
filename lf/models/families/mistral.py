"""Mistral, dense: Llama with a sliding window in every layer or in none (Jiang et al. 2023, arXiv 2310.06825)."""

from functools import partial

from lf.models.families import common, windows

DIALECT = common.Dialect(
    "mistral",
    "MistralForCausalLM",
    qk_norm=False,
    bias=common.no_bias,
    write_bias=common.write_fixed_bias,
    windows=windows.all_layers_slide,
    write_windows=windows.write_all_layers_slide,
    kv_heads=8,
    max_len=131072,
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = common.names, common.copies, common.derived

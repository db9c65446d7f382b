"""Qwen1.5, Qwen2 and Qwen2.5, which share one model_type: biases on q, k and v (Qwen team 2024, arXiv 2407.10671)."""

from functools import partial

from lf.models.families import common, windows

DIALECT = common.Dialect(
    "qwen2",
    "Qwen2ForCausalLM",
    qk_norm=False,
    bias=common.qkv_bias,
    write_bias=partial(common.write_fixed_bias, wanted=(True, False)),
    windows=windows.last_layers_slide,
    write_windows=windows.write_last_layers_slide,
    kv_heads=32,
    max_len=32768,
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = common.names, common.copies, common.derived

"""Llama 2, 3, 3.1, 3.2 and what is built like them (Touvron et al. 2023, arXiv 2307.09288; Llama team 2024, arXiv 2407.21783)."""

from functools import partial

from lf.models.families import common, windows

DIALECT = common.Dialect(
    "llama",
    "LlamaForCausalLM",
    qk_norm=False,
    bias=common.one_bias,
    write_bias=common.write_one_bias,
    windows=windows.no_windows,
    write_windows=windows.write_no_windows,
    more={"mlp_bias": False, "pretraining_tp": 1},
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = common.names, common.copies, common.derived

"""MiMo-7B: Qwen2 with a head_dim of its own, and heads that predict further tokens (Xiaomi LLM-Core team 2025, arXiv 2505.07608).

lf trains the trunk. The heads (`model.mtp_layers.*`) serve speculative decoding; they are left out on load, with a word, and a folder that lf
writes says that it has none (`num_nextn_predict_layers: 0`). transformers has no class for it: its own code comes with the release.
"""

from functools import partial

from lf.models.decoder import DecoderConfig
from lf.models.families import common, windows

DIALECT = common.Dialect(
    "mimo",
    "MiMoForCausalLM",
    qk_norm=False,
    bias=common.qkv_bias,
    write_bias=partial(common.write_fixed_bias, wanted=(True, False)),
    windows=windows.last_layers_slide,
    write_windows=windows.write_last_layers_slide,
    kv_heads=32,
    max_len=32768,
    only={"attention_bias": (True, None)},
    more={
        "attention_bias": True,
        "num_nextn_predict_layers": 0,
        "auto_map": {
            "AutoConfig": "XiaomiMiMo/MiMo-7B-Base--configuration_mimo.MiMoConfig",
            "AutoModel": "XiaomiMiMo/MiMo-7B-Base--modeling_mimo.MiMoModel",
            "AutoModelForCausalLM": "XiaomiMiMo/MiMo-7B-Base--modeling_mimo.MiMoForCausalLM",
        },
    },
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = common.names, common.copies, common.derived


def unused(name: str, config: DecoderConfig) -> str:
    return "heads that predict further tokens" if name.startswith("model.mtp_layers.") else ""

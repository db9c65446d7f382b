"""DeepSeek-V3 and V3.1, and Kimi-K2, which is of the same class (DeepSeek-AI 2024, arXiv 2412.19437; Kimi team 2025, arXiv 2507.20534).

Kimi's model_type `kimi_k2` is read, and written as `deepseek_v3`, which tools open without code of the release. The head that predicts further ahead
is a layer after the last. `aux_loss_alpha` is the weight of the routers' loss, by document where `seq_aux`; 0 where the file has none. transformers
writes `num_nextn_predict_layers: 1` for models whose files hold no such head: load refuses these, and says to write 0 there.
"""

from __future__ import annotations

from functools import partial

from lf.models.families import common, deepseek, ffn

DIALECT = common.Dialect(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    latent=True,
    ffns=partial(deepseek.read, choice=partial(deepseek.by_sigmoid, scale=2.5, groups=8, top_groups=4), first=3),
    write_ffns=deepseek.write,
    max_len=4096,
    further="num_nextn_predict_layers",
    only={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1, None)},
    more={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1, "pretraining_tp": 1},
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = partial(common.names, mixture=ffn.experts), common.copies, common.derived
forms = partial(common.forms, mixture=ffn.experts)
unused, separable = common.further_heads, common.separable

"""DeepSeek-V2 and V2-Lite: latent attention, softmax over all experts, the best groups by their best expert (DeepSeek-AI 2024, arXiv 2405.04434).

`aux_loss_alpha` is the weight of the routers' loss, by document where `seq_aux`, as in the code that comes with the releases; transformers has none.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lf.models.families import common, deepseek, ffn


def write_mixtures(ffns: ffn.FFNs) -> dict[str, Any]:
    fields = deepseek.write(ffns)
    return {**fields, "topk_method": deepseek.GROUPS if fields["n_group"] > 1 else deepseek.GREEDY}


DIALECT = common.Dialect(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    latent=True,
    ffns=partial(deepseek.read, choice=deepseek.by_softmax, first=0),
    write_ffns=write_mixtures,
    only={"scoring_func": ("softmax",), "norm_topk_prob": (False, None), "moe_layer_freq": (1, None), "rope_interleave": (True, None)},
    more={"scoring_func": "softmax", "moe_layer_freq": 1, "ep_size": 1, "pretraining_tp": 1},
)
read, write = partial(common.read, DIALECT), partial(common.write, DIALECT)
names, copies, derived = partial(common.names, mixture=ffn.experts), common.copies, common.derived
forms = partial(common.forms, mixture=ffn.experts)

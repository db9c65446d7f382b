"""InternLM2's config.json: what its own code takes, and what is refused. Its mathematics and its files are compared in test_families.py."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from lf.config import ConfigError
from lf.models.families import internlm2
from lf.models.presets import PRESETS
from lf.ops.rope import Rope

RELEASED: dict[str, Any] = {  # internlm/internlm2_5-7b
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "bias": False, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 92544,
}  # fmt: skip


def test_a_release_is_read_and_written_as_its_own_code_takes_it() -> None:
    config = internlm2.read(RELEASED)
    assert config == PRESETS["internlm2.5-7b"]
    written = internlm2.write(config)
    said = {k: written[k] for k in RELEASED.keys() & written.keys() - {"auto_map"}}
    assert said == {k: RELEASED[k] for k in said}
    assert RELEASED.keys() - written.keys() == {"torch_dtype", "pretraining_tp"}  # the export's to say; of no effect
    assert not {"rope_parameters", "head_dim"} & written.keys()
    plain = internlm2.read({**RELEASED, "rope_scaling": None})
    assert internlm2.write(plain)["rope_scaling"] is None
    assert internlm2.read(internlm2.write(plain)) == plain


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({k: v for k, v in RELEASED.items() if k != "bias"}, "bias=True is not supported; only False is"),
        ({**RELEASED, "bias": True}, "bias=True is not supported"),
        ({**RELEASED, "rope_scaling": {"type": "dynamic"}}, "need factor"),
        ({**RELEASED, "architectures": ["InternLM2ForRewardModel"]}, "only InternLM2ForCausalLM is"),
    ],
)
def test_what_cannot_be_built_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        internlm2.read(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope": Rope(kind="yarn", factor=2.0, original_len=64)}, "rotary positions are default, linear, dynamic"),
        ({"rope": Rope(dim=64)}, "of whole heads"),
        ({"head_dim": 64}, "its head_dim is the width over the heads, 4096/32; that of the model is 64"),
        ({"qkv_bias": True}, "it has biases on no matrix"),
        ({"qk_norm": True}, "norms of q and k"),
        ({"window": 8}, "no sliding windows"),
    ],
)
def test_what_its_code_has_not_cannot_be_written(change: dict[str, Any], words: str) -> None:
    config = PRESETS["internlm2.5-7b"]
    mixer = attrs.evolve(config.layers[0].mixer, **change)
    config = attrs.evolve(config, layers=tuple(attrs.evolve(layer, mixer=mixer) for layer in config.layers))
    with pytest.raises(ConfigError, match=words):
        internlm2.write(config)

"""Every family against transformers: logits, loss and every gradient, on one rank and on an awkward mesh, and its files both ways."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import context
from safetensors.torch import load_file, save_file

import lf
from lf import box, tree
from lf.config import ConfigError
from lf.models import families
from lf.models.families import rope
from lf.models.families.place import Place
from lf.models.presets import PRESETS
from lf.ops.rope import Rope
from lf.parity import random_batches

SHAPES = {
    "vocab_size": 37, "hidden_size": 30, "intermediate_size": 11, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
THETA = {"rope_theta": 50000.0}
ROPES = {
    "default": {"rope_type": "default", **THETA},
    "linear": {"rope_type": "linear", "factor": 3.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, **THETA},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, **THETA,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 1.0, **THETA},
    "yarn mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False, **THETA,
    },
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama {kind}": ("Llama", {"rope_parameters": rope, "head_dim": 12}) for kind, rope in ROPES.items()},
    "llama biases, tied": ("Llama", {"attention_bias": True, "tie_word_embeddings": True, "hidden_size": 36}),
    "qwen2": ("Qwen2", {"hidden_size": 36}),
    "qwen2 the last layer slides": ("Qwen2", {"hidden_size": 36, "max_window_layers": 1, **WINDOWS}),
    "qwen3 some layers slide": (
        "Qwen3",
        {"head_dim": 10, "attention_bias": True, "layer_types": ["sliding_attention", "full_attention"], **WINDOWS},
    ),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 4}),
    "mistral without a window, one kv head": ("Mistral", {"head_dim": 8, "sliding_window": None, "num_key_value_heads": 1}),
    "mimo": ("Qwen2", {"hidden_size": 36, "rope_parameters": {"rope_type": "default", "rope_theta": 640000.0}}),
    "internlm2": ("Llama", {"hidden_size": 36, "rope_parameters": ROPES["dynamic"]}),
    "phi3 partial": ("Phi3", {"hidden_size": 48, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}}),
    "phi3 slides": ("Phi3", {"hidden_size": 36, "sliding_window": 3, "rope_parameters": {**ROPES["default"]}}),
}


def oracle(case: str) -> Any:
    """The tiny model of transformers, with no parameter left at its initial value."""
    import transformers

    name, changes = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**SHAPES, "rope_parameters": ROPES["default"], **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        gain = p.ndim == 1 and "norm" in next(n for n, q in model.named_parameters() if q is p)
        p.data = (0.3 if p.ndim > 1 else 0.2) * torch.randn(p.shape, generator=generator) + gain
    return model.eval()


def said(model: Any, batch: lf.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of all tokens, sum of the cross-entropy), each document run by itself."""
    ends = [int(n) for n in batch.plan["cu_seqlens"].unique()]
    logits = torch.cat([model(batch.plan["tokens"][None, a:b], use_cache=False).logits[0] for a, b in itertools.pairwise(ends)])
    return logits, F.cross_entropy(logits, batch.plan["labels"], reduction="sum")


def on_disk(case: str, values: dict[str, Any], of: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config.json, tensors) of what transformers has no class for, from the class that computes the same."""
    if case == "mimo":
        heads = {f"model.mtp_layers.0.{name}.weight": torch.ones(3) for name in ("input_proj", "final_layernorm")}
        return {**values, "model_type": "mimo", "architectures": ["MiMoForCausalLM"], "attention_bias": True, "head_dim": 6}, {**of, **heads}
    if case == "internlm2":
        return {**values, "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}, internlm2(of, 3, 6)
    return values, of


def internlm2(of: dict[str, torch.Tensor], group: int, d: int) -> dict[str, torch.Tensor]:
    """wqkv is, for each kv head, its query heads, the key and the value."""
    new = {
        "model.embed_tokens": "model.tok_embeddings", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "lm_head": "output",
    }  # fmt: skip
    out = {}
    for name, w in of.items():
        if "q_proj" in name:
            q, k, v = (of[name.replace("q_proj", f"{n}_proj")].unflatten(0, (-1, g, d)) for n, g in (("q", group), ("k", 1), ("v", 1)))
            out[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat([q, k, v], 1).flatten(0, 2)
        elif "k_proj" not in name and "v_proj" not in name:
            for ours, theirs in new.items():
                name = name.replace(ours, theirs)
            out[name] = w
    return out


def write(case: str, hf: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Writes the folder; returns the gradients of its tensors, once there are some."""
    hf.save_pretrained(folder)
    values, tensors = on_disk(case, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(values))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def gradients(case: str, hf: Any) -> dict[str, torch.Tensor]:
    return on_disk(case, {}, {name: p.grad for name, p in hf.named_parameters()})[1]


def part_of(whole: dict[str, torch.Tensor], place: str | Place, piece: Any) -> torch.Tensor:
    """The box of a piece in the tensors of a folder."""
    if isinstance(place, str):
        return whole[place][box.slices(piece.box, box.whole(piece.shape))]
    rows = torch.cat([torch.arange(a, b) for a, b in place.disk(*piece.box[place.dim])])
    return whole[place.name].index_select(place.dim, rows)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_every_gradient_and_files_both_ways(tmp_path: Any, case: str) -> None:
    hf = oracle(case)
    before = write(case, hf, tmp_path / "a")
    model = lf.hf.model(tmp_path / "a")
    batches = random_batches(model, seed=1, step=0, count=4, tokens=23)
    results = [said(hf, b) for b in batches]
    count = sum(int((b.plan["labels"] != lf.IGNORE).sum()) for b in batches)
    loss = torch.stack([s for _, s in results]).sum() / count
    loss.backward()
    whole = gradients(case, hf)
    atol = 1e-4 * max(1.0, max(g.abs().max().item() for g in whole.values()))

    def rank(axes: Any) -> None:
        ctx, layout, dp = context(axes, "fp32"), lf.layout(model, axes.mesh), axes["dp"]
        params = lf.hf.load(tmp_path / "a", layout, ctx)
        for batch, (want, _) in zip(batches[dp.index :: dp.size], results[dp.index :: dp.size]):
            bare = lf.Batch({k: v for k, v in batch.plan.items() if k != "labels"})
            torch.testing.assert_close(lf.forward(model, params, bare, ctx), want.detach(), atol=1e-4, rtol=0)
        program = lf.schedule.one_f_one_b(1, 4 // dp.size)
        grads, metrics = lf.train.gradients(layout, program, ctx)(params, batches[dp.index :: dp.size])
        torch.testing.assert_close(metrics["loss"], loss.detach(), atol=1e-5, rtol=1e-5)
        names = families.of(model.config).names(model.config)
        for path, spec in layout.specs.items():
            for piece in spec.pieces(axes.coords):
                got, want = piece.view(tree.get(grads, path)), part_of(whole, names[piece.key], piece)
                torch.testing.assert_close(got, want, atol=atol, rtol=0, msg=lambda m, key=piece.key: f"{key}: {m}")
        lf.hf.save(tmp_path / f"b{axes.mesh.size}", layout, params, ctx)

    for mesh in ("", "tp=5,dp=2"):
        lf.sim.spmd(lf.Mesh.parse(mesh).fill(), rank)
    for folder in ("b1", "b10"):
        after = load_file(tmp_path / folder / "model.safetensors")
        kept = {name: w for name, w in before.items() if "mtp_layers" not in name}
        assert after.keys() == kept.keys()
        assert all(torch.equal(after[name], w) for name, w in kept.items())
        assert lf.hf.read_config(tmp_path / folder) == model.config
    if case.split()[0] in ("llama", "qwen2", "qwen3", "mistral", "phi3"):
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b10", attn_implementation="eager").eval()
        assert type(theirs) is type(hf)
        with torch.no_grad():
            assert torch.equal(said(theirs, batches[0])[0], said(hf, batches[0])[0])


@pytest.mark.parametrize(
    ("case", "mesh"),
    [("llama biases, tied", "tp=3"), ("qwen2 the last layer slides", "tp=5"), ("mistral", "tp=4,dp=2"), ("qwen3 some layers slide", "tp=7")],
)
def test_law_1(case: str, mesh: str) -> None:
    config = read_only(case)
    report = lf.parity.compare(lf.models.decoder.decoder(config), lf.Mesh.parse(mesh), microbatches=1, steps=2, padding=3)
    assert report.ok, str(report)
    assert all(q.size > 0 for q in report.rows if q.name != "skipped"), "a quantity that is 0 compares nothing"


def read_only(case: str) -> Any:
    return families.read(oracle(case).config.to_dict() | {"architectures": None})


@pytest.mark.parametrize("kind", ROPES)
def test_old_and_new_keys_mean_the_same(kind: str) -> None:
    new = {**SHAPES, "head_dim": 4, "model_type": "llama", "rope_parameters": ROPES[kind]}
    scaling = {k: v for k, v in ROPES[kind].items() if k not in ("rope_theta", "rope_type")}
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | THETA
    old["rope_scaling"] = {"type": ROPES[kind]["rope_type"], **scaling} if scaling else None
    config = families.read(new)
    assert families.read(old) == config
    assert config.layers[0].mixer.rope.kind == kind.split()[0]
    both = families.of(config).write(config)
    assert families.read(both) == config
    without_new = {k: v for k, v in both.items() if k != "rope_parameters"}
    assert families.read(without_new) == config
    assert families.read({k: v for k, v in both.items() if k not in ("rope_theta", "rope_scaling")}) == config


def test_what_a_missing_field_means() -> None:
    """As for the classes of transformers."""
    from transformers import CONFIG_MAPPING

    missing = ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")
    least = {k: v for k, v in {**SHAPES, "hidden_size": 36}.items() if k not in missing}
    config = families.read({**least, "model_type": "llama"})
    a = config.layers[0].mixer
    assert (a.kv_heads, a.head_dim, a.rope, config.tied) == (6, 6, Rope(10000.0), False)
    wide = {**least, "hidden_size": 128, "num_attention_heads": 32}
    for name in ("llama", "mistral", "qwen2", "qwen3"):
        theirs, ours = CONFIG_MAPPING[name](**wide), families.read({**wide, "model_type": name})
        a = ours.layers[0].mixer
        assert (a.kv_heads, ours.max_len, ours.tied) == (theirs.num_key_value_heads, theirs.max_position_embeddings, theirs.tie_word_embeddings)
        assert a.head_dim == (getattr(theirs, "head_dim", None) or 4)
        assert a.window == getattr(theirs, "sliding_window", None)
        assert families.read({**wide, "model_type": name, "num_key_value_heads": None}).layers[0].mixer.kv_heads == 32, "null is as many as heads"
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 512, "factor": None}
    long = {"num_key_value_heads": 2, "max_position_embeddings": 2048, "rope_parameters": yarn}
    stretched = families.read({**least, "model_type": "qwen2", **long})
    assert stretched.layers[0].mixer.rope == Rope(10000.0, "yarn", 4.0, original_len=512)


def test_every_part_of_a_head_that_turns_survives_both_ways() -> None:
    """dim / head_dim is rounded, and readers cut off: 30 of 44 would come back as 29."""
    for head_dim in range(4, 258, 2):
        for dim in range(2, head_dim, 2):
            factor = rope.write_rope(Rope(dim=dim), head_dim, 8)["partial_rotary_factor"]
            assert int(head_dim * factor) == dim


def test_a_family_writes_its_own_and_refuses_what_it_cannot_say() -> None:
    mistral, qwen3 = PRESETS["mistral-7b-v0.1"], PRESETS["qwen3-0.6b"]
    assert families.of(mistral).write(mistral)["model_type"] == "mistral"
    assert families.of(attrs.evolve(mistral, family="")).write(mistral)["model_type"] == "mistral", "llama has no windows"
    assert families.of(attrs.evolve(qwen3, family="")).write(qwen3)["model_type"] == "qwen3"
    layer = mistral.layers[0]
    some = attrs.evolve(mistral, layers=(layer, attrs.evolve(layer, mixer=attrs.evolve(layer.mixer, window=None))))
    with pytest.raises(ConfigError, match="one sliding window or none"):
        families.of(some)
    with pytest.raises(ConfigError, match="unknown family 'lama'; did you mean 'llama'"):
        families.of(attrs.evolve(mistral, family="lama"))
    with pytest.raises(ConfigError, match="biases on no matrix"):
        families.of(attrs.evolve(mistral, layers=(attrs.evolve(layer, mixer=attrs.evolve(layer.mixer, qkv_bias=True)),)))


def test_a_share_of_a_head_turns_only_where_the_class_of_the_family_does_it() -> None:
    config = read_only("phi3 partial")
    assert config.layers[0].mixer.rope.dim == 4
    for family in ("llama", "mistral", "internlm2"):
        with pytest.raises(ConfigError, match="whole heads"):
            families.of(attrs.evolve(config, family=family))
    with pytest.raises(ConfigError, match=r"kind 'linear' are not supported in phi3"):
        families.read({**SHAPES, "hidden_size": 36, "model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}})


COUNTS = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "qwen1.5-0.5b": 463_987_712, "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280, "qwen1.5-7b": 7_721_324_544, "qwen1.5-14b": 14_167_290_880, "qwen1.5-32b": 32_512_218_112,
    "qwen1.5-72b": 72_287_920_128, "qwen1.5-110b": 111_209_914_368, "qwen2-0.5b": 494_032_768, "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512, "qwen2-72b": 72_706_203_648, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552, "mistral-nemo-12b": 12_247_782_400, "mistral-small-24b": 23_572_403_200,
    "internlm2.5-1.8b": 1_889_110_016, "internlm2.5-7b": 7_737_708_544, "internlm2.5-20b": 19_861_149_696, "mimo-7b": 7_622_619_136,
    "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560, "qwen1.5-moe-a2.7b": 14_315_784_192, "qwen2-57b-a14b": 57_408_658_944,
    "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112, "deepseek-v2": 235_741_434_880, "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_404_352 + 11_610_067_968, "kimi-k2": 1_026_408_209_408, "minimax-m2": 228_689_748_992, "glm-4.5": 356_785_884_416,
    "glm-4.5-air": 109_227_304_960, "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672,
}  # fmt: skip
OWN = {"qwen3-demo": 853_056, "moe-tiny": 1_593_408}
"""Of no release."""


def test_presets_have_the_parameters_of_the_releases() -> None:
    """mimo-7b: its trunk alone. deepseek-v3 and glm-4.5 with the head that predicts further ahead, whose embedding and head count once. Without the
    selection biases, which are not learned."""
    assert COUNTS.keys() == PRESETS.keys() - OWN.keys()
    for name, config in PRESETS.items():
        model = lf.hf.model(name)
        assert sum(torch.Size(p.shape).numel() for p in model.params().values() if p.learned) == {**COUNTS, **OWN}[name], name
        family = families.of(config)
        assert families.read(family.write(config)) == attrs.evolve(config, embed_std=config.init_std), name


def test_operations_of_a_step_by_hand() -> None:
    """6 per parameter of a matrix and token, and 12 per head dim and pair of a query with a key."""
    config = attrs.evolve(read_only("mistral"), layers=read_only("mistral").layers[:1])
    tokens = np.zeros(9, np.int64)
    batch = lf.data.pack([lf.data.Row(tokens, tokens, np.array([0, 3]))])
    model = lf.models.decoder.decoder(config)
    matrices = sum(torch.Size(p.shape).numel() for path, p in model.params().items() if len(p.shape) == 2 and path != "embed/weight")
    pairs = (1 + 2 + 3) + (1 + 2 + 3 + 4 + 4 + 4)  # documents of 3 and 6 tokens, a window of 4
    assert model.flops is not None
    assert model.flops(batch) == 6 * 9 * matrices + 12 * pairs * 6 * 8

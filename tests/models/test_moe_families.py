"""Families with mixtures of experts against transformers in float64: logits and every gradient, and their files both ways."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import context
from safetensors.torch import load_file, save_file
from wide_oracle import gradients, randomised, said, wide

import lf
from lf import tree
from lf.models import families
from lf.models.decoder import MTP
from lf.models.families.place import places
from lf.models.moe import MoE
from lf.parity import random_batches

os.environ["HF_HUB_OFFLINE"] = "1"

SHAPES: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 6, "num_experts": 8, "num_experts_per_tok": 2}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {"moe_intermediate_size": 6, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.7, "mscale_all_dim": 1.0,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3_moe not normalised, tied, slides": (
        "Qwen3Moe",
        {**QWEN, "head_dim": 8, "decoder_sparse_step": 2, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4},
    ),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 7}),
    "qwen2_moe slides": (
        "Qwen2Moe",
        {**QWEN, "shared_expert_intermediate_size": 7, "qkv_bias": False, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 4},
    ),
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral slides": ("Mixtral", {**MIXTRAL, "head_dim": 8, "sliding_window": 4}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, **SHARED, "n_group": 4, "topk_group": 2, "rope_parameters": YARN}),
    "deepseek_v3 in halves, biases": (
        "DeepseekV3",
        {
            **LATENT, **SHARED, "n_group": 1, "topk_group": 1, "rope_interleave": False, "attention_bias": True, "norm_topk_prob": False,
            "q_lora_rank": None, "routed_scaling_factor": 2.827,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **LATENT, **SHARED, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v2 lite": ("DeepseekV2", {**LATENT, **SHARED, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "minimax_m2": ("MiniMaxM2", {**MIXTRAL, "head_dim": 8, "rotary_dim": 4}),
    "glm4_moe": ("Glm4Moe", {**SHARED, "head_dim": 8, "use_qk_norm": True, "attention_bias": True, "n_group": 4, "topk_group": 2}),
    "glm4_moe plain": ("Glm4Moe", {**SHARED, "head_dim": 8, "n_shared_experts": 1, "routed_scaling_factor": 2.5}),
    "gpt_oss": ("GptOss", {**MIXTRAL, "head_dim": 8, "sliding_window": 4, "swiglu_limit": 0.5}),
}  # fmt: skip


def built(case: str, **more: Any) -> Any:
    """The tiny model of transformers in float64."""
    import transformers

    name, changes = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**SHAPES, **changes, **more})
    config._attn_implementation = config._experts_implementation = "eager"
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config))


def run(folder: Path, batches: list[lf.Batch]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """({name on disk: gradient}, metrics) of lf on one rank, of the weights in a folder."""
    model = lf.hf.model(folder)

    def rank(axes: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        ctx, layout = context(axes, "fp64"), lf.layout(model, axes.mesh)
        params = lf.hf.load(folder, layout, ctx)
        grads, metrics = lf.train.gradients(layout, lf.schedule.one_f_one_b(1, len(batches)), ctx)(params, batches)
        lf.hf.save(folder.with_name("again"), layout, params, ctx)
        frozen = {path: torch.zeros_like(tree.get(params, path)) for path in layout.specs.keys() - dict(tree.items(grads)).keys()}
        lf.hf.save(folder.with_name("grads"), layout, tree.build([*tree.items(grads), *frozen.items()]), ctx)
        return load_file(folder.with_name("grads") / "model.safetensors"), metrics

    (out,) = lf.sim.spmd(lf.Mesh(dp=1), rank)
    return out


def close(got: torch.Tensor, want: torch.Tensor, scale: float, what: str) -> None:
    assert got.shape == want.shape, what
    assert (got - want).abs().max() <= 1e-10 * scale, f"{what}: off by {(got - want).abs().max():.2e}, largest {scale:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_and_files_both_ways(tmp_path: Path, case: str) -> None:
    module = case.split()[0]
    with wide(module):
        hf = built(case)
        hf.save_pretrained(tmp_path / "a")
        trunk_alone(tmp_path / "a")
        model = lf.hf.model(tmp_path / "a")
        batches = random_batches(model, seed=1, step=0, count=2, tokens=23)
        results = [said(hf, b) for b in batches]
        count = sum(int((b.plan["labels"] != lf.IGNORE).sum()) for b in batches)
        (torch.stack([s for _, s in results]).sum() / count).backward()
    before, whole = load_file(tmp_path / "a" / "model.safetensors"), gradients(hf, tmp_path / "g")
    at, scale = places(families.of(model.config).names(model.config)), max(float(g.abs().max()) for g in whole.values())

    def rank(axes: Any) -> None:
        ctx, layout, dp = context(axes, "fp64"), lf.layout(model, axes.mesh), axes["dp"]
        params = lf.hf.load(tmp_path / "a", layout, ctx)
        for batch, (want, _) in zip(batches[dp.index :: dp.size], results[dp.index :: dp.size]):
            bare = lf.Batch({k: v for k, v in batch.plan.items() if k != "labels"})
            close(lf.forward(model, params, bare, ctx), want.detach(), float(want.abs().max()), "logits")
        grads, _ = lf.train.gradients(layout, lf.schedule.one_f_one_b(1, 2 // dp.size), ctx)(params, batches[dp.index :: dp.size])
        for path, spec in layout.specs.items():
            for piece in spec.pieces(axes.coords) if spec.param.learned else ():
                got = piece.view(tree.get(grads, path))
                for cut in at[piece.key].cuts(piece.box):
                    want = at[piece.key].logical(whole[cut.name][tuple(slice(*b) for b in cut.disk)])
                    here = tuple(slice(b[0] - o[0], b[1] - o[0]) for b, o in zip(cut.part, piece.box))
                    close(got[here], want, scale, piece.key)
        lf.hf.save(tmp_path / f"b{axes.mesh.size}", layout, params, ctx)

    for mesh in ("", "dp=2,ep=2"):
        lf.sim.spmd(lf.Mesh.parse(mesh).fill(), rank)
    for folder in ("b1", "b2"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], w) for name, w in before.items())
        assert lf.hf.read_config(tmp_path / folder) == model.config
    from transformers import AutoModelForCausalLM

    with wide(module):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b2", attn_implementation="eager", dtype=torch.float64).eval()
        theirs.config._experts_implementation = "eager"
        assert type(theirs) is type(hf)
        with torch.no_grad():
            close(said(theirs, batches[0])[0], results[0][0].detach(), float(results[0][0].abs().max()), "logits of what lf wrote")


def trunk_alone(folder: Path) -> None:
    """transformers says that there is a further head, and writes none."""
    values = json.loads((folder / "config.json").read_text())
    if "num_nextn_predict_layers" in values:
        (folder / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 0}))


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral slides"])
def test_the_loss_of_routers_is_that_of_transformers_for_one_layer(tmp_path: Path, case: str) -> None:
    """With several layers theirs pools tokens of all layers, and ours adds layers up (lf/models/families/ffn.py)."""
    module = case.split()[0]
    with wide(module):
        hf = built(case, num_hidden_layers=2 if module == "qwen3_moe" else 1, output_router_logits=True, router_aux_loss_coef=0.7)
        hf.save_pretrained(tmp_path / "a")
        words = torch.arange(29) * 7 % 37
        out = hf(words[None], labels=words[None], output_router_logits=True, use_cache=False)
        out.loss.backward()
    (layer,) = {layer.ffn for layer in lf.hf.model(tmp_path / "a").config.layers if isinstance(layer.ffn, MoE)}
    assert layer.router.balance == pytest.approx(0.7 * 2)
    labels = torch.cat([words[1:], torch.tensor([lf.IGNORE])])
    batch = lf.data.pack([lf.data.Row(words.numpy(), labels.numpy(), np.array([0]))])
    got, metrics = run(tmp_path / "a", [batch])
    assert float(out.aux_loss) > 1
    torch.testing.assert_close(metrics["balance"] * layer.router.balance, 0.7 * out.aux_loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics["loss"], out.loss.detach(), rtol=1e-10, atol=0)
    want = gradients(hf, tmp_path / "g")
    for name, g in want.items():
        close(got[name], g, max(float(g.abs().max()) for g in want.values()), name)
    assert lf.hf.read_config(tmp_path / "again") == lf.hf.read_config(tmp_path / "a")


FURTHER = {f"{name}.weight": f"{name}.weight" for name in ("enorm", "hnorm", "eh_proj")} | {"post_norm.weight": "shared_head.norm.weight"}


def on_disk(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of transformers' further head under the names of the releases."""
    out = {}
    for name, w in tensors.items():
        where, block = prefix + name.removeprefix("mtp_block."), name.startswith("mtp_block.")
        if name.endswith("experts.gate_up_proj"):
            for k, (gate, up) in enumerate(e.chunk(2) for e in w):
                stem = f"{where.removesuffix('gate_up_proj')}{k}."
                out |= {f"{stem}gate_proj.weight": gate.contiguous(), f"{stem}up_proj.weight": up.contiguous()}
        elif name.endswith("experts.down_proj"):
            out |= {f"{where.removesuffix('down_proj')}{k}.down_proj.weight": e.contiguous() for k, e in enumerate(w)}
        else:
            out[where if block else prefix + FURTHER[name]] = w.contiguous()
    return out


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe plain"])
def test_a_head_that_predicts_further_ahead(tmp_path: Path, case: str) -> None:
    """Against transformers' own, which drafts with it: its layer, its norms, which half of the product is which, and what it shares."""
    from transformers.modeling_layers import MtpModel

    with wide(case.split()[0]):
        hf = built(case)
        heads = MtpModel(hf, 1)
        for p in hf.parameters():  # the head has its own copies of nothing
            p.requires_grad_(True)
        randomised(heads.layers, seed=4)
        hf.save_pretrained(tmp_path / "a")
        path = tmp_path / "a" / "model.safetensors"
        prefix = f"model.layers.{hf.config.num_hidden_layers}."
        before = load_file(path)
        further = on_disk({**dict(heads.layers[0].named_parameters()), **dict(heads.layers[0].named_buffers())}, prefix)
        shared = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
        twice = {prefix + copy: before[name].clone() for copy, name in shared.items()}
        save_file({**before, **{k: w.detach().clone() for k, w in further.items()}, **twice}, path, metadata={"format": "pt"})
        model = lf.hf.model(tmp_path / "a")
        assert model.config.mtp == MTP((model.config.layers[-1],))
        batches = random_batches(model, seed=1, step=0, count=2, tokens=23)
        near, far, counts = [], [], [0, 0]
        for batch in batches:
            for a, b in itertools.pairwise(int(n) for n in batch.plan["cu_seqlens"].unique()):
                words, labels = batch.plan["tokens"][None, a:b], batch.plan["labels"][a:b]
                hidden = hf.model(words, use_cache=False).last_hidden_state
                near.append(F.cross_entropy(hf.lm_head(hidden)[0], labels, reduction="sum"))
                if b - a > 1:
                    later = heads.forward_layer(0, hidden[:, :-1], torch.arange(1, b - a)[None], None, input_ids=words[:, 1:])
                    far.append(F.cross_entropy(hf.lm_head(later)[0], labels[1:], reduction="sum"))
                counts = [counts[0] + int((labels != lf.IGNORE).sum()), counts[1] + int((labels[1:] != lf.IGNORE).sum())]
        losses = torch.stack(near).sum() / counts[0], torch.stack(far).sum() / counts[1]
        (losses[0] + model.config.mtp.weight * losses[1]).backward()
    got, metrics = run(tmp_path / "a", batches)
    torch.testing.assert_close(metrics["mtp_0"], losses[1].detach(), rtol=1e-10, atol=0)
    want = on_disk({name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in heads.layers[0].named_parameters()}, prefix)
    assert all(g.any() for g in want.values() if "experts" not in g)
    want |= gradients(hf, tmp_path / "g")
    for name, g in want.items():
        close(got[name], g, max(float(g.abs().max()) for g in want.values()), name)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == {**before, **further}.keys(), "the copies are not written"
    assert all(torch.equal(again[name], w) for name, w in {**before, **further}.items())
    twice[prefix + "embed_tokens.weight"][0, 0] += 1
    save_file({**again, **twice}, path, metadata={"format": "pt"})
    with pytest.raises(lf.hf.CheckpointError, match=r"model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight"):
        run(tmp_path / "a", batches)

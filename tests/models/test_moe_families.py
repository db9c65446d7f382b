"""Families with mixtures of experts against transformers in float64: logits and every gradient, and their files both ways."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import context
from safetensors.torch import load_file, save_file
from wide_oracle import CASES, built, gradients, randomised, said, trunk_alone, wide

import lf
from lf import tree
from lf.models import families
from lf.models.decoder import MTP, decoder
from lf.models.families.place import places
from lf.models.moe import MoE
from lf.parity import random_batches


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
            close(lf.forward(model, params, bare, ctx), want.detach(), float(want.detach().abs().max()), "logits")
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
            close(said(theirs, batches[0])[0], results[0][0].detach(), float(results[0][0].detach().abs().max()), "logits of what lf wrote")


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
    assert out.aux_loss.detach() > 1
    torch.testing.assert_close(metrics["balance"] * layer.router.balance, 0.7 * out.aux_loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics["loss"], out.loss.detach(), rtol=1e-10, atol=0)
    want = gradients(hf, tmp_path / "g")
    for name, g in want.items():
        close(got[name], g, max(float(g.abs().max()) for g in want.values()), name)
    assert lf.hf.read_config(tmp_path / "again") == lf.hf.read_config(tmp_path / "a")


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
            out[where if block else prefix + name.replace("post_norm", "shared_head.norm")] = w.contiguous()
    return out


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe plain"])
def test_a_head_that_predicts_further_ahead(tmp_path: Path, capsys: Any, case: str) -> None:
    """Against transformers' own, which drafts with it: its layer, its norms, which half of the product is which, and what it shares."""
    from transformers.modeling_layers import MtpModel

    with wide(case.split()[0]):
        hf = built(case)
        heads = MtpModel(hf, 1)
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
    assert all(g.any() for name, g in want.items() if ".mlp.experts." not in name)
    want |= gradients(hf, tmp_path / "g")
    for name, g in want.items():
        close(got[name], g, max(float(g.abs().max()) for g in want.values()), name)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == {**before, **further}.keys(), "the copies are not written"
    assert all(torch.equal(again[name], w) for name, w in {**before, **further}.items())
    bare = decoder(attrs.evolve(model.config, mtp=None))  # without the head, whose tensors are left alone

    def trunk(axes: Any) -> None:
        ctx, layout = context(axes, "fp64"), lf.layout(bare, axes.mesh)
        lf.hf.save(tmp_path / "trunk", layout, lf.hf.load(tmp_path / "a", layout, ctx), ctx)

    lf.sim.spmd(lf.Mesh(dp=1), trunk)
    assert f"{len(further) + 2} tensors are left alone: heads that predict further ahead" in capsys.readouterr().out
    assert load_file(tmp_path / "trunk" / "model.safetensors").keys() == before.keys()
    assert lf.hf.read_config(tmp_path / "trunk") == bare.config
    twice[prefix + "embed_tokens.weight"][0, 0] += 1
    save_file({**again, **twice}, path, metadata={"format": "pt"})
    with pytest.raises(lf.hf.CheckpointError, match=r"model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight"):
        run(tmp_path / "a", batches)


def test_what_steers_training_alone_need_not_be_in_the_files(tmp_path: Path) -> None:
    """Capacity, losses and what one of them counts: a folder without them is loaded, and an export of such a model is an ordinary one."""
    hf = built("qwen3_moe")
    hf.save_pretrained(tmp_path / "a")
    config = lf.hf.read_config(tmp_path / "a")
    dense, sparse = config.layers
    router = attrs.evolve(sparse.ffn.router, capacity=1.5, balance=0.1, global_balance=0.2, z=0.3)
    steered = attrs.evolve(config, layers=(dense, attrs.evolve(sparse, ffn=attrs.evolve(sparse.ffn, router=router))))
    model = decoder(steered)

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(model, axes.mesh)
        params = lf.hf.load(tmp_path / "a", layout, ctx)
        assert tree.get(params, "layers.1.route/fraction").tolist() == [1 / 8] * 8
        lf.hf.save(tmp_path / "b", layout, params, ctx)

    lf.sim.spmd(lf.Mesh.parse("dp=2,ep=2"), rank)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], w) for name, w in before.items())
    assert families.bare(lf.hf.read_config(tmp_path / "b")) == families.bare(steered)
    assert lf.hf.read_config(tmp_path / "b").layers[1].ffn.router.balance == 0.1

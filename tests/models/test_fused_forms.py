"""Mixtures in the two forms that transformers 5 writes: a tensor for each matrix of each expert, as in the releases, and two for all experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import context
from qwen3_oracle import files
from safetensors.torch import load_file
from test_moe_families import built, trunk_alone

import lf
from lf import tree


@pytest.mark.parametrize("case", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "deepseek_v2", "minimax_m2", "glm4_moe"])
def test_both_forms_are_the_same_model_and_the_releases_form_is_written(tmp_path: Path, case: str) -> None:
    hf = built(case).float()
    for form, original in (("each", True), ("fused", False)):
        hf.save_pretrained(tmp_path / form, save_original_format=original)
        trunk_alone(tmp_path / form)
    model = lf.hf.model(tmp_path / "each")
    stacks = {name for name in load_file(tmp_path / "fused" / "model.safetensors") if name.endswith(".experts.gate_up_proj")}
    assert stacks
    assert not stacks & load_file(tmp_path / "each" / "model.safetensors").keys()

    def rank(axes: Any) -> None:
        ctx, layout = context(axes, "fp32"), lf.layout(model, axes.mesh)
        each, fused = (lf.hf.load(tmp_path / form, layout, ctx) for form in ("each", "fused"))
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(each), tree.leaves(fused), strict=True))
        for form, params in (("each", each), ("fused", fused)):
            lf.hf.save(tmp_path / f"again {form}", layout, params, ctx)

    lf.sim.spmd(lf.Mesh(dp=2, ep=2), rank)
    assert files(tmp_path / "again fused") == files(tmp_path / "again each")
    held = {form: load_file(tmp_path / form / "model.safetensors") for form in ("each", "again fused")}
    assert held["each"].keys() == held["again fused"].keys()
    assert all(torch.equal(x, held["again fused"][name]) for name, x in held["each"].items())

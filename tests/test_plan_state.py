"""What lasts on a rank is known from the layout: it is what a state there takes up, sharded or not; what cannot fit is refused with a way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SEED, context

import lf
from lf import memory, tree
from lf.chain_layouts import joined
from lf.models.small import tiny
from lf.plan_state import asked, held, lasting, state_bytes
from lf.schedule.memory import OutOfMemory
from lf.sim import spmd

PREFIX = "optimizer: "


@pytest.mark.parametrize("shard", ["0", "1", "2", "3", "3,ranks=2", "3,keep"])
def test_it_is_what_a_state_takes_up(shard: str) -> None:
    model, optimizer = tiny(False, layers=tiny().config.layers * 4), lf.optim.adamw(1e-3)
    layout = lf.layout(model, lf.Mesh(dp=4, tp=2), sharding=shard)

    def rank(axes: Any) -> dict[str, tuple[int, int]]:
        ctx = context(axes, "bf16")
        of, small = held(joined(layout), ctx), asked(joined(layout), optimizer, ctx, host=True)
        told = lasting(of, small, torch.float32)
        init, _ = lf.train.make(layout, optimizer, lf.schedule.build(layout, 1), ctx)
        state = init(lf.init(layout, ctx, SEED))
        real = {PREFIX + kind: tree.leaves(branch) for kind, branch in state.optimizer.items()}
        real["compute copy of the parameters"] = tree.leaves(state.params)
        each, there = 4 * sum(h.whole for h in of.values()), sum(2 * h.whole for h in of.values() if h.cut)
        assert (told["gradients"] < each) == (shard[0] in "23")
        assert told["parameters made whole"] == there if shard in ("0", "1", "2", "3,keep") else 0 < told["parameters made whole"] < there
        return {kind: (told[kind], sum(x.numel() * x.element_size() for x in leaves)) for kind, leaves in real.items()}

    for found in spmd(layout.mesh, rank):
        for kind, (told, real) in found.items():
            assert told == real, kind


def test_a_larger_stage_lasts_less() -> None:
    """What is said of a layout as if its state were sharded is what is said where it is, but for tensors that have too few rows to be shared."""
    said, model, ctx = dict[int, int](), lf.hf.model("qwen3-demo"), context(lf.axes_meta.MetaAxes(lf.Mesh(dp=4)), "bf16")
    for shard in range(4):
        layouts, plain = (joined(lf.layout(model, lf.Mesh(dp=4), sharding=words)) for words in (str(shard), "0"))
        small = asked(layouts, lf.optim.adamw(1e-3), ctx)
        said[shard] = sum(lasting(held(layouts, ctx), small, torch.float32).values())
        assert sum(lasting(held(plain, ctx, shard), small, torch.float32).values()) == pytest.approx(said[shard], rel=0.02)
    assert said[0] > said[1] > said[2] > said[3]


def test_bytes_of_an_element() -> None:
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    assert state_bytes(lf.optim.adamw(1e-3), layout, "bf16") == 12
    assert state_bytes(lf.optim.sgd(1e-3), layout, "fp64") == 8


@pytest.mark.parametrize(
    ("shard", "gib", "words"),
    [
        ("0", 80, "--shard 1, on the same ranks"),
        ("0", 60, "--shard 2, on the same ranks"),
        ("1", 40, "--shard 2, on the same ranks"),
        ("2", 25, "--shard 3, on the same ranks"),
        ("3", 8, "tp=4 instead of 1"),
    ],
)
def test_state_goes_into_shards_before_there_are_more_ranks(shard: str, gib: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-3.1-8b in bf16 on eight ranks: 134.6 GiB each, with stage 1 to 3 61.7, 35.7 and 22.7"""
    layout = lf.layout(lf.hf.model("llama-3.1-8b"), lf.Mesh(dp=8), sharding=shard)
    ctx = context(lf.axes_meta.MetaAxes(layout.mesh), "bf16")
    monkeypatch.setattr(lf.devices.get("cpu"), "memory_total", lambda: gib << 30)
    with pytest.raises(OutOfMemory, match=r"before the first step: rank 0 needs .* besides activations") as caught:
        memory.refuse_what_cannot_fit(layout, lf.optim.adamw(1e-3), ctx)
    assert f"without activations: {words}" in str(caught.value).splitlines()[-1]
    sizes = [line for line in str(caught.value).splitlines() if " GiB  " in line]
    assert sizes == sorted(sizes, key=lambda line: -float(line.split()[0]))

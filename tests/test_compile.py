"""Compiled layers: one full graph, the numbers of the plain ones, and equal layers share a compilation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import context, draw
from torch import Tensor

import lf
from lf import parity
from lf.axes import solo
from lf.axes_meta import MetaAxes
from lf.config import ConfigError
from lf.models.decoder import Attention, DecoderConfig, GatedMLP, Layer, decoder
from lf.ops.rope import Rope
from lf.parallel.product import W, probe_of, weight_gradient
from lf.schedule.compiled import compiled, layer_fn
from lf.schedule.shapes import trace
from lf.segment import Segment, path_of

# what there is to trace: norms of heads, biases, a window, grouped heads, positions that turn only some dims
MIXER = Attention(heads=4, kv_heads=2, head_dim=8, rope=Rope(dim=4), qk_norm=True, qkv_bias=True, out_bias=True, window=5)
MODEL = decoder(DecoderConfig(vocab=29, dim=8, layers=(Layer(MIXER, GatedMLP(6)),) * 2))
FORMS = ("plain", "acc", "probe")


class Setup:
    """A decoder on one rank, and two microbatches of one length."""

    def __init__(self, ctx: lf.Context) -> None:
        self.ctx, self.like = ctx, {"device": ctx.device.torch_device(0), "dtype": ctx.precision.compute}
        self.layout = lf.layout(MODEL, lf.Mesh(dp=1))
        self.params = parity.randomised(self.layout, ctx, seed=0)
        ids = [draw("ids", i, shape=(2, 12)).abs().mul(5).long().numpy() for i in range(2)]
        rows = [lf.data.Row(tokens, labels, np.array([0, start])) for (tokens, labels), start in zip(ids, (4, 7))]
        self.batches = [lf.shard_batch(lf.data.pack([r]), MODEL, ctx) for r in rows]
        self.shapes = trace(self.layout, self.batches[0], ctx)

    def run(self, fn: Any, segments: tuple[Segment, ...], form: str) -> list[Tensor]:
        """Outputs, input gradients and summed weight gradients of two microbatches whose forwards come first."""
        leaves = {(s.name, n): self.param(s, n).detach().requires_grad_() for s in segments for n in s.params}
        master = self.ctx.precision.master
        sums = {(s.name, n): torch.zeros_like(leaves[s.name, n], dtype=master, requires_grad=False) for s in segments for n in s.products}
        kept, out = [], []
        for i, batch in enumerate(self.batches):
            probes = {at: probe_of(self.shapes.products[at[0]][at[1]], self.like["device"]) for at in sums} if form == "probe" else {}
            weights: dict[Any, Any] = dict(leaves)
            if form != "plain":
                weights |= {at: W(leaves[at], sums[at]) if form == "acc" else W(leaves[at], probe=probes[at]) for at in sums}
            x: Any = {} if segments[0].name == "embed" else draw("x", i, shape=(12, 8)).to(**self.like).requires_grad_()
            y, losses, _, _ = fn([{n: weights[s.name, n] for n in s.params} for s in segments], x, batch, self.ctx, ())
            kept.append((x, [*losses.values()] if losses else [y], probes))
        total = {at: torch.zeros_like(w, dtype=master, requires_grad=False) for at, w in leaves.items()}
        for x, ys, probes in kept:
            inputs = [x] if isinstance(x, Tensor) else []
            wanted = [*inputs, *leaves.values(), *(p for pair in probes.values() for p in pair)]
            got = [*torch.autograd.grad(ys, wanted, [torch.ones_like(y) for y in ys], allow_unused=True)]
            out += [y.detach() for y in ys] + [got.pop(0) for _ in inputs]
            for at in leaves:
                if (g := got.pop(0)) is not None:
                    total[at] += g
            for at in probes:
                weight_gradient(sums[at], got.pop(0), got.pop(0))
        return [*out, *(t + sums[at] if at in sums else t for at, t in total.items())]

    def param(self, segment: Segment, name: str) -> Tensor:
        where, _, what = path_of(segment, name).partition("/")
        return self.params[where][what].to(self.like["dtype"])


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(context(solo()))


LAYERS = {name: tuple(s for s in MODEL.segments if s.layer == name) for name in ("embed", "layers.0", "layers.1", "head")}


def agree(setup: Setup, layer: str, form: str, backend: Any, tolerance: float = 1e-12) -> None:
    segments = LAYERS[layer]
    plain = layer_fn(tuple(s.apply for s in segments))
    want = setup.run(plain, segments, "plain")
    assert all(w.abs().max() > 0 for w in want), "the comparison would say nothing"
    for fn in (plain, compiled(plain, setup.ctx, backend)):
        for got, wanted in zip(setup.run(fn, segments, form), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        ("layers.0", "acc"),
        ("layers.0", "probe"),
        ("head", "acc"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("layers.0", "plain"), ("embed", "plain"), ("head", "probe"))),
    ],
)
def test_a_compiled_layer_gives_the_same_gradients(setup: Setup, layer: str, form: str) -> None:
    agree(setup, layer, form, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_inductor_gives_the_same_gradients(setup: Setup, form: str) -> None:
    agree(setup, "layers.0", form, "inductor")


def test_equal_layers_microbatches_and_steps_share_one_compilation(setup: Setup) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # it takes seconds to load, in every process of the tests

    counter = CompileCounterWithBackend("aot_eager")
    assert tuple(s.apply for s in LAYERS["layers.0"]) == tuple(s.apply for s in LAYERS["layers.1"])
    fn = compiled(layer_fn(tuple(s.apply for s in LAYERS["layers.0"])), setup.ctx, counter)
    for _ in range(2):
        for name in ("layers.0", "layers.1"):
            setup.run(fn, LAYERS[name], "probe")
    assert counter.frame_count == 1


def doubled(p: Any, x: Any, batch: Any, ctx: Any) -> Any:
    return x * 2, {}


def test_two_compiled_layers_do_not_use_up_each_others_recompilations(setup: Setup) -> None:
    """torch gives up after 8 recompilations of one code object, and all layers have the code of one function."""
    for dims in (range(1, 7), range(7, 13)):
        fn = compiled(layer_fn((doubled,)), setup.ctx, "eager")
        for n in dims:
            assert fn([{}], torch.ones([1] * n), None, setup.ctx, ())[0].item() == 2


def test_tp_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"compiled layers: mesh tp=2 has tp=2, and the collectives .* use tp=1"):
        compiled(layer_fn(()), context(MetaAxes(lf.Mesh(tp=2, dp=1))))

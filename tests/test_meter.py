"""What a meter measures of programs whose memory and operations are known by hand."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from helpers import SEED, context
from torch.utils.flop_counter import FlopCounterMode

import lf
from lf import meter as meters
from lf.axes import solo
from lf.meter import Meter
from lf.paper import Paper
from lf.parallel.product import product, weight_gradient

DEVICES = ["cpu", "meta"]


@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_of_a_small_program(device) -> None:
    w = torch.empty(10, 10, device=device)  # 400 bytes
    with Meter({"parameter": w}) as meter:
        x = torch.empty(5, 10, device=device)  # 200
        y = x @ w  # 200
        del x
        z = (y + 1).to(torch.float64)  # 200, which goes, and 400
        del y
    assert (meter.peak, meter.peak_by_kind) == (1200, {"parameter": 400, "activation": 800})
    assert (meter.now, meter.now_by_kind) == (800, {"parameter": 400, "activation": 400})
    assert meter.flops == 2 * 5 * 10 * 10
    del z
    assert meter.now_by_kind == {"parameter": 400}


@pytest.mark.parametrize("device", DEVICES)
def test_views_count_once(device) -> None:
    with Meter() as meter:
        x = torch.zeros(8, 8, device=device)
        views = [x.view(64), x[2:4], x.T, x.detach(), x.expand(3, 8, 8)]
        x.add_(1)
    assert meter.peak == meter.now == 256
    del x
    assert meter.now == 256  # the views hold it
    del views
    assert meter.now == 0


@pytest.mark.parametrize("device", DEVICES)
def test_what_autograd_saves_counts_until_its_backward(device) -> None:
    w = torch.ones(16, device=device, requires_grad=True)  # 64 bytes
    with Meter({"parameter": [w]}) as meter:
        y = w.exp()  # saved by exp
        z = y.exp()  # saved by exp
        del y
        loss = z.sum()
        del z
        assert meter.now == 64 + 64 + 64 + 4
        loss.backward()
        assert w.grad is not None
        assert meter.now == 64 + 64 + 4  # w, its gradient, the loss
    assert meter.peak == 64 + 64 + 64 + 4 + 4 + 64  # and 1 as the gradient of the loss, and the product at the second exp


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_that_is_dropped_goes(device) -> None:
    w = torch.ones(16, device=device, requires_grad=True)
    with Meter() as meter:
        y = w.exp().exp().exp()
        assert meter.now == 3 * 64
        del y
        assert meter.now == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_storage_that_is_resized_is_followed(device) -> None:
    given = torch.empty(100, device=device)
    with Meter({"buffer": given}) as meter:
        given.untyped_storage().resize_(0)
        assert (meter.now, meter.peak) == (0, 400)
        made = torch.empty(25, device=device)
        with Meter() as inner:  # which knows neither
            inner.mark("buffer", given, made)
            given.untyped_storage().resize_(400)
            made.untyped_storage().resize_(0)
            assert (inner.now, inner.peak) == (400, 500)
        assert (meter.now, meter.peak) == (400, 500)
        torch.add(torch.empty(0, 25, device=device), 1.0, out=made.resize_(0, 25))  # by operations, too
        made.resize_(50)
        assert meter.now == 600
    del given
    assert meter.now_by_kind == {"activation": 200}


def test_what_is_given_to_an_operation_is_not_made_by_it() -> None:
    foreign = torch.ones(10)
    with Meter() as meter:
        foreign.add_(1).view(2, 5).mul_(2)
        assert meter.now == 0
        listed = torch.tensor([1.0, 2.0])
    assert meter.now == listed.untyped_storage().nbytes()


def test_a_kind_may_be_known_late() -> None:
    with Meter() as meter:
        a = torch.zeros(25)
        b = torch.zeros(50)
        del b
        c = torch.zeros(25)
        meters.mark("gradient", {"a": a, "c": c})
        meters.mark("optimizer", a)  # the first word stands
    assert meter.peak_by_kind == {"gradient": 100, "activation": 200}  # c was not there
    assert meter.now_by_kind == {"gradient": 200}


def test_the_device_that_counts_and_what_does_not_count() -> None:
    with Meter(device="meta") as meter:
        host, paper = torch.zeros(10), torch.zeros(5, device="meta")
        with meter.quiet():
            hidden = torch.ones(10, 10, device="meta") @ torch.ones(10, 10, device="meta")
    assert (meter.now, meter.flops) == (20, 0)
    assert host.numel() + paper.numel() + hidden.numel() == 115  # all of it lived until here


def test_what_lies_on_the_host_does_not_count() -> None:
    with Meter() as meter:
        with meters.quiet():
            home = torch.empty(10, device="meta")
        meters.mark("host", home)
        meters.mark("optimizer", home)
        late = torch.empty(5, device="meta")
        meters.mark("host", late)
    assert (meter.now, meter.peak, meter.now_by_kind) == (0, 20, {})
    del home, late
    assert meter.now == 0


@pytest.mark.parametrize("device", DEVICES)
def test_operations_of_lf(device) -> None:
    x, w, acc = torch.ones(6, 4, device=device), torch.ones(8, 4, device=device), torch.zeros(8, 4, device=device)
    with Meter() as meter:
        product(x, w)
        weight_gradient(acc, x, product(x, w))
    assert meter.flops == 3 * 2 * 6 * 4 * 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_operations_of_grouped_products(device, dtype) -> None:
    """Torch's product and the loop, forward and both backwards."""
    from lf.kernels.grouped import grouped_linear

    x, w = (torch.ones(shape, device=device, dtype=dtype, requires_grad=True) for shape in ((6, 8), (3, 16, 8)))
    with Meter() as meter:
        grouped_linear(x, w, torch.tensor([1, 0, 5])).sum().backward()
    assert meter.flops == 3 * 2 * 6 * 8 * 16


def test_operations_that_torch_counts_are_those_that_torch_counts() -> None:
    def program() -> None:
        a, b = (torch.ones(2, 3, 4, 4, requires_grad=True) for _ in range(2))
        (F.linear(a, b[0, 0], b[0, 0, 0]) @ b).sum().backward()
        F.scaled_dot_product_attention(a.to(torch.float64), b.to(torch.float64), b.to(torch.float64), dropout_p=0.5).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        program()
    with Meter() as meter:
        program()
    assert meter.flops == theirs.get_total_flops() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_operations_of_attention(device) -> None:
    """The kernel of the CPU, which torch's table does not have."""
    q, k = (torch.ones(1, h, 8, 16, device=device, requires_grad=True) for h in (4, 2))
    with Meter() as meter:
        y, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, True)
        y.sum().backward()
    assert meter.flops == 2 * 4 * 8 * 8 * (2 + 5) * 16


def test_operations_of_packed_attention() -> None:
    """The kernel of a card, on paper: of the documents that it has come with."""
    q = torch.ones(8, 4, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with Paper() as paper, Meter(read=paper.read) as meter:
        starts = torch.tensor([0, 3, 8, 8], dtype=torch.int32).to("meta")
        torch.ops.aten._flash_attention_forward(q, q, q, starts, starts, 8, 8, 0.0, True, False)[0].sum().backward()
    assert meter.flops == 2 * 4 * 16 * (2 + 5) * (9 + 25)


def test_a_step_is_the_same_under_a_meter_and_leaves_nothing() -> None:
    from lf.models.small import tiny

    def run(measured: bool) -> tuple[list[torch.Tensor], Meter]:
        model, ctx = tiny(), context(solo(), "fp32")
        layout = lf.layout(model, lf.Mesh(dp=1))
        init, step = lf.train.make(layout, lf.optim.adamw(1e-2), lf.schedule.one_f_one_b(1, 2), ctx)
        state, batches = init(lf.init(layout, ctx, SEED)), lf.parity.random_batches(model, SEED, 0, 2, 21)
        meter = Meter({"parameter": state.params, "optimizer": state.optimizer, "batch": [[b.plan for b in batches], state.step]})
        before = meter.now
        if measured:
            with meter:
                state, metrics = step(state, batches)
        else:
            state, metrics = step(state, batches)
        found = [metrics["loss"], *(w.clone() for _, w in lf.tree.items(state.params))]
        del metrics
        assert not measured or (gc.collect(), meter.now)[1] == before + found[0].untyped_storage().nbytes()
        return found, meter

    plain, _ = run(False)
    seen, meter = run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert meter.peak > meter.now
    assert meter.flops > 0

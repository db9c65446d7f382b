"""Law 1, measured: a layout never changes the numbers.

One rank runs exactly the microbatches of the mesh one after another (dp coordinate d, index i ↔ i·dp + d), in float64, through the very step
that trains. Every loss, every gradient, the gradient norm and the parameters after three SGD steps must agree on every rank that has them:

    ‖a - b‖∞ ≤ 1e-10 · max(‖b‖∞, 1e-6 · ‖all gradients‖∞)        a: the mesh, b: one rank

SGD, because Adam divides the scale of a gradient out again. Every parameter is re-randomised first: a norm gain of 1 or a bias of 0 would let
a missing sum pass. Each piece that any rank holds is compared with the same box of the one rank's tensor, so every copy must be right.

Where less than float64 is asked for, b is still one rank in float64, and a may be a few times as far off as one rank of that precision is
(lf/agreement.py). All of them take the choices that the routers of b make, if it has any (lf/models/replay.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from lf import box, devices, rng, tree
from lf.agreement import Quantity, Report, rounded, table
from lf.axes_sim import spmd as simulated
from lf.batch import IGNORE, Batch
from lf.chain_context import chain_context
from lf.chain_layouts import Layouts, Place, chain_layouts, joined
from lf.chains import Chains
from lf.config import ConfigError
from lf.context import Context, precision_of
from lf.data.batches import pack
from lf.data.stream import Row
from lf.layouts import Layout, layout
from lf.mesh import Mesh
from lf.models import replay
from lf.optim import Optimizer, sgd
from lf.schedule import Program
from lf.schedule.build import build
from lf.segment import Model
from lf.sharding import NONE, Sharding
from lf.spec import Init, Piece
from lf.state import init, shard_batch
from lf.train import make
from lf.tree import Tree

__all__ = ["Quantity", "Report", "Trace", "compare", "compare_chains", "random_batches", "randomised", "table", "trace"]

RELATIVE, FLOOR = 1e-10, 1e-6
CALM = 0.25
"""How much of its noise a parameter gets where less than float64 is compared: with all of it bfloat16 is wrong by a third of a gradient, or more."""


@attrs.frozen
class Trace:
    """What one rank saw: metrics and gradients (by path) of each step, its parameters in the end, and where they were recorded the choices of routers
    in each microbatch of each step."""

    rank: int
    metrics: list[dict[str, Tensor]]
    gradients: list[dict[str, Tensor]]
    params: dict[str, Tensor]
    choices: Sequence[Sequence[Tensor]] = ()


def compare(
    model: Model,
    mesh: Mesh,
    *,
    rules: dict[str, str] | None = None,
    split: Sequence[int] | str | None = None,
    placement: Sequence[int] | None = None,
    frozen: Sequence[str] = (),
    microbatches: int = 2,
    seed: int = 0,
    tokens: int = 21,
    padding: int = 0,
    steps: int = 3,
    lr: float = 0.1,
    clip: float | None = 1.0,
    device: str = "cpu",
    spmd: Callable[..., list[Any]] = simulated,
    program: Callable[[Layout, int], Program] = build,
    compile: bool | str = False,
    dispatch: str = "exchange",
    sharding: Sharding | str = NONE,
    precision: str = "fp64",
    replayed: bool | None = None,
    optimizer: Callable[[float], Optimizer] = sgd,
) -> Report:
    """`model` on `mesh`, with `microbatches` a rank and step, against one rank. `split`, `placement`, `frozen`, `sharding`: as in `lf.layout`; the
    one rank has one stage, whole state, and the same frozen. `program(layout, microbatches)`: what the mesh does in a step; the one rank makes a
    forward and its backward in turn. `compile`: as in `lf.train.make`, `dispatch`: as in `lf.Context`, both of the mesh alone. `spmd(mesh, fn,
    *args)` is how ranks are run: fn(axes, *args) on each, the results in their order. `optimizer(lr)`: one that hides no more of a gradient than its
    scale. `precision`: of the mesh, as in `lf.Context`. `replayed`: whether all take the choices of the one rank's routers; None: where there are
    any, and less than float64. Raises what the ranks raise; ConfigError where the device has no float64 and it is asked for.
    """
    exact, less = devices.get(device).FLOAT64, precision_of(precision) != precision_of("fp64")
    if not exact and not less:
        raise ConfigError(f"device {device!r} has no float64, which parity is measured in; use --device cpu, or --precision fp32")
    if replayed is None:
        replayed = less and bool(replay.routers(model))
    mesh = mesh.fill()
    count = microbatches * mesh["dp"]
    batches = [random_batches(model, seed, step, count, tokens, padding) for step in range(steps)]
    taking = replay.replaying(model) if replayed else model
    single, again = (layout(m, Mesh(dp=1), rules, frozen=frozen) for m in (model, taking))
    where = layout(taking, mesh, rules, split=split, placement=placement, frozen=frozen, sharding=sharding)
    args = (seed, lr, clip)
    noise = CALM if less else 1.0
    alone = device if exact else "cpu", False, dispatch, "fp64", noise
    (one,) = simulated(single.mesh, trace, single, build(single, count), batches, *args, *alone, replayed, optimizer)
    batches = [[_with(b, c) for b, c in zip(row, taken)] for row, taken in zip(batches, one.choices)] if replayed else batches
    many = spmd(mesh, trace, where, program(where, microbatches), batches, *args, device, compile, dispatch, precision, noise, False, optimizer)
    rows = tuple(_compared(single, one, where, many))
    if less:
        near = simulated(single.mesh, trace, again, build(again, count), batches, *args, device, False, dispatch, precision, noise, False, optimizer)
        exactly = {rows[0].name, "tokens", "skipped", *model.sums}
        rows = rounded(rows, [*_compared(single, one, again, near)], exactly, torch.finfo(precision_of(precision).compute).eps)
    return Report(mesh, microbatches, seed, rows, precision=precision)


def compare_chains(
    model: Chains,
    places: Mapping[str, Place],
    data: Callable[[int, int, int], Batch],
    program: Callable[[Layouts, int], Program],
    single: Callable[[Layouts, int], Program],
    *,
    microbatches: int = 2,
    seed: int = 0,
    steps: int = 3,
    lr: float = 0.1,
    clip: float | None = 1.0,
    device: str = "cpu",
    spmd: Callable[..., list[Any]] = simulated,
    optimizer: Callable[[float], Optimizer] = sgd,
) -> Report:
    """A model of several chains at `places` against one rank that has them all, with the same frozen. data(step, i, multiple): data batch i of a
    step, that of microbatch m and coordinate d of the main chain being m·dp + d, padded to a multiple of so many tokens. `program(layouts,
    microbatches)`: what the ranks do in a step, `single` what the one does. The rest is as in `compare`."""
    if not devices.get(device).FLOAT64:
        raise ConfigError(f"device {device!r} has no float64, which parity is measured in; use --device cpu")
    many_layouts = chain_layouts(model, places)
    alone = {name: Place(Mesh(dp=1), frozen=place.frozen) for name, place in places.items()}
    one_layouts, mesh = chain_layouts(model, alone), many_layouts.chains[model.main].mesh
    dp, multiple = mesh["dp"], 2 * mesh.cp * mesh.tp
    batches = [[data(step, i, multiple) for i in range(microbatches * dp)] for step in range(steps)]
    args = (seed, lr, clip, device, False, "exchange", "fp64", 1.0, False, optimizer)
    (one,) = simulated(Mesh(dp=1), trace, one_layouts, single(one_layouts, microbatches * dp), batches, *args)
    many = spmd(Mesh(dp=many_layouts.world), trace, many_layouts, program(many_layouts, microbatches), batches, *args)
    return Report(many_layouts, microbatches, seed, tuple(_compared(one_layouts, one, many_layouts, many)))


def trace(
    axes: Any,
    where: Layout | Layouts,
    program: Program,
    batches: Sequence[Sequence[Batch]],
    seed: int,
    lr: float,
    clip: float | None,
    device: str,
    compile: bool | str = False,
    dispatch: str = "exchange",
    precision: str = "fp64",
    noise: float = 1.0,
    record: bool = False,
    optimizer: Callable[[float], Optimizer] = sgd,
) -> Trace:
    """This rank's part of a few steps of `lf.train.make`. batches[step] are the microbatches of all dp coordinates. noise: as in `randomised`.
    record: the choices of routers as well, of one chain without pp."""
    several, chip = isinstance(where, Layouts), devices.get(device)
    ctx = chain_context(where, axes, chip, precision) if isinstance(where, Layouts) else Context(axes, chip, precision, dispatch=dispatch)
    d, dp = axes["dp"].index, (where.chains[where.main].mesh if isinstance(where, Layouts) else axes.mesh)["dp"]
    seen: list[dict[str, Tensor]] = []
    start, step = make(where, _recording(optimizer(lr), seen), program, ctx, clip, compile)
    state, metrics, choices = start(randomised(where, ctx, seed, noise)), list[dict[str, Tensor]](), list[list[Tensor]]()
    for row in batches:
        mine = [row[i : i + dp] for i in range(0, len(row), dp)] if several else [b for i, b in enumerate(row) if i % dp == d]
        if record and isinstance(where, Layout):
            own = [shard_batch(b, where.model, ctx) for i, b in enumerate(row) if i % dp == d]
            choices.append([replay.recorded(where.model, state.params, b, ctx) for b in own])
        state, new = step(state, mine)
        metrics.append({k: v.cpu() for k, v in new.items() if k != "finite"})  # which is a rank's own
    return Trace(axes.rank, metrics, seen, {p: w.cpu() for p, w in tree.items(state.optimizer["master"])}, choices)


def _with(batch: Batch, choices: Tensor) -> Batch:
    return attrs.evolve(batch, plan={**batch.plan, "choices": choices})


def randomised(where: Layout | Layouts, ctx: Any, seed: int, noise: float = 1.0) -> Tree:
    """`lf.init`, and noise on every parameter, so much of it: the same logical model under any layout, with nothing that is still 0 or 1."""
    params = init(where, ctx, seed)
    layouts, rank = joined(where), ctx.axes.rank
    for path, spec in layouts.held(rank).items():
        shape = spec.param.shape
        std = shape[-1] ** -0.5 if len(shape) > 1 else 0.2  # keeps the variance of what a matrix makes near 1, whatever the width
        for piece in layouts.state_pieces(path, rank):
            view = piece.view(tree.get(params, path))
            view += rng.draw(seed, f"parity/{piece.key}", piece.shape, Init(std=noise * std), piece.box, view.dtype).to(view.device)
    return params


def random_batches(model: Model, seed: int, step: int, count: int, tokens: int, padding: int = 0) -> list[Batch]:
    """Packed rows of about `tokens` tokens, each of another length: documents of uneven lengths, some of one token; labels that are ignored here
    and there; every third row with hardly a label, so that a mean of means would show; then `padding` invalid tokens."""
    out = []
    for i in range(count):
        g = rng.generator(seed, "parity", step, i)
        n = tokens + int(g.integers(0, 4))
        # A short row keeps one long document: where a query sees no key but its own, gradients of q and k are exactly 0, that is rounding noise.
        starts = np.unique([0, n // 2, n // 2 + 1, *g.integers(0, n, 2)]) if n >= 12 else np.array([0, n - 1])
        words = g.integers(0, model.config.vocab, n)
        labels = np.append(words[1:], IGNORE)
        labels[starts[1:] - 1] = IGNORE
        ignored = g.random(n) < (0.9 if i % 3 == 1 else 0.2)
        ignored[labels.argmax()] = False  # one label at least
        labels[ignored] = IGNORE
        out.append(pack([Row(words, labels, starts)], n + padding))
    return out


def _recording(optimizer: Optimizer, seen: list[dict[str, Tensor]]) -> Optimizer:
    """The same optimizer, keeping what it is given: the gradients of the step itself, not of a second one written for the test."""

    def update(state: Tree, grads: Tree, *rest: Any) -> Tree:
        seen.append({path: g.detach().cpu().clone() for path, g in tree.items(grads)})
        return optimizer.update(state, grads, *rest)

    return attrs.evolve(optimizer, update=update)


def _compared(one_layout: Layout | Layouts, one: Trace, many_layout: Layout | Layouts, many: Sequence[Trace]) -> Iterator[Quantity]:
    whole, where = joined(one_layout), joined(many_layout)
    largest = torch.stack([g.abs().max() for grads in one.gradients for g in grads.values()]).max().item()
    yield _covered(where)
    for name in one.metrics[0]:
        if name not in _balances(where):  # what the work is dealt over is no number of the model
            yield _worst(_quantity(name, want[name], [(t.metrics[i][name], want[name]) for t in many], largest) for i, want in enumerate(one.metrics))
    holding: dict[str, list[Trace]] = {}
    for t in many:
        for path in where.held(t.rank):
            holding.setdefault(path, []).append(t)

    def pairs(path: str, local: list[Tensor], want: Tensor) -> list[tuple[Tensor, Tensor]]:
        held = [(where.state_pieces(path, t.rank), tensor) for t, tensor in zip(holding[path], local)]
        return _pairs(held, whole.state_pieces(path, 0), want)

    for path in where.specs:
        if path not in where.frozen:
            each = (pairs(path, [t.gradients[i][path] for t in holding[path]], g[path]) for i, g in enumerate(one.gradients))
            yield _worst(_quantity(f"gradient {path}", g[path], found, largest) for g, found in zip(one.gradients, each))
    for path in where.specs:
        w = one.params[path]
        yield _quantity(f"parameter {path}", w, pairs(path, [t.params[path] for t in holding[path]], w), largest)


def _pairs(local: Iterable[tuple[Sequence[Piece], Tensor]], whole: Sequence[Piece], want: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(a rank's piece, the same box of the one rank's tensor), for every piece of every rank."""
    return [
        (piece.view(tensor), full.view(want)[box.slices(piece.box, full.box)])
        for pieces, tensor in local
        for piece, full in zip(pieces, whole)
    ]  # fmt: skip


def _balances(layouts: Layouts) -> set[str]:
    return {f"{chain}_imbalance{end}" for chain in layouts.chains for end in ("", "_before")}


def _covered(where: Layouts) -> Quantity:
    """How far the logical tensors are from being held by some rank and owned by one, in elements."""
    first = {path: spec.mesh.coords(0) for path, spec in where.specs.items()}
    shapes = {piece.key: piece.shape for path, spec in where.specs.items() for piece in spec.pieces(first[path])}
    held, owned = ({key: torch.zeros(shape, dtype=torch.int64) for key, shape in shapes.items()} for _ in range(2))
    for rank in range(where.world):
        for piece in (piece for path in where.held(rank) for piece in where.state_pieces(path, rank)):
            held[piece.key][box.slices(piece.box, box.whole(piece.shape))] = 1
        for _, piece in where.state_owned(rank):
            owned[piece.key][box.slices(piece.box, box.whole(piece.shape))] += 1
    missed = sum(int((held[key] != 1).sum() + (owned[key] != 1).sum()) for key in shapes)
    return Quantity("elements not held, or not owned once", 1.0, float(missed), 0.0)


def _quantity(name: str, want: Tensor, pairs: list[tuple[Tensor, Tensor]], largest: float) -> Quantity:
    size = want.to(torch.float64).abs().max().item()
    errors = [torch.zeros((), dtype=torch.float64)]  # max() of tensors keeps a NaN, Python's loses it
    for a, b in pairs:
        if a.shape != b.shape:
            errors.append(errors[0] + math.inf)
        elif a.numel():
            errors.append((a.to(torch.float64) - b.to(torch.float64)).abs().max())
    return Quantity(name, size, torch.stack(errors).max().item(), RELATIVE * max(size, FLOOR * largest))


def _worst(steps: Iterable[Quantity]) -> Quantity:
    """The step that disagrees most, for its tolerance."""
    return max(steps, key=lambda q: (not q.ok, q.error / q.tolerance if q.tolerance else 0.0))

"""What a step would take on devices that are not here: memory, traffic, operations and time of each rank, by the program that would run.

    plan = lf.plan.plan(layout, program, lf.optim.adamw(3e-4), "h200", seq_len=4096)
    plan.peak, plan.seconds, plan.mfu, plan.fits; print(lf.plan.table(plan))

Memory, traffic and operations come from the step itself: `lf.train.make` on tensors without data, of one rank of each pipeline row, where each
distinct layer is run once and a stand-in takes its place from then on (lf/plan_layers.py). So they are those of `lf.sim.trace` to the byte, for the
time of some thousand operations. Seconds come from a model of the device (lf/plan_time.py) and from `lf.schedule.cost`.

Experts are taken to get equally many tokens; a document is a row. The ranks of a pipeline row differ by shares that do not divide: the last of each
row, which has the larger ones, speaks for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from types import ModuleType, SimpleNamespace
from typing import Any

import attrs
import numpy as np
import torch
from torch.utils._pytree import tree_map

from lf.axes_counted import CountedAxes, Traffic
from lf.axes_meta import MetaAxes
from lf.batch import Batch
from lf.context import Context, precision_of
from lf.data.batches import pack
from lf.data.stream import Row as Tokens
from lf.devices import paper
from lf.devices.described import Described, described
from lf.layouts import Layout
from lf.meter import BATCH, GRADIENT, OPTIMIZER, PARAMETER, Meter, quiet
from lf.optim import Optimizer
from lf.paper import Paper
from lf.plan_layers import Layers, Tally
from lf.plan_ops import table_for
from lf.plan_time import Achieved, Rates, Sent, Work
from lf.schedule import Action, Program, Timeline, cost
from lf.schedule.ir import COMPUTE, microbatches
from lf.schedule.shapes import key
from lf.segment import Model
from lf.spec import Tied
from lf.state import init as fresh
from lf.train import make

USABLE = 0.95
"""Of a device's memory: a context, communicators and what an allocator loses take the rest."""


@attrs.frozen
class Row:
    """Of one rank of a pipeline row. memory: bytes of each kind when it holds the most, `peak` in all · lasting: of each kind between steps ·
    sent: bytes that leave it in a step, by (axis, kind) · flops: of its products, second forwards too · work: of each of its actions, and of the
    `rest` of a step · held: bytes after each action."""

    row: int
    rank: int
    peak: int
    memory: Mapping[str, int]
    lasting: Mapping[str, int]
    sent: Mapping[Sent, int]
    flops: int
    work: tuple[Work, ...] = attrs.field(repr=False)
    rest: Work = attrs.field(repr=False)
    held: tuple[int, ...] = attrs.field(repr=False)

    @property
    def sent_over(self) -> dict[str, int]:
        """Bytes that leave it in a step, by axis."""
        out = dict[str, int]()
        for (axis, _), n in self.sent.items():
            out[axis] = out.get(axis, 0) + n
        return out


@attrs.frozen
class Plan:
    """Of a step. rows: those that were run, of which each other one has the layers of one · timeline: of all rows, in seconds, to the last action ·
    update: seconds after that · spent: seconds of the busiest row by what they go to · tokens: of a step, all ranks · peak_flops: of a device ·
    model_flops: forward and backward of a step on all ranks, nothing made again · beyond: seconds of what the program leaves out of a step."""

    layout: Layout
    device: Described
    rows: tuple[Row, ...]
    timeline: Timeline = attrs.field(repr=False)
    update: float
    spent: Mapping[str, float]
    tokens: int
    peak_flops: float
    model_flops: float
    beyond: float = 0.0

    @property
    def worst(self) -> Row:
        """The row that holds the most."""
        return max(self.rows, key=lambda row: row.peak)

    @property
    def peak(self) -> int:
        """Bytes that a rank holds at most."""
        return self.worst.peak

    @property
    def limit(self) -> float:
        """Bytes that a rank may hold."""
        return USABLE * self.device.need("memory")

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.timeline.makespan + self.beyond + self.update

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens / self.seconds / self.layout.mesh.size

    @property
    def mfu(self) -> float:
        """Operations that the model takes, by those that the devices could make in the time."""
        return self.model_flops / (self.seconds * self.layout.mesh.size * self.peak_flops)

    @property
    def bubble(self) -> float:
        """The share of a step in which a row computes nothing, on average."""
        return fmean(self.timeline.bubble(r) for r in range(len(self.timeline.rows))) / self.seconds


class _Clock:
    """Takes down what each action does, in the place of `lf.schedule.measured.Clock`."""

    def __init__(self, tally: Tally):
        self.tally = tally
        self.taken: dict[int, tuple[Work, int]] = {}

    def moment(self) -> Work:
        meter, traffic = self.tally.meter, self.tally.traffic
        return Work(meter.flops, self.tally.moved, {key: traffic[key].sent for key in traffic})

    def __call__(self, i: int, start: Work, end: Work) -> None:
        self.taken[i] = end - start, self.tally.meter.now


def plan(
    layout: Layout,
    program: Program,
    optimizer: Optimizer,
    device: Described | str,
    *,
    seq_len: int,
    micro_batch: int = 1,
    precision: str = "bf16",
    dispatch: str = "exchange",
    clip: float | None = 1.0,
    achieved: Achieved = Achieved(),  # noqa: B008  (frozen)
    rows: Sequence[int] | None = None,
    layers: Layers | None = None,
    of: int | None = None,
    ops: ModuleType | None = None,
) -> Plan:
    """What a step takes: `program` over `layout`, each microbatch `micro_batch` rows of `seq_len` tokens.

    device: a name of `lf.devices.described.DESCRIBED`, or a description · achieved: shares of it that are reached · rows: of the pipeline that are
    run (default: all); those that are left out take the times of one with the same layers, and their memory is not known · layers: of earlier
    plans of the same model and seq_len, which know what its layers cost · of: microbatches of a step, where the program is for fewer and these speak
    for all: the others take the time of the busiest row each · ops: the device module whose kernels are used (default: those of CUDA; in float32 and
    float64, where it has none that are meant for training, those of the CPU).
    Raises what `lf.train.make` raises, and ConfigError for a value of the device that is needed and not known.
    """
    device = described(device) if isinstance(device, str) else device
    layers, compute = layers or Layers(seq_len), precision_of(precision).compute
    rates, count, dp = Rates(layout.mesh, device, compute, achieved), microbatches(program), layout.mesh["dp"]
    batch, times = rows_of(seq_len, micro_batch, 2 * layout.mesh.tp), (of or count) / count
    signs, each = signatures(layout), range(layout.mesh.pp)
    run = [*each] if rows is None else sorted({*rows, *(signs.index(sign) for sign in signs)})
    table = table_for(precision, ops)
    found = {r: _row(r, layout, program, optimizer, [batch] * count, times, precision, dispatch, clip, layers, table) for r in run}
    like = {r: r if r in found else next(f for f in found if signs[f] == signs[r]) for r in each}
    timeline = _timed(layout, program, found, like, rates)
    update = max(rates.seconds(row.rest) for row in found.values())
    beyond = max(timeline.busy(r) for r in found) * (times - 1)
    flops, steps = layout.model.flops, (of or count) * dp
    return Plan(
        layout, device, tuple(found.values()), timeline, update, _spent(timeline, program, found, rates, update, times),
        len(batch.plan["tokens"]) * steps, device.peak(compute), flops(batch) * steps if flops else math.nan, beyond,
    )  # fmt: skip


def rows_of(seq_len: int, micro_batch: int, multiple: int) -> Batch:
    """A microbatch of rows that are one document each."""
    return pack([Tokens(np.zeros(seq_len, np.int64), np.zeros(seq_len, np.int64), np.zeros(1, np.int64))] * micro_batch, multiple)


def signatures(layout: Layout) -> list[tuple[Any, ...]]:
    """Of each pipeline row the layers of its stages, as far as they differ in anything but their place."""
    of = [tuple((s.apply, *(p if isinstance(p, Tied) else p.shape for p in s.params.values())) for s in stage) for stage in layout.stages]
    last = len(layout.stages) - 1
    return [tuple((of[s], s == 0, s == last) for s in layout.on(r)) for r in range(layout.mesh.pp)]


def _row(
    row: int, layout: Layout, program: Program, optimizer: Optimizer, batches: list[Batch], times: float, precision: str, dispatch: str,
    clip: float | None, layers: Layers, table: SimpleNamespace,
) -> Row:  # fmt: skip
    """The step of one rank, its last, on paper and of stand-ins."""
    ranks = layout.mesh.size // layout.mesh.pp
    rank = (row + 1) * ranks - 1
    tally = Tally(Meter(device="meta"), Traffic())
    clock = _Clock(tally)
    with Paper(), tally.meter:
        ctx = Context(CountedAxes(MetaAxes(layout.mesh, rank), tally.traffic), paper, precision, dispatch=dispatch, ops=table)
        alike = attrs.evolve(layout, model=_once(layout.model))
        init, step = make(alike, optimizer, program, ctx, clip, layers.stand_ins(ctx, tally))
        state = init(fresh(alike, ctx, 0))
        lasting = dict(tally.meter.now_by_kind)
        tally.meter.peak = 0
        step(state, batches, clock)
    work, held = zip(*(clock.taken[i] for i in range(len(program[row]))))
    again = sum((w for a, w in zip(program[row], work) if _microbatch(a) is not None), Work()) * (times - 1)
    total, kinds = clock.moment(), tally.meter.now_by_kind
    moved = 2 * lasting.get(OPTIMIZER, 0) + lasting.get(PARAMETER, 0) + kinds.get(GRADIENT, 0)  # an update reads and writes these
    rest = attrs.evolve(rest := total - sum(work, Work()), moved=rest.moved + moved)
    memory = dict(tally.meter.peak_by_kind)
    memory[BATCH] = round(memory.get(BATCH, 0) * times)
    sent = {key: round(n) for key, n in (total + again).sent.items()}
    return Row(row, rank, sum(memory.values()), memory, lasting, sent, round(total.flops + again.flops), work, rest, held)


def _once(model: Model) -> Model:
    """The model, which prepares and counts one of equal microbatches and gives tensors like those for the others."""
    prepared, counted = dict[Any, Batch](), dict[Any, torch.Tensor]()

    def prepare(batch: Batch, ctx: Any) -> Batch:
        if (of := key(batch)) not in prepared:
            with quiet():
                prepared[of] = model.prepare(batch, ctx)
        derived = tree_map(lambda x: torch.empty_like(x) if isinstance(x, torch.Tensor) else x, prepared[of].derived)
        return attrs.evolve(batch, derived=derived)

    def count(name: str, batch: Batch) -> torch.Tensor:
        if (of := (name, key(batch))) not in counted:
            with quiet():
                counted[of] = model.objectives[name].count(batch)
        return counted[of]

    objectives = {name: attrs.evolve(o, count=partial(count, name)) for name, o in model.objectives.items()}
    return attrs.evolve(model, objectives=objectives, prepare=prepare)


def _microbatch(a: Action) -> int | None:
    return a.pair[0].microbatch if a.op == "OVERLAP" else a.microbatch


Same = tuple[str, str | None, tuple[str, ...]]
"""An action of a stage, whatever the microbatch: its op, its segment, and which ops are made again."""


def _timed(layout: Layout, program: Program, found: Mapping[int, Row], like: Mapping[int, int], rates: Rates) -> Timeline:
    """The program in seconds. An action takes what those like it take on average; where a row was not run, those of the row that speaks for it."""
    known: dict[tuple[int, Same], float] = {}
    for r, row in found.items():
        each: dict[tuple[int, Same], list[Work]] = {}
        for a, work in zip(program[r], row.work):
            each.setdefault((a.stage, _same(a)), []).append(work)
        for at, works in each.items():
            known[at] = _duration(at[1][0], sum(works, Work()), rates) / len(works)
    names = {s: _names(layout, s) for s in range(len(layout.stages))}
    twin = {}
    for r, other in like.items():
        for s, t in zip(layout.on(r), layout.on(other)):
            twin[s] = t, dict(zip(names[s], names[t]))

    def seconds(a: Action) -> float:
        stage, called = twin[a.stage]
        op, segment, ops = _same(a)
        return known.get((stage, (op, called.get(segment or "", segment), ops)), 0.0)

    return cost(program, seconds, lambda a, source, target: seconds(a))


def _same(a: Action) -> Same:
    return str(a).replace(str(a.microbatch), "") if a.op == "OVERLAP" else a.op, a.segment, a.ops


def _names(layout: Layout, stage: int) -> list[str]:
    """Of the layers and segments of a stage, in order."""
    return [name for layer, segments in layout.layers(stage).items() for name in (layer, *(s.name for s in segments))]


def _duration(op: str, work: Work, rates: Rates) -> float:
    computing, sending = rates.computing(work), sum(rates.sending(work).values())
    return max(computing, sending) if op.startswith("(") else computing + sending  # of an OVERLAP one part sends while the other computes


def _spent(timeline: Timeline, program: Program, found: Mapping[int, Row], rates: Rates, update: float, times: float) -> dict[str, float]:
    """Seconds of a step on the row that is busy longest, by what they go to."""
    r = max(found, key=timeline.busy)
    out = {"compute": 0.0, "made again": 0.0}
    for a, work in zip(program[r], found[r].work):
        if a.op in (*COMPUTE, "OVERLAP"):
            out["made again" if a.op == "REMAT" else "compute"] += rates.computing(work)
            for axis, seconds in rates.sending(work).items():
                out[axis] = out.get(axis, 0.0) + seconds
    out = {what: seconds * times for what, seconds in out.items()}
    end = max((s.end for s in timeline.rows[r] if s.action.op in (*COMPUTE, "OVERLAP")), default=0.0)
    out["bubble"] = end - timeline.busy(r) if len(program) > 1 else 0.0
    out["waits"] = timeline.makespan - (end if len(program) > 1 else timeline.busy(r))  # for parameters and sums
    out["update"] = update
    return out

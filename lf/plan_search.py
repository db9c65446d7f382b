"""Which layout trains a model fastest on so many devices: all that there are, by formulas; of the best of these, by a plan of each.

    choices(model, ranks, …)      every mesh, schedule, sharding and recompute that divides
    Rough(…).of(choice)           seconds and bytes by formulas, from what the layers cost on one rank: some microseconds
    search(…)                     the plans of the best, one for each mesh, fastest first, and why others are not among them

The formulas scale what one rank's layers cost: everything by 1/tp but experts by 1/(ep·etp), collectives by (n-1)/n; the bubble is that of the
schedule's own page (lf/schedule/generate.py). They only have to put the good ones first: what is printed comes from `lf.plan.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch

from lf import split as splits
from lf.axes_counted import CountedAxes, Traffic
from lf.axes_meta import MetaAxes
from lf.config import ConfigError
from lf.context import Context, precision_of
from lf.data.batches import microbatches
from lf.devices import paper
from lf.devices.described import Described
from lf.layouts import layout
from lf.mesh import Mesh
from lf.optim import Optimizer
from lf.paper import Paper
from lf.pipeline import Pipeline
from lf.plan import USABLE, Plan, plan, rows_of, table_for
from lf.plan_layers import Costs, Layers, chain
from lf.plan_state import state_bytes
from lf.plan_time import Achieved, Rates, Work
from lf.schedule import ProgramError
from lf.segment import Model
from lf.spec import LayoutError, Param
from lf.state import shard_batch

SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb-v", 2))
RECOMPUTE = ("none", "half", "full")
SHARDS = ("1", "2", "3")
MICRO = (1, 2, 4, 8)
SLACK = 1.1
"""What the formulas may say too much."""


@attrs.frozen
class Choice:
    """A layout, in the words of the flags. `half`: of recompute, the first half of the layers of a stage."""

    mesh: Mesh
    micro_batch: int
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: str = "none"
    shard: str = "0"

    def pipeline(self, layers: int) -> Pipeline:
        """For a model of so many layers."""
        split = "cost" if self.mesh.pp > 1 else "count"
        return Pipeline(self.schedule, self.chunks, split, self.again(layers), shard=self.shard)

    def again(self, layers: int) -> str:
        if self.recompute != "half":
            return self.recompute
        return f"full:{max(1, round(layers / (self.mesh.pp * self.chunks) / 2))}"

    def __str__(self) -> str:
        schedule = "" if self.mesh.pp == 1 else f" {self.schedule}" + (f" {self.chunks} chunks" if self.schedule == "interleaved" else "")
        return f"{self.mesh}{schedule}, micro-batch {self.micro_batch}, shard {self.shard}, recompute {self.recompute}"


def choices(model: Model, ranks: int, node: int, global_batch: int) -> Iterator[Choice]:
    """All that divide: tp within a node, experts over any part of the ranks that share a stage."""
    layers = len(model.layers())
    experts = [p.shape[p.axes.index("expert")] for p in model.params().values() if "expert" in p.axes]
    heads = [p.shape[0] for p in model.params().values() if p.axes and p.axes[0] == "heads"]
    for tp in _divisors(ranks, min(node, min(heads, default=1))):
        for pp in _divisors(ranks // tp, layers):
            dp = ranks // tp // pp
            for ep, etp in _expert_axes(min(experts, default=0), dp * tp, tp):
                for micro in MICRO:
                    if global_batch % (dp * micro):
                        continue
                    count, mesh = global_batch // (dp * micro), Mesh(pp=pp, dp=dp, tp=tp, ep=ep, etp=etp)
                    for schedule, chunks in SCHEDULES if pp > 1 else SCHEDULES[:1]:
                        if pp * chunks > layers or (pp > 1 and count < pp):
                            continue
                        for shard in ("0",) if dp == 1 else SHARDS:
                            for again in RECOMPUTE:
                                yield Choice(mesh, micro, schedule, chunks, again, shard)


def _divisors(n: int, most: int) -> list[int]:
    return [k for k in range(1, min(n, most) + 1) if n % k == 0]


def _expert_axes(experts: int, ranks: int, tp: int) -> list[tuple[int, int]]:
    if not experts:
        return [(1, 1)]
    return [(ep, etp) for etp in {1, tp} for ep in _divisors(experts, experts) if ranks % (ep * etp) == 0]


@attrs.frozen
class Layer:
    """Of a layer on one rank of a mesh of one, a microbatch of one row. Seconds of its ways, bytes kept and taken in, elements of its dense parameters
    and of its experts · tp, ep, etp: bytes that it sends over each of two ranks, forward and backward."""

    forward: Work
    backward: Work
    kept: int
    given: int
    dense: int
    experts: int
    tp: tuple[float, float]
    ep: tuple[float, float]
    etp: tuple[float, float]


@attrs.frozen
class Guess:
    """seconds of a step, bytes of the fullest rank."""

    seconds: float
    peak: float


class Rough:
    """Formulas for one model, device and batch. layers: by name, in order · state: bytes of optimizer state for each element that trains."""

    def __init__(self, layers: Sequence[Layer], device: Described, rows: int, compute: torch.dtype, state: int, achieved: Achieved):
        self.layers, self.device, self.rows, self.compute, self.state, self.achieved = layers, device, rows, compute, state, achieved
        one = Rates(Mesh(dp=1), device, compute, achieved)
        self.ways = [(one.computing(x.forward), one.computing(x.backward)) for x in layers]
        self.parts: dict[int, list[tuple[int, int]]] = {}
        self.rates: dict[Mesh, Rates] = {}

    def of(self, c: Choice) -> Guess:
        mesh, count = c.mesh, self.rows // (c.mesh["dp"] * c.micro_batch)
        rates = self.rates.setdefault(mesh, Rates(mesh, self.device, self.compute, self.achieved))
        over = [("tp", 1, ""), ("ep", mesh.tp, "all_to_all"), ("etp", mesh.tp / 2, "")]  # (axis, how its bytes shrink with tp, kind)
        tp, ep, etp = (2 * (mesh[axis] - 1) / mesh[axis] / less * rates.per_byte(axis, kind) for axis, less, kind in over)
        stages, size = self.stages(mesh.pp * c.chunks), self.compute.itemsize
        share = {"none": 0.0, "half": 0.5, "full": 1.0}[c.recompute]
        back = 1 if c.shard != "0" else 0
        n, e = mesh["dp"] * mesh.cp, mesh.edp
        busy, full, parameters, whole = [0.0] * mesh.pp, [0.0] * mesh.pp, [0.0] * mesh.pp, [0.0] * mesh.pp
        for s, (lo, hi) in enumerate(stages):
            r = s % mesh.pp if c.schedule != "zb-v" else min(s, 2 * mesh.pp - 1 - s)
            ahead = min(count, _held(c, r)) if mesh.pp > 1 else 1
            for i in range(lo, hi):
                x, (f, b) = self.layers[i], self.ways[i]
                sends_f, sends_b = (x.tp[k] * tp + x.ep[k] * ep + x.etp[k] * etp for k in range(2))
                busy[r] += c.micro_batch * ((f + b + share * f) / mesh.tp + sends_f * (1 + share) + sends_b)
                kept = (x.kept * (1 - share) + x.given) * c.micro_batch / mesh.tp
                full[r] += kept * ahead
                dense, routed = x.dense / mesh.tp, x.experts / (mesh.ep * mesh.etp)
                parameters[r] += dense + routed
                cut = dense / (n if back else 1) + routed / (e if back else 1)
                grads = cut if c.shard in ("2", "3") else dense + routed
                copy = cut if c.shard == "3" else dense + routed
                full[r] += size * copy + 4 * grads + self.state * cut
                whole[r] += (dense * (n - 1) / n * rates.per_byte("dp·cp") + routed * (e - 1) / e * rates.per_byte("edp"))
        worst = max(busy)
        largest = max(self.layers[i].kept + self.layers[i].given for i in range(len(self.layers))) * c.micro_batch / mesh.tp
        bubble = 0.0 if mesh.pp == 1 else (mesh.pp - 1) / c.chunks * worst * (0.5 if c.schedule == "zb-v" else 1.0)
        sums = max(whole) * {"0": 8, "1": 4 + size, "2": 4 * count + size, "3": (4 + 2 * size) * count}[c.shard]
        hidden = worst * count * 0.7 if c.shard in ("2", "3") else worst * 0.7
        return Guess(worst * count + bubble + max(0.0, sums - hidden), max(full) + largest)

    def stages(self, n: int) -> list[tuple[int, int]]:
        """[start, stop) of the layers of each of n stages, balanced by their time."""
        if n not in self.parts:
            sizes = splits.partition([f + b for f, b in self.ways], n)
            ends = [sum(sizes[: k + 1]) for k in range(n)]
            self.parts[n] = [(end - size, end) for end, size in zip(ends, sizes)]
        return self.parts[n]


def _held(c: Choice, rank: int) -> float:
    """Microbatches of each stage of a rank that are held at most, on average over its stages."""
    pp = c.mesh.pp
    if c.schedule == "interleaved":
        return ((c.chunks - 1) * pp + 2 * (pp - 1 - rank) + 1) / c.chunks
    return pp if c.schedule == "zb-v" else pp - rank


def _layers(model: Model, seq_len: int, precision: str, known: Layers) -> list[Layer]:
    """The layers on one rank, and what they send on two."""
    single, sends = list[Costs](), {"tp": list[Any](), "ep": list[Any](), "etp": list[Any]()}
    experts = any("expert" in p.axes for p in model.params().values())
    for axis, mesh in (("", Mesh(dp=1)), ("tp", Mesh(tp=2)), *([("ep", Mesh(dp=2, ep=2)), ("etp", Mesh(tp=2, etp=2))] if experts else [])):
        where = layout(model, mesh)
        with Paper():
            ctx = Context(CountedAxes(MetaAxes(where.mesh, where.mesh.size - 1), Traffic()), paper, precision, ops=table_for(precision))
            costs = [*chain(where, shard_batch(rows_of(seq_len, 1, 2), model, ctx), ctx, known).values()]
        if not axis:
            single = costs
        else:
            sends[axis] = [tuple(float(sum(n for name, _, _, n in way.sent if name == axis)) for way in (c.forward, c.backward)) for c in costs]
    out, given = list[Layer](), 0
    for i, (c, segments) in enumerate(zip(single, model.layers().values())):
        params = [p for s in segments for p in s.params.values() if isinstance(p, Param) and p.learned]
        routed = sum(math.prod(p.shape) for p in params if "expert" in p.axes)
        none = (0.0, 0.0)
        out.append(Layer(
            Work(c.forward.flops, c.forward.moved), Work(c.backward.flops, c.backward.moved), c.kept, given,
            sum(math.prod(p.shape) for p in params) - routed, routed, *((sends[axis] or [none] * (i + 1))[i] for axis in ("tp", "ep", "etp")),
        ))  # fmt: skip
        given = sum({m.place: m.bytes for m in c.outputs if m.given is None}.values())
    return out


@attrs.frozen
class Found:
    """best: the fastest plan of each mesh, in order · refused: what looked as good and cannot be, and why · tried: choices that there were, those that
    fit by the formulas, and plans that were made."""

    best: tuple[tuple[Choice, Plan], ...]
    refused: tuple[tuple[Choice, str], ...]
    tried: tuple[int, int, int]


def search(
    model: Model,
    ranks: int,
    device: Described,
    optimizer: Optimizer,
    *,
    seq_len: int,
    global_batch: int,
    precision: str = "bf16",
    achieved: Achieved = Achieved(),  # noqa: B008  (frozen)
    top: int = 10,
    tell: Callable[[str], None] = lambda words: None,
) -> Found:
    """The best layouts of a model on so many devices, for steps of global_batch rows of seq_len tokens. tell: is told what goes on.

    Raises ConfigError where a value of the device is needed and not known, and where nothing fits, with what comes nearest."""
    compute, layers = precision_of(precision).compute, Layers(seq_len)
    tell("layers on paper")
    rough = Rough(_layers(model, seq_len, precision, layers), device, global_batch, compute, state_bytes(optimizer, precision), achieved)
    every = [(rough.of(c), c) for c in choices(model, ranks, int(device.need("node")), global_batch)]
    if not every:
        raise ConfigError(f"{global_batch} rows on {ranks} ranks: no mesh divides them; give --global-batch as a multiple of the ranks, {ranks}")
    limit = USABLE * device.need("memory")
    fitting = sorted((pair for pair in every if pair[0].peak <= SLACK * limit), key=lambda pair: pair[0].seconds)
    if not fitting:
        guess, c = min(every, key=lambda pair: pair[0].peak)
        raise ConfigError(f"nothing fits into {limit / 2**30:.1f} GiB a device: the least is about {guess.peak / 2**30:.1f} GiB with {c}; take more ranks")
    best, refused, made, most = dict[Mesh, tuple[Choice, Plan]](), list[tuple[Choice, str]](), 0, 2 * top
    for guess, c in fitting:
        if c.mesh in best or [other.mesh for other, _ in refused].count(c.mesh) >= 2:
            continue
        if len(best) >= top or made >= most:
            break
        tell(f"plan {made + 1}: {c}")
        made += 1
        try:
            found = planned(model, c, device, optimizer, seq_len, global_batch, precision, achieved, layers)
        except (LayoutError, ProgramError, ConfigError) as error:
            refused.append((c, str(error).splitlines()[0]))
            continue
        if found.fits:
            best[c.mesh] = c, found
        else:
            refused.append((c, f"{found.peak / 2**30:.1f} GiB on row {found.worst.row}, of {limit / 2**30:.1f}"))
    ordered = sorted(best.values(), key=lambda pair: pair[1].seconds)
    return Found(tuple(ordered), tuple(refused), (len(every), len(fitting), made))


def planned(
    model: Model, c: Choice, device: Described, optimizer: Optimizer, seq_len: int, global_batch: int, precision: str, achieved: Achieved,
    layers: Layers, rows: Sequence[int] | None = (),
) -> Plan:  # fmt: skip
    """The plan of a choice. rows: as of `lf.plan.plan`; few microbatches speak for many."""
    pipeline = c.pipeline(len(model.layers()))
    where = pipeline.layout(model, c.mesh, seq_len)
    count = microbatches(global_batch, c.micro_batch, where.mesh["dp"])
    program = pipeline.program(where, min(count, max(4, 2 * c.mesh.pp)))
    return plan(
        where, program, optimizer, device, seq_len=seq_len, micro_batch=c.micro_batch, precision=precision, achieved=achieved, rows=rows,
        layers=layers, of=count,
    )  # fmt: skip

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

import attrs
import numpy as np
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
from lf.plan import USABLE, Plan, plan, rows_of
from lf.plan_layers import Layers, chain
from lf.plan_ops import table_for
from lf.plan_state import state_bytes
from lf.plan_time import Achieved, Rates, Work
from lf.schedule import ProgramError
from lf.segment import Model
from lf.spec import LayoutError, Param
from lf.state import shard_batch

SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb-v", 2))
RECOMPUTE = {"none": 0.0, "half": 0.5, "full": 1.0}
"""Which share of the layers is run again."""
SHARDS = ("1", "2", "3")
MICRO = (1, 2, 4, 8)
SLACK = 1.05
"""What the formulas may say too much."""
SLOW = 1.6
"""Times what the formulas say of the fastest, from where on a choice is not planned any more."""
HIDDEN = 0.7
"""Of the time of a microbatch, what sums of gradients can go on beside: about its backward."""
FLYING = 3
"""Layers whose whole gradients are there at a time where they are summed after each microbatch."""
DEEPEST = 32
"""Ranks of a pipeline, at most: the programs of deeper ones take longer to lay out than all else, and no layout compared here has more."""
SHORT = 512
"""Tokens of a row that layers send by, as they would by more."""


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
    """All that divide, without a policy for state and activations: tp within a node, pp of DEEPEST at most, experts over any part of the ranks that
    share a stage."""
    layers = len(model.layers())
    experts = [p.shape[p.axes.index("expert")] for p in model.params().values() if "expert" in p.axes]
    heads = [p.shape[0] for p in model.params().values() if p.axes and p.axes[0] == "heads"]
    for tp in _divisors(math.gcd(ranks, node), min(heads, default=1)):
        for pp in _divisors(ranks // tp, min(layers, DEEPEST)):
            dp = ranks // tp // pp
            for ep, etp in _expert_axes(min(experts, default=0), dp * tp, tp):
                for micro in MICRO:
                    if global_batch % (dp * micro) or (pp > 1 and global_batch // (dp * micro) < pp):
                        continue
                    for schedule, chunks in SCHEDULES if pp > 1 else SCHEDULES[:1]:
                        if pp * chunks <= layers:
                            yield Choice(Mesh(pp=pp, dp=dp, tp=tp, ep=ep, etp=etp), micro, schedule, chunks)


def _divisors(n: int, most: int) -> list[int]:
    return [k for k in range(1, min(n, most) + 1) if n % k == 0]


def _expert_axes(experts: int, ranks: int, tp: int) -> list[tuple[int, int]]:
    if not experts:
        return [(1, 1)]
    return [(ep, etp) for etp in {1, tp} for ep in _divisors(experts, experts) if ranks % (ep * etp) == 0]


FIELDS = ("forward", "backward", "tp_f", "tp_b", "ep_f", "ep_b", "etp_f", "etp_b", "kept", "given", "dense", "experts", "moment")
"""What the formulas know of a layer, on one rank and for one row: seconds forward and backward; bytes that it sends over tp, ep and etp of two ranks,
forward and backward; bytes that it keeps and takes in; elements of its dense parameters and of its experts; bytes that its backward makes for a
moment, besides the gradients of experts."""


@attrs.frozen
class Guess:
    """seconds of a step, bytes of the fullest rank."""

    seconds: float
    peak: float


class Rough:
    """Formulas for one model, device and batch. layers: (layer, FIELDS) · rows: of a step · state: bytes of optimizer state for each element."""

    def __init__(self, layers: np.ndarray, device: Described, rows: int, compute: torch.dtype, state: float, achieved: Achieved):
        self.layers, self.device, self.rows, self.compute, self.state, self.achieved = layers, device, rows, compute, state, achieved
        self.parts: dict[int, np.ndarray] = {}

    def of(self, c: Choice) -> Iterator[tuple[Guess, Choice]]:
        """With each way to keep state and activations."""
        mesh, count, size = c.mesh, self.rows // (c.mesh["dp"] * c.micro_batch), self.compute.itemsize
        rates = Rates(mesh, self.device, self.compute, self.achieved)
        x = dict(zip(FIELDS, self.stages(mesh.pp * c.chunks).T))
        place = np.arange(mesh.pp * c.chunks)
        at = np.minimum(place, 2 * mesh.pp - 1 - place) if c.schedule == "zb-v" else place % mesh.pp
        over = [("tp", 1, ""), ("ep", mesh.tp, "all_to_all"), ("etp", mesh.tp / 2, "")]  # (axis, how its bytes shrink with tp, kind)
        each = {axis: 2 * (mesh[axis] - 1) / mesh[axis] / less * rates.per_byte(axis, kind) for axis, less, kind in over}
        forward, backward = (x[way] / mesh.tp + sum(x[f"{axis}_{way[0]}"] * t for axis, t in each.items()) for way in ("forward", "backward"))
        forward, backward = (np.bincount(at, c.micro_batch * t, mesh.pp) for t in (forward, backward))
        ahead = np.minimum(count, _held(c, at)) if mesh.pp > 1 else np.ones(1)
        kept, given = (np.bincount(at, x[name] * ahead * c.micro_batch / mesh.tp, mesh.pp) for name in ("kept", "given"))
        dense, experts = np.bincount(at, x["dense"] / mesh.tp, mesh.pp), np.bincount(at, x["experts"] / (mesh.ep * mesh.etp), mesh.pp)
        n, e = mesh["dp"] * mesh.cp, mesh.edp
        cut, whole = dense / n + experts / e, dense + experts
        sums = dense * (n - 1) / n * rates.per_byte("dp·cp") + experts * (e - 1) / e * rates.per_byte("edp")  # a byte of each element
        kept_, _, dense_, experts_, moment_ = self.layers[:, 8:].T
        one = dense_ / mesh.tp + experts_ / (mesh.ep * mesh.etp)  # parameters of each layer here
        moment = c.micro_batch * moment_ / mesh.tp + size * experts_ / (mesh.ep * mesh.etp)
        for again, share in RECOMPUTE.items():
            busy = float((forward * (1 + share) + backward).max())
            bubble = (mesh.pp - 1) / c.chunks * busy * (0.5 if c.schedule == "zb-v" else 1.0)
            held = kept * (1 - share) + given + (moment + (c.micro_batch * kept_ / mesh.tp if share else 0)).max()
            for shard in SHARDS if mesh["dp"] > 1 else ("0",):
                mine = cut if shard != "0" else whole
                copy = {"0": whole, "3": cut + 2 * one.max()}.get(shard, whole + cut)
                grads = cut + FLYING * one.max() if shard in ("2", "3") else whole + (cut if shard == "1" else 0)
                sent = float(sums.max()) * {"0": 8, "1": 4 + size, "2": 4 * count + size, "3": (4 + 2 * size) * count}[shard]
                hidden = HIDDEN * busy * (count if shard in ("2", "3") else 1)
                lasts = size * copy + self.state * mine
                peak = float((lasts + 4 * grads + held).max())
                if 1 < count < 2 * mesh.pp:  # when the most is held few sums have been begun, when all have been less is held
                    peak = float(np.maximum(lasts + 4 * grads / c.chunks + held, lasts + 4 * grads + held / 2).max())
                yield Guess(busy * count + bubble + max(0.0, sent - hidden), peak), attrs.evolve(c, recompute=again, shard=shard)

    def stages(self, n: int) -> np.ndarray:
        """(stage, FIELDS): the sums over the layers of each of n stages, balanced by their time."""
        if n not in self.parts:
            sizes = splits.partition((self.layers[:, 0] + self.layers[:, 1]).tolist(), n)
            ends = np.cumsum(sizes)
            self.parts[n] = np.stack([self.layers[end - size : end].sum(0) for end, size in zip(ends, sizes)])
        return self.parts[n]


def _held(c: Choice, rank: np.ndarray) -> np.ndarray:
    """Microbatches of each stage that its rank holds at most, on average over the stages of a rank."""
    pp = c.mesh.pp
    if c.schedule == "interleaved":
        return ((c.chunks - 1) * pp + 2 * (pp - 1 - rank) + 1) / c.chunks
    return np.full(len(rank), 1.25 * pp) if c.schedule == "zb-v" else pp - rank  # what W multiplies waits


def _layers(model: Model, seq_len: int, precision: str, device: Described, achieved: Achieved, known: Layers) -> np.ndarray:
    """(layer, FIELDS), from the layers on one rank, and what they send on two, which is found out on shorter rows."""
    out = np.zeros((len(model.layers()), len(FIELDS)))
    experts = any("expert" in p.axes for p in model.params().values())
    meshes = {"": Mesh(dp=1), "tp": Mesh(tp=2)} | ({"ep": Mesh(dp=2, ep=2), "etp": Mesh(tp=2, etp=2)} if experts else {})
    for axis, mesh in meshes.items():
        where, tokens = layout(model, mesh), seq_len if not axis else min(seq_len, SHORT)
        with Paper():
            ctx = Context(CountedAxes(MetaAxes(where.mesh, where.mesh.size - 1), Traffic()), paper, precision, ops=table_for(precision))
            costs = [*chain(where, shard_batch(rows_of(tokens, 1, 2), model, ctx), ctx, known if not axis else Layers(tokens)).values()]
        if axis:
            for k, way in enumerate("fb"):
                sent = [(c.forward, c.backward)[k].sent for c in costs]
                out[:, FIELDS.index(f"{axis}_{way}")] = [sum(n for name, _, _, n in each if name == axis) * seq_len / tokens for each in sent]
            continue
        rates, given = Rates(mesh, device, precision_of(precision).compute, achieved), 0
        for i, (c, segments) in enumerate(zip(costs, model.layers().values())):
            params = [p for s in segments for p in s.params.values() if isinstance(p, Param) and p.learned]
            routed = sum(math.prod(p.shape) for p in params if "expert" in p.axes)
            ways = [rates.computing(Work(way.flops, way.moved)) for way in (c.forward, c.backward)]
            moment = c.backward.peak - precision_of(precision).compute.itemsize * routed
            out[i, :2], out[i, 8:] = ways, (c.kept, given, sum(math.prod(p.shape) for p in params) - routed, routed, moment)
            given = sum({m.place: m.bytes for m in c.outputs if m.given is None}.values())
    return out


@attrs.frozen
class Found:
    """best: the fastest plan of each mesh, in order · refused: what looked as good and cannot be, and why · tried: how many choices there were, how
    many of them fit by the formulas, and how many plans were made."""

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
    layers = Layers(seq_len)
    tell("layers on paper")
    rough = formulas(model, device, optimizer, seq_len, global_batch, precision, achieved, layers)
    every = [pair for c in choices(model, ranks, int(device.need("node")), global_batch) for pair in rough.of(c)]
    if not every:
        raise ConfigError(f"{global_batch} rows on {ranks} ranks: no mesh divides them; give --global-batch as a multiple of the ranks, {ranks}")
    limit = USABLE * device.need("memory")
    fitting = sorted((pair for pair in every if pair[0].peak <= SLACK * limit), key=lambda pair: pair[0].seconds)
    if not fitting:
        guess, c = min(every, key=lambda pair: pair[0].peak)
        least = f"the least is about {guess.peak / 2**30:.1f} GiB, with {c}"
        raise ConfigError(f"nothing fits into {limit / 2**30:.1f} GiB a device: {least}; take more ranks than {ranks}, or another device")
    best, refused, made, most = dict[Mesh, tuple[Choice, Plan]](), list[tuple[Choice, str]](), 0, 2 * top
    for guess, c in fitting:
        if c.mesh in best or [other.mesh for other, _ in refused].count(c.mesh) >= 2:
            continue
        if len(best) >= top or made >= most or (best and guess.seconds > SLOW * fitting[0][0].seconds):
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


def formulas(
    model: Model, device: Described, optimizer: Optimizer, seq_len: int, global_batch: int, precision: str, achieved: Achieved, layers: Layers
) -> Rough:  # fmt: skip
    known, state = _layers(model, seq_len, precision, device, achieved, layers), state_bytes(optimizer, layout(model, Mesh(dp=1)), precision)
    return Rough(known, device, global_batch, precision_of(precision).compute, state, achieved)


def nearest(rough: Rough, model: Model, now: Choice, limit: float) -> Choice | None:
    """The layout that fits, by the formulas, and differs from this one in the fewest settings: on as many ranks, or else on 2, 4 or 8 times as many;
    of several the fastest. None: nothing does."""
    node = int(rough.device.need("node"))
    for times in (1, 2, 4, 8):
        every = [pair for c in choices(model, now.mesh.size * times, node, rough.rows) for pair in rough.of(c)]
        if fits := [(_apart(c, now), guess.seconds, i) for i, (guess, c) in enumerate(every) if guess.peak <= limit]:
            return every[min(fits)[2]][1]
    return None


def _apart(a: Choice, b: Choice) -> int:
    """How many settings differ; dp follows from the others."""
    meshes = sum(a.mesh[axis] != b.mesh[axis] for axis in ("tp", "pp", "ep", "etp"))
    return meshes + sum(getattr(a, name) != getattr(b, name) for name in ("micro_batch", "schedule", "chunks", "recompute", "shard"))


def planned(
    model: Model, c: Choice, device: Described, optimizer: Optimizer, seq_len: int, global_batch: int, precision: str, achieved: Achieved,
    layers: Layers, rows: Sequence[int] | None = (),
) -> Plan:  # fmt: skip
    """The plan of a choice. rows: as of `lf.plan.plan`; few microbatches speak for many."""
    pipeline = c.pipeline(len(model.layers()))
    where = pipeline.layout(model, c.mesh, seq_len)
    count = microbatches(global_batch, c.micro_batch, where.mesh["dp"])
    enough = c.mesh.pp + 2 if c.schedule == "1f1b" and c.mesh.pp > 1 else 2 * c.mesh.pp  # for a rank to hold the most that it will
    program = pipeline.program(where, min(count, enough))
    return plan(
        where, program, optimizer, device, seq_len=seq_len, micro_batch=c.micro_batch, precision=precision, achieved=achieved, rows=rows,
        layers=layers, of=count,
    )  # fmt: skip

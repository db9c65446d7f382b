"""A program joined with a layout: all that a rank's actions need and that does not change from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from lf.config import one_of
from lf.layouts import Layout
from lf.parallel.reduce import Lies, lies_of
from lf.schedule.compiled import Compile, LayerFn, compiled, layer_fn
from lf.schedule.ground import Ground, Where, ground
from lf.schedule.ir import BACKWARD, COMPUTE, Action, Program, ProgramError, flat
from lf.schedule.lower import reduced_layers, tied_paths
from lf.schedule.pieces import Stage
from lf.schedule.shapes import Brought, Shapes, key, trace
from lf.schedule.shard import gathered_layers
from lf.segment import Segment, path_of
from lf.spec import Spec

SPANNING = ("B", "I", "W", "REMAT", "OFFLOAD", "FETCH")
KINDS = ("plain", "acc", "probe")
"""How the weights of products arrive: as tensors where there is no backward, with the sum that a B adds to, with the probes of I and W."""


@attrs.frozen
class Fed:
    """What an edge brings to a piece: to its segment number `segment` as `input`, over joint number `joint`. `live`: its gradient is wanted."""

    segment: int
    input: str
    joint: int
    live: bool

    @property
    def name(self) -> str:
        """What it is called beside the carry, which has no such names."""
        return f"{self.segment}<{self.input}"


@attrs.frozen
class Piece:
    """A layer, or a segment of one: what a forward runs between two cuts of autograd.

    fn[kind](values, x, batch, ctx, fed) -> (y, losses, outputs, sums), for each of KINDS · `names`: of each segment its name, and (name, path, is
    it a product) of each of its parameters · `leaves`: paths whose gradients autograd returns · `products`: (segment, name, path) of those that come
    through a W · `upstream`: whether anything before it trains, so that its input has a gradient · `back`: whether it has a backward · `fed`: what
    edges bring to it · `outputs`: what edges take from it ·
    `gathered`: paths that lie in shards, which a GATHER makes whole.
    """

    stage: int
    name: str
    fn: dict[str, LayerFn]
    names: tuple[tuple[str, tuple[tuple[str, str, bool], ...]], ...]
    leaves: tuple[str, ...]
    products: tuple[tuple[str, str, str], ...]
    upstream: bool
    back: bool
    fed: tuple[Fed, ...]
    outputs: tuple[str, ...]
    gathered: tuple[str, ...]


@attrs.frozen
class BoundChain:
    """Of a chain, on one of its ranks. `pieces`: of each stage and `segment` of a forward, what it runs · `spans`: of each other compute action's
    (stage, segment), the names of the pieces that it covers · `final`: the (stage, segment)s of forwards that end their stage · `split`: (stage,
    unit, piece)s whose weight gradients a W makes · `again`: of each (stage, unit, piece) that is made again, which ops (none named: all) ·
    `away`: those that are offloaded · `trained`: each path here, and whether it trains · `reduced`: of each (stage, layer), the paths whose sum is
    then complete on this rank · `gathered`: of each, those that lie in shards · `lies`: how each of those does ·
    `tied`: the pipeline ranks of each path that has several."""

    layout: Layout
    ctx: Any
    rank: int
    known: tuple[Stage, ...]
    pieces: dict[tuple[int, str | None], tuple[Piece, ...]]
    spans: dict[tuple[int, str | None], frozenset[str]]
    final: frozenset[tuple[int, str | None]]
    split: frozenset[tuple[int, int | None, str]]
    again: dict[tuple[int, int | None, str], tuple[str, ...]]
    away: frozenset[tuple[int, int | None, str]]
    trained: dict[str, bool]
    reduced: dict[tuple[int, str], tuple[str, ...]]
    gathered: dict[tuple[int, str], tuple[str, ...]]
    lies: dict[str, Lies]
    tied: dict[str, tuple[int, ...]]
    shapes: Callable[[Any, Mapping[str, Brought]], Shapes]
    compiled: bool
    trains: bool  # whether there is any backward in the program

    @property
    def placement(self) -> tuple[int, ...]:
        return self.layout.placement


@attrs.frozen
class Bound:
    """`actions` of one rank, in row `row` of the program · `chains`: those that this rank is on."""

    actions: tuple[Action, ...]
    row: int
    ground: Ground
    chains: dict[str, BoundChain]
    number: int  # under which `axes.position` knows the program
    trains: bool
    last: dict[int, tuple[str, int]]  # action → the unit of a chain that is dealt, whose last compute here it is


def bind(program: Program, where: Where, ctx: Any, compile: Compile = False, name: str = "step") -> Bound:
    """The actions of this rank. `compile`: each distinct layer by torch.compile, as a full graph, for this backend (True: inductor), or by a function
    of its own. `name`:
    what one run of it is called, where a rank says how far it is. Collective over the pipeline of each chain the first time."""
    on = ground(program, where)
    assert on.layouts is not None
    # of all ranks: one alone that refused would leave the others waiting
    named = sorted({op for row in program for a in flat(row) if a.op == "REMAT" for op in a.ops})
    for op in named:
        one_of("op to run again", op, vars(ctx.ops))
    if compile and named and not callable(compile):
        raise ProgramError(f"ops {', '.join(named)} are to be run again: a compiler decides itself what it keeps; leave out compile, or these ops")
    row = on.layouts.row(ctx.axes.rank)
    chains = {c: _chain(c, on, program[row], ctx.of(c), compile) for c in on.layouts.chains if ctx.of(c).axes is not None}
    if on.joints:
        ctx.axes.links()
    number = ctx.axes.position.program([str(a) for a in program[row]], name)
    ends = {(a.chain, a.microbatch): i for i, whole in enumerate(program[row]) for a in flat((whole,)) if a.op in COMPUTE and a.chain != on.main}
    last = {i: (c, u) for (c, u), i in ends.items() if u is not None}
    return Bound(program[row], row, on, chains, number, any(a.op in BACKWARD for a in flat(program[row])), last)


def _chain(chain: str, on: Ground, actions: tuple[Action, ...], ctx: Any, compile: Compile) -> BoundChain:
    assert on.layouts is not None
    layout, known, rank = on.layouts.chains[chain], on.known[chain], ctx.axes.coords["pp"]
    ctx.axes.pipe()
    mine = [a for a in flat(actions) if a.chain == chain]
    fns: dict[Any, LayerFn] = {}
    pieces: dict[tuple[int, str | None], tuple[Piece, ...]] = {}
    spans: dict[tuple[int, str | None], frozenset[str]] = {}
    for a in mine:
        at = a.stage, a.segment
        if a.op == "F" and at not in pieces:
            segments = {s.name: s for s in layout.stages[a.stage]}
            names = known[a.stage].pieces(a.segment) if segments else ()
            pieces[at] = tuple(_piece(chain, a.stage, name, on, segments, fns, ctx, compile) for name in names)
        elif a.op in SPANNING and at not in spans:
            lo, hi = known[a.stage].span(a.segment) or (0, 0)
            spans[at] = frozenset((*known[a.stage].atoms[lo:hi], *known[a.stage].layers[lo:hi]))
    again = {(a.stage, a.microbatch, p): a.ops for a in mine if a.op == "REMAT" for p in spans[a.stage, a.segment]}
    away = {(a.stage, a.microbatch, p) for a in mine if a.op == "OFFLOAD" for p in spans[a.stage, a.segment]}
    final = {(s, segment) for s, segment in pieces if (known[s].span(segment) or (0, 0))[1] == len(known[s].atoms)}
    return BoundChain(
        layout, ctx, rank, known, pieces, spans, frozenset(final),
        frozenset((a.stage, a.microbatch, p) for a in mine if a.op == "I" for p in spans[a.stage, a.segment]),
        again, frozenset(away),
        {path: path not in layout.frozen for path in layout.held(ctx.axes.coords)},
        reduced_layers(layout, rank),
        gathered_layers(layout, rank),
        lies_of([*layout.held(ctx.axes.coords).values()], ctx.axes.coords),
        {path: layout.holders(path) for path in tied_paths(layout, rank)},
        _traced(layout, ctx),
        bool(compile) and not callable(compile),
        any(a.op in BACKWARD for a in flat(actions)),
    )  # fmt: skip


def summed(spec: Spec) -> bool:
    """Whether other ranks of its stage have a part in the gradient."""
    return bool(spec.shared()) or any(spec.mesh[a] > 1 for a in spec.sum_axes)


def _piece(
    chain: str, index: int, name: str, on: Ground, segments: dict[str, Segment], fns: dict[Any, LayerFn], ctx: Any, compile: Compile
) -> Piece:
    assert on.layouts is not None
    layout, stage = on.layouts.chains[chain], on.known[chain][index]
    lo, hi = stage.span(name) or (0, 0)
    mine = [segments[atom] for atom in stage.atoms[lo:hi]]
    names = tuple((s.name, tuple((n, path_of(s, n), n in s.products) for n in s.params)) for s in mine)
    trained = [(s, n, path, w) for s, params in names for n, path, w in params if path not in layout.frozen]
    upstream = stage.upstream or any(stage.inside[:lo]) or any(stage.fed[:lo])
    key = tuple(s.apply for s in mine)
    for kind in KINDS:
        if (key, kind) not in fns:  # equal layers share one function, and so one compilation for each kind of weight
            if callable(compile):
                fns[key, kind] = compile(key)
            else:
                fns[key, kind] = compiled(layer_fn(key), ctx, "inductor" if compile is True else compile) if compile else layer_fn(key)
    kinds = {kind: fns[key, kind] for kind in KINDS}
    leaves = tuple(dict.fromkeys(path for _, _, path, w in trained if not w))
    products = tuple((s, n, path) for s, n, path, w in trained if w)
    into = [(e, k) for k in on.into(chain, index) for e in on.joints[k].edges]
    fed = tuple(Fed(i, e.input, k, on.live[k]) for i, s in enumerate(mine) for e, k in into if e.segment == s.name)
    taken = {on.joints[k].edges[0].output for k in on.out(chain, index)}
    outputs = tuple(o for s in mine for o in s.outputs if o in taken)
    gathered = tuple(dict.fromkeys(path for _, params in names for _, path, _ in params if layout.specs[path].cut))
    return Piece(index, name, kinds, names, leaves, products, upstream, hi > stage.stop, fed, outputs, gathered)


def _traced(layout: Layout, ctx: Any) -> Callable[[Any, Mapping[str, Brought]], Shapes]:
    """shapes(batch, brought), worked out once for each shape of batch and of what edges bring; like segments once for all of these."""
    known: dict[Any, Shapes] = {}
    done: dict[Any, Any] = {}

    def shapes(batch: Any, brought: Mapping[str, Brought]) -> Shapes:
        if (k := (key(batch), tuple(sorted((s, tuple(x.items())) for s, x in brought.items())))) not in known:
            known[k] = trace(layout, batch, ctx, brought, done)
        return known[k]

    return shapes

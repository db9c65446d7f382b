"""What scripts/mutate breaks; programs and their interpreter are in schedule_mutations.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from chain_mutations import CHAIN
from mixer_mutations import MIXERS
from moe_mutations import MIXTURES
from mutation import Mutation, rewritten, stale, words
from optim_mutations import OPTIMIZERS
from schedule_mutations import SCHEDULE
from sharding_mutations import SHARDING

from lf import axes, axes_sim, chain_layouts, drift, evaluate, layouts, loop, ramp, record, rng, split, state, train
from lf.checkpoint import native, shards
from lf.kernels import adamw as fused
from lf.kernels import norm, rope, swiglu
from lf.mesh import Mesh
from lf.ops import attention
from lf.ops.adamw import adamw_update as update
from lf.optim import adamw, lr, sgd
from lf.optim.adamw import is_matrix
from lf.parallel import linear, product, redistribute, reduce, vocab
from lf.schedule.graphs import Graphs
from lf.schedule.run import _Rank
from lf.spec import Part, Spec

REDISTRIBUTE, LINEAR, PRODUCT, VOCAB, REDUCE = (
    f"tests/parallel/test_{name}.py" for name in ("redistribute", "linear", "product", "vocab", "reduce")
)
PARITY, TRAIN, GLOO, SPEC, LAWS = (f"tests/test_{name}.py" for name in ("parity", "train", "gloo", "spec", "laws"))
OPTIM = "tests/optim/test_adamw.py"


def _later(move: Callable[..., Any]) -> Callable[..., Any]:
    def moved(x: Any, axis: Any, s: Any, later: bool = False) -> Any:
        y = move(x, axis, s)
        return (lambda: y) if later else y

    return moved


def _mean_of(move: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, axis, s: move(x, axis, s) / axis.size


# For each move the nearest wrong one that gives the same shape: what a slip of the pen would be.
WRONG = {
    "_nothing": redistribute._all_reduce,
    "_all_reduce": redistribute._nothing,
    "_all_gather": redistribute._zero_fill,
    "_reduce_scatter": redistribute._slice,
    "_slice": redistribute._reduce_scatter,
    "_zero_fill": redistribute._all_gather,
    "_keep_on_first": redistribute._nothing,
}


def edges() -> list[Mutation]:
    """Every edge of the table, forward and backward apart: another move, and the right move off by the number of ranks."""
    out = []
    for pair, edge in redistribute.EDGES.items():
        for way in ("forward", "backward"):
            right = getattr(edge, way)
            wrongs = {
                WRONG[right.__name__].__name__.strip("_"): WRONG[right.__name__],
                "a mean": _mean_of(right),
            }
            for what, wrong in wrongs.items():

                def apply(pair: str = pair, way: str = way, wrong: Any = wrong) -> None:
                    redistribute.EDGES[pair] = attrs.evolve(redistribute.EDGES[pair], **{way: _later(wrong)})

                out.append(Mutation(f"edge {pair} {way}: {what}", apply, (REDISTRIBUTE,)))
    return out


def fget(owner: type, name: str) -> Any:
    return owner.__dict__[name].fget


MOVES = [
    words(
        "edge S→S forward: out of order",
        REDISTRIBUTE,
        (redistribute.redistribute, "lambda x: _swap(x, axis, src, dst)", "lambda x: _swap(x, axis, src, dst).flip(src.dim)"),
    ),
    words(
        "edge S→S forward: a mean",
        REDISTRIBUTE,
        (redistribute.redistribute, "lambda x: _swap(x, axis, src, dst)", "lambda x: _swap(x, axis, src, dst) / axis.size"),
    ),
    words(
        "edge S→S backward: out of order",
        REDISTRIBUTE,
        (redistribute.redistribute, "_swap(dy, axis, dst, src)", "_swap(dy, axis, dst, src).flip(dst.dim)"),
    ),
    words(
        "edge S→S backward: a mean", REDISTRIBUTE, (redistribute.redistribute, "_swap(dy, axis, dst, src)", "_swap(dy, axis, dst, src) / axis.size")
    ),
    words(
        "exchange forward: out of order",
        REDISTRIBUTE,
        (redistribute.exchange, "axis.all_to_all(x, send_rows, recv_rows)", "axis.all_to_all(x, send_rows, recv_rows).flip(0)"),
    ),
    words("exchange backward: counts not swapped", REDISTRIBUTE, (redistribute.exchange, "(dy, recv_rows, send_rows)", "(dy, send_rows, recv_rows)")),
    words(
        "exchange backward: a mean",
        REDISTRIBUTE,
        (redistribute.exchange, "axis.all_to_all(dy, recv_rows, send_rows)", "axis.all_to_all(dy, recv_rows, send_rows) / axis.size"),
    ),
    words("shift forward: the other way", REDISTRIBUTE, (redistribute.shift, "axis.shift(x, k)", "axis.shift(x, -k)")),
    words("shift backward: the same way", REDISTRIBUTE, (redistribute.shift, "axis.shift(dy, -k)", "axis.shift(dy, k)")),
    words("shift backward: nothing", REDISTRIBUTE, (redistribute.shift, "axis.shift(dy, -k)", "dy")),
    words(
        "redistribute: sizes not fixed before backward",
        REDISTRIBUTE,
        (redistribute.redistribute, "shard = shard._replace(sizes=tuple(sizes))", "pass"),
    ),
    words("column linear: dX is not scattered", LINEAR, (linear._scatter, 'EDGES["S→R"].backward(dx, axis, seq, later=True)', "lambda: dx")),
    words(
        "column linear: dW from the shard's own rows",
        LINEAR,
        (linear._Column.backward, "gathered()", "torch.cat([x] * axis.size)[: len(dy)]"),
    ),
    words("column linear: the probe gets no dY on the first rank", LINEAR, (linear._Column.backward, "(rows, dy) if", "(rows, dy * axis.index) if")),
    words("product: the sum is written over", (PRODUCT, LINEAR), (product._add_product, "acc.addmm_(dy.T, rows)", "acc.addmm_(dy.T, rows, beta=0)")),
    words("row linear: P→S as I→S", LINEAR, (linear.row_linear, "axis, P, seq", "axis, Type('I'), seq")),
]

SPECS = [
    words("reduction axes: without dp", (REDUCE, PARITY), (fget(Spec, "sum_axes"), "not in self.names", "not in (*self.names, 'dp')")),
    words("reduction axes: without tp", (REDUCE, PARITY), (fget(Spec, "sum_axes"), "not in self.names", "not in (*self.names, 'tp')")),
    words("reduction axes: without cp", SPEC, (fget(Spec, "sum_axes"), "not in self.names", "not in (*self.names, 'cp')")),
    words("reduction axes: without edp", SPEC, (fget(Spec, "sum_axes"), "not in self.names", "not in (*self.names, 'edp')")),
    words("reduction axes: one too many", PARITY, (fget(Spec, "sum_axes"), "if a not in self.names", "")),
    words("reduction axes: experts by the dense ones", SPEC, (fget(Spec, "grid"), '"expert" in self.param.axes', "False")),
    words("overlap of kv heads: not summed", PARITY, (reduce._overlaps, "for i in spec.shared())", "for i in ())")),
    words("overlap of kv heads: keys alone are summed", PARITY, (reduce._overlaps, "for i in spec.shared())", "for i in spec.shared()[:1])")),
    words(
        "overlap of kv heads: found only where boxes are equal",
        (SPEC, PARITY),
        (Part.overlaps, "> self.bounds(r + 1, ranks)[0]", "> self.bounds(r + 1, ranks)[1]"),
    ),
    words("gradient sum: not done", PARITY, (reduce.reduce_gradients, "elif axes[spec.sum_axes].size > 1:", "elif False:")),
    words("gradient sum: not waited for", PARITY, (_Rank.results, "self.finish_sums()\n", "pass\n")),
    words("norm owner: every holder counts", PARITY, (Spec.owned, "if any(coords[a] for a in self.sum_axes):", "if False:")),
    words("norm owner: only rank 0 counts", PARITY, (Spec.owned, "for a in self.sum_axes)", "for a in coords)")),
    words("norm owner: overlaps count twice", PARITY, (Spec.owned, "if coords[axis] else 0", "if False else 0")),
    words("norm owner: overlaps are not counted", PARITY, (Spec.owned, "start = min(max(lo, before), hi)", "start = hi")),
    words("norm owner: the first part alone", PARITY, (Spec.owned, "if box.volume(piece.box):", "if box.volume(piece.box) and not out:")),
    words("kv heads: empty shares start at the end", SPEC, (Part.units, "lo if lo < hi else lo + group - 1", "lo")),
]

# train.gradients holds the step's own function: its words are the outer one's, too.
STEP, COUNTS = train.gradients, train._counts
NORMALISER = [
    words("normaliser: the rank's own count", PARITY, (COUNTS, 'ctx.axes["dp"].sum(mine).to', "mine.to")),
    words("normaliser: counts summed over tp", PARITY, (COUNTS, 'ctx.axes["dp"].sum', 'ctx.axes["tp"].sum')),
    words("normaliser: counts summed over all ranks", PARITY, (COUNTS, 'ctx.axes["dp"].sum', "ctx.axes.world.sum")),
    words(
        "normaliser: the first microbatch's count for all",
        PARITY,
        (COUNTS, "o.count(b) for b in batches", "o.count([*batches][0]) for b in batches"),
    ),
    words(
        "normaliser: number of tokens, not of labels",
        TRAIN,
        (COUNTS, "o.count(b) for b in batches", "torch.tensor(len(b.plan['tokens'])) for b in batches"),
    ),
    words("normaliser: one for all objectives", TRAIN, (STEP, "o.weight / norms[k]", "o.weight / norms[k] ** 0")),
    words("normaliser: weight left out", TRAIN, (STEP, "k: o.weight / norms[k]", "k: 1 / norms[k]")),
    words("normaliser: mean of means over ranks", PARITY, (COUNTS, 'ctx.axes["dp"].sum(mine).to', '(mine * ctx.axes["dp"].size).to')),
    words(
        "normaliser: mean of means over microbatches",
        PARITY,
        (
            Graphs.back,
            "self.seeds[k] for k in kept.losses",
            "(self.seeds[k] * 0 + 1) / len(self.batches) / (self.batches[0].plan['labels'] >= 0).sum() for k in kept.losses",
        ),
    ),
    words("normaliser: no label divides by 0", TRAIN, (STEP, "counts.clamp_min(1)", "counts")),
    words("loss: summed over dp alone", PARITY, (train._world_sums, "ctx.axes.world.sum", 'ctx.axes["dp"].sum')),
    words("loss: summed over tp alone", PARITY, (train._world_sums, "ctx.axes.world.sum", 'ctx.axes["tp"].sum')),
    words("norm: squared", TRAIN, (train._world_sums, "square.sqrt()", "square")),
]

PAIR = "redistribute(_Partials.apply(z_TV, labels_T - first, m_T), axis, P, seq)"
TARGET = "z.gather(1, at)[:, 0].to(m.dtype) - m"
POINTWISE = "tests/ops/test_pointwise.py"
MODEL = [
    words(
        "cross-entropy: P→S as I",
        VOCAB,
        (vocab.vocab_cross_entropy, PAIR, PAIR.replace("seq", "I")),
        (vocab.vocab_cross_entropy, "redistribute(labels_T, axis, I, seq)", "labels_T"),
    ),
    words(
        "cross-entropy: a mean over own tokens",
        VOCAB,
        (vocab.vocab_cross_entropy, "pair[:, 0].log() - pair[:, 1]).sum()", "pair[:, 0].log() - pair[:, 1]).mean()"),
    ),
    words("cross-entropy: the rank's own largest logit", VOCAB, (vocab.vocab_cross_entropy, "axis.max(", "(")),
    words("cross-entropy: ignored labels count", VOCAB, (vocab.vocab_cross_entropy, "own == IGNORE", "own == IGNORE - 1")),
    words("cross-entropy: targets of other ranks count", VOCAB, (vocab._Partials.forward, f"torch.where(mine, {TARGET}, 0.0)", TARGET)),
    words("cross-entropy: targets of other ranks pull", VOCAB, (vocab._Partials.backward, " * mine[:, None]", "")),
    words("norm: its gradient forgets the scale", POINTWISE, (norm._RmsNorm.backward, ".addcmul_(h, scaled)", "")),
    words("rope: its gradient turns on", POINTWISE, (rope._Rope.backward, "sin, -1)", "sin, 1)")),
    words("swiglu: its gradient forgets what is gated", POINTWISE, (swiglu._SwiGLU.backward, "(dy, up, out=dgate)", "(dy, dy, out=dgate)")),
    words("embedding: ids of other ranks give a row", VOCAB, (vocab.vocab_embedding, " * mine[:, None]", "")),
    words("embedding: a rank without rows has no graph", VOCAB, (vocab.vocab_embedding, " + w_VD.sum()", "")),
    words(
        "attention: sees the next document",
        "tests/ops/test_attention.py",
        (attention.causal_mask, "document[:, None] == document[None, :]", "document[:, None] >= document[None, :]"),
    ),
    words("attention: a window of one more", "tests/ops/test_attention.py", (attention.causal_mask, ".triu(1 - window)", ".triu(-window)")),
    words("attention: sees the future", "tests/ops/test_attention.py", (attention.causal_mask, ".tril()", "")),
    words("draws: one tile for all", "tests/test_rng.py", (rng.draw, "generator(seed, key, *at)", "generator(seed, key)")),
    words("draws: one key for all", "tests/test_rng.py", (rng.draw, "generator(seed, key, *at)", "generator(seed, *at)")),
    words("draws: not by logical place", "tests/test_rng.py", (rng.draw, "boxes.slices(common, tile)", "boxes.slices(common, common)")),
    words(
        "init: parts drawn by the local box",
        "tests/test_rng.py",
        (state.init, "piece.shape, spec.param.init, piece.box", "piece.shape, spec.param.init, tuple((0, hi - lo) for lo, hi in piece.box)"),
    ),
]

STEPS = [
    words("clip: never", TRAIN, (train.make, "torch.ones_like(norm) if clip is None else", "torch.ones_like(norm) if True else")),
    words("clip: also up", TRAIN, (train.make, ".clamp_max(1.0)", "")),
    words("clip: by the square", TRAIN, (train.make, "(clip / (norm + 1e-6)).clamp", "((clip / (norm + 1e-6)) ** 2).clamp")),
    words("gate: always open", TRAIN, (train.make, "torch.isfinite(norm) &", "torch.ones_like(norm, dtype=torch.bool) |")),
    words("gate: the host asks", LAWS, (train.make, "torch.isfinite(norm) &", "torch.isfinite(norm) & bool(norm > 0) &")),
    words("the step's count stands still", TRAIN, (train.make, "state.step + 1", "state.step")),
    words("compute copy of the old master", TRAIN, (
        train.make, 'compute_copy(layouts, state_of["master"], ctx, state.params)', "tree.map(torch.zeros_like, state.params)")),
    words("sgd: no clip factor", OPTIM, (sgd, "(lr * scale)", "lr")),
    words("sgd: not gated", OPTIM, (sgd, "torch.where(ok, ", "torch.where(ok | True, ")),
    words("adamw: no clip factor", OPTIM, (update, "grad * scale.to(grad.dtype)", "grad")),
    words("adamw, fused: no clip factor", OPTIM, (fused.adamw_update, "scale.to(torch.float32).reciprocal()", "torch.ones(())")),
    words("adamw, fused: not gated", OPTIM, (fused.adamw_update, "(~ok).to(torch.float32)", "torch.zeros(())")),
    words("adamw: no bias correction", OPTIM, (update, "(m / correct1.to(m.dtype))", "m")),
    words("adamw: betas swapped", OPTIM, (update, "b1, b2 = betas", "b2, b1 = betas")),
    words("adamw: decay coupled to the gradient", OPTIM, (update, "+ decay * w", "+ decay * g")),
    words("adamw: gains decay", OPTIM, (is_matrix, ">= 2", ">= 1")),
    words("adamw: eps under the root", OPTIM, (update, ".sqrt() + eps)", "+ eps).sqrt()")),
    words("adamw: a skipped step ages", OPTIM, (adamw, ".add_(ok)", ".add_(1)")),
    words("adamw: moments not gated", OPTIM, (update, "keep = ok.to(g.dtype)", "keep = torch.ones_like(ok, dtype=g.dtype)")),
    words("rate: warm-up from 0", OPTIM, (lr._warmed, "(s + 1) / max(warmup, 1)", "s / max(warmup, 1)")),
    words("rate: falls on after the end", OPTIM, (lr._done, ".clamp(0, 1)", "")),
]

AXES = [
    words(
        "live axes: shift the other way",
        GLOO,
        (axes.Axis.shift, "(self.index + k) % self.size", "(self.index - k) % self.size"),
        (axes.Axis.shift, "self.ranks[(self.index - k) % self.size]\n", "self.ranks[(self.index + k) % self.size]\n"),
    ),
    words("live axes: padding not taken out", GLOO, (axes.Axis.all_gather, "piece[:k] for piece, k", "piece[-k:] for piece, k")),
    words("live axes: max is a sum", GLOO, (axes.Axis.max, 'self.all_reduce(x, "max")', "self.all_reduce(x)")),
    words(
        "live axes: all-to-all joins where it cuts",
        GLOO,
        (axes.Axis.all_to_all, "shapes)], join)", "shapes)], dim)"),
    ),
    words(
        "simulated axes: scatter in another order",
        REDISTRIBUTE,
        (axes_sim.SimAxis.reduce_scatter, "[self.index] for t in full", "[-1 - self.index] for t in full"),
    ),
    words("mesh: the first axis is the fastest", "tests/test_mesh.py", (Mesh.coords, "for axis in reversed(grid):", "for axis in grid:")),
    words("simulator: ranks may differ", "tests/test_sim.py", (axes_sim.World.post, "if theirs != tag:", "if False:")),
]

EVALUATE, DRIFT, LOOP, RAMP, LR = (f"tests/{name}.py" for name in ("test_evaluate", "test_drift", "test_loop", "test_ramp", "optim/test_lr"))
RUNS = [
    words("evaluation: counts summed over all ranks", EVALUATE, (evaluate._means, "dp.sum(", "ctx.axes.world.sum(")),
    words("evaluation: loss summed over dp alone", EVALUATE, (evaluate._means, "ctx.axes.world.sum(", "dp.sum(")),
    words("evaluation: padding counts", EVALUATE, (evaluate._padding, "np.full(n, IGNORE, np.int64)", "np.zeros(n, np.int64)")),
    words("evaluation: ranks without rows stay out", EVALUATE, (evaluate._batches, "micro_batch * dp.size)", "micro_batch * dp.size - 1)")),
    words("drift: constants may be even", DRIFT, (drift._odd, "c | 1", "c & -2")),
    words("drift: one constant for all places", DRIFT, (drift._odd, "c | 1", "c * 0 + 1")),
    words("drift: the top bit is lost", DRIFT, (drift.digest, "(total ^ (total >> 31))", "total")),
    words("drift: shared units are not looked at", DRIFT, (drift._atoms, "if shared:", "if False:")),
    words("drift: the largest hash alone", DRIFT, (drift.check, "most != -least", "most < -least")),
    words("ramp: a stage begins a step late", RAMP, (ramp._stages, "-(-(done + 1) * ramp.rows // k)", "(done + 1) * ramp.rows // k + 1")),
    words("wsd: falls a step early", LR, (lr.warmup_stable_decay, "steps - falling - 1", "steps - falling - 2")),
    words("loop: no checkpoint at an early end", LOOP, (loop.run, "or bool(stop)", "")),
    words("loop: skipped steps are never too many", LOOP, (loop.run, "in_a_row > policy.skips", "in_a_row > policy.skips > 0")),
    words("loop: records of steps in between are lost", LOOP, (loop.run, "stop = settle(ended=began) or stop\n", "pending = measured\n")),
    words("record: the speed of all ranks", LOOP, (record.record_of, "/ seconds / ranks, 1)", "/ seconds, 1)")),
    words("record: rank 0's memory", LOOP, (record.measure, '"max", later=True', '"sum", later=True')),
]

LAYOUT, PIPELINE, SPLIT = "tests/test_layout.py", "tests/checkpoint/test_checkpoint_pipeline.py", "tests/test_split.py"
CHAINS, CHAIN_FILES = "tests/test_chain_layouts.py", "tests/checkpoint/test_checkpoint_chains.py"
HOLDS = 'self._holders[p][0] == coords["pp"]'
L = layouts.Layout
STAGES = [
    words("norm owner: every stage that holds it counts", (LAYOUT, PIPELINE), (L.state_owned, HOLDS, 'coords["pp"] in self._holders[p]')),
    words("norm owner: the last stage that holds it", LAYOUT, (L.state_owned, HOLDS, HOLDS.replace("[0]", "[-1]"))),
    words("frozen: a tied parameter in one place alone", LAYOUT, (layouts._frozen, "add(path_of(segment, name))", 'add(f"{segment.name}/{name}")')),
    words("frozen: has moments all the same", TRAIN, (layouts.Layout.trained, "if path not in self.frozen", "")),
    words("init: every stage's parameters on every rank", LAYOUT, (state.init, "layouts.held(rank)", "layouts.specs")),
    words(
        "checkpoint: the leaves of rank 0's stages alone",
        PIPELINE,
        (native._all_leaves, "ctx.axes.world.max(table.to(device_of(ctx))).cpu()", "table"),
    ),
    words("checkpoint: a thawed parameter has no moments", PIPELINE, (native._thawed, "if path not in layouts.frozen:", "if False:")),
    words("export: what other stages hold is left out", PIPELINE, (shards._gives, "layout.holders(spec.path)[0]", 'near["pp"]')),
    words("drift: stages are not compared", DRIFT, (drift._atoms, " * len(layouts.chains[chain].holders(spec.path))", "")),
    words("drift: numbered by what a rank holds", DRIFT, (drift._atoms, "first += sum(_places(spec))\n", "pass\n")),
    words("chains: a mesh is numbered by ranks of the world", CHAINS, (chain_layouts.Layouts.coords, "mesh.coords(local)", "mesh.coords(rank)")),
    words("chains: a place on rows of other stages", CHAINS, (chain_layouts.Layouts.places, "set(self.homes(chain, stage)) & ", "")),
    words("chains: all in one compute dtype", CHAINS, (state.compute_copy, "ctx.of(layouts.chain_of[path]).precision", "ctx.precision")),
    words("checkpoint: as many ranks as the main chain", CHAIN_FILES, (native.save, "layouts.world", "layouts.chains[layouts.main].mesh.size")),
    words("drift: coordinates of the main chain", DRIFT, (drift._atoms, "at_of[chain]", "at_of[layouts.main] or at_of[chain]")),
    words("split: the largest stage may be larger", SPLIT, (split.partition, "<= limit", "<= 2 * limit")),
    words("split: stages in between uneven", SPLIT, (split._joined, "cost**2", "cost")),
]

ALL: list[Mutation] = [
    *edges(), *MOVES, *SPECS, *NORMALISER, *MODEL, *STEPS, *SCHEDULE, *AXES, *RUNS, *STAGES, *CHAIN, *MIXTURES, *MIXERS, *OPTIMIZERS, *SHARDING,
]  # fmt: skip
__all__ = ["ALL", "Mutation", "rewritten", "stale"]
assert len({m.name for m in ALL}) == len(ALL)

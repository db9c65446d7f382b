"""What to say when memory has run out: what filled it, and the smallest change that should fit.

What a state holds is known to the byte. Activations are not: they are taken to be what was held beyond the state, divided by the share of layers
whose forward had begun, and to grow with the tokens of a microbatch. So the way out is an estimate, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from lf import tree
from lf.batch import Batch
from lf.chain_layouts import Layouts, joined
from lf.layouts import Layout
from lf.optim import Optimizer
from lf.plan_state import asked, held, lasting
from lf.schedule.memory import OutOfMemory
from lf.sharding import STAGES
from lf.state import State, device_of
from lf.tree import Tree

LARGEST = 5  # tensors that are named
FULL = 0.95  # of the memory can be used: an allocator loses some of it
INPUT = 1 / 17
"""What a layer takes in, by what it keeps: 2 bytes by 34 for each token and channel (Korthikanti et al. 2022, arXiv 2205.05198, eq. 2)."""
SHORTEST = 128  # tokens in a row that are still worth a proposal


@attrs.frozen
class Usage:
    """Bytes of one rank when memory was full. `kinds`: what is there, by name · `lasting`: what a whole step needs besides activations ·
    `activations`: of one microbatch, all layers, estimated · `limit`: what there may be."""

    kinds: dict[str, int]
    lasting: int
    activations: int
    limit: int


@attrs.frozen
class Setting:
    """What can be changed: rows in a microbatch, tokens in a row, ranks of tp and of pp, and the dtypes (compute, master) · `layers`: more ranks
    of pp than these would have nothing to do · `whole`: layers of this rank of which all is kept for the backward, 0 where some are run again.

    Of several chains tp, pp, layers and compute are those of `chain`, which takes the most here, and `share` of what there is: a larger mesh of it
    leaves the rest as it is.

    `routed`: the share of what lasts that experts are, which tp does not split · `ep`: ranks that share the experts of a layer out · `edp`: ranks
    that hold the same ones · `experts`: of the layer that has the fewest."""

    micro_batch: int
    seq_len: int
    tp: int
    compute: torch.dtype
    master: torch.dtype
    pp: int = 1
    layers: int = 1
    whole: int = 0
    chain: str = ""
    share: float = 1.0
    routed: float = 0.0
    ep: int = 1
    edp: int = 1
    experts: int = 0
    shards: Mapping[str, int] = attrs.field(factory=dict)


def explained(
    error: OutOfMemory, layout: Layout | Layouts, state: State, batches: Sequence[Batch], seq_len: int, ctx: Any, again: bool = False
) -> OutOfMemory:
    """The same error with all that is known about it: where, bytes by kind, the largest tensors, the way out. `again`: layers are run again, so
    that much of them is not kept already."""
    used, layouts = ctx.device.memory_peak() + error.wanted, joined(layout)
    usage = measure(error, layouts, state, used, ctx)
    tokens = max((len(b.plan["tokens"]) for b in batches), default=seq_len)
    sizes = {path: math.prod(layouts.local_shape(path, ctx.axes.rank)) for path in layouts.held(ctx.axes.rank)}
    setting = _setting(layouts, max(tokens // seq_len, 1), seq_len, ctx, again, _each(layouts, state.optimizer, sizes, ctx))
    asked = f"; {_bytes(error.wanted)} more were asked for" if error.wanted else ""
    lines = [f"out of memory on rank {ctx.axes.rank}, in {error.where}: it holds {_bytes(used - error.wanted)} of {_bytes(usage.limit)}{asked}"]
    lines += [f"  {_bytes(n):>10}  {kind}" for kind, n in usage.kinds.items()]
    lines += ["largest parameters, with all that is kept for each:"]
    lines += [f"  {_bytes(n):>10}  {path} {shape}" for n, path, shape in _largest(layouts, state, ctx)]
    lines += [f"The smallest change that should fit, by an estimate: {way_out(usage, setting)}"]
    return OutOfMemory("\n".join(lines), error.where, error.forward, error.gradients, error.wanted)


def measure(error: OutOfMemory, layout: Layout | Layouts, state: State, used: int, ctx: Any) -> Usage:
    """What filled the `used` bytes."""
    masters = {x.data_ptr() for x in tree.leaves(state.optimizer["master"])}
    kinds = {"compute copy of the parameters": sum(_size(x) for x in tree.leaves(state.params) if x.data_ptr() not in masters)}
    here = device_of(ctx).type  # some of it may lie in the host's memory
    kinds |= {f"optimizer: {name}": sum(_size(x) for x in tree.leaves(b) if x.device.type == here) for name, b in state.optimizer.items()}
    # one for each master that is trained, in its dtype
    gradients = sum(_size(x) for path, x in tree.items(state.optimizer["master"]) if path not in layout.frozen)
    lasting = sum(kinds.values()) + gradients
    rest = max(used - sum(kinds.values()) - error.gradients, 0)
    kinds |= {"gradients": error.gradients, "activations, buffers and the rest": rest}
    return Usage(kinds, lasting, math.ceil(rest / error.forward), ctx.device.memory_total())


def refuse_what_cannot_fit(layout: Layout | Layouts, optimizer: Optimizer, ctx: Any) -> None:
    """Raises OutOfMemory, before anything is allocated, when what lasts through a step (parameters, gradients, the optimizer's `init` of them)
    is more than this rank's device has. The optimizer is asked with one element for each parameter: its trees are shaped like them, or scalars."""
    layouts, master, rank, there = joined(layout), ctx.precision.master, ctx.axes.rank, ctx.device.memory_total()
    small, of = asked(layouts, optimizer, ctx, device_of(ctx).type == "cpu"), held(layouts, ctx)
    kinds = lasting(of, small, master)
    if (total := sum(kinds.values())) <= there:
        return
    lines = [f"out of memory before the first step: rank {rank} needs {_bytes(total)} besides activations, its device has {_bytes(there)}"]
    lines += [f"  {_bytes(n):>10}  {kind}" for kind, n in sorted(kinds.items(), key=lambda pair: -pair[1]) if n]
    setting = _setting(layouts, 1, SHORTEST, ctx, True, _each(layouts, small, {path: h.kept for path, h in of.items()}, ctx))  # none is run again yet
    least = max(where.sharding.stage for where in layouts.chains.values())
    sharded = {f"--shard {k}": sum(lasting(held(layouts, ctx, k), small, master).values()) for k in range(least + 1, len(STAGES))}
    setting = attrs.evolve(setting, shards={words: n for words, n in sharded.items() if n < total})
    lines += [f"The smallest change that should fit, without activations: {way_out(Usage(kinds, total, 0, there), setting)}"]
    raise OutOfMemory("\n".join(lines))


def way_out(usage: Usage, now: Setting) -> str:
    """The first change that fits: fewer rows in a microbatch, layers that are run again, both, state in shards, experts over more of the ranks that
    there are, shorter rows, twice tp, twice ep, twice pp or lower precision, ever more tp, and as much more ep.

    Twice pp halves what lasts; of activations each rank then has half the layers for twice the microbatches (1F1B), as much as before."""
    row = usage.activations / now.micro_batch

    def fits(lasting: float, activations: float) -> bool:
        return lasting + activations <= FULL * usage.limit

    for rows in range(now.micro_batch - 1, 0, -1):
        if now.micro_batch % rows == 0 and fits(usage.lasting, row * rows):
            return f"--micro-batch {rows} instead of {now.micro_batch} (about {_bytes(usage.lasting + row * rows)})"
    for rows in [n for n in range(now.micro_batch, 0, -1) if now.whole and now.micro_batch % n == 0]:
        again = row * rows * (INPUT + 1 / now.whole)  # the inputs, and one layer at a time
        if fits(usage.lasting, again):
            fewer = f"--micro-batch {rows} instead of {now.micro_batch} and " if rows < now.micro_batch else ""
            return f"{fewer}--recompute full (about {_bytes(usage.lasting + again)}; a step then takes up to a third longer)"
    one = "--micro-batch 1 and " if now.micro_batch > 1 else ""
    of = f" in chain {now.chain!r}" if now.chain else ""
    for words, sharded in now.shards.items():
        if fits(sharded, usage.activations):
            return f"{words}, on the same ranks (about {_bytes(sharded + usage.activations)} each)"
    for times in [n for n in range(2, now.edp + 1) if now.edp % n == 0 and now.ep * n <= now.experts]:
        left = usage.lasting * (1 - now.routed * (1 - 1 / times))
        for words, kept in (("", usage.activations), (one, row)):
            if fits(left, kept):
                return f"{words}ep={times * now.ep} instead of {now.ep}{of}, on the same ranks (about {_bytes(left + kept)} each)"
    length = now.seq_len // 2
    while length >= SHORTEST:
        share = length / now.seq_len
        if fits(usage.lasting, row * share):
            return f"{one}--seq-len {length} instead of {now.seq_len} (about {_bytes(usage.lasting + row * share)})"
        length //= 2
    ways, half = [], 1 - now.share / 2
    if fits(usage.lasting * (half + now.routed / 2), usage.activations * half):
        total = usage.lasting * (half + now.routed / 2) + usage.activations * half
        ways.append(f"tp={2 * now.tp} instead of {now.tp}{of}, on twice the ranks (about {_bytes(total)} each)")
    if 2 * now.ep <= now.experts and fits(usage.lasting * (1 - now.routed / 2), usage.activations):
        total = usage.lasting * (1 - now.routed / 2) + usage.activations
        ways.append(f"ep={2 * now.ep} instead of {now.ep}{of} and twice the dp (about {_bytes(total)} each)")
    if 2 * now.pp <= now.layers and fits(usage.lasting * half, usage.activations):
        total = usage.lasting * half + usage.activations
        ways.append(f"pp={2 * now.pp} instead of {now.pp}{of}, on twice the ranks (about {_bytes(total)} each)")
    lower, left = _lower(usage.lasting, now)
    if lower and fits(left, usage.activations * half):
        ways.append(f"--precision {lower}{of} (about {_bytes(left + usage.activations * half)})")
    if ways:
        return "; or ".join(ways)
    for times in (2, 4, 8, 16, 32, 64):
        part, spread = 1 - now.share * (1 - 1 / times), times * now.ep <= now.experts
        left = usage.lasting * (part if spread else part + now.routed * (1 - 1 / times))
        if fits(left, row * part):
            more = f" and ep={times * now.ep} instead of {now.ep}" if spread else ""
            return f"{one}tp={times * now.tp} instead of {now.tp}{more}{of} (about {_bytes(left + row * part)} each)"
    more = "tp, ep" if now.experts else "tp"
    return f"none of fewer rows, recompute, shorter rows, more {more} or lower precision is enough; take a smaller model or more memory"


def _setting(layouts: Layouts, micro_batch: int, seq_len: int, ctx: Any, again: bool, each: dict[str, int]) -> Setting:
    """What there is to change, where this rank keeps so many bytes of `each` parameter."""
    here = {chain: coords for chain in layouts.chains if (coords := layouts.coords(chain, ctx.axes.rank))}
    sizes = {chain: sum(n for path, n in each.items() if layouts.chain_of[path] == chain) for chain in here}
    chain = max(sizes, key=lambda chain: sizes[chain])
    where, compute = layouts.chains[chain], ctx.of(chain).precision.compute
    whole = 0 if again else sum(len(layouts.chains[c].layers(stage)) for c, at in here.items() for stage in layouts.chains[c].on(at["pp"]))
    share = sizes[chain] / total if (total := sum(sizes.values())) else 1.0
    layers, mesh = len(where.model.layers()), where.mesh
    params = {path: layouts.specs[path].param for path in each if layouts.chain_of[path] == chain}
    routed = {path: param.shape[param.axes.index("expert")] for path, param in params.items() if "expert" in param.axes}
    of_experts = sum(each[path] for path in routed) / max(total, 1)
    return Setting(
        micro_batch, seq_len, mesh.tp, compute, ctx.precision.master, mesh.pp, layers, whole, chain, share,
        routed=of_experts, ep=mesh.ep, edp=mesh.edp, experts=min(routed.values(), default=0),
    )  # fmt: skip


def _copied(layouts: Layouts, path: str, ctx: Any) -> int:
    """Bytes of the compute copy of one element of a parameter; 0 where that is the master itself."""
    compute = layouts.specs[path].param.used_in(ctx.of(layouts.chain_of[path]).precision.compute)
    return 0 if compute == ctx.precision.master else compute.itemsize


def _each(layouts: Layouts, optimizer: Tree, sizes: dict[str, int], ctx: Any) -> dict[str, int]:
    """Bytes that last of each parameter of this rank: the compute copy, the gradient, and all trees of the optimizer, of which a tensor stands for
    one with `sizes` elements."""
    master = ctx.precision.master.itemsize
    kept = {path: n * (_copied(layouts, path, ctx) + master * (path not in layouts.frozen)) for path, n in sizes.items()}
    for branch in optimizer.values():
        for path, x in tree.items(branch):
            if path in sizes:
                kept[path] += sizes[path] * x.element_size()
    return kept


def _lower(lasting: int, now: Setting) -> tuple[str, float]:
    """(the next lower precision, bytes of the state then); ('', …) where there is none."""
    if now.master == torch.float64:
        return "fp32", lasting / 2
    if now.compute == torch.float32:  # a copy in bf16 comes beside master, gradients and moments, which stay
        return "bf16", lasting * (1 + now.share * 2 / 16)
    return "", lasting


def _largest(layouts: Layouts, state: State, ctx: Any) -> list[tuple[int, str, list[int]]]:
    """(bytes in all trees, path, local shape) of the largest parameters of this rank."""
    sizes: dict[str, int] = {}
    for leaf, x in tree.items(state.optimizer):
        path = leaf.partition("/")[2]
        if path in layouts.specs:
            sizes[path] = sizes.get(path, 0) + _size(x)
    top = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST]
    return [(sizes[path], path, [*layouts.local_shape(path, ctx.axes.rank)]) for path in top]


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _bytes(n: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.{0 if unit == 'B' else 1}f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"

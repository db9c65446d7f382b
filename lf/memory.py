"""What to say when memory has run out: what filled it, and the smallest change that should fit.

What a state holds is known to the byte. Activations are not: they are taken to be what was held beyond the state, divided by the share of layers
whose forward had begun, and to grow with the tokens of a microbatch. So the way out is an estimate, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from lf import tree
from lf.batch import Batch
from lf.layouts import Layout
from lf.schedule.memory import OutOfMemory
from lf.state import State
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
    of pp than these would have nothing to do · `whole`: layers of this rank of which all is kept for the backward, 0 where some are run again."""

    micro_batch: int
    seq_len: int
    tp: int
    compute: torch.dtype
    master: torch.dtype
    pp: int = 1
    layers: int = 1
    whole: int = 0


def explained(
    error: OutOfMemory, layout: Layout, state: State, batches: Sequence[Batch], seq_len: int, ctx: Any, again: bool = False
) -> OutOfMemory:
    """The same error with all that is known about it: where, bytes by kind, the largest tensors, the way out. `again`: layers are run again, so
    that much of them is not kept already."""
    used = ctx.device.memory_peak() + error.wanted
    usage = measure(error, layout, state, used, ctx)
    tokens = max((len(b.plan["tokens"]) for b in batches), default=seq_len)
    setting = _setting(layout, max(tokens // seq_len, 1), seq_len, ctx, again)
    asked = f"; {_bytes(error.wanted)} more were asked for" if error.wanted else ""
    lines = [f"out of memory on rank {ctx.axes.rank}, in {error.where}: it holds {_bytes(used - error.wanted)} of {_bytes(usage.limit)}{asked}"]
    lines += [f"  {_bytes(n):>10}  {kind}" for kind, n in usage.kinds.items()]
    lines += ["largest parameters, with all that is kept for each:"]
    lines += [f"  {_bytes(n):>10}  {path} {shape}" for n, path, shape in _largest(layout, state, ctx)]
    lines += [f"The smallest change that should fit, by an estimate: {way_out(usage, setting)}"]
    return OutOfMemory("\n".join(lines), error.where, error.forward, error.gradients, error.wanted)


def measure(error: OutOfMemory, layout: Layout, state: State, used: int, ctx: Any) -> Usage:
    """What filled the `used` bytes."""
    masters = {x.data_ptr() for x in tree.leaves(state.optimizer["master"])}
    kinds = {"compute copy of the parameters": sum(_size(x) for x in tree.leaves(state.params) if x.data_ptr() not in masters)}
    kinds |= {f"optimizer: {name}": sum(map(_size, tree.leaves(branch))) for name, branch in state.optimizer.items()}
    # one for each master that is trained, in its dtype
    gradients = sum(_size(x) for path, x in tree.items(state.optimizer["master"]) if path not in layout.frozen)
    lasting = sum(kinds.values()) + gradients
    rest = max(used - sum(kinds.values()) - error.gradients, 0)
    kinds |= {"gradients": error.gradients, "activations, buffers and the rest": rest}
    return Usage(kinds, lasting, math.ceil(rest / error.forward), ctx.device.memory_total())


def refuse_what_cannot_fit(layout: Layout, init: Callable[[Tree, torch.device], Tree], ctx: Any) -> None:
    """Raises OutOfMemory, before anything is allocated, when what lasts through a step (parameters, gradients, the optimizer's `init` of them)
    is more than this rank's device has. The optimizer is asked with one element for each parameter: its trees are shaped like them, or scalars."""
    dtypes, coords, there = ctx.precision, ctx.axes.coords, ctx.device.memory_total()
    sizes = {path: math.prod(spec.local_shape(coords)) for path, spec in layout.held(coords).items()}
    trained = [path for path in sizes if path not in layout.frozen]
    small = init(tree.build([(path, torch.zeros(1, dtype=dtypes.master)) for path in trained]), torch.device("cpu"))
    kinds = {"compute copy of the parameters": sum(sizes.values()) * dtypes.compute.itemsize * (dtypes.compute != dtypes.master)}
    kinds |= {f"optimizer: {name}": sum(_size(x) * sizes.get(path, 1) for path, x in tree.items(branch)) for name, branch in small.items()}
    kinds["optimizer: master"] += sum(n for path, n in sizes.items() if path in layout.frozen) * dtypes.master.itemsize
    kinds["gradients"] = sum(sizes[path] for path in trained) * dtypes.master.itemsize
    if (lasting := sum(kinds.values())) <= there:
        return
    lines = [f"out of memory before the first step: rank {ctx.axes.rank} needs {_bytes(lasting)} besides activations, its device has {_bytes(there)}"]
    lines += [f"  {_bytes(n):>10}  {kind}" for kind, n in kinds.items() if n]
    setting = _setting(layout, 1, SHORTEST, ctx, again=True)  # there is nothing to be run again yet
    lines += [f"The smallest change that should fit, without activations: {way_out(Usage(kinds, lasting, 0, there), setting)}"]
    raise OutOfMemory("\n".join(lines))


def way_out(usage: Usage, now: Setting) -> str:
    """The first change that fits: fewer rows in a microbatch, layers that are run again, both, shorter rows, twice tp, twice
    pp or lower precision, ever more tp.

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
    length = now.seq_len // 2
    while length >= SHORTEST:
        share = length / now.seq_len
        if fits(usage.lasting, row * share):
            return f"{one}--seq-len {length} instead of {now.seq_len} (about {_bytes(usage.lasting + row * share)})"
        length //= 2
    ways = []
    if fits(usage.lasting / 2, usage.activations / 2):
        ways.append(f"tp={2 * now.tp} instead of {now.tp}, on twice the ranks (about {_bytes((usage.lasting + usage.activations) / 2)} each)")
    if 2 * now.pp <= now.layers and fits(usage.lasting / 2, usage.activations):
        total = usage.lasting / 2 + usage.activations
        ways.append(f"pp={2 * now.pp} instead of {now.pp}, on twice the ranks (about {_bytes(total)} each)")
    lower, lasting = _lower(usage.lasting, now)
    if lower and fits(lasting, usage.activations / 2):
        ways.append(f"--precision {lower} (about {_bytes(lasting + usage.activations / 2)})")
    if ways:
        return "; or ".join(ways)
    for times in (2, 4, 8, 16, 32, 64):
        if fits(usage.lasting / times, row / times):
            return f"{one}tp={times * now.tp} instead of {now.tp} (about {_bytes((usage.lasting + row) / times)} each)"
    return "none of fewer rows, recompute, shorter rows, more tp or lower precision is enough; take a smaller model or more memory"


def _setting(layout: Layout, micro_batch: int, seq_len: int, ctx: Any, again: bool) -> Setting:
    dtypes, mesh = ctx.precision, layout.mesh
    whole = 0 if again else sum(len(layout.layers(stage)) for stage in layout.on(ctx.axes.coords["pp"]))
    return Setting(micro_batch, seq_len, mesh.tp, dtypes.compute, dtypes.master, mesh.pp, len(layout.model.layers()), whole)


def _lower(lasting: int, now: Setting) -> tuple[str, float]:
    """(the next lower precision, bytes of the state then); ('', …) where there is none."""
    if now.master == torch.float64:
        return "fp32", lasting / 2
    if now.compute == torch.float32:  # a copy in bf16 comes beside master, gradients and moments, which stay
        return "bf16", lasting * (1 + 2 / 16)
    return "", lasting


def _largest(layout: Layout, state: State, ctx: Any) -> list[tuple[int, str, list[int]]]:
    """(bytes in all trees, path, local shape) of the largest parameters of this rank."""
    sizes: dict[str, int] = {}
    for leaf, x in tree.items(state.optimizer):
        path = leaf.partition("/")[2]
        if path in layout.specs:
            sizes[path] = sizes.get(path, 0) + _size(x)
    top = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST]
    return [(sizes[path], path, [*layout.specs[path].local_shape(ctx.axes.coords)]) for path in top]


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _bytes(n: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.{0 if unit == 'B' else 1}f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"

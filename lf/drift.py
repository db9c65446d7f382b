"""Do the ranks that hold the same numbers still hold the same numbers? A cosmic ray, a broken card or a sum that one rank left out makes
replicas drift, and no loss shows it for a long time.

Every box of the optimizer's state that several ranks hold gets a hash, computed where it lies:

    hash(box) = Σ_i x_i · c_i  mod 2^64        x_i: the bits of element i as an integer · c_i: an odd number that depends on i

The sum has no order, so it is the same on any device; c_i is odd, so one changed element always changes it. The largest and the smallest hash
of each box over all ranks, in one all-reduce, tell whether all holders agree; only where they do not, who says what is collected. Boxes that
overlap (kv heads under query heads) are hashed unit by unit: a unit lies whole on each of its holders; where it is cut into shards, between all
of their ends. A shard is compared with the same shard of other groups of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor

from lf import box, tree
from lf.chain_layouts import Layouts, joined
from lf.layouts import Layout
from lf.runs import RunError
from lf.spec import Piece, Spec
from lf.state import State, device_of

CHUNK = 1 << 22  # elements hashed at a time: 32 MiB of constants beside them
SHOWN = 10  # tensors in one error
NOBODY = -(1 << 63)  # below every hash and its negative


def check(layout: Layout | Layouts, state: State, ctx: Any) -> None:
    """Raises RunError on every rank, naming tensors and ranks, when replicas of the state differ. Collective; the host waits for the answer."""
    layouts, device = joined(layout), device_of(ctx)
    mine, leaves = {**dict(tree.items(state.optimizer)), "step": state.step}, _leaves(layouts, state)
    atoms = [(place, leaf, piece) for place, leaf, piece in _atoms(layouts, leaves, ctx.axes.rank) if leaf in mine]
    spread = torch.full((2, sum(sum(_places(spec)) for spec in _specs(layouts, leaves))), NOBODY, dtype=torch.int64, device=device)
    if atoms:
        places = torch.tensor([place for place, _, _ in atoms], device=device)
        hashes = torch.stack([digest(piece.view(mine[leaf])).to(device) for _, leaf, piece in atoms])  # some may lie in the host's memory
        spread[0, places], spread[1, places] = hashes, -hashes
    most, least = ctx.axes.world.max(spread).unbind()
    bad = (most != -least).logical_and(most != NOBODY).nonzero()[:, 0]
    if len(bad):
        raise RunError(_report(bad, spread[0], layouts, leaves, ctx))


def digest(x: Tensor) -> Tensor:
    """The hash of a tensor's bits, an int64 scalar that is not negative."""
    flat = x.detach().reshape(-1)
    flat = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(flat), CHUNK):
        piece = flat[start : start + CHUNK]
        total += (piece.to(torch.int64) * _odd(start, start + len(piece), x.device)).sum()
    return (total ^ (total >> 31)) & (2**63 - 1)  # the top bit is folded in before it goes


def _odd(start: int, stop: int, device: torch.device) -> Tensor:
    """Odd constants without a pattern, one for each place (the finaliser of MurmurHash3, Appleby 2011)."""
    c = torch.arange(start, stop, dtype=torch.int64, device=device) + 1
    for factor in (_signed(0xFF51AFD7ED558CCD), _signed(0xC4CEB9FE1A85EC53)):
        c = (c ^ ((c >> 33) & 0x7FFFFFFF)) * factor
    return c | 1


def _signed(value: int) -> int:
    return value - (1 << 64)


def _leaves(layouts: Layouts, state: State) -> list[str]:
    """What the state could have on any rank, in one order: of each tree every parameter, also those that lie elsewhere, and the scalars."""
    out = []
    for kind, branch in state.optimizer.items():
        out += [f"{kind}/{path}" for path in layouts.specs]
        out += [f"{kind}/{path}" for path, _ in tree.items(branch) if path not in layouts.specs]
    return [*out, "step"]


def _specs(layouts: Layouts, leaves: Iterable[str]) -> list[Spec | None]:
    """The spec of each leaf; None for one that is shaped like no parameter: a scalar, the same on all ranks."""
    return [layouts.specs.get(leaf.partition("/")[2]) for leaf in leaves]


def _places(spec: Spec | None) -> list[int]:
    """How many atoms each part has over all ranks: a box for every coordinate on the axes that split it and every shard; where boxes overlap, for
    everything between two ends."""
    if spec is None:
        return [1]
    shared = spec.shared()
    return [
        (len(_ends(spec, i)) - 1 if i in shared else 1) * math.prod(spec.mesh[a] for a in _axes(spec, i)) * _shards(spec, i in shared)
        for i in range(len(spec.parts()))
    ]


def _shards(spec: Spec, shared: bool) -> int:
    """How many shards each box is in, unless ends do it."""
    return 1 if spec.cut is None or (shared and spec.cut.dim == spec.param.part_dim) else spec.cut.n


def _ends(spec: Spec, i: int) -> list[int]:
    """Of a part whose boxes overlap, along the dim of the parts: where a unit, or some rank's shard, begins or ends."""
    part, axis, cut = spec.parts()[i], spec.names[spec.param.part_dim], spec.cut
    assert axis is not None
    ends = {min(n * part.size, part.rows) for n in range(part.n + 1)}
    if cut is not None and cut.dim == spec.param.part_dim:
        for lo, hi in (part.bounds(rank, spec.mesh[axis]) for rank in range(spec.mesh[axis])):
            ends |= {lo + end for shard in range(cut.n) for end in cut.bounds(hi - lo, shard)}
    return sorted(ends)


def _axes(spec: Spec, i: int) -> tuple[str, ...]:
    """The axes that split part i, but for one along which its boxes overlap."""
    return tuple(a for d, a in enumerate(spec.names) if a and not (d == spec.param.part_dim and i in spec.shared()))


def _atoms(layouts: Layouts, leaves: Iterable[str], rank: int) -> Iterator[tuple[int, str, Piece]]:
    """(place, leaf, piece) of what a rank holds and others, too. `place` numbers the atoms of the state, on every rank alike."""
    first, held, leaves = 0, layouts.held(rank), [*leaves]
    at_of = {chain: layouts.coords(chain, rank) for chain in layouts.chains}
    for leaf, spec in zip(leaves, _specs(layouts, leaves)):
        if spec is None:
            yield first, leaf, Piece(leaf, (), (), 0, 0)
            first += 1
            continue
        if spec.path not in held:
            first += sum(_places(spec))
            continue
        kind, chain = leaf.partition("/")[0], layouts.chain_of[spec.path]
        coords = at_of[chain]
        assert coords is not None  # it is held
        copies = math.prod(spec.mesh[a] for a in spec.sum_axes) // (spec.cut.n if spec.cut else 1)
        alone = copies * len(layouts.chains[chain].holders(spec.path)) == 1
        for i, (piece, places) in enumerate(zip(spec.state_pieces(coords), _places(spec))):
            piece, at, shared = attrs.evolve(piece, key=f"{kind}/{piece.key}"), first, i in spec.shared()
            first += places
            for axis in _axes(spec, i):
                at += coords[axis] * (places := places // spec.mesh[axis])
            if (shards := _shards(spec, shared)) > 1:
                at += spec.shard(coords)[0] * (places := places // shards)
            if shared:
                yield from ((at + n, leaf, part) for n, part in _between(_ends(spec, i), piece) if box.volume(part.box))
            elif not alone and box.volume(piece.box):
                yield at, leaf, piece


def _between(ends: list[int], piece: Piece) -> Iterator[tuple[int, Piece]]:
    """What lies of a piece between two ends, each with its number."""
    begin, stop = piece.box[piece.dim]
    for n, (lo, hi) in enumerate(pairwise(ends)):
        if begin <= lo and hi <= stop:
            held = tuple((lo, hi) if d == piece.dim else b for d, b in enumerate(piece.box))
            yield n, attrs.evolve(piece, box=held, at=piece.at + lo - begin)


def _report(bad: Tensor, hashes: Tensor, layouts: Layouts, leaves: Iterable[str], ctx: Any) -> str:
    """Who differs from the most, for each atom. Collective: every rank comes here with the same `bad`."""
    world, shown = ctx.axes.world, bad[:SHOWN]
    said = torch.full((world.size, len(shown)), NOBODY, dtype=torch.int64, device=hashes.device)
    said[world.index] = hashes[shown]
    lines = []
    for place, row in zip(shown.tolist(), world.max(said).T.tolist()):
        groups: dict[int, list[int]] = {}
        for rank, value in enumerate(row):
            if value != NOBODY:
                groups.setdefault(value, []).append(rank)
        most, *others = sorted(groups.values(), key=len, reverse=True)
        piece = next(p for at, _, p in _atoms(layouts, leaves, most[0]) if at == place)
        where = f" {list(piece.box)} of {list(piece.shape)}" if piece.shape else ""
        odd = sorted(rank for ranks in others for rank in ranks)
        known = len(most) > len(others[0])  # of two equal camps none is the right one
        words = f"{_ranks(odd)} against {_ranks(most)}" if known else f"{_ranks(most)} and {_ranks(odd)} differ"
        lines.append(f"\n  {piece.key}{where}: {words}")
    more = f"\n  … and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "replicas have drifted apart, nothing was saved:" + "".join(lines) + more


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"

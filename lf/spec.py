"""One spec per parameter, and everything that follows from it: this rank's piece, who else holds it, who counts it.

A `Param` is logical: a shape, a name per dim, an initial distribution; no layout. Rules (logical name → mesh axis) and a mesh make a `Spec`:

    pieces     boxes of the logical tensor that this rank holds, one per part: the initial slice, the box in a file
    sum_axes   the gradient is summed over these: the axes of its factoring that the spec does not name
    shared     parts whose boxes overlap along a named axis (kv heads that follow their query heads): summed element by element
    owned      the pieces that this rank is the first to hold: counted in the norm, written in a checkpoint
    state_…    the same of the shard that it keeps of masters, moments and summed gradients, where these are cut (lf/sharding.py)

The rule behind all four: *a gradient element is summed over every rank that holds the element, and the first holder counts it.* It is right
for norms, biases, routers and replicated kv heads alike, because between blocks every rank has tokens of its own (sequence parallelism), so
each rank's gradient is a partial sum.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from lf import box
from lf.box import Box
from lf.mesh import Mesh
from lf.sharding import Cut


class LayoutError(ValueError):
    """A layout that cannot be."""


@attrs.frozen
class Init:
    """Initial distribution: mean + std · N(0, 1)."""

    mean: float = 0.0
    std: float = 0.0


def normal(std: float) -> Init:
    return Init(std=std)


def constant(value: float) -> Init:
    return Init(mean=value)


@attrs.frozen
class Part:
    """n whole units of `size` rows that a split never cuts (a head, 64 vocabulary rows); the last unit is short when `rows` says so.

    `of=q` follows a split of q units instead of splitting its own n: a rank holds every unit that its share of the q needs, so the boxes of
    neighbours may overlap (kv heads under query heads; any tp works).
    """

    name: str
    n: int
    size: int = 1
    of: int | None = None
    rows: int = attrs.field()

    @rows.default
    def _all(self) -> int:
        return self.n * self.size

    def __attrs_post_init__(self) -> None:
        if self.n < 1 or self.size < 1 or not (self.n - 1) * self.size < self.rows <= self.n * self.size:
            raise LayoutError(f"part {self.name!r}: {self.n} units of {self.size} rows cannot make {self.rows} rows")
        if self.of is not None and self.of % self.n:
            raise LayoutError(f"part {self.name!r}: {self.of} units cannot share {self.n} evenly (query heads must be a multiple of kv heads)")

    def units(self, rank: int, ranks: int) -> tuple[int, int]:
        """The units [start, stop) of a rank among `ranks`."""
        n = self.n if self.of is None else self.of
        lo, hi = rank * n // ranks, (rank + 1) * n // ranks
        group = n // self.n  # an empty share starts where it ends, so the ends never fall from one rank to the next
        return (lo if lo < hi else lo + group - 1) // group, -(-hi // group)

    def bounds(self, rank: int, ranks: int) -> tuple[int, int]:
        """The rows [start, stop) of a rank among `ranks`."""
        lo, hi = self.units(rank, ranks)
        return min(lo * self.size, self.rows), min(hi * self.size, self.rows)

    def sizes(self, ranks: int) -> tuple[int, ...]:
        """Rows on each of `ranks`; they add up to `rows` unless boxes overlap."""
        return tuple(hi - lo for lo, hi in (self.bounds(r, ranks) for r in range(ranks)))

    def overlaps(self, ranks: int) -> bool:
        """Whether some rows lie on several of `ranks`."""
        return self.of is not None and any(self.bounds(r, ranks)[1] > self.bounds(r + 1, ranks)[0] for r in range(ranks - 1))


@attrs.frozen
class Param:
    """A logical parameter. `axes` names each dim (None: never split). A fused one is its `parts`, which lie along dim `part_dim`.

    learned=False: it has no gradient; `Model.after_step` alone changes it, and it is used in at least float32, whatever the compute dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    parts: tuple[Part, ...] = ()
    part_dim: int = 0
    learned: bool = True

    def __attrs_post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise LayoutError(f"shape {self.shape} has {len(self.shape)} dims, axes {self.axes} name {len(self.axes)}")
        if self.parts and sum(p.rows for p in self.parts) != self.shape[self.part_dim]:
            rows = " + ".join(f"{p.name} {p.rows}" for p in self.parts)
            raise LayoutError(f"parts {rows} do not add up to dim {self.part_dim} of shape {self.shape}")

    def used_in(self, compute: torch.dtype) -> torch.dtype:
        """The dtype of its compute copy. A bias that moves by 1e-3 a step would not move at all in bfloat16."""
        return compute if self.learned else torch.promote_types(compute, torch.float32)


@attrs.frozen
class Tied:
    """The same parameter as the one at `path` ('segment/name')."""

    path: str


@attrs.frozen
class Piece:
    """What one rank holds of one part: rows [at, at + n) along dim `dim` of its local tensor are `box` of the part's logical tensor."""

    key: str
    shape: tuple[int, ...]
    box: Box
    dim: int
    at: int

    def view(self, local: Tensor) -> Tensor:
        """This piece inside the rank's local tensor (not a copy)."""
        if not self.box:  # a scalar
            return local
        lo, hi = self.box[self.dim]
        return local.narrow(self.dim, self.at, hi - lo)


@attrs.frozen
class Spec:
    """A parameter under a layout: `names` is the mesh axis of each dim, or None. `cut`: how its state lies in shards; None: every rank that holds
    the parameter keeps all of it."""

    path: str
    param: Param
    names: tuple[str | None, ...]
    mesh: Mesh
    cut: Cut | None = None

    @property
    def grid(self) -> tuple[str, ...]:
        """The factoring it lives in: the expert one when a logical axis is `expert`."""
        return self.mesh.grid(("ep",) if "expert" in self.param.axes else ("tp",))

    @property
    def sum_axes(self) -> tuple[str, ...]:
        """Mesh axes that the gradient is summed over. Never pp: which stages hold a parameter is the program's affair."""
        return tuple(a for a in self.grid[1:] if a not in self.names)

    @property
    def data_axes(self) -> tuple[str, ...]:
        """Mesh axes whose ranks see other data and hold the parameter alike: its state can be cut over these."""
        return tuple(a for a in self.sum_axes if a in ("dp", "cp", "edp"))

    def parts(self) -> tuple[Part, ...]:
        return self.param.parts or (Part("", self.param.shape[self.param.part_dim] if self.param.shape else 1),)

    def pieces(self, coords: dict[str, int]) -> tuple[Piece, ...]:
        """The boxes that the rank at `coords` holds, in the order in which its local tensor has them along `part_dim`."""
        if not self.param.shape:
            return (Piece(self.path, (), (), 0, 0),)
        d, at, out = self.param.part_dim, 0, []
        for part in self.parts():
            full = tuple(part.rows if i == d else n for i, n in enumerate(self.param.shape))
            held = tuple(self._bounds(i, part if i == d else Part("", n), coords) for i, n in enumerate(full))
            out.append(Piece(f"{self.path}/{part.name}" if part.name else self.path, full, held, d, at))
            at += held[d][1] - held[d][0]
        return tuple(out)

    def _bounds(self, dim: int, part: Part, coords: dict[str, int]) -> tuple[int, int]:
        axis = self.names[dim]
        return part.bounds(coords[axis], self.mesh[axis]) if axis else (0, part.rows)

    def local_shape(self, coords: dict[str, int]) -> tuple[int, ...]:
        held = [box.shape(p.box) for p in self.pieces(coords)]
        return tuple(sum(s[i] for s in held) if i == self.param.part_dim else n for i, n in enumerate(held[0]))

    def shared(self) -> tuple[int, ...]:
        """Indices of the parts that several ranks along the axis of `part_dim` hold."""
        axis = self.names[self.param.part_dim] if self.names else None
        return tuple(i for i, p in enumerate(self.parts()) if axis and p.overlaps(self.mesh[axis]))

    def shard(self, coords: dict[str, int]) -> tuple[int, int]:
        """(which shard the rank at `coords` keeps, which of the equal groups of shards it is in)."""
        if self.cut is None:
            return 0, 0
        at = 0
        for axis in self.cut.axes:  # row-major, as mesh.group orders them
            at = at * self.mesh[axis] + coords[axis]
        return at % self.cut.n, at // self.cut.n

    def of_shard(self, shard: int, copy: int) -> dict[str, int]:
        """The coordinates, on the axes of the cut, of the rank that keeps this shard in this group; {} where nothing is cut."""
        if self.cut is None:
            return {}
        at, out = copy * self.cut.n + shard, {}
        for axis in reversed(self.cut.axes):
            at, out[axis] = divmod(at, self.mesh[axis])
        return out

    def state_pieces(self, coords: dict[str, int]) -> tuple[Piece, ...]:
        """The boxes that the rank at `coords` keeps the state of, in the order in which its shard has them along `part_dim`."""
        if self.cut is None:
            return self.pieces(coords)
        d, at, out = self.cut.dim or 0, 0, []
        for piece in self.pieces(coords):
            lo, hi = piece.box[d]
            start, stop = self.cut.bounds(hi - lo, self.shard(coords)[0])
            held = tuple((lo + start, lo + stop) if i == d else b for i, b in enumerate(piece.box))
            out.append(attrs.evolve(piece, box=held, at=at))
            at += held[piece.dim][1] - held[piece.dim][0]
        return tuple(out)

    def state_shape(self, coords: dict[str, int]) -> tuple[int, ...]:
        """The shape of the shard."""
        if self.cut is None:
            return self.local_shape(coords)
        held = [box.shape(p.box) for p in self.state_pieces(coords)]
        return tuple(sum(s[i] for s in held) if i == self.param.part_dim else n for i, n in enumerate(held[0]))

    def state_owned(self, coords: dict[str, int]) -> tuple[Piece, ...]:
        """Of the shard what this rank is the first to hold; over all ranks every element exactly once."""
        if self.cut is None:
            return self.owned(coords)
        if self.shard(coords)[1]:
            return ()
        first = {p.key: p for p in self.owned({**coords, **dict.fromkeys(self.cut.axes, 0)})}
        out = []
        for piece in self.state_pieces(coords):
            if (owned := first.get(piece.key)) is None:
                continue
            common = box.intersect(piece.box, owned.box)
            if box.volume(common):
                out.append(attrs.evolve(piece, box=common, at=piece.at + common[piece.dim][0] - piece.box[piece.dim][0]))
        return tuple(out)

    def owned(self, coords: dict[str, int]) -> tuple[Piece, ...]:
        """The pieces that this rank is the first to hold; over all ranks they cover every element exactly once."""
        if any(coords[a] for a in self.sum_axes):
            return ()
        pieces, shared, out = self.pieces(coords), self.shared(), []
        for i, piece in enumerate(pieces):
            if i in shared:  # bounds grow with the rank, so earlier ranks hold exactly the rows below the last one's end
                axis = self.names[piece.dim]
                assert axis is not None
                lo, hi = piece.box[piece.dim]
                part = self.parts()[i]
                before = part.bounds(coords[axis] - 1, self.mesh[axis])[1] if coords[axis] else 0
                start = min(max(lo, before), hi)
                held = tuple((start, hi) if d == piece.dim else b for d, b in enumerate(piece.box))
                piece = attrs.evolve(piece, box=held, at=piece.at + start - lo)
            if box.volume(piece.box):
                out.append(piece)
        return tuple(out)


def spec_of(path: str, param: Param, rules: dict[str, str], mesh: Mesh) -> Spec:
    """Rules (logical axis → mesh axis) and a mesh give a parameter its layout. Raises LayoutError when two dims want one mesh axis."""
    names = tuple(rules.get(a) if a else None for a in param.axes)
    for axis in set(names) - {None}:
        if names.count(axis) > 1:
            raise LayoutError(f"{path}: axes {param.axes} put mesh axis {axis!r} on two dims; change the rules")
    spec = Spec(path, param, names, mesh)
    if wrong := set(names) - {None, *spec.grid[1:]}:
        raise LayoutError(f"{path}: the rules put axes {param.axes} on {sorted(map(str, wrong))}; its mesh axes are {spec.grid[1:]}")
    return spec

"""Who holds what where a model has several chains: a layout of each over its own mesh of some of the ranks, and how they are joined.

A *row* of a program is the ranks that do the same: those that have the same pipeline coordinate in every chain. With one chain, row r is pp = r.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property

import attrs

from lf.chains import Chains, Edge
from lf.layouts import Layout, layout
from lf.mesh import Mesh
from lf.sharding import NONE, Sharding
from lf.spec import LayoutError, Piece, Spec

Coords = dict[str, int]


@attrs.frozen
class Place:
    """Where a chain lies: its mesh, over `ranks` of the world in this order (None: all of them), and its layout, as in `lf.layout`."""

    mesh: Mesh
    ranks: Sequence[int] | None = None
    rules: dict[str, str] | None = None
    stages: int | None = None
    split: Sequence[int] | str | None = None
    placement: Sequence[int] | None = None
    frozen: Sequence[str] = ()
    sharding: Sharding | str = NONE


@attrs.frozen
class Joint:
    """Edges that carry one output into one stage, whose rows therefore travel once: from stage `source_stage` of chain `source`, which makes it,
    to stage `target_stage` of chain `target`. `name`: 'source.output'."""

    name: str
    source: str
    source_stage: int
    target: str
    target_stage: int
    edges: tuple[Edge, ...] = ()


@attrs.frozen(slots=False)
class Layouts:
    """`chains`: the layout of each, in the order of the model · `ranks`: of each, the ranks of the world that its mesh numbers 0, 1, … · `world`: how
    many ranks there are · `main`: the chain that runs the data batches as they are · `joints`: what travels between chains."""

    model: Chains | None
    chains: dict[str, Layout]
    ranks: dict[str, tuple[int, ...]]
    world: int
    main: str
    joints: tuple[Joint, ...] = ()

    @staticmethod
    def of(layout: Layout) -> Layouts:
        """A model of one chain, which has no name."""
        return Layouts(None, {"": layout}, {"": tuple(range(layout.mesh.size))}, layout.mesh.size, "")

    def __str__(self) -> str:
        """The mesh of each chain, and its ranks where they are not all: 'vision dp=4; decoder pp=2 on ranks 0, 2'."""
        if self.model is None:
            return str(self.chains[""].mesh)
        each = [(f"{name} {where.mesh}", self.ranks[name]) for name, where in self.chains.items()]
        return "; ".join(words + ("" if ranks == (*range(self.world),) else f" on ranks {runs(ranks)}") for words, ranks in each)

    @property
    def size(self) -> int:
        """Number of ranks, as of a mesh."""
        return self.world

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each row, rows in the order of their first rank."""
        if len(self.chains) == 1:  # pp is the slowest axis
            ((chain, where),) = self.chains.items()
            if self.ranks[chain] == tuple(range(self.world)):
                n = self.world // where.mesh.pp
                return tuple(tuple(range(pp * n, (pp + 1) * n)) for pp in range(where.mesh.pp))
        found: dict[tuple[int | None, ...], list[int]] = {}
        for rank in range(self.world):
            found.setdefault(tuple(c["pp"] if (c := self.coords(chain, rank)) else None for chain in self.chains), []).append(rank)
        return tuple(map(tuple, found.values()))

    @cached_property
    def _row(self) -> dict[int, int]:
        return {rank: r for r, ranks in enumerate(self.rows) for rank in ranks}

    @cached_property
    def _local(self) -> dict[str, dict[int, int]]:
        return {chain: {rank: i for i, rank in enumerate(ranks)} for chain, ranks in self.ranks.items()}

    def row(self, rank: int) -> int:
        return self._row[rank]

    def coords(self, chain: str, rank: int) -> Coords | None:
        """Where a rank of the world is in the mesh of a chain; None: nowhere."""
        local = self._local[chain].get(rank)
        return None if local is None else self.chains[chain].mesh.coords(local)

    def pp(self, chain: str, row: int) -> int | None:
        """The pipeline coordinate of a row in the mesh of a chain; None: it is not on it."""
        return self._pp[chain][row]

    def homes(self, chain: str, stage: int) -> tuple[int, ...]:
        """The rows that hold a stage."""
        return self._homes[chain, self.chains[chain].placement[stage]]

    @cached_property
    def _pp(self) -> dict[str, tuple[int | None, ...]]:
        return {
            chain: tuple(c["pp"] if (c := self.coords(chain, ranks[0])) else None for ranks in self.rows) for chain in self.chains
        }  # fmt: skip

    @cached_property
    def _homes(self) -> dict[tuple[str, int], tuple[int, ...]]:
        out: dict[tuple[str, int], tuple[int, ...]] = {}
        for chain, pps in self._pp.items():
            for row, pp in enumerate(pps):
                if pp is not None:
                    out[chain, pp] = (*out.get((chain, pp), ()), row)
        return out

    def blocks(self, chain: str, stage: int) -> tuple[tuple[int, ...], ...]:
        """The smallest sets of rows of a stage that are whole ranks of data parallelism: what a unit of the chain may stand on. One row each, but
        where cp or tp of the chain go over several rows: those do it together."""
        together: dict[int, int] = {}  # row → the first row that it shares a dp coordinate with
        first: dict[int, int] = {}  # dp coordinate → row
        for r in self.homes(chain, stage):
            together[r] = r
            for rank in self.rows[r]:
                coords = self.coords(chain, rank)
                assert coords is not None
                if (other := first.setdefault(coords["dp"], r)) != r:
                    old, new = together[r], together[other]
                    together = {k: new if v == old else v for k, v in together.items()}
        out: dict[int, list[int]] = {}
        for r, f in together.items():
            out.setdefault(f, []).append(r)
        return tuple(map(tuple, out.values()))

    def lanes(self, chain: str) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For each stage of a chain its blocks, joined until those of all stages have the same dp coordinates: a unit that stands on the k-th one
        of a stage stands on the k-th ones of all."""
        stages = range(len(self.chains[chain].stages))
        lane: dict[int, int] = {}  # dp coordinate → the first one of its lane
        for s in stages:
            for block in self.blocks(chain, s):
                places = self.places(chain, s, block)
                old = {lane.setdefault(d, d) for d in places}
                lane = {d: min(old) if first in old else first for d, first in lane.items()}
        firsts = sorted(set(lane.values()))
        return tuple(tuple(self._rows_of(chain, s, {d for d in lane if lane[d] == first}) for first in firsts) for s in stages)

    def _rows_of(self, chain: str, stage: int, places: set[int]) -> tuple[int, ...]:
        return tuple(r for r in self.homes(chain, stage) if places & set(self.places(chain, stage, (r,))))

    def places(self, chain: str, stage: int, rows: Sequence[int]) -> tuple[int, ...]:
        """The dp coordinates of a chain that these rows have for a stage, ascending."""
        mine = set(self.homes(chain, stage)) & set(rows)
        return tuple(sorted({c["dp"] for r in mine for rank in self.rows[r] if (c := self.coords(chain, rank))}))

    def spread(self, chain: str) -> bool:
        """Whether a stage of the chain lies in several rows, so that its sums of gradients go over rows."""
        return len(self.chains) > 1 and any(len(self.homes(chain, s)) > 1 for s in range(len(self.chains[chain].stages)))

    @cached_property
    def specs(self) -> dict[str, Spec]:
        return {path: spec for where in self.chains.values() for path, spec in where.specs.items()}

    @cached_property
    def chain_of(self) -> dict[str, str]:
        """The chain of each parameter, by path."""
        return {path: chain for chain, where in self.chains.items() for path in where.specs}

    @cached_property
    def frozen(self) -> frozenset[str]:
        return frozenset().union(*(where.frozen for where in self.chains.values()))

    def held(self, rank: int) -> dict[str, Spec]:
        """The specs of what a rank of the world holds."""
        return {p: s for chain, where in self.chains.items() if (c := self.coords(chain, rank)) for p, s in where.held(c).items()}

    def trained(self, rank: int) -> dict[str, Spec]:
        return {path: spec for path, spec in self.held(rank).items() if path not in self.frozen}

    def state_owned(self, rank: int) -> list[tuple[str, Piece]]:
        """(path, piece of its shard) of all whose state a rank is the first to keep."""
        return [both for chain, where in self.chains.items() if (c := self.coords(chain, rank)) for both in where.state_owned(c)]

    def state_pieces(self, path: str, rank: int) -> tuple[Piece, ...]:
        """What a rank that holds a parameter keeps the state of."""
        return self.specs[path].state_pieces(self._at(path, rank))

    def state_shape(self, path: str, rank: int) -> tuple[int, ...]:
        """The shape of each tensor of state that a rank has of a parameter that it holds."""
        return self.specs[path].state_shape(self._at(path, rank))

    def local_shape(self, path: str, rank: int) -> tuple[int, ...]:
        """The shape of the parameter that a rank computes with."""
        return self.specs[path].local_shape(self._at(path, rank))

    def _at(self, path: str, rank: int) -> Coords:
        coords = self.coords(self.chain_of[path], rank)
        assert coords is not None
        return coords


def runs(ranks: Sequence[int]) -> str:
    """(0, 1, 2, 5) → '0–2, 5', in their order."""
    out: list[list[int]] = []
    for rank in ranks:
        if out and rank == out[-1][-1] + 1:
            out[-1].append(rank)
        else:
            out.append([rank])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in out)


def joined(layout: Layout | Layouts) -> Layouts:
    """What any layout is as one of several chains: who asks it by rank works for both."""
    return Layouts.of(layout) if isinstance(layout, Layout) else layout


def chain_layouts(model: Chains, places: Mapping[str, Place], world: int | None = None) -> Layouts:
    """Lays each chain out at its place. `world`: how many ranks there are; without, as many as the places name.

    Raises LayoutError, MeshError for what cannot be, with the chain or the edge.
    """
    for name in places:
        if name not in model.chains:
            near = difflib.get_close_matches(name, model.chains, 1)
            raise LayoutError(f"chain {name!r} has a place, and the model has none of that name; it has {', '.join(near or model.chains)}")
    if missing := [name for name in model.chains if name not in places]:
        raise LayoutError(f"chain {missing[0]!r} has no place: say which mesh it has, and over which ranks")
    if world is None:
        world = max(max(p.ranks, default=-1) + 1 if p.ranks is not None else p.mesh.fill().size for p in places.values())
    chains, ranks = {}, {}
    for name in model.chains:
        chains[name], ranks[name] = _placed(name, model, places[name], world)
    if idle := sorted(set(range(world)) - set().union(*ranks.values())):
        raise LayoutError(f"no chain lies on ranks {runs(idle)} of {world}: give them to one, or use fewer ranks")
    out = Layouts(model, chains, ranks, world, model.main, _joints(model, chains))
    for name, where in chains.items():
        sharding = where.sharding
        if out.spread(name) and (sharding.stage == 3 or sharding.reduce == "microbatch"):
            raise LayoutError(
                f"chain {name!r} lies in several rows of ranks, whose programs differ, and sharding {sharding} gathers or sums beside its compute; "
                f"use sharding 1, or 2,reduce=step"
            )
    if out.frozen and out.frozen >= out.specs.keys():
        raise LayoutError(f"every parameter of chains {', '.join(chains)} is frozen: nothing is left to train; leave something out of `frozen`")
    return out


def _placed(name: str, model: Chains, place: Place, world: int) -> tuple[Layout, tuple[int, ...]]:
    ranks = tuple(range(world)) if place.ranks is None else tuple(place.ranks)
    if not ranks:
        raise LayoutError(f"chain {name!r} has no ranks: name at least one of 0 to {world - 1}")
    if wrong := [r for r in ranks if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r < world]:
        raise LayoutError(f"chain {name!r}: {wrong[0]!r} is no rank; they are 0 to {world - 1}")
    if len(set(ranks)) < len(ranks):
        raise LayoutError(f"chain {name!r}: rank {next(r for r in ranks if ranks.count(r) > 1)} stands twice in its ranks")
    try:
        mesh = place.mesh.fill(len(ranks))
        asked = {k: getattr(place, k) for k in ("rules", "stages", "split", "placement", "frozen", "sharding")}
        return layout(model.chains[name].model, mesh, whole=False, **asked), ranks
    except ValueError as error:
        raise type(error)(f"chain {name!r}: {error}") from None


def _joints(model: Chains, chains: Mapping[str, Layout]) -> tuple[Joint, ...]:
    stage_of = {(c, s.name): i for c, where in chains.items() for i, segments in enumerate(where.stages) for s in segments}
    found: dict[tuple[str, str, int, str, int], list[Edge]] = {}
    for e in model.edges:
        giver = model.giver(e.source, e.output)
        assert giver is not None  # Chains has seen to it
        key = (f"{e.source}.{e.output}", e.source, stage_of[e.source, giver.name], e.target, stage_of[e.target, e.segment])
        for other in (k for k in found if k == key):
            if found[other][0].takes != e.takes:
                raise LayoutError(f"edges {found[other][0]} and {e} carry one output to one stage and take other rows of it; give both one `takes`")
        found.setdefault(key, []).append(e)
    return tuple(Joint(*key, tuple(edges)) for key, edges in found.items())

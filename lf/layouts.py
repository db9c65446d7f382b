"""A layout is the frozen answer to "who holds what": the segments of each stage, the spec of every parameter."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import attrs

from lf import split as splits
from lf.mesh import Mesh
from lf.segment import Model, Segment, by_layer, path_of
from lf.sharding import NONE, Cut, Sharding, cut_dim, shard_count
from lf.spec import LayoutError, Part, Piece, Spec, spec_of

RULES = {"vocab": "tp", "heads": "tp", "mlp": "tp", "expert": "ep", "expert_mlp": "etp"}
"""Logical axis → mesh axis. An axis that is not named here is not split."""


@attrs.frozen
class Layout:
    """`stages`: the segments of each pipeline stage, some perhaps none · `placement`: the pp coordinate of each stage · `specs`: the spec of each
    parameter of the model by path · `frozen`: paths that are not trained, those of what is not learned among them · `sharding`: which state is cut
    over the ranks that hold it alike."""

    model: Model
    mesh: Mesh
    rules: dict[str, str]
    stages: tuple[tuple[Segment, ...], ...]
    placement: tuple[int, ...]
    specs: dict[str, Spec]
    frozen: frozenset[str] = frozenset()
    sharding: Sharding = NONE
    _holders: dict[str, tuple[int, ...]] = attrs.field(init=False, repr=False, eq=False)

    @_holders.default
    def _find_holders(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, dict[int, None]] = {}
        for rank, segments in zip(self.placement, self.stages):
            for segment in segments:
                for name in segment.params:
                    found.setdefault(path_of(segment, name), {})[rank] = None
        return {path: tuple(ranks) for path, ranks in found.items()}

    def layers(self, stage: int) -> dict[str, tuple[Segment, ...]]:
        """The segments of a stage by layer, in order."""
        return by_layer(self.stages[stage])

    def on(self, pp: int) -> tuple[int, ...]:
        """The stages of a pipeline rank, ascending."""
        return tuple(s for s, rank in enumerate(self.placement) if rank == pp)

    def holders(self, path: str) -> tuple[int, ...]:
        """The pp coordinates that hold a parameter: those whose stages use it, the one of the first such stage first."""
        return self._holders[path]

    def held(self, coords: dict[str, int]) -> dict[str, Spec]:
        """The specs of what the rank at `coords` holds, in the order of `specs`."""
        return {path: spec for path, spec in self.specs.items() if coords["pp"] in self._holders[path]}

    def trained(self, coords: dict[str, int]) -> dict[str, Spec]:
        """Those of `held` that have a gradient and moments and are updated."""
        return {path: spec for path, spec in self.held(coords).items() if path not in self.frozen}

    def shard_groups(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """(axes, n) of each way in which state is cut, as of `Axes.part`."""
        return tuple(dict.fromkeys((spec.cut.axes, spec.cut.n) for spec in self.specs.values() if spec.cut))

    def state_owned(self, coords: dict[str, int]) -> list[tuple[str, Piece]]:
        """(path, piece of its shard) of all whose state the rank at `coords` is the first to keep: over all ranks each element once."""
        return [(p, piece) for p, spec in self.specs.items() if self._holders[p][0] == coords["pp"] for piece in spec.state_owned(coords)]


def layout(
    model: Model,
    mesh: Mesh,
    rules: dict[str, str] | None = None,
    *,
    stages: int | None = None,
    split: Sequence[int] | str | None = None,
    placement: Sequence[int] | None = None,
    frozen: Sequence[str] = (),
    whole: bool = True,
    sharding: Sharding | str = NONE,
) -> Layout:
    """Lays a model out over a mesh. `rules` maps logical axes to mesh axes (default RULES).

    `stages`: of the pipeline (default: as many as the split or the placement has, else pp) · `split`: how many layers each has, as numbers or in
    words (`lf.split.explicit`; default: balanced) · `placement`: the pipeline rank of each (default: stage s on rank s mod pp; `lf.schedule` has
    others) · `frozen`: segments, layers or parameters that are not trained, by name or pattern ('layers.0.*', 'embed', '*/norm'); a tied
    parameter is frozen wherever it is used · `whole`: the model is all there is, so something of it must train · `sharding`: of masters, moments,
    gradients and parameters over dp and cp, as a `Sharding` or in its words, "3,ranks=8".
    Raises LayoutError for what this version cannot lay out, and for rules, stages and names that cannot be.
    """
    mesh, rules = mesh.fill(), dict(RULES if rules is None else rules)
    if mesh.cp > 1:
        raise LayoutError(f"mesh {mesh}: context parallelism (cp={mesh.cp}) is not built yet; use cp=1, with tp, pp and dp instead")
    if mesh.ep * mesh.etp > 1 and not any("expert" in param.axes for param in model.params().values()):
        raise LayoutError(f"mesh {mesh}: ep and etp split experts, and the model has none; leave them out")
    if model.rules is not None:
        for name in dict.fromkeys(a for param in model.params().values() for a in param.axes if a):
            if rules.get(name) != model.rules.get(name):
                raise LayoutError(f"the rules put {name!r} on {rules.get(name)}; the model is written for {model.rules}: use these rules")
    specs = {path: spec_of(path, param, rules, mesh) for path, param in model.params().items()}
    sizes = _sizes(model, mesh, stages, split, placement)
    ranks = tuple(s % mesh.pp for s in range(len(sizes))) if placement is None else tuple(placement)
    _refuse_placement(ranks, mesh)
    each, dealt, at = [*model.layers().values()], [], 0
    for n in sizes:
        dealt.append(tuple(segment for layer in each[at : at + n] for segment in layer))
        at += n
    fixed = {path for path, param in model.params().items() if not param.learned}
    sharding = Sharding.parse(sharding)
    whole_state = Layout(model, mesh, rules, tuple(dealt), ranks, specs, _frozen(model, frozen, whole, fixed), sharding)
    return attrs.evolve(whole_state, specs=_cut(whole_state)) if sharding.stage else whole_state


def _cut(layout: Layout) -> dict[str, Spec]:
    """The specs with their cuts. What has too few rows goes whole to the shard that has the fewest elements of such so far, among those of a pipeline
    rank. What is not learned, and scalars, stay on every rank: they are small, and `Model.after_step` wants them whole."""
    load: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    out = {}
    for path, spec in layout.specs.items():
        ranks = math.prod(spec.mesh[a] for a in spec.data_axes)
        n = shard_count(layout.sharding, ranks, "expert" in spec.param.axes)
        if n > 1 and spec.param.learned and spec.param.shape:
            dim = cut_dim([_lengths(spec, d) for d in range(len(spec.param.shape))], n)
            owner = 0
            if dim is None:
                each = load.setdefault((layout.holders(path)[0], spec.data_axes), [0] * n)
                owner = each.index(min(each))
                each[owner] += math.prod(spec.param.shape)
            spec = attrs.evolve(spec, cut=Cut(spec.data_axes, n, dim, owner))
        out[path] = spec
    return out


def _lengths(spec: Spec, dim: int) -> list[int]:
    """The lengths along a dim of all pieces of all ranks."""
    parts = spec.parts() if dim == spec.param.part_dim else (Part("", spec.param.shape[dim]),)
    axis = spec.names[dim]
    return [rows for part in parts for rows in (part.sizes(spec.mesh[axis]) if axis else (part.rows,))]


def _sizes(
    model: Model, mesh: Mesh, stages: int | None, split: Sequence[int] | str | None, placement: Sequence[int] | None
) -> tuple[int, ...]:
    """How many layers each stage has."""
    if split is None:
        n = stages if stages is not None else mesh.pp if placement is None else len(placement)
        sizes = splits.by_count(model, n)
    else:
        sizes = splits.explicit(model, split) if isinstance(split, str) else splits.counts(model, split)
    shown = f"split {split!r}" if split is not None else f"stages={len(sizes)}"
    if stages is not None and len(sizes) != stages:
        raise LayoutError(f"{shown} is of {len(sizes)} stages, stages={stages} was asked for; leave one of them out")
    if placement is not None and len(sizes) != len(placement):
        raise LayoutError(f"placement {tuple(placement)} is of {len(placement)} stages, {shown} of {len(sizes)}; name the rank of each stage")
    return sizes


def _refuse_placement(placement: tuple[int, ...], mesh: Mesh) -> None:
    if wrong := [r for r in placement if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r < mesh.pp]:
        raise LayoutError(f"placement {placement}: {wrong[0]!r} is no pipeline rank of mesh {mesh}; they are 0 to {mesh.pp - 1}")
    if idle := sorted(set(range(mesh.pp)) - set(placement)):
        raise LayoutError(
            f"{len(placement)} stages on ranks {placement} leave pipeline ranks {', '.join(map(str, idle))} of mesh {mesh} without a stage; "
            f"use at least {mesh.pp} stages (one may be empty), or pp={mesh.pp - len(idle)}"
        )


def _frozen(model: Model, patterns: Sequence[str], whole: bool, fixed: set[str]) -> frozenset[str]:
    """`fixed`, and the paths of what the patterns name. Raises LayoutError for one that names nothing, and when nothing is left to train."""
    if isinstance(patterns, str):
        raise LayoutError(f"frozen={patterns!r} should be a tuple of names, as ({patterns!r},)")
    named: dict[str, set[str]] = {}  # segment, layer or parameter → paths
    for segment in model.segments:
        for name in segment.params:
            for key in (segment.name, segment.layer, f"{segment.name}/{name}"):
                named.setdefault(key, set()).add(path_of(segment, name))
    out = set(fixed)
    for pattern in patterns:
        found = [paths for key, paths in named.items() if fnmatchcase(key, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, named, 3, 0.4) or [*named][:3]
            raise LayoutError(f"frozen {pattern!r} names no segment, layer or parameter of the model; near: {', '.join(near)}")
        out.update(*found)
    if whole and patterns and out >= set(model.params()):
        raise LayoutError(f"frozen={tuple(patterns)} is every parameter of the model: nothing is left to train; leave one out")
    return frozenset(out)

"""A layout is the frozen answer to "who holds what": the segments of each stage, the spec of every parameter."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from lf.mesh import Mesh, shares
from lf.segment import Model, Segment, path_of
from lf.spec import LayoutError, Piece, Spec, spec_of

RULES = {"vocab": "tp", "heads": "tp", "mlp": "tp"}
"""Logical axis → mesh axis. An axis that is not named here is not split."""


@attrs.frozen
class Layout:
    """`stages`: the segments of each pipeline stage, some perhaps none · `placement`: the pp coordinate of each stage · `specs`: the spec of each
    parameter of the model by path · `frozen`: paths that are not trained."""

    model: Model
    mesh: Mesh
    rules: dict[str, str]
    stages: tuple[tuple[Segment, ...], ...]
    placement: tuple[int, ...]
    specs: dict[str, Spec]
    frozen: frozenset[str] = frozenset()

    def layers(self, stage: int) -> dict[str, tuple[Segment, ...]]:
        """The segments of a stage by layer, in order."""
        out: dict[str, list[Segment]] = {}
        for segment in self.stages[stage]:
            out.setdefault(segment.layer, []).append(segment)
        return {layer: tuple(segments) for layer, segments in out.items()}

    def on(self, pp: int) -> tuple[int, ...]:
        """The stages of a pipeline rank, ascending."""
        return tuple(s for s, rank in enumerate(self.placement) if rank == pp)

    def holders(self, path: str) -> tuple[int, ...]:
        """The pp coordinates that hold a parameter: those whose stages use it, the one of the first such stage first."""
        return tuple(dict.fromkeys(rank for stage, rank in zip(self.stages, self.placement) if any(path_of(s, n) == path for s in stage for n in s.params)))

    def held(self, coords: dict[str, int]) -> dict[str, Spec]:
        """The specs of what the rank at `coords` holds, in the order of `specs`."""
        mine = {path_of(s, n) for stage in self.on(coords["pp"]) for s in self.stages[stage] for n in s.params}
        return {path: spec for path, spec in self.specs.items() if path in mine}

    def owned(self, coords: dict[str, int]) -> list[tuple[str, Piece]]:
        """(path, piece) of all that the rank at `coords` is the first to hold: over all ranks each element of each parameter once."""
        return [(p, piece) for p, spec in self.held(coords).items() if self.holders(p)[0] == coords["pp"] for piece in spec.owned(coords)]


def layout(
    model: Model,
    mesh: Mesh,
    rules: dict[str, str] | None = None,
    *,
    split: Sequence[int] | None = None,
    placement: Sequence[int] | None = None,
    frozen: Sequence[str] = (),
) -> Layout:
    """Lays a model out over a mesh. `rules` maps logical axes to mesh axes (default RULES).

    `split`: how many layers each stage has · `placement`: the pipeline rank of each stage (default: stage s on rank s mod pp).
    Raises LayoutError for what this version cannot lay out, and for rules that cannot be.
    """
    mesh, rules = mesh.fill(), dict(RULES if rules is None else rules)
    for axis, name in (("cp", "context"), ("ep", "expert"), ("etp", "expert tensor")):
        if (n := mesh[axis]) > 1:
            raise LayoutError(f"mesh {mesh}: {name} parallelism ({axis}={n}) is not built yet; use {axis}=1, with tp, pp and dp instead")
    if model.rules is not None:
        for name in dict.fromkeys(a for param in model.params().values() for a in param.axes if a):
            if rules.get(name) != model.rules.get(name):
                raise LayoutError(f"the rules put {name!r} on {rules.get(name)}; the model is written for {model.rules}: use these rules")
    specs = {path: spec_of(path, param, rules, mesh) for path, param in model.params().items()}
    layers: dict[str, list[Segment]] = {}
    for segment in model.segments:
        layers.setdefault(segment.layer, []).append(segment)
    if split is None:
        split = shares(len(layers), mesh.pp if placement is None else len(placement))
    if placement is None:
        placement = tuple(s % mesh.pp for s in range(len(split)))
    each, stages, at = [*layers.values()], [], 0
    for n in split:
        stages.append(tuple(segment for layer in each[at : at + n] for segment in layer))
        at += n
    return Layout(model, mesh, rules, tuple(stages), tuple(placement), specs, frozenset(frozen))

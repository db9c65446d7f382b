"""A layout is the frozen answer to "who holds what": the segments of each stage, the spec of every parameter."""

from __future__ import annotations

import attrs

from lf.mesh import Mesh
from lf.segment import Model, Segment, path_of
from lf.spec import LayoutError, Spec, spec_of

RULES = {"vocab": "tp", "heads": "tp", "mlp": "tp"}
"""Logical axis → mesh axis. An axis that is not named here is not split."""


@attrs.frozen
class Layout:
    """`stages` are the segments of each pipeline stage; `specs` the spec of each parameter by path."""

    model: Model
    mesh: Mesh
    rules: dict[str, str]
    stages: tuple[tuple[Segment, ...], ...]
    specs: dict[str, Spec]

    def layers(self, stage: int) -> dict[str, tuple[Segment, ...]]:
        """The segments of a stage by layer, in order."""
        out: dict[str, list[Segment]] = {}
        for segment in self.stages[stage]:
            out.setdefault(segment.layer, []).append(segment)
        return {layer: tuple(segments) for layer, segments in out.items()}

    def layer_paths(self, stage: int) -> dict[str, tuple[str, ...]]:
        """The parameters of each layer of a stage. A tied one belongs to the first layer that uses it, whose backward comes last."""
        seen: set[str] = set()
        out = {}
        for layer, segments in self.layers(stage).items():
            used = [path_of(s, name) for s in segments for name in s.params]
            out[layer] = tuple(p for p in dict.fromkeys(used) if p not in seen)
            seen.update(used)
        return out


def layout(model: Model, mesh: Mesh, rules: dict[str, str] | None = None, stages: int = 1) -> Layout:
    """Lays a model out over a mesh. `rules` maps logical axes to mesh axes (default RULES).

    Raises LayoutError for what this version cannot lay out, and for rules that cannot be.
    """
    mesh, rules = mesh.fill(), dict(RULES if rules is None else rules)
    for axis, name in (("pp", "pipeline"), ("cp", "context"), ("ep", "expert"), ("etp", "expert tensor")):
        if (n := mesh[axis]) > 1:
            raise LayoutError(f"mesh {mesh}: {name} parallelism ({axis}={n}) is not built yet; use {axis}=1, with tp and dp instead")
    if stages != 1:
        raise LayoutError(f"stages={stages}: pipeline stages are not built yet; use stages=1")
    if model.rules is not None:
        for name in dict.fromkeys(a for param in model.params().values() for a in param.axes if a):
            if rules.get(name) != model.rules.get(name):
                raise LayoutError(f"the rules put {name!r} on {rules.get(name)}; the model is written for {model.rules}: use these rules")
    specs = {path: spec_of(path, param, rules, mesh) for path, param in model.params().items()}
    return Layout(model, mesh, rules, (model.segments,), specs)

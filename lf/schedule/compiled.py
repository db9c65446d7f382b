"""A layer as one compiled graph, forward and backward.

All that differs between equal layers, microbatches and steps is an input: parameters (as tensors or as `W`), x, the batch. So layers with the same
apply functions share one compilation. What is read as the graph is made is guarded: another kind of weight, another dtype or a batch with
other names is compiled anew; lengths that have changed once are symbols from then on.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lf.config import ConfigError
from lf.mesh import Mesh
from lf.parallel.product import W
from lf.segment import Apply, Segment

Fed = tuple[dict[str, Tensor], ...]
"""Of each segment, what edges bring to it, by name; () where they bring nothing to the layer."""
Told = tuple[Any, dict[str, Tensor], dict[str, Tensor], dict[tuple[int, str], Tensor]]
"""x, losses, outputs for edges, sums by the number of the segment and their name."""
LayerFn = Callable[[Sequence[dict[str, Tensor | W]], Any, Any, Any, Fed], Told]
Compile = bool | str | Callable[[tuple[Apply, ...]], LayerFn]
"""How layers are run: as they are, by torch.compile (True, or the name of a backend), or as a function of their segments' `apply` makes them."""


def layer_fn(applies: tuple[Apply, ...]) -> LayerFn:
    """The segments of a layer one after another: (parameters of each segment by name, x, batch, ctx, fed) → (x, losses, outputs for edges, sums)."""

    def layer(values: Sequence[dict[str, Tensor | W]], x: Any, batch: Any, ctx: Any, fed: Fed) -> Told:
        losses: dict[str, Tensor] = {}
        sums: dict[tuple[int, str], Tensor] = {}
        outputs: dict[str, Tensor] = {}
        for i, (apply, mine) in enumerate(zip(applies, values)):
            if fed and fed[i]:
                x = {**(x if isinstance(x, dict) else {"x": x}), **fed[i]}
            x, terms = apply(mine, x, batch, ctx)  # type: ignore[arg-type]
            losses.update(terms.get("losses", {}))
            outputs.update(terms.get("outputs", {}))
            for name, value in terms.get("sums", {}).items():
                sums[i, name] = value
        return x, losses, outputs, sums

    return layer


def compiled(layer: LayerFn, ctx: Any, backend: str | Callable[..., Any] = "inductor") -> LayerFn:
    """`layer` compiled in full; whatever a compiler cannot trace is an error when it is first run, never a slower path.

    A caller keeps the result, one for each tuple of apply functions and each kind of weight (plain, acc, probe): torch counts recompilations for
    each of them apart, and stops at 8. Raises ConfigError as `refuse_compile`.
    """
    refuse_compile(ctx.axes.mesh, ctx.device, backend)
    ctx.axes["tp"]  # made on first use, which a compiler would trace
    assert isinstance(layer, types.FunctionType)
    code = layer.__code__.replace()  # an own code object: that is what torch keeps compilations, and counts them, by
    own = types.FunctionType(code, layer.__globals__, layer.__name__, layer.__defaults__, layer.__closure__)
    return torch.compile(own, fullgraph=True, backend=backend)


def refuse_compile(
    mesh: Mesh, device: types.ModuleType, backend: bool | str | Callable[..., Any] = True, segments: Sequence[Segment] = ()
) -> None:
    """Raises ConfigError on a mesh with tp > 1, whose collectives no compiler traces, for segments that read on the host, and where torch's own
    compiler lacks what it needs."""
    if reads := [s.name for s in segments if s.host]:
        raise ConfigError(
            f"compiled layers: {reads[0]} counts on the host how many rows each expert gets, which is not traced; run a model with experts "
            "without compilation"
        )
    if (n := mesh.tp) > 1:
        raise ConfigError(
            f"compiled layers: mesh {mesh} has tp={n}, and the collectives inside of a layer are not traced; use tp=1, with pp and dp "
            "instead, or run without compilation"
        )
    if backend in (True, "inductor") and (why := device.no_compiler()):
        raise ConfigError(f"compiled layers on device {device.NAME!r}: {why}; install it, or run without compilation")

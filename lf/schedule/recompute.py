"""What a user wants run again instead of kept, or kept on the host: the texts of --recompute and --offload, and what they choose of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from lf.config import ConfigError, one_of
from lf.layouts import Layout

OPS = ("attention", "grouped_linear", "permute", "rms_norm", "rope", "swiglu", "unpermute")
"""The ops of a forward: those of the devices' tables but the optimizer's."""
EVERY = -1


@attrs.frozen
class Recompute:
    """`layers`: how many layers of each stage are run again whole, its first ones (Megatron-LM's method "block"; EVERY: all) · `segments`: last
    parts of names: those segments are run again whole · `ops`: these are, wherever the rest of a layer is not."""

    layers: int = 0
    segments: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()

    def __str__(self) -> str:
        full = "" if not self.layers else "full" if self.layers == EVERY else f"full:{self.layers}"
        words = (full, self.segments and f"segments={','.join(self.segments)}", self.ops and f"ops={','.join(self.ops)}")
        return ";".join(filter(None, words)) or "none"  # type: ignore[arg-type]

    def chosen(self, layout: Layout, stage: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(layer or segment, ops) of what is run again of a stage, in the order of its forward; no ops: all of it. Of each layer either its own
        name stands here or those of segments; one with ops may call none of them. Raises ConfigError for a segment that the model does not have.
        """
        for name in self.segments:
            one_of("segment to recompute", name, {_last(s.name) for s in layout.model.segments})
        whole = _first(layout, stage, self.layers)
        out: list[tuple[str, tuple[str, ...]]] = []
        for layer, segments in layout.layers(stage).items():
            chosen = [_last(s.name) in self.segments for s in segments]
            if layer in whole or all(chosen):
                out.append((layer, ()))
            elif any(chosen):
                out += [(s.name, () if c else self.ops) for s, c in zip(segments, chosen) if c or self.ops]
            elif self.ops:
                out.append((layer, self.ops))
        return tuple(out)


@attrs.frozen
class Offload:
    """`layers`: of how many layers of each stage, its first ones, what the forward keeps goes to the host's memory (EVERY: all) · `names`: of these
    layers, too · `distance`: a FETCH starts so many compute actions of the rank before the one that needs it."""

    layers: int = 0
    names: tuple[str, ...] = ()
    distance: int = 1

    def __str__(self) -> str:
        full = "" if not self.layers else "full" if self.layers == EVERY else f"full:{self.layers}"
        words = [*filter(None, (full, self.names and f"layers={','.join(self.names)}"))]
        return ";".join([*words, f"distance={self.distance}"]) if words else "none"  # type: ignore[list-item]

    def chosen(self, layout: Layout, stage: int) -> tuple[str, ...]:
        """The layers of a stage, in the order of its forward. Raises ConfigError for a layer that the model does not have."""
        for name in self.names:
            one_of("layer to offload", name, {s.layer for s in layout.model.segments})
        first = _first(layout, stage, self.layers)
        return tuple(layer for layer in layout.layers(stage) if layer in first or layer in self.names)


def parse_recompute(text: str, ops: Iterable[str] = OPS) -> Recompute:
    """The policy that a text says: parts joined by ';', each once.

        none              everything that a backward needs is kept
        full              every layer is run again from its input
        full:K            the first K layers of each stage are: the earliest keep theirs the longest. The model's first layer, which takes in the
                          tokens and keeps no more than them, is neither counted nor chosen
        segments=attn,mlp the segments whose names end so
        ops=swiglu        these ops, of `ops`, in all that is not run again whole

    Raises ConfigError with what there is.
    """
    parts = _parts("recompute", text, ("none", "full", "segments", "ops"))
    chosen = parts.get("ops", ())
    for name in chosen:
        one_of("op to recompute", name, ops)
    if parts.get("full") == () and len(parts) > 1:
        raise ConfigError(f"--recompute {text}: full runs every layer again and leaves nothing for the rest; write full alone, or full:K")
    return Recompute(_count("recompute", parts), parts.get("segments", ()), chosen)


def parse_offload(text: str) -> Offload:
    """The policy that a text says: parts joined by ';', each once.

        none              what a forward keeps stays on the device
        full, full:K      that of every layer goes to the host's memory, or of the first K of each stage (see parse_recompute)
        layers=A,B        that of these layers
        distance=N        a FETCH starts N compute actions of the rank ahead of what needs it; 1 if not said, 0: right before it

    Raises ConfigError with what there is.
    """
    parts = _parts("offload", text, ("none", "full", "layers", "distance"))
    if "distance" in parts and len(parts) == 1:
        raise ConfigError(f"--offload {text}: distance says when layers come back, not which go; add full, full:K or layers=…")
    if parts.get("full") == () and "layers" in parts:
        raise ConfigError(f"--offload {text}: full is every layer; write full alone, or full:K, or layers=…")
    distance = _whole("offload", "distance", parts["distance"], 0) if "distance" in parts else 1
    return Offload(_count("offload", parts), parts.get("layers", ()), distance)


def _parts(flag: str, text: str, known: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """{part: its values}: 'full' has none or one after ':', those with '=' at least one."""
    out: dict[str, tuple[str, ...]] = {}
    for part in text.split(";"):
        word = part.strip()
        mark = "=" if "=" in word else ":"
        name, given, rest = (w.strip() for w in word.partition(mark))
        one_of(f"part of --{flag}", name, known)
        values = tuple(v.strip() for v in rest.split(",")) if given else ()
        if name in out:
            raise ConfigError(f"--{flag} {text}: {name} stands twice; write it once")
        wants = {"none": "", "full": ":"}.get(name, "=")
        if (given and mark != wants) or (wants == "=" and not given) or not all(values):
            way = {"": "none", ":": "full or full:K"}.get(wants, f"{name}=…")
            raise ConfigError(f"--{flag} {text}: {word!r} should be {way}")
        if twice := sorted({v for v in values if values.count(v) > 1}):
            raise ConfigError(f"--{flag} {text}: {', '.join(twice)} stands twice in {name}; write it once")
        out[name] = values
    if "none" in out and len(out) > 1:
        raise ConfigError(f"--{flag} {text}: none stands alone")
    return out


def _count(flag: str, parts: dict[str, tuple[str, ...]]) -> int:
    if "full" not in parts:
        return 0
    return _whole(flag, "full", parts["full"], 1) if parts["full"] else EVERY


def _whole(flag: str, name: str, values: Sequence[str], least: int) -> int:
    text = ",".join(values)
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"--{flag}: {name} is to be a whole number, at least {least}, not {text!r}")
    return int(text)


def _first(layout: Layout, stage: int, layers: int) -> tuple[str, ...]:
    names = tuple(layout.layers(stage))
    if layers == EVERY:
        return names
    tokens = layout.model.segments[0].layer
    return tuple(n for n in names if n != tokens)[:layers]


def _last(name: str) -> str:
    return name.rpartition(".")[2]

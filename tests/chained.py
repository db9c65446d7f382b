"""Three chains small enough for a sweep and awkward to split: eyes with fused, overlapping kv heads, words with a tied table, a hand that is fed by
every layer of words. They are laid out, held, saved and compared, never run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import torch

import lf
from lf import tree
from lf.chain_layouts import Layouts, Place, chain_layouts
from lf.chains import Chain, Chains, Edge
from lf.segment import Model, Segment
from lf.spec import Param, Part, Tied, normal
from lf.state import compute_copy


def never(params: Any, x: Any, batch: Any, ctx: Any) -> Any:
    raise AssertionError("these chains are laid out, never run")


def fused(heads: int, kv: int, dim: int) -> Param:
    """Queries, keys and values in one: of more ranks than kv heads several hold the same ones."""
    parts = (Part("q", heads, 2), Part("k", kv, 2, of=heads), Part("v", kv, 2, of=heads))
    return Param(((heads + 2 * kv) * 2, dim), ("heads", "embed"), normal(1.0), parts)


def segment(name: str, layer: str, params: dict[str, Param | Tied], inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> Segment:
    return Segment(name, layer, params, never, inputs=inputs, outputs=outputs)


def norm(dim: int) -> Param:
    return Param((dim,), ("embed",), normal(1.0))


TABLE = Param((37, 6), ("vocab", "embed"), normal(1.0), (Part("", 10, 4, rows=37),))
EYES = Chain(
    Model({"depth": 2}, (
        segment("eyes.0", "eyes.0", {"qkv": fused(6, 3, 5), "norm": norm(5)}, outputs=("early",)),
        segment("eyes.1", "eyes.1", {"qkv": fused(6, 3, 5), "down": Param((5, 7), ("embed", "mlp"), normal(1.0), part_dim=1)}),
        segment("eyes.out", "eyes.1", {"scale": Param((), (), normal(1.0))}, outputs=("late",)),
    ), {}),
    {"early": 5, "late": 5},
    collate=never,
)  # fmt: skip
WORDS = Chain(
    Model({"depth": 3}, (
        segment("embed", "embed", {"table": TABLE}, inputs=("seen",)),
        segment("words.0", "words.0", {"qkv": fused(4, 2, 6)}, outputs=("said.0",)),
        segment("words.1", "words.1", {"qkv": fused(4, 2, 6), "norm": norm(6)}, inputs=("deep",), outputs=("said.1",)),
        segment("head", "head", {"table": Tied("embed/table"), "norm": norm(6)}),
    ), {}),
    {"said.0": 6, "said.1": 6},
)  # fmt: skip
HAND = Chain(
    Model({"depth": 2}, (
        segment("hand.0", "hand.0", {"up": Param((3, 6), ("mlp", "embed"), normal(1.0))}, inputs=("said",)),
        segment("hand.1", "hand.1", {"up": Param((3, 6), ("mlp", "embed"), normal(1.0))}, inputs=("said",)),
    ), {}),
    collate=never,
)  # fmt: skip
CHAINS = {"eyes": EYES, "words": WORDS, "hand": HAND}
EDGES = (
    Edge("eyes", "late", "words", "embed", "seen"),
    Edge("eyes", "early", "words", "words.1", "deep"),
    Edge("words", "said.0", "hand", "hand.0", "said"),
    Edge("words", "said.0", "hand", "hand.1", "said"),
)


def three(**changes: Any) -> Chains:
    return Chains(**{"config": None, "chains": CHAINS, "edges": EDGES, "main": "words", **changes})


def at(eyes: str = "", words: str = "", hand: str = "", ranks: dict[str, Any] | None = None, **more: Any) -> dict[str, Place]:
    """Where each chain lies: its mesh in words, its ranks (else all). `more`: what else one asks for, as eyes_frozen=("eyes.0",)."""
    asked: dict[str, dict[str, Any]] = {"eyes": {}, "words": {}, "hand": {}}
    for key, value in more.items():
        name, _, field = key.partition("_")
        asked[name][field] = value
    meshes = {"eyes": eyes, "words": words, "hand": hand}
    return {name: Place(lf.Mesh.parse(mesh), (ranks or {}).get(name), **asked[name]) for name, mesh in meshes.items()}


def laid_out(places: dict[str, Place], world: int | None = None) -> Layouts:
    return chain_layouts(three(), places, world)


def context(axes: Any, layouts: Layouts, compute: dict[str, str] | None = None, precision: str = "bf16") -> lf.Context:
    """The context of the world, with that of each chain that this rank is on. `compute`: precisions of chains that have another."""
    cpu = lf.devices.get("cpu")
    each = {name: lf.Context(None, cpu, (compute or {}).get(name, precision)) if layouts.coords(name, axes.rank) else None for name in layouts.chains}
    return lf.Context(axes, cpu, precision, chains=each)


def some_state(layouts: Layouts, ctx: lf.Context) -> lf.State:
    """A state of which every tensor is random and the same logical one under any layout; what is frozen has a master alone."""
    trained = layouts.trained(ctx.axes.rank)
    trees = {kind: tree.items(lf.init(layouts, ctx, seed)) for seed, kind in enumerate(("master", "m", "v"))}
    optimizer = {kind: tree.build([(path, x) for path, x in leaves if kind == "master" or path in trained]) for kind, leaves in trees.items()}
    optimizer["t"] = {"t": torch.tensor(41)}
    return lf.State(compute_copy(layouts, optimizer["master"], ctx), optimizer, torch.tensor(50))


def world(layouts: Layouts, fn: Any, *args: Any) -> list[Any]:
    return lf.sim.spmd(lf.Mesh(dp=layouts.world), fn, *args)


def tiny_device(ctx: lf.Context, **answers: int) -> lf.Context:
    """The same with a device that says so much of its memory."""
    fake = SimpleNamespace(**{**vars(ctx.device), **{name: (lambda n=n: n) for name, n in answers.items()}})
    return attrs.evolve(ctx, device=fake)

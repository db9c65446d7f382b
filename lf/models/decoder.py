"""Most language models: a pre-norm decoder whose config lists each layer's mixer and each layer's feed-forward.

Between layers the residual stream is x_tD, S(0) over tp (t this rank's tokens, D width). Every layer is a few segments with parameters of their
own; there is no stacked axis.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import attrs

from lf.batch import Batch
from lf.config import ConfigError
from lf.layouts import RULES
from lf.models import mtp
from lf.models.attention import Attention, attention
from lf.models.block import Block
from lf.models.latent import Latent, latent
from lf.models.mlp import GatedMLP, mlp
from lf.models.moe import MoE, moe, moe_objectives, moe_report, moe_state, moe_sums
from lf.models.router import documents
from lf.models.tokens import accepts, embed, embed_flops, head, matrix_flops, tables, valid_labels, vocab_part
from lf.ops.rope import Rope
from lf.segment import Model, Objective, Segment
from lf.spec import Init, Param, Tied, constant, normal


@attrs.frozen
class Layer:
    mixer: Attention | Latent
    ffn: GatedMLP | MoE


@attrs.frozen
class MTP:
    """Heads that predict further ahead, each with a layer of its own. weight: of their losses together."""

    layers: tuple[Layer, ...]
    weight: float = 0.3

    def __attrs_post_init__(self) -> None:
        if not self.layers or not self.weight >= 0:
            raise ConfigError(f"MTP: {len(self.layers)} layers and weight={self.weight}; give at least one layer, and a weight that is not negative")


@attrs.frozen
class DecoderConfig:
    """`tied`: the head is the embedding table. Matrices start as N(0, init_std²), the embedding as N(0, embed_std²), biases as 0. `mtp`: further
    heads (lf/models/mtp.py).

    Two fields are only passed on to files: `max_len`, the longest text that the model is meant for (the mathematics has no limit), and `family`,
    whose format they are written in (see lf.models.families; "": the first that can say it).
    """

    vocab: int
    dim: int
    layers: tuple[Layer, ...]
    norm_eps: float = 1e-6
    tied: bool = True
    init_std: float = 0.02
    embed_std: float = 0.02
    max_len: int = 40960
    family: str = ""
    mtp: MTP | None = None

    @property
    def all_layers(self) -> dict[str, Layer]:
        """The layers, and those of the further heads, by name."""
        heads = self.mtp.layers if self.mtp else ()
        return {f"layers.{i}": layer for i, layer in enumerate(self.layers)} | {f"mtp.{k}": layer for k, layer in enumerate(heads)}


def decoder(config: DecoderConfig) -> Model:
    """The model as segments: embed, of each layer its mixer and its feed-forward, of each further head the same between two of its own, head.

    layers.i.attn · layers.i.mlp, or layers.i.route, .dispatch, .experts and .combine · mtp.k.enter, the same, mtp.k.leave. Objectives:
    cross_entropy, those of the routers, mtp_k.
    """
    matrix = normal(config.init_std)
    # Two products a layer are added to the residual stream, 2L in all; each 1/√(2L) as large keeps the sum's variance (GPT-2 §2.3, Megatron-LM).
    added = normal(config.init_std / math.sqrt(2 * max(len(config.layers), 1)))
    words = vocab_part(config.vocab)
    table = Param((config.vocab, config.dim), ("vocab", "embed"), normal(config.embed_std), (words,))
    eps, dim, layers = config.norm_eps, config.dim, config.all_layers
    ropes = tuple(dict.fromkeys((layer.mixer.rope, layer.mixer.turned) for layer in layers.values()))
    mixers = {a: _mixer(a, ropes.index((a.rope, a.turned)), config, matrix, added) for a in {layer.mixer for layer in layers.values()}}
    ffns = {f: _ffn(f, config, matrix, added) for f in {layer.ffn for layer in layers.values()}}
    blocks = {layer: {**mixers[layer.mixer], **ffns[layer.ffn]} for layer in layers.values()}
    segments = [Segment("embed", "embed", {"weight": table}, partial(embed, words), (), embed_flops)]
    for i, layer in enumerate(config.layers):
        segments += [Segment(f"layers.{i}.{name}", f"layers.{i}", {**block.params}, *block[1:]) for name, block in blocks[layer].items()]
    heads = config.mtp.layers if config.mtp else ()
    further = {layer: {name: mtp.inside(block) for name, block in blocks[layer].items()} for layer in heads}
    for k, layer in enumerate(heads):
        first = mtp.enter(k, words, dim, eps, matrix)
        last = mtp.leave(k, k == len(heads) - 1, words, dim, config.vocab, eps, config.tied)
        each = {"enter": first, **further[layer], "leave": last}
        segments += [Segment(f"mtp.{k}.{name}", f"mtp.{k}", {**block.params}, *block[1:]) for name, block in each.items()]
    weight = Tied("embed/weight") if config.tied else attrs.evolve(table, init=matrix)
    ends = {"norm": Param((dim,), ("embed",), constant(1.0)), "weight": weight}
    segments.append(Segment("head", "head", ends, partial(head, words, eps), ("weight",), partial(matrix_flops, dim * config.vocab)))
    routed = {name: layer.ffn for name, layer in layers.items() if isinstance(layer.ffn, MoE)}
    objectives = {"cross_entropy": Objective(1.0, valid_labels), **moe_objectives(routed)}
    for k in range(len(heads)):
        assert config.mtp is not None
        objectives[mtp.objective(k)] = Objective(config.mtp.weight / len(heads), partial(mtp.labels_ahead, k + 1))
    return Model(
        config, tuple(segments), objectives, RULES, partial(accepts, config.vocab), partial(_prepared, ropes, bool(routed)),
        sums=moe_sums(routed), after_step=partial(moe_state, routed), report=partial(moe_report, routed),
    )  # fmt: skip


def attentions(config: DecoderConfig) -> tuple[Attention, ...]:
    """The mixers of the layers, for what knows no other kind. Raises ConfigError where one is of another."""
    mixers = tuple(layer.mixer for layer in config.layers if isinstance(layer.mixer, Attention))
    if len(mixers) < len(config.layers):
        raise ConfigError(f"of its {len(config.layers)} layers, {len(mixers)} mix by grouped-query attention; here all of them must")
    return mixers


def _prepared(ropes: tuple[tuple[Rope, int], ...], routed: bool, batch: Batch, ctx: Any) -> Batch:
    batch = tables(ropes, batch, ctx)
    return attrs.evolve(batch, derived={**batch.derived, **documents(batch)}) if routed else batch


def _mixer(a: Attention | Latent, rope: int, config: DecoderConfig, matrix: Init, added: Init) -> dict[str, Block]:
    if isinstance(a, Latent):
        return {"attn": latent(a, config.dim, rope, config.norm_eps, matrix, added)}
    return {"attn": attention(a, config.dim, rope, config.norm_eps, matrix, added)}


def _ffn(f: GatedMLP | MoE, config: DecoderConfig, matrix: Init, added: Init) -> dict[str, Block]:
    if isinstance(f, MoE):
        return moe(f, config.dim, config.norm_eps, matrix, added)
    return {"mlp": mlp(f, config.dim, config.norm_eps, matrix, added)}

"""Small mixtures of experts whose routing is uneven, for tests."""

from __future__ import annotations

from typing import Any

import attrs

from lf.models.decoder import MTP, Attention, DecoderConfig, GatedMLP, Layer, MoE, decoder
from lf.models.router import Router
from lf.segment import Model
from lf.spec import Init, Param

LOSSES = {"balance": 0.1, "sequence_balance": 0.05, "global_balance": 0.07, "z": 0.01}
ROUTERS: dict[str, dict[str, Any]] = {
    "sigmoid": {"score": "sigmoid", "bias": True, "scale": 1.5, **LOSSES},
    "softmax": {"normalise": False, "bias": True, **LOSSES},
    "chosen": {"linear_bias": True, "bias": True, **LOSSES},
    "groups": {"experts": 6, "groups": 3, "top_groups": 2, "group_score": "top2", "score": "sigmoid", "bias": True, "balance": 0.1},
    "best group": {"experts": 6, "groups": 2, "top_groups": 1, "bias": True, "z": 0.1},
    "probability": {"bias": True, "capacity": 0.7, "balance": 0.1},
    "position": {"score": "sigmoid", "bias": True, "capacity": 0.9, "drop": "position"},
    "one": {"experts": 3, "top": 1, "score": "sigmoid", "normalise": False, "bias": True, "global_balance": 0.1},
}


def mixture(router: str = "sigmoid", heads: int = 0, skew: float = 3.0, **more: Any) -> Model:
    """A dense layer, a mixture, and `heads` further heads with a mixture; what differs from that in `more`: fields of MoE and of the config.

    skew: the standard deviation of the selection bias, which is large beside scores from 0 to 1: one expert gets up to half of all rows, others none.
    """
    r = Router(**{"experts": 5, "top": 2, **ROUTERS[router]})
    config = {name: more.pop(name) for name in ("tied", "vocab") if name in more}
    a = Attention(heads=6, kv_heads=3, head_dim=4, qk_norm=True)
    routed = Layer(a, MoE(r, **{"dim": 6, "shared": 10, "shared_gate": True, "biases": True, **more}))
    further = MTP((routed,) * heads) if heads else None
    model = decoder(DecoderConfig(**{"vocab": 37, "dim": 15, "layers": (Layer(a, GatedMLP(10)), routed), "mtp": further, **config}))
    return skewed(model, skew)


def skewed(model: Model, std: float) -> Model:
    """The same model, whose selection biases start as N(0, std²)."""

    def start(name: str, param: Any) -> Any:
        return attrs.evolve(param, init=Init(std=std)) if isinstance(param, Param) and not param.learned and name == "bias" else param

    segments = [attrs.evolve(s, params={n: start(n, p) for n, p in s.params.items()}) for s in model.segments]
    return attrs.evolve(model, segments=tuple(segments))

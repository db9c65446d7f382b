"""How fast is a mixture of experts, next to others on this machine? Ratios, measured in one run: the peers take turns, each in its own process.

    scripts/launch bench_moe --device cpu
    scripts/launch bench_moe --device cuda --precision bf16 --tokens 8192 --dim 2048 --inner 768 --mixtures 128/8

One layer on one rank, forward and backward, of the same weights and tokens: norm, router, experts, residual; gradients of all parameters and of the
tokens. transformers runs its Qwen3-MoE block, with each way to compute the experts that is asked for; megatron-core its MoE layer of the local spec,
one product an expert. First each is compared with lf in float32, and in the precision that is measured: a peer that differs is not timed. Memory is
the peak beyond what stood there when the libraries were loaded: weights, activations, gradients.
"""

import importlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

import lf
from lf.config import ConfigError, one_of
from lf.console import table
from lf.models.moe import MoE, moe
from lf.models.router import Router
from lf.spec import normal

sys.path.insert(0, str(Path(__file__).parent / "lib"))
from turns import take_turns, words

RANKS = 1
OUT = "runs/bench_moe"
EPS = 1e-6
TOLERANCE = {"fp32": 1e-4, "bf16": 0.2}  # ‖a - b‖ / ‖b‖; in bfloat16 some tokens choose another expert where two score nearly alike


@attrs.frozen
class Config:
    device: str | None = None
    precision: str = "fp32"
    mixtures: tuple[str, ...] = ("8/2", "128/8")  # experts/experts of a token
    tokens: int = 2048
    dim: int = 512
    inner: int = 256  # of an expert
    peers: tuple[str, ...] = ("transformers", "transformers-grouped", "megatron-core")
    rounds: int = 7
    steps: int = 2  # of each peer in a round
    json: str | None = None


class Layer(NamedTuple):
    """apply: (tokens, D) to the same. leaves: {name of a weight: the tensors that it is as, a stack's one by one where it is several}."""

    apply: Callable[[Tensor], Tensor]
    leaves: Mapping[str, tuple[Tensor, ...]]


def main(config: Config) -> None:
    lf.config.at_least(1, config, "tokens", "dim", "inner", "rounds", "steps")
    one_of("value for --precision:", config.precision, TOLERANCE)
    for peer in config.peers:
        one_of("peer", peer, PEERS)
    mixtures = {text: sizes(text) for text in config.mixtures}
    device = lf.devices.get(config.device)
    screen, results = lf.console.console(), dict[str, Found]()
    with screen.status("the peers load, and are compared"):
        agreed = checked(config, mixtures)
    for text, (experts, top) in mixtures.items():
        with screen.status(f"{text}: the peers take turns"):
            found = results[text] = timed(config, experts, top, agreed[text])
        busy = f", {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}" if device.NAME == "cpu" else ""
        title = f"{experts} experts, {top} a token: {config.tokens} tokens, {config.dim} → {config.inner}, {config.precision}, {device.NAME}"
        screen.print(table(f"{title} ({device.found()}{busy})", *shown(found, config.tokens)))
        for name, x in found.items():
            if "error" in x:
                screen.print(f"{name}: {x['error']}", markup=False, soft_wrap=True)
    if config.json:
        Path(config.json).write_text(json.dumps({"config": lf.config.to_dict(config), "mixtures": results}, indent=1) + "\n")
    if any("differs" in x for found in results.values() for x in found.values()):
        raise SystemExit(1)


def sizes(text: str) -> tuple[int, int]:
    """'128/8' → (128, 8)."""
    experts, _, top = text.partition("/")
    if not (experts.isdigit() and top.isdigit() and 1 <= int(top) <= int(experts)):
        raise ConfigError(f"--mixtures {text!r}: give experts/experts of a token, as 128/8")
    return int(experts), int(top)


Found = dict[str, dict[str, Any]]


def checked(config: Config, mixtures: Mapping[str, tuple[int, int]]) -> dict[str, Found]:
    """{mixture: {peer: {"errors": of what it gives}}}, or {"error": why it is not to be timed}, with "differs" where that is the reason."""
    out: dict[str, Found] = {text: {} for text in mixtures}
    for name in ("lf", *config.peers):
        with ProcessPoolExecutor(1, get_context("spawn")) as own:
            for text, answer in [(text, own.submit(compared, config, *sizes, name)) for text, sizes in mixtures.items()]:
                try:
                    errors = answer.result()
                except Exception as error:
                    out[text][name] = {"error": words(error)}
                    continue
                wrong = [f"{c} {what}: {x:.1e}" for c, each in errors.items() for what, x in each.items() if not x <= TOLERANCE[c]]
                out[text][name] = {"differs": True, "error": f"differs: {', '.join(wrong)}"} if wrong else {"errors": errors}
    return out


def timed(config: Config, experts: int, top: int, found: Found) -> Found:
    """With "seconds": median of a step, "ratio": lf's time over its, "bytes": peak, of each peer that has no error."""
    assert config.device is not None
    builds = {name: partial(steps_of, name, experts, top) for name, x in found.items() if "error" not in x}
    taken = take_turns(builds, config, config.device, config.rounds, config.steps) if "lf" in builds else {}
    if error := found["lf"].get("error") or taken["lf"].get("error"):
        raise ConfigError(f"lf's own layer did not run: {error}")
    out = {name: {**x} for name, x in found.items()}
    for name, x in taken.items():
        times = x.get("times", ())
        ratio = [a / b for a, b in zip(taken["lf"]["times"], times)]
        out[name] |= x if "error" in x else {"seconds": statistics.median(times), "ratio": statistics.median(ratio), "bytes": x["bytes"]}
    return out


def shown(found: Found, tokens: int) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    lines: list[tuple[object, ...]] = []
    for name, x in found.items():
        if "error" in x:
            continue
        memory = found["lf"]["bytes"] / x["bytes"]
        worst = max(e for each in x["errors"].values() for e in each.values())
        speed = f"{tokens / x['seconds']:,.0f}"
        lines.append((name, f"{x['seconds'] * 1e3:.1f}", speed, f"{x['ratio']:.2f}", f"{x['bytes'] / 2**20:,.0f}", f"{memory:.2f}", f"{worst:.0e}"))
    return ("peer", "ms", "tokens/s", "lf / peer, time", "peak MiB", "lf / peer, memory", "differs by"), lines


def compared(config: Config, experts: int, top: int, name: str) -> dict[str, dict[str, float]]:
    """{precision: {what: ‖its - lf's‖ / ‖lf's‖}}: output and gradients, of lf in float32 from the same weights."""
    lf.devices.get(config.device).select(0)
    load(name, config)
    given = drawn(config, experts, top)
    exact = {what: x.float() for what, x in given.items()}
    single = attrs.evolve(config, precision="fp32")
    want = results(lf_layer(single, experts, top, exact), exact)
    out = {}
    for c, values in {"fp32": (single, exact), config.precision: (config, given)}.values():
        got = results(PEERS[name](c, experts, top, values), values)
        out[c.precision] = {what: float((got[what].float() - x).norm() / x.norm()) for what, x in want.items()}
    return out


def results(layer: Layer, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients by name, each in one row."""
    x = given["x"].clone().requires_grad_()
    y, grads = step(layer, x, given["dy"])
    out, rest = {"output": y.detach().flatten(), "gradient of x": grads[0].flatten()}, iter(grads[1:])
    return out | {f"gradient of {name}": torch.cat([next(rest).flatten() for _ in each]) for name, each in layer.leaves.items()}


def steps_of(name: str, experts: int, top: int, config: Config) -> Iterator[int]:
    load(name, config)
    yield lf.devices.get(config.device).memory_peak()
    given = drawn(config, experts, top)
    layer, x = PEERS[name](config, experts, top, given), given["x"].requires_grad_()
    while True:
        step(layer, x, given["dy"])
        yield 0


def step(layer: Layer, x: Tensor, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    y = layer.apply(x)
    return y, torch.autograd.grad(y, [x, *(t for each in layer.leaves.values() for t in each)], dy)


def drawn(config: Config, experts: int, top: int) -> dict[str, Tensor]:
    """Weights and tokens, in the dtype that is measured: x, dy (T, D), norm (D,), router (E, D), gate_up (E, 2F, D), down (E, D, F)."""
    d, f, where = config.dim, config.inner, lf.devices.get(config.device).torch_device(0)
    dtype = lf.context.PRECISIONS[config.precision].compute
    shapes: dict[str, tuple[tuple[int, ...], float]] = {
        "x": ((config.tokens, d), 1.0), "dy": ((config.tokens, d), 1.0), "norm": ((d,), 1.0), "router": ((experts, d), 2 / math.sqrt(d)),
        "gate_up": ((experts, 2 * f, d), 1 / math.sqrt(d)), "down": ((experts, d, f), 1 / math.sqrt(f)),
    }  # fmt: skip
    dice = torch.Generator(where).manual_seed(0)
    return {name: torch.empty(shape, dtype=dtype, device=where).normal_(0, std, generator=dice) for name, (shape, std) in shapes.items()}


def lf_layer(config: Config, experts: int, top: int, given: Mapping[str, Tensor]) -> Layer:
    ctx = lf.Context(lf.solo(), lf.devices.get(config.device), config.precision)
    blocks = moe(MoE(Router(experts, top), config.inner), config.dim, EPS, normal(0.02), normal(0.02))
    w = {name: given[name].detach().requires_grad_() for name in ("norm", "router", "gate_up", "down")}
    params = {"route": {"norm": w["norm"], "weight": w["router"]}, "experts": {"gate_up": w["gate_up"], "down": w["down"]}}
    all_T = torch.ones(config.tokens, dtype=torch.bool, device=given["x"].device)
    batch = lf.Batch({"tokens": all_T.long()}, derived={"live": all_T})

    def apply(x: Any) -> Tensor:
        for name, block in blocks.items():
            x, _ = block.apply(params.get(name, {}), x, batch, ctx)
        return x

    return Layer(apply, {name: (t,) for name, t in w.items()})


def transformers_layer(experts_by: str, config: Config, experts: int, top: int, given: Mapping[str, Tensor]) -> Layer:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as theirs
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

    made = Qwen3MoeConfig(
        hidden_size=config.dim, moe_intermediate_size=config.inner, num_experts=experts, num_experts_per_tok=top, norm_topk_prob=True
    )
    made._experts_implementation = experts_by
    with torch.device("meta"):
        block, norm = theirs.Qwen3MoeSparseMoeBlock(made), theirs.Qwen3MoeRMSNorm(config.dim, EPS)
    names = {"router": "gate.weight", "gate_up": "experts.gate_up_proj", "down": "experts.down_proj"}
    block.load_state_dict({theirs: given[ours] for ours, theirs in names.items()}, assign=True)
    norm.load_state_dict({"weight": given["norm"]}, assign=True)
    leaves = {"norm": (norm.weight,), **{ours: (block.get_parameter(theirs),) for ours, theirs in names.items()}}
    return Layer(lambda x: x + block(norm(x)[None])[0], leaves)


def megatron_layer(config: Config, experts: int, top: int, given: Mapping[str, Tensor]) -> Layer:
    """MoELayer of the local spec, without Transformer Engine: its experts one after another."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import build_module

    where = given["x"].device
    if where.type == "cpu":
        torch.cuda.current_device = lambda: where  # type: ignore[assignment,return-value]  # it makes its buffers there
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # its router asks for it by name even where Transformer Engine is not there
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    made = TransformerConfig(
        num_layers=1, hidden_size=config.dim, num_attention_heads=1, num_moe_experts=experts, moe_router_topk=top, moe_ffn_hidden_size=config.inner,
        ffn_hidden_size=config.inner, gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, use_cpu_initialization=True,
        perform_initialization=False, moe_router_load_balancing_type="none", moe_router_dtype="fp32", moe_token_dispatcher_type="allgather",
        bias_activation_fusion=False, gradient_accumulation_fusion=False, params_dtype=given["x"].dtype,
    )  # fmt: skip
    layer = build_module(get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False), made)
    norm, each = given["norm"].detach().requires_grad_(), layer.experts.local_experts
    router, first, second = layer.router.weight, [e.linear_fc1.weight for e in each], [e.linear_fc2.weight for e in each]
    for mine, theirs in zip((given["router"], *given["gate_up"], *given["down"]), (router, *first, *second)):
        theirs.data = mine
    leaves = {"norm": (norm,), "router": (router,), "gate_up": tuple(first), "down": tuple(second)}
    return Layer(lambda x: x + layer(F.rms_norm(x, (config.dim,), norm, EPS)[:, None])[0][:, 0], leaves)


def load(name: str, config: Config) -> None:
    """What a peer brings along, before memory is counted."""
    import warnings

    warnings.filterwarnings("ignore")
    for library in LIBRARIES.get(name, ()):
        importlib.import_module(library)
    device = lf.devices.get(config.device)
    lf.devices.op_table(device)
    x = torch.ones(64, 64, device=device.torch_device(0), requires_grad=True)
    torch.autograd.grad(F.linear(x, x), x, x)  # torch loads parts of itself, and the library of its products, when they are first used


PEERS: dict[str, Callable[[Config, int, int, Mapping[str, Tensor]], Layer]] = {
    "lf": lf_layer, "transformers": partial(transformers_layer, "eager"), "transformers-grouped": partial(transformers_layer, "grouped_mm"),
    "megatron-core": megatron_layer,
}  # fmt: skip
QWEN = "transformers.models.qwen3_moe.modeling_qwen3_moe"
LIBRARIES = {
    "transformers": (QWEN,), "transformers-grouped": (QWEN,), "megatron-core": ("megatron.core", "megatron.core.models.gpt.moe_module_specs"),
}  # fmt: skip

if __name__ == "__main__":
    lf.cli.run(main, Config)

"""How fast is it, next to others on this machine? Ratios, measured in one run: the peers take turns, each in a process of its own.

    scripts/launch bench --device cpu
    scripts/launch bench --device cuda --model qwen3-0.6b --precision bf16 --seq-len 4096 --micro-batch 1

A step is one optimizer step of the same model from the same shapes: forward, backward, clipping, AdamW. transformers trains with its own class,
SDPA and torch's fused AdamW; megatron-core with GPTModel and its local layers, on the CPU. The loader is compared with iterating a data set of
the same rows with `datasets`. Memory is the peak beyond what stood there when the libraries were loaded.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import einops
import numpy as np
import torch

import lf
from lf.console import table

sys.path.insert(0, str(Path(__file__).parent / "lib"))
from turns import Build, take_turns

RANKS = 1
OUT = "runs/bench"



@attrs.frozen
class Config:
    device: str | None = None
    model: str = "qwen3-demo"
    precision: str = "fp32"
    seq_len: int = 256
    micro_batch: int = 4
    global_batch: int = 8  # rows in a step
    peers: tuple[str, ...] = ("transformers", "megatron-core")
    rounds: int = 7
    steps: int = 4  # of each peer in a round
    rows: int = 4000  # of the loader's data set; 0 leaves the loader out
    json: str | None = None


def main(config: Config) -> None:
    lf.config.at_least(1, config, "seq_len", "micro_batch", "global_batch", "rounds", "steps")
    device = lf.devices.get(config.device)
    for peer in config.peers:
        lf.config.one_of("peer", peer, PEERS)
    screen = lf.console.console()
    with screen.status("steps: the peers load"):
        found = steps(config)
    tokens = config.global_batch * config.seq_len
    screen.print(table(f"a step of {config.model}: {tokens} tokens, {config.precision}, {device.NAME} ({device.found()})", *shown(found, tokens)))
    results: dict[str, Any] = {"step": found}
    if config.rows:
        with screen.status("loader"):
            speeds = results["loader"] = loader(config)
        rows = [(name, f"{speed:,.0f}", f"{speeds['lf'] / speed:.2f}") for name, speed in speeds.items()]
        screen.print(table(f"loader: shuffled rows of {config.seq_len} tokens, one thread", ("peer", "tokens/s", "lf / peer, speed"), rows))
    if config.json:
        Path(config.json).write_text(json.dumps({"config": lf.config.to_dict(config), **results}, indent=1) + "\n")


def shown(found: dict[str, dict[str, Any]], tokens: int) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    lines: list[tuple[object, ...]] = []
    ours = found["lf"]
    for name, x in found.items():
        if "error" in x:
            lines.append((name, x["error"], "", "", "", ""))
            continue
        ratios = [f"{ours[key] / x[key]:.2f}" for key in ("seconds", "bytes")]
        lines.append((name, f"{x['seconds'] * 1e3:.1f}", f"{tokens / x['seconds']:,.0f}", ratios[0], f"{x['bytes'] / 2**20:,.0f}", ratios[1]))
    return ("peer", "ms a step", "tokens/s", "lf / peer, time", "peak MiB", "lf / peer, memory"), lines


def steps(config: Config) -> dict[str, dict[str, Any]]:
    """{peer: {"seconds": median of a step, "bytes": peak}}, or {"error": why it did not run}."""
    assert config.device is not None
    found = take_turns({name: PEERS[name] for name in ("lf", *config.peers)}, config, config.device, config.rounds, config.steps)
    if "error" in found["lf"]:
        raise lf.config.ConfigError(f"lf's own step did not run: {found['lf']['error']}")
    return {name: x if "error" in x else {"seconds": statistics.median(x["times"]), "bytes": x["bytes"]} for name, x in found.items()}


def tokens_of(config: Config, vocab: int) -> np.ndarray:
    """(rows of a step, seq_len): one document a row, so that every peer computes the same attention."""
    return np.random.default_rng(0).integers(0, vocab, (config.global_batch, config.seq_len))


def lf_steps(config: Config) -> Iterator[int]:
    device = lf.devices.get(config.device)
    ctx = lf.Context(lf.solo(), device, config.precision)
    model = lf.hf.model(config.model)
    layout = lf.layout(model, ctx.axes.mesh)
    program = lf.schedule.one_f_one_b(1, lf.data.microbatches(config.global_batch, config.micro_batch, 1))
    init, step = lf.train.make(layout, lf.optim.adamw(1e-4), program, ctx)
    words = tokens_of(config, model.config.vocab)

    def row(k: int) -> lf.data.Row:
        labels = np.append(words[k % len(words), 1:], lf.IGNORE)
        return lf.data.Row(words[k % len(words)], labels, np.array([0]))

    batches = lf.data.step_batches(row, 0, config.global_batch, config.micro_batch)
    einops.rearrange(torch.zeros(1, 1), "a b -> b a")  # its part for torch is loaded when it is first used
    yield device.memory_peak()
    state = init(lf.init(layout, ctx, seed=0))
    while True:
        state, _ = step(state, batches)
        yield 0


def transformers_steps(config: Config) -> Iterator[int]:
    from transformers import AutoConfig, AutoModelForCausalLM

    device = lf.devices.get(config.device)
    where = device.torch_device(0)
    ours = lf.hf.model(config.model).config
    words = torch.from_numpy(tokens_of(config, ours.vocab)).to(where)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(lf.models.families.of(ours).write(ours)))
        theirs = AutoConfig.from_pretrained(folder)
    model_class = AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa").__class__  # loads its code
    yield device.memory_peak()
    model = model_class._from_config(theirs, attn_implementation="sdpa").to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    low = config.precision == "bf16"
    while True:
        optimizer.zero_grad()
        for part in words.split(config.micro_batch):
            with torch.autocast(where.type, torch.bfloat16, enabled=low):
                loss = model(part, labels=part, use_cache=False).loss
            (loss * len(part) / len(words)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield 0


def megatron_steps(config: Config) -> Iterator[int]:
    """GPTModel with local layers: one rank, no Transformer Engine."""
    import warnings

    warnings.filterwarnings("ignore")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    if config.device != "cpu":
        raise RuntimeError("measured on the CPU alone: its local layers are no fast path on a card")
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]  # its rotary tables are moved there
    device, ours = lf.devices.get(config.device), lf.hf.model(config.model).config
    a, precision = ours.layers[0].mixer, config.precision
    words = torch.from_numpy(tokens_of(config, ours.vocab))
    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield device.memory_peak()
        made = TransformerConfig(
            num_layers=len(ours.layers), hidden_size=ours.dim, ffn_hidden_size=ours.layers[0].ffn.dim, num_attention_heads=a.heads,
            num_query_groups=a.kv_heads, kv_channels=a.head_dim, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
            add_bias_linear=False, add_qkv_bias=a.qkv_bias, normalization="RMSNorm", layernorm_epsilon=ours.norm_eps, qk_layernorm=a.qk_norm,
            use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=False, masked_softmax_fusion=False,
            persist_layer_norm=False, bias_dropout_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False,
            params_dtype=torch.float32,
        )  # fmt: skip
        # its tracker of random states is CUDA's alone; without dropout nothing is drawn
        tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()  # type: ignore[method-assign]
        model = GPTModel(
            made, get_gpt_layer_local_spec(qk_layernorm=a.qk_norm, normalization="RMSNorm"), vocab_size=ours.vocab,
            max_sequence_length=config.seq_len, share_embeddings_and_output_weights=ours.tied, position_embedding_type="rope",
            rotary_base=int(a.rope.theta),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        hidden = torch.ones(1, 1, config.seq_len, config.seq_len, dtype=torch.bool).triu(1)
        places = torch.arange(config.seq_len)[None]
        while True:
            optimizer.zero_grad()
            for part in words.split(config.micro_batch):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    losses = model(part, places.expand(len(part), -1), hidden, labels=part.roll(-1, 1))
                (losses[:, :-1].sum() / (len(words) * (config.seq_len - 1))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield 0


def loader(config: Config) -> dict[str, float]:
    """Tokens a second, the best of `rounds` passes. lf makes rows with labels and documents out of indexed tokens of documents; `datasets` reads
    rows that were cut beforehand, without either."""
    import datasets

    dice, n = np.random.default_rng(0), config.seq_len
    lengths = dice.integers(20, 2000, max(2, config.rows * n // 1000))
    words = dice.integers(0, 50000, lengths.sum())
    with tempfile.TemporaryDirectory() as folder:
        with lf.data.Writer(f"{folder}/documents", 50000) as writer:
            writer.add(words, lengths)
            writer.finish()
        ours = lf.data.rows(lf.data.open_documents(f"{folder}/documents"), n, seed=0)
        whole = words[: len(words) // n * n].reshape(-1, n).astype(np.int32)
        datasets.Dataset.from_dict({"input_ids": whole}).save_to_disk(f"{folder}/rows")
        cut = datasets.load_from_disk(f"{folder}/rows").shuffle(seed=0)
        passes: dict[str, Callable[[], Any]] = {
            "lf": lambda: [ours(k) for k in range(config.rows)],
            "lf, as torch batches of 4 rows": lambda: [lf.data.microbatch(ours, k, 4) for k in range(0, config.rows - 3, 4)],
            "datasets, numpy": lambda: [row for _, row in zip(range(config.rows), cut.with_format("numpy"))],
            "datasets, torch": lambda: [row for _, row in zip(range(config.rows), cut.with_format("torch"))],
            "datasets, Python lists": lambda: [row for _, row in zip(range(config.rows), cut)],
        }
        best = dict.fromkeys(passes, float("inf"))
        for _ in range(config.rounds):
            for name, once in passes.items():
                began = time.perf_counter()
                read = once()
                best[name] = min(best[name], time.perf_counter() - began)
                del read
    return {name: config.rows * n / seconds for name, seconds in best.items()}


PEERS: dict[str, Build] = {"lf": lf_steps, "transformers": transformers_steps, "megatron-core": megatron_steps}
"""Each yields the memory that its libraries take, then makes one step a turn."""

if __name__ == "__main__":
    lf.cli.run(main, Config)

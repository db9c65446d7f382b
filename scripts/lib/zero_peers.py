"""torch's own ways to shard the state of a model over ranks: DDP, DDP with ZeroRedundancyOptimizer, FSDP2. Each trains transformers' class."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import lf


class Side(NamedTuple):
    """step() -> (loss, norm of the gradient) of the whole batch, device scalars. state() -> {name: (weight, first moment)} whole, on the CPU."""

    step: Callable[[], tuple[Tensor, Tensor]]
    state: Callable[[], dict[str, tuple[Tensor, Tensor]]]


class Task(NamedTuple):
    """What every side does: a model of transformers' class as it starts, the rows of this rank's microbatches, (rows, seq_len) each, the number
    of labels in the step over all ranks, and how it is updated."""

    config: Any
    weights: Mapping[str, Tensor]
    parts: Sequence[Tensor]
    labels: int
    low: bool  # bf16 with float32 masters, instead of float32
    where: torch.device
    lr: float
    betas: tuple[float, float]
    decay: float  # of matrices
    clip: float


def theirs(config: Any) -> Any:
    """The config of transformers' class for a model of lf's."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(lf.models.families.of(config).write(config)))
        return AutoConfig.from_pretrained(folder)


def made(task: Task) -> torch.nn.Module:
    """The whole model on this rank, in float32."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        kind = AutoModelForCausalLM.from_config(task.config).__class__
    model = kind._from_config(task.config, attn_implementation="sdpa", dtype=torch.float32)
    missing, unexpected = model.load_state_dict(task.weights, strict=False)
    tied = {"lm_head.weight"} if task.config.tie_word_embeddings else set()
    if unexpected or {*missing} != tied:
        raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.to(task.where)


def groups(model: torch.nn.Module, task: Task) -> list[dict[str, Any]]:
    """Matrices decay, the rest does not."""
    weights = [*model.parameters()]
    return [
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": task.decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]


def named(model: torch.nn.Module) -> dict[str, Tensor]:
    """Its parameters, by their names in the class of transformers."""
    return {name.removeprefix("module."): w for name, w in model.named_parameters()}


def stepper(
    model: Any, optimizer: Any, task: Task, hold: Callable[[bool], contextlib.AbstractContextManager[None]]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """hold(last): what surrounds a microbatch, the last of a step or one before. The ranks' gradients are averaged, so each loss is multiplied."""
    ranks = dist.get_world_size()
    count = torch.tensor(task.labels, device=task.where)

    def step() -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=task.where)
        for i, part in enumerate(task.parts):
            words = part.to(task.where)
            with hold(i + 1 == len(task.parts)):
                loss = model(words, labels=words, use_cache=False, num_items_in_batch=count).loss
                (loss * ranks).backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        return total, norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]

    return step


def ddp(task: Task, zero: bool) -> Side:
    """`zero`: each rank has the optimizer's state of some parameters, updates these and sends them to the others (stage 1)."""
    model = DistributedDataParallel(made(task), gradient_as_bucket_view=True)
    how: dict[str, Any] = {"lr": task.lr, "betas": task.betas, "fused": True}
    if zero:
        # its type says tensors alone, it takes groups as well
        given: Any = groups(model, task)
        optimizer: Any = ZeroRedundancyOptimizer(given, torch.optim.AdamW, parameters_as_bucket_view=True, **how)
    else:
        optimizer = torch.optim.AdamW(groups(model, task), **how)

    @contextlib.contextmanager
    def hold(last: bool) -> Any:
        with contextlib.nullcontext() if last else model.no_sync(), torch.autocast(task.where.type, torch.bfloat16, enabled=task.low):
            yield

    def state() -> dict[str, tuple[Tensor, Tensor]]:
        out = {}
        moments = (optimizer.optim if zero else optimizer).state
        for name, w in named(model).items():
            m = moments[w]["exp_avg"] if w in moments else torch.zeros_like(w)
            if zero:
                dist.all_reduce(m := m.clone())
            out[name] = w.detach().cpu().clone(), m.cpu().clone()
        return out

    return Side(stepper(model, optimizer, task, hold), state)


def fsdp(task: Task, reshard: bool) -> Side:
    """FSDP2, a group for each layer and one for the rest. Every microbatch reduces its gradients into shards. `reshard`: weights are whole around
    each forward and each backward alone (stage 3); without, from the first forward of a step to its last backward (stage 2)."""
    model = made(task)
    mesh = init_device_mesh(task.where.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if task.low else MixedPrecisionPolicy()
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)  # type: ignore[arg-type]
    whole: Any = fully_shard(model, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    optimizer = torch.optim.AdamW(groups(model, task), lr=task.lr, betas=task.betas, fused=True)

    @contextlib.contextmanager
    def hold(last: bool) -> Any:
        whole.set_reshard_after_backward(reshard or last)
        yield

    def state() -> dict[str, tuple[Tensor, Tensor]]:
        def full(x: Any) -> Tensor:
            return x.detach().full_tensor().cpu().clone()

        return {name: (full(w), full(optimizer.state[w]["exp_avg"])) for name, w in named(model).items()}

    return Side(stepper(model, optimizer, task, hold), state)


PEERS: dict[int, tuple[str, Callable[[Task], Side]]] = {
    0: ("DDP", lambda task: ddp(task, zero=False)),
    1: ("DDP + ZeRO-1", lambda task: ddp(task, zero=True)),
    2: ("FSDP2, kept", lambda task: fsdp(task, reshard=False)),
    3: ("FSDP2", lambda task: fsdp(task, reshard=True)),
}
"""Stage of sharding → its peer."""

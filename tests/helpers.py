"""What several tests share: ranks that are real processes, ranks that are threads, and a context for either."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lf
from lf.axes import connect

ROOT = Path(__file__).resolve().parents[1]
SEED = int(os.environ["LF_TEST_SEED"])
MEASURED = ("tokens_per_s_per_device", "tflops_per_device", "mfu", "memory_gib")  # what of a record no two runs have in common
QWEN3 = {  # the config.json of a model that takes milliseconds
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 290, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "max_position_embeddings": 64,
}  # fmt: skip


class ChildTraceback(Exception):
    """Where in its own process a rank raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def processes(mesh: lf.Mesh | int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """fn(axes, *args) on every rank of `mesh` (or on that many ranks of dp), each a real process, over gloo; the results in their order.

    The same face as `lf.sim.spmd`. The children are forked from this process, so torch is there already and nothing but results is pickled.
    What a child raises is raised here, with its traceback; the others are ended. A child that says nothing for `timeout_s` is ended, too.
    """
    mesh = lf.Mesh(dp=mesh) if isinstance(mesh, int) else mesh.fill()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, children = [], []
        for rank in range(mesh.size):
            ours, theirs = fork.Pipe(duplex=False)
            child = fork.Process(target=_child, args=(theirs, rank, mesh, f"{folder}/store", timeout_s, fn, args), daemon=True)
            child.start()
            theirs.close()  # or the end of a child that dies would not be seen
            pipes.append(ours)
            children.append(child)
        try:
            return _results(pipes, children, mesh, timeout_s)
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()
                child.join()
            for pipe in pipes:
                pipe.close()


def _results(pipes: list[Any], children: list[Any], mesh: lf.Mesh, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        pending = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(pending), max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} of mesh {mesh} said nothing for {timeout_s:.0f} s")
        for pipe in ready:
            rank = pending[pipe]  # type: ignore[index]
            try:
                value, error, text = pickle.loads(pipe.recv_bytes())
            except EOFError:
                children[rank].join(5)
                raise RuntimeError(f"rank {rank} of mesh {mesh} died with exit code {children[rank].exitcode}") from None
            if text is not None:
                raise error from ChildTraceback(f"rank {rank} {mesh.coords(rank)} of mesh {mesh}:\n{text}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _child(pipe: Any, rank: int, mesh: lf.Mesh, store: str, timeout_s: float, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(mesh.size))
    if loopback := next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None):
        os.environ["GLOO_SOCKET_IFNAME"] = loopback  # the host's name may not resolve
    torch.set_num_threads(1)
    try:
        limit = datetime.timedelta(seconds=max(timeout_s, 60))  # the parent's clock ends a rank that hangs
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=mesh.size, timeout=limit)
        # Plain pickle: torch's own would pass file descriptors that close with this process.
        message = pickle.dumps((fn(connect(mesh, lf.devices.get("cpu")), *args), None, None))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            message = pickle.dumps((None, error, text))
            pickle.loads(message)
        except Exception:
            message = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), text))
    pipe.send_bytes(message)
    pipe.close()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def context(axes: Any, precision: str = "fp64") -> lf.Context:
    return lf.Context(axes, lf.devices.get("cpu"), precision)


def draw(*key: int | str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Numbers that depend on the key alone, so that every rank can have the same or its own."""
    from lf.rng import generator

    return torch.from_numpy(generator("test", *key).standard_normal(shape)).to(dtype)

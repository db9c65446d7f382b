"""Peers that take turns, each in a process of its own: a machine that slows down slows all of them, and each has a peak of memory of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

import lf

Build = Callable[[Any], Iterator[int]]
"""Given a config, yields the memory that the libraries take, then makes one step a turn. A function of a module, so that it can be pickled."""


def take_turns(builds: Mapping[str, Build], config: Any, device: str, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """{peer: {"times": seconds of a step in each round, "bytes": peak beyond the libraries}}, or {"error": why it did not run}."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    children = []
    for name, build in builds.items():
        pipes[name], theirs = spawn.Pipe()
        children.append(spawn.Process(target=_child, args=(theirs, build, config, device, steps), daemon=True))
        children[-1].start()
        theirs.close()
    out: dict[str, dict[str, Any]] = {name: {"times": []} for name in builds}
    for _ in range(rounds):
        for name in builds:
            if "error" not in out[name]:
                try:
                    pipes[name].send("go")
                    kind, value, peak = pipes[name].recv()
                except (EOFError, BrokenPipeError, ConnectionResetError):
                    kind, value, peak = "error", "its process died", 0
                if kind == "error":
                    out[name] = {"error": value}
                else:
                    out[name]["times"].append(value)
                    out[name]["bytes"] = peak
    for child in children:
        child.kill()
    return out


def _child(pipe: Connection, build: Build, config: Any, device: str, steps: int) -> None:
    """One peer: builds its step, then makes some whenever it is told to."""
    here = lf.devices.get(device)
    here.select(0)
    try:
        step = build(config)
        before = next(step)
        for _ in range(2):
            next(step)
        while pipe.recv():
            began = time.perf_counter()
            for _ in range(steps):
                next(step)
            if device == "cuda":
                torch.cuda.synchronize()
            pipe.send(("ok", (time.perf_counter() - began) / steps, max(here.memory_peak() - before, 1)))
    except EOFError:
        pass
    except Exception as error:
        pipe.recv()
        pipe.send(("error", words(error), 0))


def words(error: Exception) -> str:
    """What it was, short enough for a table."""
    return f"{type(error).__name__}: {error}"[:200]

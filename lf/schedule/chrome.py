"""A timeline as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open: zoom, search and measure where a picture is too small.

The format is Google's "Trace Event Format": complete events X, flow events s and f, counters C and metadata M; times in microseconds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import attrs

from lf.schedule.ir import COMPUTE, MEMORY, Action
from lf.schedule.looks import looks
from lf.schedule.picture import pairs
from lf.schedule.timeline import Span, Timeline

THREADS = ("compute", "communication", "memory")
LANES = 100  # at most of one kind of thread: what overlaps goes into lanes of its own, for boxes of one thread may not cross


def chrome(timeline: Timeline, path: str | Path, main: str = "") -> Path:
    """Writes the trace to `path`: a process for each pipeline rank, its threads compute, communication and memory; an arrow from each SEND to its
    RECV, which lasts until the message is there (of a timeline without them, from each forward and backward to what waits for it on another
    rank), and from who gives to who takes in a BRIDGE; and a counter of what is held. Seconds become microseconds; a unit of the times given to
    `cost` becomes one, too. main: the main chain of several, where it has a name.
    """
    scale = 1e6 if timeline.unit == "s" else 1.0
    arrows, look = list(pairs(timeline)), looks(timeline, main)
    until = {b: max(a.end, b.end) for _, a, _, b in arrows if b.action.op in ("RECV_F", "RECV_B")}
    events: list[dict[str, Any]] = []
    thread: dict[tuple[int, Action], int] = {}
    for rank, row in enumerate(timeline.rows):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"pipeline {look.label(rank)}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        free: dict[int, list[float]] = defaultdict(list)  # of each kind of thread, when each of its lanes is free
        for s in sorted((attrs.evolve(s, end=until.get(s, s.end)) for s in row), key=lambda s: s.start):
            kind = _kind(s.action)
            lane = next((i for i, end in enumerate(free[kind]) if end <= s.start), len(free[kind]))
            free[kind][lane : lane + 1] = [s.end]
            thread[rank, s.action] = tid = kind * LANES + lane
            about = {"chain": s.action.chain or None, "stage": s.action.stage, "microbatch": s.action.microbatch, "segment": s.action.segment}
            args = {k: v for k, v in about.items() if v is not None}
            times = {"ts": s.start * scale, "dur": (s.end - s.start) * scale}
            events.append({"ph": "X", "name": str(s.action), "cat": s.action.op, "pid": rank, "tid": tid, **times, "args": args})
        for kind, lanes in free.items():
            for lane in range(len(lanes)):
                name, tid = f"{THREADS[kind]} {lane + 1}" if lane else THREADS[kind], kind * LANES + lane
                events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": name}})
                events.append({"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": tid, "args": {"sort_index": tid}})
    for number, (rank, a, other, b) in enumerate(arrows):
        at, to = _middle(a), _middle(attrs.evolve(b, end=until.get(b, b.end)))  # inside the boxes that it joins
        for ph, r, s, ts in (("s", rank, a, at), ("f", other, b, max(at, to))):
            where = {"pid": r, "tid": thread[r, s.action], "ts": ts * scale}
            events.append({"ph": ph, "bp": "e", "id": number, "name": "message", "cat": "message", **where})
    for rank, steps in enumerate(timeline.memory):
        events += [{"ph": "C", "name": "held", "pid": rank, "ts": t * scale, "args": {"held": held}} for t, held in steps]
    path = Path(path)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
    return path


def _middle(s: Span) -> float:
    return (s.start + s.end) / 2


def _kind(action: Action) -> int:
    return 0 if action.op in (*COMPUTE, "OVERLAP") else 2 if action.op in MEMORY else 1

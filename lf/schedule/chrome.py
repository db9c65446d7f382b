"""A timeline as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open: zoom, search and measure where a picture is too small.

The format is Google's "Trace Event Format": complete events X, flow events s and f, counters C and metadata M; times in microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lf.schedule.ir import COMPUTE, MEMORY, Action
from lf.schedule.picture import pairs
from lf.schedule.timeline import Timeline

THREADS = ("compute", "communication", "memory")


def chrome(timeline: Timeline, path: str | Path) -> Path:
    """Writes the trace to `path`: a process for each pipeline rank with a thread each for compute, communication and memory, an arrow from each
    SEND to its RECV (of a timeline without them from each forward and backward to what waits for it on another rank), and a counter of what is
    held. Seconds become microseconds; a unit of the times given to `cost` becomes one, too.
    """
    scale = 1e6 if timeline.unit == "s" else 1.0
    events: list[dict[str, Any]] = []
    for rank, row in enumerate(timeline.rows):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"pipeline rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        for thread, name in enumerate(THREADS):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}})
        for s in row:
            about = {"stage": s.action.stage, "microbatch": s.action.microbatch, "segment": s.action.segment}
            place = {"pid": rank, "tid": _thread(s.action), "ts": s.start * scale, "dur": (s.end - s.start) * scale}
            args = {k: v for k, v in about.items() if v is not None}
            events.append({"ph": "X", "name": str(s.action), "cat": s.action.op, **place, "args": args})
    for number, (rank, a, other, b) in enumerate(pairs(timeline)):  # an arrow belongs to the box that it begins and ends in: their middles
        for ph, r, s in (("s", rank, a), ("f", other, b)):
            place = {"pid": r, "tid": _thread(s.action), "ts": (s.start + s.end) / 2 * scale}
            events.append({"ph": ph, "bp": "e", "id": number, "name": "message", "cat": "message", **place})
    for rank, steps in enumerate(timeline.memory):
        events += [{"ph": "C", "name": "held", "pid": rank, "ts": t * scale, "args": {"held": held}} for t, held in steps]
    path = Path(path)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
    return path


def _thread(action: Action) -> int:
    return 0 if action.op in (*COMPUTE, "OVERLAP") else 2 if action.op in MEMORY else 1

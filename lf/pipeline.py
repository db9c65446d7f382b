"""A pipeline in the words of the scripts' flags: which layers a stage has, in which order a step goes through the stages, and what it keeps.

pipeline = lf.pipeline.Pipeline("interleaved", chunks=2, recompute="full")
layout = pipeline.layout(model, mesh, seq_len)        who holds what
program = pipeline.program(layout, microbatches)      what a step does: lowered and checked
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import attrs
import numpy as np

from lf import split as splits
from lf.batch import IGNORE, Batch
from lf.config import ConfigError, one_of
from lf.data.batches import pack
from lf.data.stream import Row
from lf.layouts import Layout, layout
from lf.mesh import Mesh
from lf.optim import lr
from lf.schedule.build import build
from lf.schedule.cost import cost
from lf.schedule.ir import Program, ProgramError
from lf.schedule.named import Schedule, on_loop, resolve
from lf.schedule.place import loop
from lf.schedule.recompute import Offload, Recompute, parse_offload, parse_recompute
from lf.segment import Model
from lf.sharding import Sharding

WAYS = ("count", "cost")


@attrs.frozen
class Pipeline:
    """`schedule`: a name of `lf.schedule.named.SCHEDULES`, a function as my.py:fn, or a file with a program (.txt, .csv) · `chunks`: stages on each
    rank (default: the schedule's) · `split`: layers to stages, "count": as many in each; "cost": by floating-point operations; or in words, as
    "e,4,4,h" · `recompute`, `offload`: policies, see `lf.schedule.recompute` · `freeze`: names or patterns of what is not trained · `shard`: of state
    over dp and cp, see `lf.sharding`.
    Raises ConfigError, ProgramError for words that say nothing."""

    schedule: str = "1f1b"
    chunks: int | None = None
    split: str = "count"
    recompute: str = "none"
    offload: str = "none"
    freeze: tuple[str, ...] = ()
    shard: str = "0"
    _named: Schedule = attrs.field(init=False, repr=False, eq=False)
    _recomputed: Recompute = attrs.field(init=False, repr=False, eq=False)
    _offloaded: Offload = attrs.field(init=False, repr=False, eq=False)
    _sharding: Sharding = attrs.field(init=False, repr=False, eq=False)

    @staticmethod
    def of(config: Any) -> Pipeline:
        """Of a script's config, which has fields of these names."""
        return Pipeline(config.schedule, config.chunks, config.split, config.recompute, config.offload, config.freeze, config.shard)

    @_named.default
    def _resolve(self) -> Schedule:
        if self.schedule in lr.SCHEDULES:
            raise ConfigError(
                f"--schedule {self.schedule} is of the learning rate, whose flag is --lr-schedule now; --schedule is the order of a step, as 1f1b"
            )
        if self.chunks is not None and self.chunks < 1:
            raise ConfigError(f"--chunks {self.chunks}: must be at least 1")
        return resolve(self.schedule)

    @_recomputed.default
    def _parse_recompute(self) -> Recompute:
        return parse_recompute(self.recompute)

    @_offloaded.default
    def _parse_offload(self) -> Offload:
        return parse_offload(self.offload)

    @_sharding.default
    def _parse_sharding(self) -> Sharding:
        return Sharding.parse(self.shard)

    def layout(self, model: Model, mesh: Mesh, seq_len: int = 1024) -> Layout:
        """The model over the mesh. seq_len: tokens of the row that a split by cost is worked out for. Raises as `lf.layout`."""
        mesh = mesh.fill()
        place = self._named.place(mesh.pp, self._named.chunks if self.chunks is None else self.chunks)
        if self.split not in WAYS:
            if re.fullmatch("[a-z]{2,}", self.split):
                one_of("--split, which may also be in words, as e,4,h:", self.split, WAYS)
            stages = len(splits.explicit(model, self.split))
            if stages != len(place):
                if self.chunks is not None or self._named.place is not on_loop or stages < mesh.pp:
                    raise ConfigError(
                        f"--split {self.split} is of {stages} stages; --schedule {self.schedule} on pp={mesh.pp} has {len(place)}: "
                        f"give as many words, or another --chunks"
                    )
                place = loop(stages, mesh.pp)
            return layout(model, mesh, split=self.split, placement=place, frozen=self.freeze, sharding=self._sharding)
        sizes = splits.by_count(model, len(place)) if self.split == "count" else splits.by_cost(model, len(place), _row(seq_len))
        return layout(model, mesh, split=sizes, placement=place, frozen=self.freeze, sharding=self._sharding)

    def program(self, where: Layout, microbatches: int) -> Program:
        """What each rank of a pipeline does in a step. Raises ProgramError, ConfigError for what cannot be."""
        return build(where, microbatches, self._named.generate, self._recomputed, self._offloaded)

    def programs(self, where: Layout, counts: Sequence[int]) -> list[Program]:
        """One for each number of microbatches that occurs in a run. Raises for the first that cannot be, before any is run."""
        out = []
        for n in counts:
            try:
                out.append(self.program(where, n))
            except ProgramError as error:
                if len(counts) == 1:
                    raise
                each = ", ".join(map(str, counts))
                raise ProgramError(f"steps of this run have {each} microbatches; --schedule {self.schedule} with {n}: {error}") from None
        return out

    def told(self, program: Program, stages: int) -> str:
        """In a line: the schedule, its stages, how much of the ranks' time is idle where each stage takes the same, and what is not kept."""
        timeline = cost(program)
        idle = fmean(timeline.bubble(rank) for rank in range(len(program))) / (timeline.makespan or 1.0)
        words = f"{self.schedule}, {stages} stage{'s' * (stages > 1)}, bubble {idle:.1%} in unit times, recompute {self._recomputed}"
        words += f", offload {self._offloaded}" if str(self._offloaded) != "none" else ""
        return words + (f", sharding {self._sharding}" if self._sharding.stage else "")


def micro_batch(rows: int | None, microbatches: int | None, global_batch: int, dp: int) -> int:
    """Rows in a microbatch: --micro-batch, or what --microbatches of a rank and step makes of the global batch; 1 where neither is said.

    Raises ConfigError where the two do not agree, or the global batch does not divide."""
    for flag, value in (("--micro-batch", rows), ("--microbatches", microbatches)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    if microbatches is None:
        return 1 if rows is None else rows
    each, left = divmod(global_batch, dp * microbatches)
    if left or not each:
        unit = dp * microbatches
        near = sorted({max(global_batch // unit, 1) * unit, -(-global_batch // unit) * unit})
        raise ConfigError(
            f"--microbatches {microbatches}: --global-batch {global_batch} is no multiple of dp·microbatches = {dp}·{microbatches} = {unit}; "
            f"the nearest that are: {' and '.join(map(str, near))}"
        )
    if rows not in (None, each):
        raise ConfigError(
            f"--micro-batch {rows} and --microbatches {microbatches} do not agree: {rows}·{microbatches}·dp = {rows * microbatches * dp} rows "  # type: ignore[operator]
            f"a step, and --global-batch is {global_batch}; leave one of the two out, or give that --global-batch"
        )
    return each


def _row(seq_len: int) -> Batch:
    return pack([Row(np.zeros(seq_len, np.int64), np.full(seq_len, IGNORE, np.int64), np.zeros(1, np.int64))])

"""How many rows a step takes: always the same, or fewer at first.

A ramp begins with `start` rows a step and adds `increment` each time a further share of its `rows` rows of data is consumed, until a step takes
`global_batch` (Megatron-LM's --rampup-batch-size). Rows and steps are closed forms of the step, so where a run is follows from its step alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import attrs

from lf.config import ConfigError
from lf.data.batches import microbatches


@attrs.frozen
class Stage:
    """From step `step` on, before which `consumed` rows were taken, a step takes `rows` rows."""

    step: int
    consumed: int
    rows: int


def _stages(ramp: Ramp) -> tuple[Stage, ...]:
    """With k increments, a step that begins after c rows takes start + increment · min(⌊c·k / rows⌋, k)."""
    k = (ramp.global_batch - ramp.start) // ramp.increment
    out = [Stage(0, 0, ramp.start if ramp.rows else ramp.global_batch)]
    while out[-1].rows < ramp.global_batch:
        last = out[-1]
        done = (last.rows - ramp.start) // ramp.increment
        end = -(-(done + 1) * ramp.rows // k)  # the first c at which the next stage begins
        steps = -(-(end - last.consumed) // last.rows)
        consumed = last.consumed + steps * last.rows
        out.append(Stage(last.step + steps, consumed, ramp.start + ramp.increment * min(consumed * k // ramp.rows, k)))
    return tuple(out)


@attrs.frozen
class Ramp:
    """Rows of each step. `Ramp(256)` is 256 rows from the first step on; see the module for the others. Raises ConfigError for what cannot be."""

    global_batch: int
    start: int = attrs.field(default=attrs.Factory(lambda self: self.global_batch, takes_self=True))
    increment: int = 1
    rows: int = 0
    stages: tuple[Stage, ...] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.start <= self.global_batch:
            raise ConfigError(f"batch_ramp: start={self.start} must lie between 1 and global_batch={self.global_batch}")
        if self.increment < 1 or self.rows < 0:
            raise ConfigError(f"batch_ramp: increment={self.increment} must be at least 1 and rows={self.rows} at least 0")
        if (self.global_batch - self.start) % self.increment:
            raise ConfigError(
                f"batch_ramp: steps of {self.increment} do not lead from start={self.start} to global_batch={self.global_batch}: "
                f"their difference {self.global_batch - self.start} must be a multiple of the increment"
            )
        object.__setattr__(self, "stages", _stages(self))

    @staticmethod
    def parse(text: str | None, global_batch: int) -> Ramp:
        """'start:increment:rows' → Ramp; None: always `global_batch` rows. Raises ConfigError where the text does not read so."""
        if text is None:
            return Ramp(global_batch)
        words = text.split(":")
        if len(words) != 3 or not all(word.isascii() and word.isdigit() for word in words):
            raise ConfigError(f"batch_ramp {text!r} should read start:increment:rows, three whole numbers, as 32:32:100000")
        return Ramp(global_batch, *map(int, words))

    def at(self, step: int) -> int:
        """The rows of step `step`, counted from 0."""
        return self._stage(step).rows

    def consumed(self, step: int) -> int:
        """The rows that all steps before step `step` take."""
        stage = self._stage(step)
        return stage.consumed + (step - stage.step) * stage.rows

    def steps(self, rows: int) -> int:
        """How many steps it takes to consume at least `rows` rows."""
        stage = self.stages[bisect_right(self.stages, max(rows, 0), key=lambda s: s.consumed) - 1]
        return stage.step + -(-max(rows - stage.consumed, 0) // stage.rows)

    def _stage(self, step: int) -> Stage:
        return self.stages[bisect_right(self.stages, max(step, 0), key=lambda s: s.step) - 1]

    def microbatches(self, micro_batch: int, dp: int) -> tuple[int, ...]:
        """The numbers of microbatches of a rank that occur, the smallest first. Raises ConfigError that names the nearest ramp that divides."""
        counts = microbatches(self.global_batch, micro_batch, dp)
        unit = micro_batch * dp
        if wrong := [stage.rows for stage in self.stages if stage.rows % unit]:
            near = " or ".join(f"{start}:{increment}:{self.rows}" for start, increment in self._near(unit))
            raise ConfigError(
                f"batch_ramp {self.start}:{self.increment}:{self.rows}: steps of {', '.join(map(str, wrong[:5]))}{' …' * (len(wrong) > 5)} rows; "
                f"each must be a multiple of micro_batch*dp = {micro_batch}*{dp} = {unit}. The nearest that work: {near}"
            )
        return tuple(dict.fromkeys([*(stage.rows // unit for stage in self.stages), counts]))

    def _near(self, unit: int) -> Iterator[tuple[int, int]]:
        """Starts and increments that are multiples of `unit`, near to ours, and lead to the same global batch."""
        below = self.start // unit * unit
        for start in (below, below + unit) if self.start % unit else (below,):
            left = self.global_batch - start
            if start >= unit and left >= 0:
                fits = [n for n in range(unit, left + 1, unit) if left % n == 0]
                yield start, min(fits, key=lambda n: abs(n - self.increment), default=unit)

    def __str__(self) -> str:
        first, *rest = self.stages
        return ", ".join([f"{first.rows} rows a step", *(f"{stage.rows} from step {stage.step + 1} on" for stage in rest)])


def length(steps: int | None, tokens: int | None, seq_len: int, ramp: Ramp, default: int) -> int:
    """How many steps a run has: so many, or as many as it takes to consume `tokens` tokens; `default` where neither is given.

    Raises ConfigError where both are given, or one is below 1.
    """
    if steps is not None and tokens is not None:
        raise ConfigError(f"--steps {steps} and --tokens {tokens} both say how long the run is: leave one of them out")
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps {steps}: must be at least 1")
    if tokens is None:
        return default if steps is None else steps
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: must be at least 1")
    return ramp.steps(-(-tokens // seq_len))

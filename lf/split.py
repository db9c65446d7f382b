"""How layers are dealt to the stages of a pipeline: by count, by cost, or in words. Each way gives the number of layers of each stage.

The first and the last layer (an embedding, a head) are layers like the others. A stage may be empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from lf.batch import Batch
from lf.mesh import shares
from lf.segment import Model
from lf.spec import LayoutError

FIRST, LAST = "e", "h"


def by_count(model: Model, stages: int) -> tuple[int, ...]:
    """Balanced shares. Raises LayoutError for less than one stage."""
    return shares(len(model.layers()), _at_least_one(stages))


def by_cost(model: Model, stages: int, batch: Batch) -> tuple[int, ...]:
    """The split whose most expensive stage is the cheapest there can be, by the floating-point operations of `batch`; among those the one of the
    smallest sum of squares, so that the other stages are as even as they can be.

    This is the linear partition problem (Skiena, The Algorithm Design Manual, §10.7), by dynamic programming: stages · layers² additions.
    Raises LayoutError for a model with a segment that does not know its operations.
    """
    costs = []
    for segments in model.layers().values():
        layer = 0.0
        for segment in segments:
            if segment.flops is None:
                raise LayoutError(f"segment {segment.name!r} does not say its floating-point operations; give it `flops`, or split by count")
            layer += segment.flops(batch)
        costs.append(layer)
    return partition(costs, _at_least_one(stages))


def partition(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Consecutive costs in `stages` groups: how many are in each. The largest sum is minimal, then the sum of squares, then how many are empty."""
    n, before = len(costs), [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    largest = [before[j] - before[0] for j in range(n + 1)]  # of the first j in one group
    for _ in range(stages - 1):
        largest = [min(max(largest[i], before[j] - before[i]) for i in range(j + 1)) for j in range(n + 1)]
    limit = largest[n]
    best: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ()), *[(math.inf, 0, ())] * n]  # of the first j in so many groups
    for _ in range(stages):
        best = [min(_joined(best[i], before[j] - before[i], j - i) for i in range(j + 1) if before[j] - before[i] <= limit) for j in range(n + 1)]
    return best[n][2]


def _joined(groups: tuple[float, int, tuple[int, ...]], cost: float, size: int) -> tuple[float, int, tuple[int, ...]]:
    """(sum of squares, how many are empty, sizes) with one group more."""
    return groups[0] + cost**2, groups[1] + (size == 0), (*groups[2], size)


def explicit(model: Model, text: str) -> tuple[int, ...]:
    """A split in words, one a stage: 'e,4,4,5,3,h' or 'e+3,4,3+h'.

    `e`: the first layer · `h`: the last · a number: so many of those between · `0`: an empty stage · `+` joins what stands in one stage. An `e`
    or `h` that is not named goes to the first or the last stage. Raises LayoutError that names the word, or the sum and one that would do.
    """
    inner = len(model.layers()) - 2
    if inner < 0:
        raise LayoutError(f"split {text!r}: words are for a first layer, a last one and those between; the model has {inner + 2}: give counts")
    stages = [[part.strip() for part in word.split("+")] for word in text.split(",")]
    parts = [part for stage in stages for part in stage]
    for part in parts:
        if part not in (FIRST, LAST) and not re.fullmatch("[0-9]{1,9}", part):
            raise LayoutError(f"split {text!r}: {part!r} should be {FIRST}, {LAST} or a number of layers, joined by + inside of a stage")
        if part in (FIRST, LAST) and parts.count(part) > 1:
            raise LayoutError(f"split {text!r}: {part!r} stands twice; there is one {'first' if part == FIRST else 'last'} layer")
    counted = [i for i, part in enumerate(parts) if part not in (FIRST, LAST) and int(part)]
    first, last = (parts.index(name) if name in parts else None for name in (FIRST, LAST))
    if first is not None and counted and counted[0] < first:
        raise LayoutError(f"split {text!r}: {FIRST} is the first layer, and {parts[counted[0]]} stand before it; put it in front of them")
    if last is not None and counted and counted[-1] > last:
        raise LayoutError(f"split {text!r}: {LAST} is the last layer, and {parts[counted[-1]]} stand behind it; put it behind them")
    if first is not None and last is not None and last < first:
        raise LayoutError(f"split {text!r}: {LAST} stands before {FIRST}; the last layer cannot come before the first")
    numbers = [sum(int(part) for part in stage if part not in (FIRST, LAST)) for stage in stages]
    if sum(numbers) != inner:
        added = " + ".join(str(int(part)) for part in parts if part not in (FIRST, LAST)) or "no number"
        total = f" = {sum(numbers)}" if "+" in added else ""
        would = ",".join(_word(stage, n) for stage, n in zip(stages, _proposal(stages, numbers, inner)))
        raise LayoutError(
            f"split {text!r}: {added}{total} for the {inner} layers between the first and the last; {would!r} would do"
        )
    numbers[next((i for i, stage in enumerate(stages) if FIRST in stage), 0)] += 1
    numbers[next((i for i, stage in enumerate(stages) if LAST in stage), -1)] += 1
    return tuple(numbers)


def counts(model: Model, split: Sequence[int]) -> tuple[int, ...]:
    """A split that is given as numbers, once it is known to add up. Raises LayoutError with one that would."""
    split = tuple(split)
    if wrong := [n for n in split if isinstance(n, bool) or not isinstance(n, int) or n < 0]:
        raise LayoutError(f"split {split}: {wrong[0]!r} is no number of layers")
    n = len(model.layers())
    if not split or sum(split) != n:
        would = by_count(model, max(len(split), 1))
        words = f"{' + '.join(map(str, split))} = {sum(split)}" if split else "no stage"
        raise LayoutError(f"split {split}: {words} for {n} layers, the first and the last included; {would} would do")
    return split


def _at_least_one(stages: int) -> int:
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise LayoutError(f"stages={stages!r} must be a whole number, at least 1")
    return stages


def _proposal(stages: list[list[str]], numbers: list[int], inner: int) -> list[int]:
    """The same words with numbers that add up: balanced over the stages that have one, or over those that may have one."""
    chosen = [i for i, n in enumerate(numbers) if n]
    if not chosen:
        first = next((i for i, stage in enumerate(stages) if FIRST in stage), 0)
        last = next((i for i, stage in enumerate(stages) if LAST in stage), len(stages) - 1)
        chosen = [i for i in range(len(stages)) if first < i < last] or [*range(first, last + 1)]
    given = dict(zip(chosen, shares(inner, len(chosen))))
    return [given.get(i, 0) for i in range(len(stages))]


def _word(stage: list[str], number: int) -> str:
    words = [name for name in (FIRST,) if name in stage]
    words += [str(number)] if number or not set(stage) & {FIRST, LAST} else []
    return "+".join(words + [name for name in (LAST,) if name in stage])

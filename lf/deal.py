"""Dealing the items of a chain over its places, the dp coordinates of the rows that a unit of it stands on, so that no place has much more to do.

Scheduling on equal machines: the longest item first, always to the place with the least (Graham 1969, doi 10.1137/0117039: at most
4/3 − 1/(3·places) of the best), then exchanges between the fullest place and the emptiest while they help. Every rank computes it alone from the
plans and gets the same.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate, pairwise

import attrs

from lf.batch import BatchError
from lf.chains import Items, groups
from lf.mesh import shares
from lf.spec import LayoutError

ROUNDS = 64  # of exchanges: each takes the best one there is, so that few bring most


@attrs.frozen
class Share:
    """The address of an item: item `item` of data batch (`dp`, `microbatch`)."""

    microbatch: int
    dp: int
    item: int


@attrs.frozen
class Dealt:
    """What each place of a chain works at in one step.

    `shares[unit, place]`: its items, ascending; the order in which they are packed · `places[microbatch, dp]`: of each item of a data batch the place
    · `microbatches`: of each unit · `loads`: of each unit what its places have to do, by cost, in the order of the places; `before`: what they would
    have if the items were cut by number.
    """

    shares: dict[tuple[int, int], tuple[Share, ...]]
    places: dict[tuple[int, int], tuple[int, ...]]
    microbatches: tuple[range, ...]
    loads: tuple[tuple[float, ...], ...]
    before: tuple[tuple[float, ...], ...]

    def unit(self, microbatch: int) -> int:
        """The unit that works at a microbatch of the data."""
        return next(u for u, group in enumerate(self.microbatches) if microbatch in group)

    @property
    def imbalance(self) -> tuple[float, float]:
        """Of the step, before and after: how many times as long it takes as it would if all places had as much."""
        return imbalance(*self.before), imbalance(*self.loads)


def imbalance(*units: Sequence[float]) -> float:
    """Of units that run one after another, each as long as its fullest place: Σ max / Σ mean of their places' loads. 1.0 where there is nothing."""
    mean = math.fsum(math.fsum(loads) / len(loads) for loads in units if loads)
    return math.fsum(max(loads) for loads in units if loads) / mean if mean else 1.0


def naive(costs: Sequence[float], places: int) -> tuple[tuple[int, ...], ...]:
    """For each place its items where they are cut in order into equal numbers."""
    return tuple(tuple(range(lo, hi)) for lo, hi in pairwise(accumulate(shares(len(costs), places), initial=0)))


def deal(costs: Sequence[float], places: int) -> tuple[tuple[int, ...], ...]:
    """For each place its items, ascending. The largest load is at most 4/3 of the least that there can be, and never above that of `naive`; equal
    items give numbers that differ by at most one. Raises BatchError for a cost that is no finite number from 0 up."""
    if places < 1:
        raise LayoutError(f"{len(costs)} items over {places} places: a unit stands on one place at least")
    for i, cost in enumerate(costs):
        if not 0 <= cost < math.inf:
            raise BatchError(f"item {i} costs {cost}: a cost is a finite number from 0 up, such as floating-point operations")
    held: list[list[int]] = [[] for _ in range(places)]
    least = [(0.0, 0, p) for p in range(places)]  # a heap of (load, items, place)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, n, p = least[0]
        held[p].append(i)
        heapq.heapreplace(least, (load + costs[i], n + 1, p))
    loads = _loads(costs, held)
    for _ in range(ROUNDS):
        full, empty = loads.index(max(loads)), loads.index(min(loads))
        pair = _exchange(costs, held[full], held[empty], (loads[full] - loads[empty]) / 2)
        new = _loads(costs, pair)
        if max(new) >= loads[full]:
            break
        (held[full], held[empty]), (loads[full], loads[empty]) = pair, new
    plain = naive(costs, places)
    return plain if max(_loads(costs, plain)) < max(loads) else tuple(tuple(sorted(mine)) for mine in held)


def _loads(costs: Sequence[float], held: Sequence[Sequence[int]]) -> list[float]:
    return [math.fsum(costs[i] for i in mine) for mine in held]  # exact, so that no order matters


def _exchange(costs: Sequence[float], full: list[int], empty: list[int], half: float) -> tuple[list[int], list[int]]:
    """One item of `full` for one of `empty`, or for none: the pair whose costs differ by what is nearest to `half`."""
    there = sorted((costs[i], i) for i in empty)
    best: tuple[float, int, int] | None = None
    for a in full:
        at = bisect(there, (costs[a] - half, -1))
        for cost, b in ((0.0, -1), *there[max(at - 1, 0) : at + 1]):
            found = (abs(costs[a] - cost - half), a, b)
            best = found if best is None or found < best else best
    if best is None:
        return full, empty
    _, a, b = best
    return [i for i in full if i != a] + ([b] if b >= 0 else []), [i for i in empty if i != b] + [a]


def dealt(items: Sequence[Sequence[Items]], units: int, places_of: Sequence[Sequence[int]]) -> Dealt:
    """Deals all items of a step, `items[microbatch][dp]` of the main chain's dp, where the chain has `units` units and unit u stands on the dp
    coordinates `places_of[u]`. Raises BatchError for a cost that cannot be, with the item."""
    for m, batches in enumerate(items):
        for d, batch in enumerate(batches):
            if bad := [(j, c) for j, c in enumerate(batch.cost) if not 0 <= c < math.inf]:
                where = f"item {bad[0][0]} of data batch dp={d} of microbatch {m}"
                raise BatchError(f"{where} costs {bad[0][1]}: a cost is a finite number from 0 up, such as floating-point operations")
    of: dict[tuple[int, int], tuple[Share, ...]] = {}
    places = {(m, d): [0] * len(batch.cost) for m, batches in enumerate(items) for d, batch in enumerate(batches)}
    after, before = [], []
    for u, group in enumerate(groups(units, len(items))):
        mine = [Share(m, d, j) for m in group for d, batch in enumerate(items[m]) for j in range(len(batch.cost))]
        costs = [c for m in group for batch in items[m] for c in batch.cost]
        hands = deal(costs, len(places_of[u]))
        for place, hand in zip(places_of[u], hands):
            of[u, place] = tuple(mine[i] for i in hand)
            for share in of[u, place]:
                places[share.microbatch, share.dp][share.item] = place
        after.append(tuple(_loads(costs, hands)))
        before.append(tuple(_loads(costs, naive(costs, len(places_of[u])))))
    return Dealt(of, {k: tuple(v) for k, v in places.items()}, groups(units, len(items)), tuple(after), tuple(before))

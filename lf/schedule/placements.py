"""What the placements of an encoder cost, in one table: for encoders of several sizes, and pipelines and steps of several lengths.

A pipeline rank's share of a microbatch takes 1 forward, 1 for the input's gradient and 1 for the weights'; the encoder e forward and 2e backward of
a microbatch. The bound is what no placement on the pipeline's own rows can be below: the main program alone, or all work spread evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs

from lf.chain_layouts import Joint
from lf.schedule.beside import Beside, beside
from lf.schedule.cost import Times, cost, durations, held
from lf.schedule.ir import Action, Program, microbatches, placement
from lf.schedule.named import SCHEDULES
from lf.schedule.plan import plan

JOINT = Joint("encoder.output", "encoder", 0, "", 0)
ON_THE_SAME_ROWS = ("nested", "decoupled", "inline")


@attrs.frozen
class Placed:
    """A row of the table. `share`: the encoder's forward, of that of a rank's share of the main chain · `alone`: the main program's time without an
    encoder · `bound`: see the page · `room`: whether its bubbles have room, see `room` · `time`: what the step takes · `held`: units (microbatches)
    of the encoder held at most on a row, and on all together."""

    schedule: str
    ranks: int
    microbatches: int
    share: float
    kind: str
    alone: float
    bound: float
    room: bool
    time: float
    held: tuple[float, float]

    @property
    def over(self) -> float:
        """How far above the bound, as a part of it."""
        return self.time / self.bound - 1


def room(main: Program, joint: Joint, times: Times, tolerance: float = 0.05) -> bool:
    """Whether a chain of one stage, a unit a microbatch, has room in the bubbles of a program of the main chain:

    in time   The forwards of all units up to any one fit into what the rows are idle before that one is wanted, and the backwards from any one on
              into what they are idle after it is given back; but for the first forward and the last backward: a program that begins and ends with
              what the chain feeds is idle neither before nor after.
    by rows   A unit's backward is on the row of its forward. What a row is idle before the last unit is wanted, after the first is given back, and
              in all: the least of these tells how many units it can take. Those of all rows together are enough.
    the ends  The first forward and the last backward, which all rows share, take half of the tolerance at most.

    Without one of the first two, some of the chain must run while the program, as it is alone, has no row idle that could; without the last one
    the ends alone take half of what is tolerated.
    """
    count, rows = microbatches(main), range(len(main))
    laid = plan(main, times, 0.0, [joint], {joint.target: count, joint.source: count})
    time = times if callable(times) else durations(times)
    forward, backward = (time(Action(op, joint.source_stage, 0, chain=joint.source)) for op in "FB")
    wanted = [laid.wanted(joint.source, u) for u in range(count)]
    due, release = sorted(s for s, _ in wanted), sorted(e for _, e in wanted)
    small = 1e-9 * laid.end
    before = all(sum(laid.idle(r, 0.0, t) for r in rows) + small >= k * forward for k, t in enumerate(due))
    after = all(sum(laid.idle(r, t, laid.end) for r in rows) + small >= (count - 1 - k) * backward for k, t in enumerate(release))
    takes = sum(
        min(
            laid.idle(r, 0.0, due[-1]) / forward,
            laid.idle(r, release[0], laid.end) / backward,
            laid.idle(r, 0.0, laid.end) / (forward + backward),
        )
        for r in rows
    )
    return before and after and takes + small >= count and (forward + backward) / len(main) <= tolerance / 2 * laid.end


def comparison(
    shares: Sequence[float] = (0.1, 0.5, 1.5),
    ranks: Sequence[int] = (4, 8, 16),
    steps: Sequence[int] = (1, 2, 4, 8),
    schedule: str = "1f1b",
    kinds: Sequence[str] = ON_THE_SAME_ROWS,
    in_flight: int | None = None,
) -> Iterator[Placed]:
    """The rows of the table. steps: microbatches of a step, in multiples of the ranks. kinds: of KINDS; dedicated has one rank more."""
    for p in ranks:
        for m in (p * n for n in steps):
            main = SCHEDULES[schedule].generate(SCHEDULES[schedule].place(p, SCHEDULES[schedule].chunks), m)
            share = p / len(placement(main))
            for e in shares:
                yield from _placed(main, schedule, {"F": share, "I": share, "W": share, "encoder:F": e, "encoder:B": 2 * e}, kinds, in_flight)


def _placed(main: Program, schedule: str, times: Mapping[str, float], kinds: Sequence[str], in_flight: int | None) -> Iterator[Placed]:
    p, m, e = len(main), microbatches(main), times["encoder:F"]
    alone = cost(main, times)
    bound = max(alone.makespan, (sum(map(alone.busy, range(p))) + 3 * e * m) / p)
    fits = room(main, JOINT, times)
    for kind in kinds:
        where = Beside(kind, in_flight=in_flight if kind in ("nested", "dedicated") else None)
        of_all = {**times, "encoder:F": e * m, "encoder:B": 2 * e * m} if kind == "decoupled" else times
        timeline = cost(beside(main, [JOINT], {"encoder": where}, times=of_all), of_all, joints=[JOINT])
        each, together = held(timeline, "encoder")
        units = m if kind == "decoupled" else 1
        yield Placed(schedule, p, m, e, kind, alone.makespan, bound, fits, timeline.makespan, (max(each) * units, together * units))

"""How the actions of a timeline look, on a terminal and in pictures: a hue for each op, for each chain beside the main one hues of its own, and
from light to dark where a rank has several stages of a chain."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from lf.schedule.ir import BRIDGES, COMPUTE, Action, flat
from lf.schedule.timeline import Timeline

# Hues that a colour-blind person tells apart (Okabe & Ito 2008; the violet of REMAT and the brown of copies are added), and their greys differ.
COLOURS = {
    "F": "#56B4E9",
    "B": "#009E73",
    "I": "#E69F00",
    "W": "#F0E442",
    "REMAT": "#8E7CC3",
    "REDUCE": "#CC79A7",
    "GATHER": "#D55E00",
    "OFFLOAD": "#A5714B",
    "FETCH": "#A5714B",
}
BESIDE = (
    {"F": "#CC6677", "B": "#882255", "I": "#AA4466", "W": "#DDAABB", "REMAT": "#B86B9E"},
    {"F": "#A8A13C", "B": "#66601A", "I": "#87802B", "W": "#D6D193", "REMAT": "#8C8650"},
    {"F": "#8C9CAD", "B": "#3F4E5E", "I": "#65768A", "W": "#C0CAD4", "REMAT": "#75818E"},
)
"""Of the chains beside the main one, in the order of their names: rose, olive and slate, and again from the first."""
BRIDGE, OTHER = "#444444", "#999999"
MEANING = {
    "F": "forward",
    "B": "backward",
    "I": "backward, input",
    "W": "backward, weights",
    "REMAT": "forward again",
    "REDUCE": "sum of gradients",
    "GATHER": "parameters made whole",
    "OFFLOAD": "to the host",
    "FETCH": "and back",
}
Unit = tuple[str, int, int | None]


@attrs.frozen
class Looks:
    """`main`: the chain that the others are beside · `beside`: their names, sorted, so that each looks the same in drawings of the same chains ·
    `stages`: of each rank, the stages that it has of each chain · `shared`: (chain, stage, unit) of what several ranks do a part of."""

    main: str
    beside: tuple[str, ...]
    stages: tuple[dict[str, tuple[int, ...]], ...]
    shared: frozenset[Unit]

    def of(self, rank: int, chain: str) -> tuple[int, ...]:
        return self.stages[rank].get(chain, ())

    @property
    def most(self) -> tuple[int, ...]:
        """The stages of the main chain on a rank that has the most."""
        return max((of.get(self.main, ()) for of in self.stages), key=len, default=())

    def colour(self, action: Action, rank: int) -> str:
        """As #rrggbb: the hue is that of the op and the chain; of a rank's stages of a chain the first is the lightest and the last the darkest."""
        return shade(self.hues(action.chain).get(action.op, BRIDGE if action.op in BRIDGES else OTHER), action, self.of(rank, action.chain))

    def hues(self, chain: str) -> dict[str, str]:
        return {**COLOURS, **BESIDE[self.beside.index(chain) % len(BESIDE)]} if chain in self.beside else COLOURS

    def used(self, timeline: Timeline, chain: str) -> dict[str, str]:
        """{op: hue} of the compute of a chain, in one order always."""
        seen = {a.op for row in timeline.rows for s in row for a in flat([s.action]) if a.chain == chain}
        return {op: self.hues(chain)[op] for op in COMPUTE if op in seen}

    def label(self, rank: int) -> str:
        """'rank 4: vision' where a rank does nothing but what is beside the main chain."""
        mine = [chain for chain in self.beside if chain in self.stages[rank]]
        return f"rank {rank}: {', '.join(mine)}" if mine and self.main not in self.stages[rank] else f"rank {rank}"

    def sign(self, chain: str) -> str:
        """As few letters of a chain beside the main one as tell it from the others; of the main one none."""
        if chain not in self.beside:
            return ""
        others = [other for other in self.beside if other != chain]
        return next((chain[:n] for n in range(1, len(chain)) if not any(other.startswith(chain[:n]) for other in others)), chain)

    def is_shared(self, action: Action) -> bool:
        return action.op in COMPUTE and (action.chain, action.stage, action.microbatch) in self.shared


def looks(timeline: Timeline, main: str = "") -> Looks:
    """main: the name of the main chain, of a timeline in which it has one."""
    stages: list[dict[str, set[int]]] = []
    ranks: dict[Unit, set[int]] = {}
    for rank, row in enumerate(timeline.rows):
        stages.append({})
        for a in flat([s.action for s in row]):
            if a.op in COMPUTE:
                stages[-1].setdefault(a.chain, set()).add(a.stage)
                ranks.setdefault((a.chain, a.stage, a.microbatch), set()).add(rank)
    beside = tuple(sorted({chain for of in stages for chain in of} - {main}))
    shared = frozenset(unit for unit, on in ranks.items() if len(on) > 1)
    return Looks(main, beside, tuple({chain: tuple(sorted(of)) for chain, of in each.items()} for each in stages), shared)


def ops(timeline: Timeline) -> list[str]:
    """Those that occur and have a meaning to tell, in one order always."""
    seen = {a.op for row in timeline.rows for s in row for a in flat([s.action])}
    return [op for op in MEANING if op in seen]


def shade(back: str, action: Action, stages: Sequence[int]) -> str:
    if len(stages) < 2 or action.stage not in stages or action.op not in COMPUTE:
        return back
    at = 2 * stages.index(action.stage) / (len(stages) - 1) - 1  # from -1 to 1
    return mixed(back, 255, -at / 2) if at < 0 else mixed(back, 0, at / 5)


def mixed(back: str, other: int, share: float) -> str:
    """The colour with this share of white (255) or black (0)."""
    return "#" + "".join(f"{round(int(back[i : i + 2], 16) * (1 - share) + other * share):02x}" for i in (1, 3, 5))


def ink(background: str) -> str:
    """What can be read on it: black or white."""
    r, g, b = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * r + 0.587 * g + 0.114 * b > 115 else "#ffffff"


def amount(held: float, unit: str) -> str:
    """What is held: bytes where it was measured, else in the unit of whoever made the timeline."""
    return f"{held / 2**30:.2f} GiB" if unit == "s" else f"{held:.4g}"


def span_of_time(t: float, unit: str) -> str:
    return f"{t:.4g}" if not unit else f"{t:.4g} s" if t >= 1 else f"{t * 1e3:.4g} ms"

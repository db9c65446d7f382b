"""What scripts/mutate breaks where a model has several chains: who runs what, what edges carry, where it stands."""

from __future__ import annotations

from mutation import words

from lf import bridge, chain_feed, chains, deal, train
from lf.chain_layouts import Layouts
from lf.schedule import nest
from lf.schedule.edges import Edges
from lf.schedule.feed import Feed
from lf.schedule.graphs import Graphs
from lf.schedule.ground import Ground
from lf.schedule.holds import Holds
from lf.schedule.lower import _with_reductions
from lf.schedule.move import _Walk
from lf.schedule.names import _Look
from lf.schedule.pieces import _walked
from lf.schedule.run import _Rank

LAW, BRIDGE, DEAL = "tests/test_placements.py", "tests/test_bridge.py", "tests/test_deal.py"
CHAINS, FUZZ, LAYOUTS = "tests/schedule/test_check_chains.py", "tests/schedule/test_mutations_chains.py", "tests/test_chain_layouts.py"
BESIDE, STEPS = "tests/schedule/test_beside.py", "tests/test_chains.py"

CHAIN = [
    words(
        "groups: the last microbatch is left out",
        (LAW, DEAL),
        (chains.groups, "(u + 1) * microbatches // units", "max((u + 1) * microbatches // units - 1, 1)"),
    ),
    words("deal: items in turn", DEAL, (deal.deal, "key=lambda i: (-costs[i], i)", "key=lambda i: i")),
    words(
        "bridge: places have equal rows",
        BRIDGE,
        (bridge.End.packed, "equal(padded(ends[-1], 2 * self.parts), self.parts)", "equal(ends[-1], self.parts)"),
    ),
    words("bridge: rows of other microbatches, too", (BRIDGE, LAW), (bridge._moves, "item.microbatch != m or", "")),
    words("bridge: gradients of one row replace each other", (BRIDGE, LAW), (bridge.assemble, "out[a:b] += piece", "out[a:b] = piece")),
    words("bridge: own rows stay where they were", (BRIDGE, LAW), (bridge.start, "x[here[0] : here[1]]", "x[there[0] : there[1]]")),
    words("edges: the gradient of one edge for all of a joint", LAW, (Edges.give_back, "mine[f.joint] + g if f.joint in mine else g", "g")),
    words("edges: an output's gradient is not returned", LAW, (Edges.returned, "out[tap(name)] = self", "_ = self")),
    words("edges: what was made is kept", LAW, (Edges.forward, "del self.made[source]", "pass")),
    words("edges: one bridge is all", LAW, (Edges.last, "if n < ", "if 1 > ")),
    words(
        "graphs: what edges bring has no gradient",
        LAW,
        (Graphs.make, "{f.name: f.live for f in piece.fed}", "{f.name: False for f in piece.fed}"),
    ),
    words("trainable: edges bring nothing that is wanted", LAW, (_walked, "or wanted[edge.source, edge.output]", "or False")),
    words(
        "trainable: outputs of what is frozen are wanted",
        LAW,
        (_walked, "live) for output in segment.outputs", "True) for output in segment.outputs"),
    ),
    words(
        "feed: a batch of every item",
        LAW,
        (chain_feed._batches, "shares = hand.shares[u, place]", "shares = [s for k in hand.shares if k[0] == u for s in hand.shares[k]]"),
    ),
    words("feed: rows of the first rank of a place", STEPS, (Feed.takes, '.mesh.tp + coords["tp"]', ".mesh.tp")),
    words(
        "normaliser: counts of every rank of a chain",
        LAW,
        (train._counts, "first = axes is not None and not (", "first = axes is not None and not False and (True or "),
    ),
    words("reduce: sums of a spread chain as soon as they are there", LAW, (_with_reductions, "at = end = max(at, end)", "pass")),
    words("move: bridges in the order in which they are made", LAW, (_Walk.carry, "near = sorted(", "near = reversed(")),
    words("move: no gradient goes back over edges", LAW, (_Walk.hand_on, 'self.bridge("BRIDGE_B", k, m)', "pass")),
    words(
        "check: what edges bring is not asked",
        "tests/schedule/test_check_chains.py",
        (Holds.forward, "for k, m in self.edges(key, into=True) if lo == 0 else ():", "for k, m in ():"),
    ),
    words(
        "check: a bridge meets nobody",
        "tests/schedule/test_check_chains.py",
        (Ground.bridged, "{*self.rows.get(source, ()), *self.rows.get(target, ())}", "{*self.rows.get(source, ())}"),
    ),
    words(
        "bridge: gradients go the way of the rows",
        (BRIDGE, LAW),
        (vars(bridge.Table)["back"].fget, "self.takes, self.gives, own", "self.gives, self.takes, own"),
    ),
    words("lanes: each dp coordinate by itself", (LAYOUTS, LAW), (Layouts.lanes, "min(old) if first in old else first", "first")),
    words("reduce: each row by itself", CHAINS, (Ground.summed, "if len(self.known) > 1 else (row,)", "if False else (row,)")),
    words("check: units stand on parts of blocks", CHAINS, (_Look.rows, "if b not in rows]:", "if False]:")),
    words("check: a chain may stand nowhere", CHAINS, (_Look.ends, "if without := [c for c in on.known if", "if without := [c for c in () if")),
    words("run: batches are never dropped", FUZZ, (_Rank.drop, "if isinstance(batches, Units):", "if False:")),
    words(
        "nest: more units in flight than may be",  # in all and on a block: in all programs that were tried one limit keeps the other, too
        BESIDE,
        (nest._Nest.fits, "if self.total + 1 > self.what.in_flight + 1e-9 or", "if False or"),
        (nest._Nest.fits, "if self.load[b] + 1 / n > self.most + 1e-9:", "if False:"),
    ),
    words("nest: a row holds what others should", BESIDE, (nest._Nest.fits, "if self.load[b] + 1 / n > self.most + 1e-9:", "if False:")),
    words("nest: stops make no room", BESIDE, (nest._Nest.room, "while self.total + count > self.what.in_flight + 1e-9:", "while False:")),
]

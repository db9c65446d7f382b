"""What each unit of a step with several chains works at: items are dealt, batches are made, bridges are laid. All ranks work it out alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs

from lf.batch import Batch, BatchError
from lf.bridge import bridge
from lf.chain_layouts import Layouts
from lf.chains import Chain, Items
from lf.deal import Dealt, dealt
from lf.schedule.feed import Feed, Units
from lf.schedule.ground import Ground
from lf.state import device_of, shard_batch

Data = Sequence[Sequence[Batch]]
"""data[microbatch][dp of the main chain]: every plan, on the host, on every rank; payloads where they are read."""


def feed(on: Ground, data: Data, ctx: Any) -> Feed:
    """Raises BatchError, with the data batch, for plans that do not fit the program or each other."""
    layouts = on.layouts
    assert layouts is not None
    assert layouts.model is not None
    refuse_data(layouts, on.count, data)
    chains, dp, rank = layouts.model.chains, layouts.chains[layouts.main].mesh["dp"], ctx.axes.rank
    items = {c: [[_items(c, about, data[m][d], m, d) for d in range(dp)] for m in range(on.count)] for c, about in chains.items()}
    hands: dict[str, Dealt] = {}
    for c in chains:
        if c != layouts.main:
            places = [layouts.places(c, 0, on.rows.get((c, 0, u), ())) for u in range(on.units[c])]
            hands[c] = dealt(items[c], on.units[c], places)
    bridges = tuple(bridge(layouts, joint, rank, items, hands, data) for joint in on.joints)
    batches = {c: _batches(c, layouts, on, hands.get(c), data, ctx) for c in chains if ctx.of(c).axes is not None}
    return Feed(device_of(ctx), batches, bridges, {c: (hand.imbalance[0], hand.imbalance[1]) for c, hand in hands.items()})


def refuse_data(layouts: Layouts, microbatches: int, data: Data) -> None:
    assert layouts.model is not None
    dp = layouts.chains[layouts.main].mesh["dp"]
    if len(data) != microbatches:
        raise BatchError(f"the program is for {microbatches} microbatches; {len(data)} were given")
    for m, row in enumerate(data):
        if isinstance(row, Batch) or len(row) != dp:
            have = "one batch" if isinstance(row, Batch) else f"{len(row)} batches"
            raise BatchError(f"microbatch {m} is {have}; chain {layouts.main!r} has dp={dp}: give a sequence of so many, one for each coordinate")
        for d, batch in enumerate(row):
            if not isinstance(batch, Batch):
                why = "every rank deals the items of all data batches; leave out payloads that it does not read, not plans"
                raise BatchError(f"data batch dp={d} of microbatch {m} is {batch!r}, no Batch: {why}")
            try:
                layouts.model.chains[layouts.main].model.accepts(batch)
            except BatchError as error:
                raise BatchError(f"data batch dp={d} of microbatch {m}: {error}") from None


def _items(chain: str, about: Chain, batch: Batch, m: int, d: int) -> Items:
    try:
        return about.items(batch)
    except BatchError as error:
        raise BatchError(f"chain {chain!r}, data batch dp={d} of microbatch {m}: {error}") from None


def _batches(chain: str, layouts: Layouts, on: Ground, hand: Dealt | None, data: Data, ctx: Any) -> Units:
    """Of each unit that this rank has a part in."""
    assert layouts.model is not None
    about, own = layouts.model.chains[chain], ctx.of(chain)
    mesh, place = layouts.chains[chain].mesh, own.axes.coords["dp"]

    def made(u: int) -> Batch:
        if about.collate is None or hand is None:
            batch = data[u][place]
            batch = attrs.evolve(batch, payload={k: v for k, v in batch.payload.items() if k in about.reads})
        else:
            shares = hand.shares[u, place]
            try:
                batch = about.collate([(data[s.microbatch][s.dp], s.item) for s in shares], 2 * mesh.cp * mesh.tp)
            except BatchError as error:
                where = ", ".join(f"{s.item} of dp={s.dp} of microbatch {s.microbatch}" for s in shares)
                raise BatchError(f"chain {chain!r}, unit {u} of items {where or 'none'}: {error}") from None
        return shard_batch(batch, about.model, own)

    return Units({u: partial(made, u) for u in range(on.units[chain]) if hand is None or (u, place) in hand.shares})

"""What two runs of a model agree in: quantities with their errors, and reports of them.

In float64 a tolerance is a part of the quantity, 1e-10. In less it is what rounding does to one rank: against one rank in float64 the mesh may be
a few times as far off, as a part of its quantity, as one rank of its precision is in the worst one of that kind (losses, gradients, parameters).
Counts must be the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import attrs

from lf import console
from lf.chain_layouts import Layouts
from lf.mesh import Mesh

TIMES = 4.0
"""How many times: a largest error is luck in part. Of 120 comparisons (five models, two precisions) it was 2.6 at most."""
MOST = 0.5
"""No tolerance is a larger part of its quantity: where one of two ranks' part is missing, it must show."""
SMALL = 1e-3
"""Of the largest gradient, or parameter: what is smaller is measured as if it were so large. Rounding goes by the sums that cancel to it."""


@attrs.frozen
class Quantity:
    """One compared quantity, as it was where it disagreed most. `size` is ‖b‖∞: with 0 there the comparison says nothing."""

    name: str
    size: float
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance and math.isfinite(self.tolerance)  # false for NaN, and for ∞ against ∞


@attrs.frozen
class Report:
    """What `compare` found. `about`: what its ranks did in a step, in words, where several reports stand side by side."""

    mesh: Mesh | Layouts
    microbatches: int
    seed: int
    rows: tuple[Quantity, ...]
    about: str = ""
    precision: str = "fp64"

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(q.ok for q in self.rows)

    @property
    def bad(self) -> tuple[Quantity, ...]:
        return tuple(q for q in self.rows if not q.ok)

    def __str__(self) -> str:
        """One line a quantity that disagrees, or that all agree."""
        about = f" {self.about}" if self.about else ""
        words = f"mesh {self.mesh}{about}, {self.microbatches} microbatches a rank, seed {self.seed}: "
        if self.ok:
            return words + f"all {len(self.rows)} quantities agree with one rank" + ("" if self.precision == "fp64" else f", within {self.precision}")
        lines = [f"  {q.name}: error {q.error:.3g}, at most {q.tolerance:.3g}" for q in self.bad]
        return words + f"{len(self.bad)} of {len(self.rows)} quantities disagree with one rank\n" + "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: what is not finite is None, and never ok."""

        def number(x: float) -> float | None:
            return x if math.isfinite(x) else None

        rows = [
            {"name": q.name, "size": number(q.size), "error": number(q.error), "tolerance": number(q.tolerance), "ok": q.ok} for q in self.rows
        ]
        where = {"mesh": str(self.mesh), "about": self.about, "ranks": self.mesh.size, "microbatches": self.microbatches}
        return {**where, "seed": self.seed, "precision": self.precision, "ok": self.ok, "rows": rows}


def table(reports: Sequence[Report]) -> Any:
    """As one rich table: the error of each quantity on each mesh, and how large the quantity is on the last."""
    rows = [
        (q.name, *(f"{r.rows[i].error:.1e}{'' if r.rows[i].ok else ' DISAGREES'}" for r in reports), f"{q.size:.2e}")
        for i, q in enumerate(reports[-1].rows)
    ]
    return console.table("error against one rank", ("quantity", *(f"{r.mesh} {r.about}".strip() for r in reports), "largest value"), rows)


def rounded(rows: Sequence[Quantity], one: Sequence[Quantity], exact: Collection[str], eps: float) -> tuple[Quantity, ...]:
    """`rows`, the errors of a mesh, with the tolerances that those of one rank of its precision give; of what is `exact` as they are. eps: of the
    precision, which errors are taken to reach: a loss may be right by luck."""

    def kind(q: Quantity) -> str:
        first = "gradient" if q.name == "grad_norm" else q.name.partition(" ")[0]
        return first if first in kinds else "loss"

    def scale(q: Quantity) -> float:
        return max(q.size, SMALL * largest.get(kind(q), 0.0))

    kinds = "gradient", "parameter"
    largest = {k: max((q.size for q in one if kind(q) == k and q.name != "grad_norm"), default=0.0) for k in kinds}
    worst = dict.fromkeys(("loss", *kinds), eps)
    for q in (q for q in one if q.name not in exact and scale(q)):
        worst[kind(q)] = max(worst[kind(q)], q.error / scale(q))
    return tuple(q if q.name in exact else attrs.evolve(q, tolerance=min(TIMES * worst[kind(q)], MOST) * scale(q)) for q in rows)

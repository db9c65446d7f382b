"""A program as text."""

from __future__ import annotations

from collections.abc import Mapping

from lf.schedule.ir import Program


def draw(program: Program, mark: Mapping[int, int] | tuple[int, int] | None = None) -> str:
    """One line a rank; the marked actions, rank → place, stand between >> and <<."""
    marks = dict([mark]) if isinstance(mark, tuple) else dict(mark or {})
    lines = []
    for rank, actions in enumerate(program):
        words = [f">>{a}<<" if marks.get(rank) == i else str(a) for i, a in enumerate(actions)]
        lines.append(f"rank {rank}: " + " ".join(words))
    return "\n".join(lines)

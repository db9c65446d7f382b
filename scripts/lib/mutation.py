"""What a mutation is: an entry of a table or a few words of functions, changed in memory.

The words to replace must stand in the function exactly once: when the code changes, a mutation that no longer means anything says so.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import attrs


@attrs.frozen
class Mutation:
    name: str
    apply: Callable[[], None]
    tests: tuple[str, ...]
    edits: Sequence[tuple[Any, list[tuple[str, str]]]] = ()


def rewritten(function: Any, changes: list[tuple[str, str]]) -> Any:
    """The code of a function with (old, new) words changed. LookupError where old words do not stand in it exactly once."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        if source.count(old) != 1:
            raise LookupError(f"{function.__qualname__} has {source.count(old)} places that read {old!r}")
        source = source.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(source, function.__code__.co_filename, "exec", __future__.annotations.compiler_flag, True), function.__globals__, names)
    made: Any = names[function.__name__]
    made = made.fget if isinstance(made, property) else getattr(made, "__func__", made)
    return made.__code__


def stale(mutation: Mutation) -> str:
    """Why the words of a mutation no longer stand in the code, or ''."""
    try:
        for function, edit in mutation.edits:
            rewritten(function, edit)
    except LookupError as error:
        return str(error)
    return ""


def words(name: str, tests: str | tuple[str, ...], *changes: tuple[Any, str, str]) -> Mutation:
    """`changes`: (function, old words, new words)."""

    functions = dict.fromkeys(f for f, _, _ in changes)  # a function's source is that of its file: all its changes at once
    edits = [(function, [(old, new) for f, old, new in changes if f is function]) for function in functions]

    def apply() -> None:
        for function, code in [(function, rewritten(function, edit)) for function, edit in edits]:
            function.__code__ = code  # for everybody who has imported it

    return Mutation(name, apply, (tests,) if isinstance(tests, str) else tests, edits)

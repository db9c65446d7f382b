"""What pyproject.toml asks for, and what an environment lacks of it. Standard library only, and quick: it runs at every start.

pyproject.toml is our own file, so a pattern reads it: Python 3.10 has no TOML reader. A requirement is `name>=1.2,<3`, nothing fancier.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path


def declared(pyproject: str, extra: str | None = None) -> list[str]:
    """The requirements in the text of a pyproject.toml: the base set, or that of one extra."""
    found = re.search(rf"^{extra or 'dependencies'} = \[\n(.*?)^\]", pyproject, re.M | re.S)
    if not found:
        raise ValueError(f"pyproject.toml has no list `{extra or 'dependencies'} = [`")
    return re.findall(r'"([^"]+)"', re.sub(r"#.*", "", found.group(1)))


def split(requirement: str) -> tuple[str, list[tuple[str, str]]]:
    """'numpy>=1.26,<3' → ('numpy', [('>=', '1.26'), ('<', '3')])."""
    name, rest = re.fullmatch(r"([\w.-]+)(?:\[[\w,]*\])?\s*(.*)", requirement.partition(";")[0].strip()).groups()  # type: ignore[union-attr]
    limits = [re.fullmatch(r"(>=|<=|==|!=|<|>)\s*([\w.+!]+)", part.strip()) for part in rest.split(",") if part.strip()]
    if None in limits:
        raise ValueError(f"requirement {requirement!r}: only >=, <=, ==, !=, < and > are read here")
    return name, [(m.group(1), m.group(2)) for m in limits if m]


def release(version: str) -> tuple[int, ...]:
    """'2.5.1+cu124' → (2, 5, 1). A pre-release counts as its release: vendors ship torch as 2.5.0a0+build and mean 2.5."""
    numbers = [int(n) for n in re.match(r"\d*(?:\.\d+)*", version).group().split(".") if n]  # type: ignore[union-attr]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def satisfies(version: str, limits: Iterable[tuple[str, str]]) -> bool:
    have = release(version)
    for op, limit in limits:
        want = release(limit)
        ok = {">=": have >= want, "<=": have <= want, "==": have == want, "!=": have != want, "<": have < want, ">": have > want}
        if not ok[op]:
            return False
    return True


def installed(name: str) -> str | None:
    """Version of a distribution in the running Python, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torch_version() -> str | None:
    """torch's version without importing it; one built from source may have no metadata, but always has a version.py."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        found = re.search(r"^__version__ = ['\"]([^'\"]+)", Path(spec.origin).with_name("version.py").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1) if found else installed("torch")


def lacking(wanted: list[str], version_of: Callable[[str], str | None] = installed) -> list[tuple[str, str | None]]:
    """(requirement, version there is or None) for each that is not met."""
    out = []
    for requirement in wanted:
        name, limits = split(requirement)
        have = version_of(name)
        if have is None or not satisfies(have, limits):
            out.append((requirement, have))
    return out

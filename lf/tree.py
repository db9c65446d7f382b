"""Trees are nested dicts with string keys; everything that is not a dict is a leaf. A path joins the keys with '/'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Tree = dict[str, Any]


def items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) in the order of insertion."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from items(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def leaves(tree: Tree) -> list[Any]:
    return [leaf for _, leaf in items(tree)]


def build(pairs: Iterator[tuple[str, Any]] | list[tuple[str, Any]]) -> Tree:
    """The inverse of `items` (empty dicts, which hold no leaf, are not seen by it)."""
    tree: Tree = {}
    for path, leaf in pairs:
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def get(tree: Tree, path: str) -> Any:
    node: Any = tree
    for key in path.split("/"):
        node = node[key]
    return node


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """f on the leaves that stand at the same path of all trees. Raises ValueError where the trees differ in their keys."""
    for other in rest:
        if not isinstance(other, dict) or other.keys() != tree.keys():
            raise ValueError(f"trees differ: {sorted(tree)} and {sorted(other) if isinstance(other, dict) else type(other).__name__}")
    return {k: map(f, v, *(r[k] for r in rest)) if isinstance(v, dict) else f(v, *(r[k] for r in rest)) for k, v in tree.items()}

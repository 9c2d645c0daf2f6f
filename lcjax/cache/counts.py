"""How many tokens the caches of a model hold: one count for all layers, since they advance together.

Between passes it is kept once. A loop that carried it in every cache would copy it and add to it a layer.
"""

from typing import Any

import jax

from lcjax.cache.base import Counts

FIELDS = ("length", "start")


def counted[T](caches: T, length: Counts) -> T:
    """Caches that `uncounted` left, ready for the next append to `length[B]` tokens."""
    return _with(caches, length)


def uncounted[T](caches: T) -> tuple[T, Counts]:
    """(the caches of a model without their counts, `length[B]` of all)."""
    found: list[Counts] = []
    _each(caches, lambda name, x: found.append(x) if name == "length" else None)
    return _with(caches, None), found[0]


def _with[T](caches: T, count: Counts | None) -> T:
    return _each(caches, lambda name, x: count if name in FIELDS else x)


def _each(caches: Any, change: Any) -> Any:
    """`change(name of the field, x)` instead of each array x or None."""
    name = lambda path: getattr(path[-1], "name", None)
    return jax.tree_util.tree_map_with_path(lambda path, x: change(name(path), x), caches, is_leaf=lambda x: x is None)

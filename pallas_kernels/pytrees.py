"""Frozen records that are pytrees."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable

import jax


@typing.dataclass_transform(frozen_default=True, eq_default=False)
def record[T](*static: str, eq: bool = False) -> Callable[[type[T]], type[T]]:
    """A frozen dataclass registered as a pytree whose fields are children, except those named.

    JAX rebuilds pytrees around placeholders, so rebuilding skips `__init__` and its checks.
    """

    def wrap(cls: type[T]) -> type[T]:
        cls = dataclasses.dataclass(frozen=True, eq=eq)(cls)
        children = [f.name for f in dataclasses.fields(cls) if f.name not in static]

        def flatten(x):
            return [getattr(x, n) for n in children], tuple(getattr(x, n) for n in static)

        def flatten_with_keys(x):
            return [(jax.tree_util.GetAttrKey(n), getattr(x, n)) for n in children], flatten(x)[1]

        def unflatten(values, leaves):
            x = object.__new__(cls)
            for name, value in (*zip(static, values, strict=True), *zip(children, leaves, strict=True)):
                object.__setattr__(x, name, value)
            return x

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return wrap

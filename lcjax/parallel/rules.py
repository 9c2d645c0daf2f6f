"""The one table from logical axes to mesh axes, and the shardings that follow from it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "vocab": ("tensor",),
    "embed": ("fsdp", "context"),  # shards of a sequence share the weights as shards of the batch do
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "slots": (),
    "rank": (),
    "taps": (),
    "groups": (),
    "layers": (),
    # activations
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "hidden": (),
}


def partition(axes: Sequence[str], sizes: dict[str, int], shape: Sequence[int] | None = None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes on a mesh of these axis sizes.

    Raises ValueError for an unknown logical axis, a mesh axis used twice, or (given `shape`) an indivisible dimension.
    """
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for i, axis in enumerate(axes):
        if axis not in RULES:
            raise ValueError(f"logical axis {axis!r} has no rule; known axes: {', '.join(RULES)}")
        names = tuple(name for name in RULES[axis] if sizes.get(name, 1) > 1)
        for name in names:
            if name in used:
                raise ValueError(
                    f"mesh axis {name!r} would split both {used[name]!r} and {axis!r} of an array with axes {axes}"
                )
            used[name] = axis
        ways = math.prod(sizes[name] for name in names)
        if shape is not None and shape[i] % ways:
            raise ValueError(
                f"axis {axis!r} of size {shape[i]} does not split {ways} ways over mesh axes {', '.join(names)}"
            )
        entries.append(names or None)
    return PartitionSpec(*entries)


def shardings(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """A tree like `params` (an `nnx.State` of arrays or shapes) with a NamedSharding in place of each array."""

    def one(path: Any, param: Any) -> Any:
        try:
            spec = partition(param.axes, dict(mesh.shape), param.shape)
        except ValueError as error:
            raise ValueError(f"{'.'.join(str(getattr(p, 'key', p)) for p in path)}: {error}") from None
        return param.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def spread[T](tree: T, lie: Any) -> T:
    """Arrays that every process holds whole and alike, as global arrays with the shardings of the tree `lie`.

    A random key may only be replicated.
    """

    def one(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x), sharding))
        # From one device's array `device_put` makes none that lies on other processes too.
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, lie)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of `[B,T]` batches: rows over data and fsdp, columns over context."""
    return NamedSharding(mesh, partition(("batch", "length"), dict(mesh.shape)))


def batch_ways(mesh: jax.sharding.Mesh | None) -> int:
    """How many parts the rows of a batch lie in."""
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in RULES["batch"])


def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Pin an activation's layout where a mesh is set (`jax.set_mesh`); dimensions that don't divide stay free."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    sizes = dict(mesh.shape)
    entries = []
    for size, names in zip(x.shape, partition(axes, sizes), strict=True):
        ways = math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names or ()))
        entries.append(names if size % ways == 0 else PartitionSpec.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))

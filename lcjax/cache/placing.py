"""How requests and their caches lie on a mesh: requests over data and fsdp, heads over tensor, slots together."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lcjax.parallel.rules import constrain, partition

AXES = {
    "k": ("batch", "slots", "kv_heads", "head_dim"),
    "v": ("batch", "slots", "kv_heads", "head_dim"),
    "pages_k": ("batch", "kv_heads", "pages", "slots", "head_dim"),
    "pages_v": ("batch", "kv_heads", "pages", "slots", "head_dim"),
    "s": ("batch", "heads", "head_dim", "head_dim"),
    "z": ("batch", "heads", "head_dim"),
    "tails": ("batch", "taps", "heads"),  # of heads and features in one axis
    "ends": ("slots",),  # the ids that end an answer, whole everywhere
}
"""Logical axes by the name of a field; any other array has a row a request."""


def constrained[T](caches: T) -> T:
    """Pin the layout of caches where a mesh is set, so that a program returns them as it takes them.

    Constants too, such as the lengths of caches that are known to be empty.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(jnp.asarray(x), _axes(path, x)), caches)


def placed(shapes: Any, mesh: Mesh) -> Any:
    """Shapes of caches, or of what else a batch of requests has, with their shardings on `mesh`.

    Raises ValueError when requests or heads don't split over it.
    """

    def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        spec = partition(_axes(path, x), dict(mesh.shape), x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, shapes)


def _axes(path: Any, x: Any) -> tuple[str, ...]:
    names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
    found = next((AXES[name] for name in reversed(names) if name in AXES), ("batch",))
    return found[: x.ndim] if x.ndim else ()

"""Putting a weight together from the shards that it is stored in, and dealing its gradient out to them.

The compiler would do both by itself, but over several mesh axes at once: for groups that span more than one dimension
of a torus, TPU compilers then sum whole weights, twice the bytes. One axis after the other they gather and scatter.
"""

import functools
from collections.abc import Sequence

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from lcjax.parallel.rules import RULES, partition

SHARED = {*RULES["batch"], *RULES["length"]}
"""Mesh axes that split tokens: what a weight is stored in parts over, beside `tensor`, is put together for use."""


def whole(weight: Float[Array, "..."], axes: Sequence[str]) -> Float[Array, "..."]:
    """The weight with these logical axes as layers use it: split over `tensor` alone, where a mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return weight
    # Heads and their features count as one axis, split as heads are: libtpu scatters no small second-minor axis.
    flat = weight.reshape(*weight.shape[:-2], -1) if axes[-1] == "head_dim" else weight
    spec = partition(axes[:-1] if axes[-1] == "head_dim" else axes, dict(mesh.shape))
    order = storage_axes(spec)
    steps = tuple(_without(spec, set(order[n:])) for n in range(len(order), -1, -1))
    return _gathered(steps, flat).reshape(weight.shape) if order else weight


def storage_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes of a stored weight that go when it is put together, the outermost first."""
    return tuple(name for entry in spec for name in _names(entry) if name in SHARED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(steps: tuple[PartitionSpec, ...], weight: Array) -> Array:
    for spec in steps:
        weight = lax.with_sharding_constraint(weight, spec)
    return weight


def _scattered(steps: tuple[PartitionSpec, ...], _: None, gradient: Array) -> tuple[Array]:
    for spec in steps[-2::-1]:
        gradient = lax.with_sharding_constraint(gradient, spec)
    return (gradient,)


_gathered.defvjp(lambda steps, weight: (_gathered(steps, weight), None), _scattered)


def _without(spec: PartitionSpec, gone: set[str]) -> PartitionSpec:
    kept = (tuple(name for name in _names(entry) if name not in gone) for entry in spec)
    return PartitionSpec(*(entry or None for entry in kept))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()

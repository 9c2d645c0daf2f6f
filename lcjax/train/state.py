"""Everything that training changes, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcjax.models.decoder import Decoder
from lcjax.models.spec import ModelSpec
from lcjax.parallel.rules import partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts batches seen; `skipped` those whose update was not finite and had no effect.

    Leaves are arrays, or in an abstract state shapes with shardings, or shardings alone.
    """

    step: Any  # int32 scalar
    params: Any  # nnx.State of float32 master weights
    opt_state: Any
    key: Any  # typed PRNG key
    skipped: Any  # int32 scalar
    skipped_in_row: Any  # int32 scalar


def initialise(spec: ModelSpec, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state: float32 master weights drawn from `seed`."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params = nnx.split(Decoder(spec, rngs=nnx.Rngs(init_key)), nnx.Param)[1]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=train_key,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def create(spec: ModelSpec, optimizer: optax.GradientTransformation, seed: int, shapes: TrainState) -> TrainState:
    """A fresh state on the devices that the abstract state `shapes` names, sharded from birth."""
    if jax.tree.leaves(shapes)[0].sharding.mesh.size > 1:
        return jax.jit(lambda: initialise(spec, optimizer, seed), out_shardings=shardings(shapes))()
    # One weight at a time compiles one small program per shape; the whole model in one takes 20 s of compiling.
    return jax.device_put(initialise(spec, optimizer, seed), shardings(shapes))


def warm_start(state: TrainState, params: nnx.State) -> TrainState:
    """The state with these weights in place of its own; what only the new model has (a CLEX flow) stays.

    Raises ValueError naming the first weight that is missing, left over or of another shape.
    """
    given = dict(nnx.to_flat_state(params))
    named = lambda path: ".".join(map(str, path))

    def take(path: Any, own: nnx.Variable) -> nnx.Variable:
        value = given.pop(path, None)
        if value is None:
            if path[0] == "flows":
                return own
            raise ValueError(f"train.init has no weight {named(path)}; its model differs from train.model")
        if value.shape != own.shape:
            raise ValueError(f"train.init: {named(path)} has shape {value.shape}, train.model needs {own.shape}")
        return own.replace(jax.device_put(value[...].astype(own.dtype), own[...].sharding))

    taken = [(path, take(path, own)) for path, own in nnx.to_flat_state(state.params)]
    if given:
        raise ValueError(f"train.init has a weight {named(next(iter(given)))} that train.model lacks")
    return dataclasses.replace(state, params=nnx.from_flat_state(taken))


def abstract_state(spec: ModelSpec, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state's shapes with their shardings on `mesh`: nothing is allocated."""
    sizes = dict(mesh.shape)

    def place(path: Any, leaf: Any) -> Any:
        axes = leaf.axes if isinstance(leaf, nnx.Variable) else ()
        try:
            spec = partition(axes, sizes, leaf.shape) if axes else PartitionSpec()
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {error}") from None
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        return leaf.replace(shape) if isinstance(leaf, nnx.Variable) else shape

    shapes = jax.eval_shape(lambda: initialise(spec, optimizer, seed=0))
    return jax.tree_util.tree_map_with_path(place, shapes, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def shardings(abstract: TrainState) -> TrainState:
    """The shardings of an abstract state, as `jax.jit` takes them."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def bytes_of(state: Any) -> int:
    """Bytes of all arrays in a tree, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if hasattr(leaf, "size"))

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
from lcjax.models.stacked import Stacks, stacked
from lcjax.models.weights import carry_over, cast, check_patterns, matching
from lcjax.parallel.rules import partition, spread


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


@dataclasses.dataclass(frozen=True)
class Start:
    """What a fresh state is made of.

    weights: parameters to start from, by path; what they lack is drawn from `seed`. trainable: see `train.step.divide`.
    Trained parameters are float32 master weights; frozen ones stay in the dtype of `weights`.
    """

    spec: ModelSpec
    optimizer: optax.GradientTransformation
    seed: int = 0
    trainable: tuple[str, ...] = ()
    weights: nnx.State | None = None

    def state(self) -> TrainState:
        """The state before the first batch. Raises ValueError when weights or patterns don't fit the model."""
        init_key, train_key = jax.random.split(jax.random.key(self.seed))
        if self.weights is None:
            params = nnx.split(Decoder(self.spec, rngs=nnx.Rngs(init_key)), nnx.Param)[1]
        else:
            params = carry_over(self.spec, self.weights, key=init_key)
        check_patterns("train.trainable", self.trainable, params)
        trained, frozen = divide(params, self.trainable)
        trained = cast(trained, jnp.float32)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=nnx.merge_state(trained, frozen),
            opt_state=self.optimizer.init(trained),
            key=train_key,
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_row=jnp.zeros((), jnp.int32),
        )


def divide(params: nnx.State, trainable: tuple[str, ...]) -> tuple[nnx.State, nnx.State]:
    """(parameters that training changes, the others); without patterns, all of them are trained."""
    if not trainable:
        return params, nnx.State({})
    trained, frozen = nnx.split_state(params, matching(trainable), ...)
    return trained, frozen


def create(start: Start, shapes: TrainState) -> TrainState:
    """A fresh state on the devices that the abstract state `shapes`, unstacked, names; sharded from birth."""
    if start.weights is None and jax.tree.leaves(shapes)[0].sharding.mesh.size > 1:
        return jax.jit(start.state, out_shardings=shardings(shapes))()
    # One weight at a time compiles one small program per shape; the whole model in one takes 20 s of compiling.
    return spread(start.state(), shardings(shapes))


def abstract_state(start: Start, mesh: Mesh, stacks: Stacks = ()) -> TrainState:
    """The shapes of the state, stacked as said, with their shardings on `mesh`: nothing is allocated."""
    sizes = dict(mesh.shape)

    def place(path: Any, leaf: Any) -> Any:
        axes = leaf.axes if isinstance(leaf, nnx.Variable) else ()
        try:
            spec = partition(axes, sizes, leaf.shape) if axes else PartitionSpec()
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {error}") from None
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        return leaf.replace(shape) if isinstance(leaf, nnx.Variable) else shape

    shapes = jax.eval_shape(lambda: stacked(start.state(), stacks))
    return jax.tree_util.tree_map_with_path(place, shapes, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def shapes_of(state: TrainState) -> TrainState:
    """The abstract state of a state in memory."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def shardings(abstract: TrainState) -> TrainState:
    """The shardings of an abstract state, as `jax.jit` takes them."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def bytes_of(state: Any) -> int:
    """Bytes of all arrays in a tree, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if hasattr(leaf, "size"))

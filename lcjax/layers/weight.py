"""The single declaration of a weight."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

type Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclass(frozen=True)
class Weight:
    """Shape, one logical axis name per dimension, and the initial values.

    Those are normal with `std`, or the constant `fill`, or what `draw(key, shape)` returns in float32.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None = None
    fill: float = 0.0
    draw: Draw | None = None

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"a weight of shape {self.shape} needs {len(self.shape)} axis names, got {self.axes}")

    def param(self, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Param:
        """An initialised parameter that carries its logical axes as metadata `axes`."""
        if self.draw is not None:
            return nnx.Param(self.draw(rngs.params(), self.shape).astype(dtype), axes=self.axes)
        if self.std is None:
            return nnx.Param(jnp.full(self.shape, self.fill, dtype), axes=self.axes)
        return nnx.Param(self.std * jax.random.normal(rngs.params(), self.shape, dtype), axes=self.axes)

"""Root-mean-square norm in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcjax.layers.weight import Weight


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + weight) over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, dim: int, axis: str, *, eps: float, offset: float = 0.0, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.eps, self.offset = eps, offset
        self.weight = Weight((dim,), (axis,), fill=1.0 - offset).param(rngs, param_dtype)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)

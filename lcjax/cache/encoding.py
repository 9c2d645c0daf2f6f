"""How keys and values lie in a cache: as floats, or as int8 codes with one float32 factor a token and KV head."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.decode.cache import quantize_tokens


def encode(x: Float[Array, "B T K D"], dtype: DTypeLike) -> tuple[Array, Any]:
    """(x as it is stored, factors `[B,T,K]` or None)."""
    if dtype == jnp.int8:
        return quantize_tokens(x)
    return x.astype(dtype), None


def decode(stored: Array, factors: Array | None, dtype: DTypeLike) -> Array:
    """`[B,S,K,D]` floats; codes with factors `[B,K,S]` become `dtype`, floats stay as they are."""
    if factors is None:
        return stored
    return (stored.astype(jnp.float32) * factors.swapaxes(1, 2)[..., None]).astype(dtype)


def no_factors(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Zero factors of this shape for int8, else None."""
    return jnp.zeros(shape, jnp.float32) if dtype == jnp.int8 else None


def stored_bytes(*arrays: Any) -> int:
    """Bytes of the arrays that are there."""
    return sum(x.nbytes for x in arrays if x is not None)

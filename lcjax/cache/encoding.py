"""How keys and values lie in a cache: as floats, or as int8 codes with a bfloat16 factor a token and KV head."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.decode.cache import pack_factors, quantize_tokens, unpack_factors


def encode(k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], dtype: DTypeLike) -> tuple[Array, Array, Any]:
    """(k, v as they are stored, factors of both `[B,T,K]` or None)."""
    if dtype != jnp.int8:
        return k.astype(dtype), v.astype(dtype), None
    (k, of_k), (v, of_v) = quantize_tokens(k), quantize_tokens(v)
    return k, v, pack_factors(of_k, of_v)


def decode(k: Array, v: Array, factors: Int32[Array, "B K S"] | None, dtype: DTypeLike) -> tuple[Array, Array]:
    """k, v `[B,S,K,D]` as floats: codes become `dtype`, floats stay as they are."""
    if factors is None:
        return k, v
    of_k, of_v = (x.swapaxes(1, 2)[..., None] for x in unpack_factors(factors))
    return (k.astype(jnp.float32) * of_k).astype(dtype), (v.astype(jnp.float32) * of_v).astype(dtype)


def no_factors(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Zero factors of this shape for int8, else None."""
    return jnp.zeros(shape, jnp.int32) if dtype == jnp.int8 else None


def stored_bytes(*arrays: Any) -> int:
    """Bytes of the arrays that are there."""
    return sum(x.nbytes for x in arrays if x is not None)

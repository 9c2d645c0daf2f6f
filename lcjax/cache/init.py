"""The caches of a whole decoder, one per layer."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from lcjax.cache.dense import DenseCache
from lcjax.cache.recurrent import RecurrentCache, zero_state
from lcjax.cache.ring import RingCache

if TYPE_CHECKING:
    from lcjax.models.recurrent import RecurrentMixer
    from lcjax.models.spec import Attention, ModelSpec

type Cache = DenseCache | RingCache | RecurrentCache


def init_caches(
    spec: "ModelSpec", batch: int, capacity: int, dtype: DTypeLike | None = None, *, chunk: int = 256
) -> tuple[Cache, ...]:
    """Empty caches for `batch` requests of up to `capacity` tokens, one per layer by its mixer.

    `chunk` is the longest append (a prefill chunk). A windowed layer gets a ring where that is smaller than `capacity`.
    `dtype` (default: the spec's compute dtype) is that of keys and values; recurrent states are float32.
    """
    for name, number in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
        if number < 1:
            raise ValueError(f"init_caches: {name} must be positive, got {number}")
    dtype = spec.compute_dtype if dtype is None else dtype
    return tuple(_init(mixer, spec, batch, capacity, dtype, chunk) for mixer in spec.layers)


def cache_bytes(caches: tuple[Cache, ...]) -> int:
    """Bytes of all layers."""
    return sum(cache.bytes for cache in caches)


def _init(mixer: Any, spec: "ModelSpec", batch: int, capacity: int, dtype: DTypeLike, chunk: int) -> Cache:
    if hasattr(mixer, "memory"):
        return _recurrent(mixer, spec, batch, dtype)
    return _attention(mixer, spec, batch, capacity, dtype, chunk)


def _attention(mixer: "Attention", spec: "ModelSpec", batch: int, capacity: int, dtype: DTypeLike, chunk: int) -> Cache:
    if mixer.window is not None and mixer.sink + mixer.window + chunk - 1 < capacity:
        return RingCache.init(
            batch, mixer.window, spec.num_kv_heads, spec.head_dim, dtype, sink=mixer.sink, chunk=chunk
        )
    return DenseCache.init(batch, capacity, spec.num_kv_heads, spec.head_dim, dtype)


def _recurrent(mixer: "RecurrentMixer", spec: "ModelSpec", batch: int, dtype: DTypeLike) -> RecurrentCache:
    memory = mixer.memory(spec)
    tails = {name: jnp.zeros((batch, held, channels), dtype) for name, (held, channels) in memory.tails.items()}
    return RecurrentCache.init(zero_state(batch, memory.heads, memory.keys, memory.values, memory.normalise), tails)

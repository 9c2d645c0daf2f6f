"""The caches of a whole decoder, one per layer."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from lcjax.cache.base import AttentionCache
from lcjax.cache.recurrent import RecurrentCache, zero_state
from lcjax.cache.room import CacheLayout, Room
from lcjax.positions.tables import rotates_at_read

if TYPE_CHECKING:
    from lcjax.models.recurrent import RecurrentMixer
    from lcjax.models.spec import ModelSpec

type Cache = AttentionCache | RecurrentCache


def init_caches(spec: "ModelSpec", batch: int, capacity: int, layout: CacheLayout | None = None) -> tuple[Cache, ...]:
    """Empty caches for `batch` requests of up to `capacity` tokens, one per layer by its mixer.

    Heads with a window get a ring where that is smaller than `capacity`.
    """
    for name, number in (("batch", batch), ("capacity", capacity)):
        if number < 1:
            raise ValueError(f"init_caches: {name} must be positive, got {number}")
    room = Room.of(spec, batch, capacity, layout or CacheLayout())
    return tuple(_init(mixer, spec, room) for mixer in spec.layers)


def cache_bytes(caches: tuple[Cache, ...]) -> int:
    """Bytes of all layers."""
    return sum(cache.bytes for cache in caches)


def _init(mixer: Any, spec: "ModelSpec", room: Room) -> Cache:
    if hasattr(mixer, "memory"):
        return _recurrent(mixer, spec, room)
    if mixer.pattern is not None:
        return mixer.pattern.cache(room)
    if mixer.remap is not None or rotates_at_read(mixer.rope, None):
        return room.dense(room.num_kv_heads)
    if mixer.window is not None and room.turns(mixer.sink, mixer.window):
        return room.ring(room.num_kv_heads, mixer.sink, mixer.window)
    return room.full(room.num_kv_heads) if mixer.window is None else room.whole(room.num_kv_heads)


def _recurrent(mixer: "RecurrentMixer", spec: "ModelSpec", room: Room) -> RecurrentCache:
    memory = mixer.memory(spec)
    tails = {
        name: jnp.zeros((room.batch, held, channels), room.floats) for name, (held, channels) in memory.tails.items()
    }
    state = zero_state(room.batch, memory.heads, memory.keys, memory.values, memory.normalise)
    return RecurrentCache.init(state, tails)

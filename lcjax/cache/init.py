"""The caches of a whole decoder, one per layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from lcjax.cache.dense import DenseCache
from lcjax.cache.paged import PAGE, PagedCache
from lcjax.cache.recurrent import RecurrentCache, zero_state
from lcjax.cache.ring import RingCache
from lcjax.cache.selected import SelectedCache, Selection
from lcjax.positions.tables import rotates_at_read

if TYPE_CHECKING:
    from lcjax.models.recurrent import RecurrentMixer
    from lcjax.models.spec import ModelSpec

type Cache = DenseCache | RingCache | PagedCache | SelectedCache | RecurrentCache


@dataclass(frozen=True)
class CacheLayout:
    """How keys and values are kept.

    kind: 'dense', a slot a token, or 'paged', with `page` tokens a page. dtype: 'float32', 'bfloat16' or 'int8' (codes
    with a factor a token and KV head); None is the model's compute dtype. selection: read only some pages of a long
    context. Layers with a window have a ring of floats and read all of it, layers that rotate keys as they read them a
    dense cache of floats, recurrent layers a float32 state.
    """

    kind: str = "dense"
    dtype: str | None = None
    page: int = PAGE
    selection: Selection | None = None

    def __post_init__(self):
        if self.kind not in ("dense", "paged"):
            raise ValueError(f"CacheLayout.kind is {self.kind!r}; choose 'dense' or 'paged'")
        if self.dtype not in (None, "float32", "bfloat16", "int8"):
            raise ValueError(f"CacheLayout.dtype is {self.dtype!r}; choose 'float32', 'bfloat16' or 'int8'")
        if self.page < 1:
            raise ValueError(f"CacheLayout.page must be positive, got {self.page}")


def init_caches(
    spec: "ModelSpec", batch: int, capacity: int, layout: CacheLayout | None = None, *, chunk: int = 256
) -> tuple[Cache, ...]:
    """Empty caches for `batch` requests of up to `capacity` tokens, one per layer by its mixer.

    `chunk` is the longest append (a prefill chunk). A windowed layer gets a ring where that is smaller than `capacity`.
    """
    for name, number in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
        if number < 1:
            raise ValueError(f"init_caches: {name} must be positive, got {number}")
    layout = layout or CacheLayout()
    return tuple(_init(mixer, spec, batch, capacity, layout, chunk) for mixer in spec.layers)


def cache_bytes(caches: tuple[Cache, ...]) -> int:
    """Bytes of all layers."""
    return sum(cache.bytes for cache in caches)


def _init(mixer: Any, spec: "ModelSpec", batch: int, capacity: int, layout: CacheLayout, chunk: int) -> Cache:
    dtype = jnp.dtype(layout.dtype or spec.compute_dtype)
    floats = spec.compute_dtype if dtype == jnp.int8 else dtype
    if hasattr(mixer, "memory"):
        return _recurrent(mixer, spec, batch, floats)
    if mixer.window is not None and mixer.sink + mixer.window + chunk - 1 < capacity:
        return RingCache.init(
            batch, mixer.window, spec.num_kv_heads, spec.head_dim, floats, sink=mixer.sink, chunk=chunk
        )
    shape = batch, capacity, spec.num_kv_heads, spec.head_dim
    if mixer.remap is not None or rotates_at_read(mixer.rope, None):
        return DenseCache.init(*shape, floats)
    paged = layout.kind == "paged"
    cache = PagedCache.init(*shape, dtype, page=layout.page) if paged else DenseCache.init(*shape, dtype)
    if layout.selection is None or mixer.window is not None:
        return cache
    return SelectedCache.around(cache, layout.selection, spec.num_kv_heads)


def _recurrent(mixer: "RecurrentMixer", spec: "ModelSpec", batch: int, dtype: DTypeLike) -> RecurrentCache:
    memory = mixer.memory(spec)
    tails = {name: jnp.zeros((batch, held, channels), dtype) for name, (held, channels) in memory.tails.items()}
    return RecurrentCache.init(zero_state(batch, memory.heads, memory.keys, memory.values, memory.normalise), tails)

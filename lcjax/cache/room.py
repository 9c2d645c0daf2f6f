"""What one attention layer's cache is made for, and the caches that serve some of its heads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax.typing import DTypeLike

from lcjax.cache.dense import DenseCache
from lcjax.cache.paged import PAGE, PagedCache
from lcjax.cache.ring import RingCache
from lcjax.cache.selected import SelectedCache, Selection
from lcjax.cache.strided import StridedCache, Stripes

if TYPE_CHECKING:
    from lcjax.models.spec import ModelSpec


@dataclass(frozen=True)
class CacheLayout:
    """How keys and values are kept.

    kind: 'dense', a slot a token, or 'paged', with `page` tokens a page. dtype: 'float32', 'bfloat16' or 'int8' (codes
    with a factor a token and KV head); None is the model's compute dtype. selection: read only some pages of a long
    context. Heads with a window have a ring of floats and read all of it, layers that rotate keys as they read them a
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


@dataclass(frozen=True)
class Room:
    """Sizes of a layer's cache: `batch` requests of up to `capacity` tokens."""

    batch: int
    capacity: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    compute: DTypeLike
    layout: CacheLayout = CacheLayout()

    @classmethod
    def of(cls, spec: "ModelSpec", batch: int, capacity: int, layout: CacheLayout) -> "Room":
        """For the attention layers of a model."""
        heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
        return cls(batch, capacity, *heads, spec.compute_dtype, layout)

    @property
    def dtype(self) -> DTypeLike:
        """What a full cache stores."""
        return jnp.dtype(self.layout.dtype or self.compute)

    @property
    def floats(self) -> DTypeLike:
        """What a cache without int8 codes stores."""
        return self.compute if self.dtype == jnp.int8 else self.dtype

    def dense(self, heads: int) -> DenseCache:
        """A slot a token, of floats."""
        return DenseCache.init(self.batch, self.capacity, heads, self.head_dim, self.floats)

    def whole(self, heads: int) -> DenseCache | PagedCache:
        """Every token of `heads` KV heads, as the layout says, all of it read."""
        shape = self.batch, self.capacity, heads, self.head_dim
        if self.layout.kind == "paged":
            return PagedCache.init(*shape, self.dtype, page=self.layout.page)
        return DenseCache.init(*shape, self.dtype)

    def full(self, heads: int) -> DenseCache | PagedCache | SelectedCache:
        """Every token of `heads` KV heads that look anywhere: of a long context the layout's selection is read."""
        cache = self.whole(heads)
        return cache if self.layout.selection is None else SelectedCache.around(cache, self.layout.selection, heads)

    def turns(self, sink: int, window: int) -> bool:
        """Whether a ring of this reach is smaller than all tokens."""
        return sink + window < self.capacity

    def ring(self, heads: int, sink: int, window: int) -> RingCache:
        """The first `sink` and the last `window` tokens of `heads` KV heads."""
        return RingCache.init(self.batch, window, heads, self.head_dim, self.floats, sink=sink)

    def strided(self, stripes: Stripes) -> StridedCache:
        """Local blocks and those that stay."""
        return StridedCache.init(self.batch, self.capacity, self.head_dim, self.floats, stripes)

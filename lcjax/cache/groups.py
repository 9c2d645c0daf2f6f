"""Different caches for different KV heads of one layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lcjax.cache.base import AttentionCache, Counts, Options
from pallas_kernels.head_masks import of_heads
from pallas_kernels.masks import Mask


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupedCache:
    """`caches[n]` holds the KV heads `heads[n]` of the layer, ascending, and serves their query heads."""

    caches: tuple[Any, ...]
    heads: tuple[tuple[int, ...], ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, caches: Sequence[AttentionCache], heads: Sequence[Sequence[int]]) -> AttentionCache:
        """Around empty caches, one a set of KV heads; a single cache stays as it is."""
        if sorted(head for group in heads for head in group) != list(range(sum(map(len, heads)))):
            raise ValueError(f"grouped cache: {heads} does not name each KV head once")
        return caches[0] if len(caches) == 1 else cls(tuple(caches), tuple(map(tuple, heads)))

    @property
    def length(self) -> Any:
        """Tokens of each request."""
        return self.caches[0].length

    @property
    def start(self) -> Any:
        """Tokens of each request before the last append."""
        return self.caches[0].start

    @property
    def capacity(self) -> int:
        """Tokens that one request may reach: the least of all groups."""
        return min(cache.capacity for cache in self.caches)

    @property
    def bytes(self) -> int:
        """Bytes of all groups."""
        return sum(cache.bytes for cache in self.caches)

    def append(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], valid: Bool[Array, "B T"] | None = None
    ) -> "GroupedCache":
        """Each group takes its heads."""
        pairs = zip(self.caches, self.heads, strict=True)
        return replace(self, caches=tuple(c.append(_take(k, heads), _take(v, heads), valid) for c, heads in pairs))

    def prepare(self, q: Float[Array, "B T H D"]) -> "GroupedCache":
        """Each group for its query heads."""
        pairs = zip(self.caches, self._query_heads(q.shape[2]), strict=True)
        return replace(self, caches=tuple(cache.prepare(_take(q, heads)) for cache, heads in pairs))

    def attend(
        self, q: Float[Array, "B T H D"], mask: Mask, **options: Unpack[Options]
    ) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
        """The groups' results, put back in the order of the query heads."""
        groups = self._query_heads(q.shape[2])
        logits = options.pop("sink_logits", None)
        outs, lses = [], []
        for cache, heads in zip(self.caches, groups, strict=True):
            own = None if logits is None else logits[np.array(heads)]
            o, lse = cache.attend(_take(q, heads), of_heads(mask, heads), sink_logits=own, **options)
            outs.append(o)
            lses.append(lse)
        order = np.argsort(np.concatenate(groups))
        o = _take(jnp.concatenate(outs, axis=2), order)
        if any(lse is None for lse in lses):
            return o, None
        return o, jnp.concatenate(lses, axis=1)[:, order]

    def settled(self) -> "GroupedCache":
        """Each group settled."""
        return replace(self, caches=tuple(cache.settled() for cache in self.caches))

    def fork(self, rows: Counts) -> "GroupedCache":
        """Each group forked."""
        return replace(self, caches=tuple(cache.fork(rows) for cache in self.caches))

    def evict(self, drop: Bool[Array, "B"]) -> "GroupedCache":
        """Each group's rows."""
        return replace(self, caches=tuple(cache.evict(drop) for cache in self.caches))

    def _query_heads(self, num_heads: int) -> list[tuple[int, ...]]:
        """The query heads of each group."""
        size = num_heads // sum(map(len, self.heads))
        return [tuple(head * size + n for head in heads for n in range(size)) for heads in self.heads]


def _take(x: Float[Array, "B T H D"], heads: Sequence[int] | np.ndarray) -> Float[Array, "B T N D"]:
    """Some heads; neighbours as a slice, which is no copy."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return x[:, :, int(heads[0]) : int(heads[0]) + len(heads)]
    return x[:, :, np.array(heads)]

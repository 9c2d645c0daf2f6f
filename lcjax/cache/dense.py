"""Every token keeps its slot: the cache of a layer that may look anywhere."""

from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcjax.cache.base import Counts, appended, check_room, known_empty, no_tokens, write_first, write_slots
from lcjax.cache.direct import attend_direct, few
from lcjax.cache.visible import visible
from pallas_kernels import block_sparse_attention

PLAN_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCache:
    """Token j of a request lies in slot j."""

    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K Dv"]
    length: Counts
    start: Counts

    @classmethod
    def init(cls, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: Any) -> Self:
        """An empty cache for `capacity` tokens a request."""
        shape = (batch, capacity, num_kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), no_tokens(batch), no_tokens(batch))

    @property
    def capacity(self) -> int:
        """Tokens that one request may reach."""
        return self.k.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values: 2 B S K D times the width of the dtype (K and V of equal width)."""
        return self.k.nbytes + self.v.nbytes

    def append(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], valid: Bool[Array, "B T"] | None = None
    ) -> Self:
        """Write the new tokens behind the ones held."""
        batch, tokens = k.shape[:2]
        count = appended(tokens, valid, batch)
        check_room(self.length, count, self.capacity)
        if known_empty(self.length):
            k, v = write_first(self.k, k), write_first(self.v, v)
            return replace(self, k=k, v=v, length=self.length + jnp.asarray(count), start=self.length)
        slot = self.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        return replace(
            self,
            k=write_slots(self.k, k, slot, valid),
            v=write_slots(self.v, v, slot, valid),
            length=self.length + count,
            start=self.length,
        )

    def attend(
        self,
        q: Float[Array, "B T H D"],
        mask: Any,
        *,
        scale: float | None = None,
        soft_cap: float | None = None,
        sink_logits: Float[Array, "H"] | None = None,
    ) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
        """One token reads the slots directly; a chunk goes through the block-sparse op, the first without an offset."""
        tokens, heads = q.shape[1:3]
        options = {"scale": scale, "soft_cap": soft_cap, "sink_logits": sink_logits}
        if known_empty(self.start) and tokens <= self.capacity:
            k, v = self.k[:, :tokens], self.v[:, :tokens]
            return block_sparse_attention(q, k, v, mask, return_lse=True, **options)
        if not few(tokens):
            return block_sparse_attention(
                q, self.k, self.v, mask, q_offset=self.start, kv_length=self.length, return_lse=True, **options
            )
        plan = mask.plan(heads, tokens, self.capacity, PLAN_BLOCK, PLAN_BLOCK)
        slots = jnp.arange(self.capacity, dtype=jnp.int32)
        columns = jnp.where(slots < self.length[:, None], slots, -1)
        rows = self.start[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        return attend_direct(q, self.k, self.v, visible(plan, rows, columns), **options)

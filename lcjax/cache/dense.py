"""Every token keeps its slot: the cache of a layer that may look anywhere."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels as pk
from lcjax.cache.base import (
    Options,
    appended,
    check_room,
    known_empty,
    no_tokens,
    through_op,
    write_first,
    write_slots,
)
from lcjax.cache.direct import attend_direct, few
from lcjax.cache.visible import visible
from pallas_kernels.masks import Mask
from pallas_kernels.op import platform

PLAN_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCache:
    """Token j of a request lies in slot j."""

    k: Any  # [B,S,K,D]
    v: Any  # [B,S,K,Dv]
    length: Any  # int32 [B]
    start: Any  # int32 [B]

    @classmethod
    def init(cls, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: Any) -> "DenseCache":
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

    def with_keys(self, k: Float[Array, "B S K E"]) -> "DenseCache":
        """The same tokens with other keys in the slots."""
        return replace(self, k=k)

    def append(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], valid: Bool[Array, "B T"] | None = None
    ) -> "DenseCache":
        """Write the new tokens behind the ones held."""
        batch, tokens = k.shape[:2]
        count = appended(tokens, valid, batch)
        check_room(self.length, count, self.capacity)
        if known_empty(self.length):
            k, v = write_first(self.k, k), write_first(self.v, v)
            return replace(self, k=k, v=v, length=self.length + jnp.asarray(count), start=self.length)
        slot = jnp.asarray(self.length)[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        return replace(
            self,
            k=write_slots(self.k, k, slot, valid),
            v=write_slots(self.v, v, slot, valid),
            length=self.length + count,
            start=self.length,
        )

    def positions(self) -> Int[Array, "B S"]:
        """The absolute position of the token in each slot."""
        return jnp.broadcast_to(jnp.arange(self.capacity, dtype=jnp.int32), self.k.shape[:2])

    def attend(
        self, q: Float[Array, "B T H D"], mask: Mask, **options: Unpack[Options]
    ) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
        """One token reads the slots directly; a chunk goes through the block-sparse op, the first without an offset."""
        tokens, heads = q.shape[1:3]
        if known_empty(self.start) and tokens <= self.capacity:
            return through_op(q, self.k[:, :tokens], self.v[:, :tokens], mask, **options)
        if not few(tokens):
            return through_op(q, self.k, self.v, mask, q_offset=self.start, kv_length=self.length, **options)
        if platform() == "gpu":
            held = pk.KVCache(self.k, self.v, jnp.minimum(self.start + tokens, self.capacity))
            with contextlib.suppress(pk.Unsupported):
                options_with_lse: Options = {**options, "return_lse": True}
                o, lse = pk.decode_attention(q, held, mask, implementation="mosaic_gpu", **options_with_lse)
                return o, lse
        plan = mask.plan(heads, tokens, self.capacity, PLAN_BLOCK, PLAN_BLOCK)
        slots = jnp.arange(self.capacity, dtype=jnp.int32)
        columns = jnp.where(slots < jnp.asarray(self.length)[:, None], slots, -1)
        rows = jnp.asarray(self.start)[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        return attend_direct(q, self.k, self.v, visible(plan, rows, columns), **options)

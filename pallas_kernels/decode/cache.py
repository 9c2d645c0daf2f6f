"""What decode attention reads: a contiguous, ring or paged key/value cache, as it is or as int8 with scales."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.pytrees import record


@record("ring")
class KVCache:
    """Keys and values of a batch of requests, with the place of every token.

    Contiguous and ring: `k [B,S,K,D]`, `v [B,S,K,Dv]`. Paged: `k [P,K,page,D]`, `v [P,K,page,Dv]` and a `page_table` of
    physical pages, `[B,W]` or, a table for every KV head, `[B,K,W]`; entries past a request's length are never read.

    Attributes:
      k: keys, rotated already. bfloat16, float32, or int8 with `k_scale`.
      v: values, likewise.
      lengths: tokens of each request seen so far, the queries' own included, `[B]`.
      k_scale: float32 factors of int8 keys: `[B, K, S]`, or `[P, K, page]` when paged.
      v_scale: likewise of the values.
      page_table: physical pages, or None.
      ring: number of leading slots that never turn over (attention sinks), when the other slots form a ring; else None.
        The token at position `p >= ring` lies in slot `ring + (p - ring) % (S - ring)`.
    """

    k: Array
    v: Array
    lengths: Int[Array, " B"]
    k_scale: Float[Array, "_ K _"] | None = None
    v_scale: Float[Array, "_ K _"] | None = None
    page_table: Int[Array, "B W"] | Int[Array, "B K W"] | None = None
    ring: int | None = None

    @property
    def kind(self) -> Literal["contiguous", "ring", "paged"]:
        if self.page_table is not None:
            return "paged"
        return "contiguous" if self.ring is None else "ring"

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1] if self.kind == "paged" else self.k.shape[2]

    @property
    def capacity(self) -> int:
        """Slots a request can address."""
        return self.page_table.shape[-1] * self.k.shape[2] if self.page_table is not None else self.k.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of the stored keys, values and scales."""
        return sum(x.size * x.dtype.itemsize for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None)

    def slot_positions(self, slot: Int[Array, "B ..."] | None = None) -> Int[Array, "B ..."]:
        """The position held by each slot (all of them by default), or -1 where a slot holds none."""
        slot = jnp.arange(self.capacity, dtype=jnp.int32)[None] if slot is None else slot
        length = self.lengths.reshape(-1, *(1,) * (slot.ndim - 1))
        if self.ring is None:
            return jnp.where(slot < length, slot, -1)
        period = self.capacity - self.ring
        age = (length - 1 - slot) % period  # tokens since this slot was written, for the slots that turn over
        position = jnp.where(slot < self.ring, slot, length - 1 - age)
        return jnp.where((position >= jnp.minimum(slot, self.ring)) & (position < length), position, -1)


def quantize_tokens(x: Float[Array, "... D"]) -> tuple[Int[Array, "... D"], Float[Array, ...]]:
    """int8 codes and one float32 factor a vector: x ~ codes * factor, off by at most half a step, |x|_max / 254."""
    x = x.astype(jnp.float32)
    factor = jnp.maximum(jnp.abs(x).max(-1), 1e-30) / 127.0
    return jnp.round(x / factor[..., None]).astype(jnp.int8), factor

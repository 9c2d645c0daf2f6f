"""What decode attention reads: a contiguous, ring or paged key/value cache, as it is or as int8 with factors."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int, Int32

from pallas_kernels.pytrees import record


@record("ring")
class KVCache:
    """Keys and values of a batch of requests, with the place of every token.

    Contiguous and ring: `k [B,S,K,D]`, `v [B,S,K,Dv]`. Paged: `k [P,K,page,D]`, `v [P,K,page,Dv]` and a `page_table` of
    physical pages, `[B,W]` or, a table for every KV head, `[B,K,W]`; entries past a request's length are never read.

    Attributes:
      k: keys, rotated already. bfloat16, float32, or int8 with `factors`.
      v: values, likewise.
      lengths: tokens of each request seen so far, the queries' own included, `[B]`.
      factors: of int8 keys and values, a word of both (`pack_factors`): `[B, K, S]`, or `[P, K, page]` when paged.
      page_table: physical pages, or None.
      ring: number of leading slots that never turn over (attention sinks), when the other slots form a ring; else None.
        The token at position `p >= ring` lies in slot `ring + (p - ring) % (S - ring)`.
    """

    k: Array
    v: Array
    lengths: Int[Array, " B"]
    factors: Int[Array, "_ K _"] | None = None
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
        """Bytes of the stored keys, values and factors."""
        return sum(x.size * x.dtype.itemsize for x in (self.k, self.v, self.factors) if x is not None)

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


def quantize_tokens(x: Float[Array, "... D"]) -> tuple[Int[Array, "... D"], BFloat16[Array, ...]]:
    """int8 codes and one bfloat16 factor a vector: x ~ codes * factor, off by at most half a step, |x|_max / 252.

    The factor is |x|_max / 127 rounded up, and the codes are those of the rounded one: they stay within 127, and the
    rounding costs no more than a step that is up to 1/128 larger.
    """
    x = x.astype(jnp.float32)
    exact = lax.bitcast_convert_type(jnp.maximum(jnp.abs(x).max(-1), 1e-30) / 127.0, jnp.int32)
    factor = lax.bitcast_convert_type((exact + 0xFFFF) & -0x10000, jnp.float32)
    return jnp.round(x / factor[..., None]).astype(jnp.int8), factor.astype(jnp.bfloat16)


def pack_factors(k: BFloat16[Array, ...], v: BFloat16[Array, ...]) -> Int32[Array, ...]:
    """Words with a key's factor in the lower half and its value's in the upper: one copy brings a block's both."""
    bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32)
    return bits(k) | bits(v) << 16


def unpack_factors(words: Int32[Array, ...]) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """float32 factors of the keys and of the values; also inside kernels."""
    as_float = lambda bits: lax.bitcast_convert_type(bits, jnp.float32)
    return as_float(words << 16), as_float(words & -0x10000)

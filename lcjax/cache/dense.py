"""Every token keeps its slot: the cache of a layer that may look anywhere."""

from dataclasses import dataclass, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels as pk
from lcjax.cache.base import (
    Counts,
    Options,
    appended,
    check_room,
    dropped,
    emptied,
    known_empty,
    no_tokens,
    take_rows,
    through_op,
    write_first,
    write_slots,
    written,
)
from lcjax.cache.direct import attend_direct
from lcjax.cache.encoding import decode, encode, no_factors, stored_bytes
from lcjax.cache.few import by_kernel, by_op, few
from lcjax.cache.visible import visible
from pallas_kernels.masks import Mask

PLAN_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCache:
    """Token j of a request lies in slot j, as it is or as int8 codes with factors."""

    k: Any  # [B,S,K,D]
    v: Any  # [B,S,K,Dv]
    factors: Any  # int32 [B,K,S], of int8: two bfloat16 a word (`encoding`)
    length: Any  # int32 [B]
    start: Any  # int32 [B]

    @classmethod
    def init(cls, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> "DenseCache":
        """An empty cache for `capacity` tokens a request; `dtype` int8 halves what bfloat16 takes."""
        shape, factors = (batch, capacity, num_kv_heads, head_dim), (batch, num_kv_heads, capacity)
        k, v = (jnp.zeros(shape, dtype) for _ in range(2))
        return cls(k, v, no_factors(factors, dtype), no_tokens(batch), no_tokens(batch))

    @property
    def capacity(self) -> int:
        """Tokens that one request may reach."""
        return self.k.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values: 2 B S K D times the width of the dtype (K and V of equal width); int8: D + 2."""
        return stored_bytes(self.k, self.v, self.factors)

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
        k, v, new_factors = encode(k, v, self.k.dtype)
        length, factors = jnp.asarray(self.length), self.factors
        if known_empty(self.length):
            if factors is not None:
                factors = write_first(factors, new_factors.swapaxes(1, 2), axis=2)
            new = write_first(self.k, k), write_first(self.v, v), factors
            return DenseCache(*new, length=length + jnp.asarray(count), start=self.length)
        slot = length[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        if factors is not None:
            rows, there = jnp.arange(batch)[:, None], dropped(slot, valid, self.capacity)
            factors = written(factors.at[rows, :, there], new_factors)
        new = write_slots(self.k, k, slot, valid), write_slots(self.v, v, slot, valid), factors
        return DenseCache(*new, length=length + count, start=self.length)

    def prepare(self, q: Array) -> "DenseCache":
        """Nothing."""
        return self

    def settled(self) -> "DenseCache":
        """Itself."""
        return self

    def held(self, tokens: int) -> pk.KVCache:
        """What the decode op reads after an append of `tokens`."""
        length = jnp.minimum(jnp.asarray(self.start) + tokens, self.capacity)
        return pk.KVCache(self.k, self.v, length, self.factors)

    def floats(self, dtype: DTypeLike, tokens: int | None = None) -> tuple[Array, Array]:
        """Keys and values of the first `tokens` slots (default: all), widened to `dtype` where they are codes."""
        cut = lambda x, axis: x if x is None or tokens is None else jax.lax.slice_in_dim(x, 0, tokens, axis=axis)
        return decode(cut(self.k, 1), cut(self.v, 1), cut(self.factors, 2), dtype)

    def positions(self) -> Int[Array, "B S"]:
        """The absolute position of the token in each slot."""
        return jnp.broadcast_to(jnp.arange(self.capacity, dtype=jnp.int32), self.k.shape[:2])

    def attend(
        self, q: Float[Array, "B T H D"], mask: Mask, **options: Unpack[Options]
    ) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
        """One token reads the slots directly; a chunk goes through the block-sparse op, the first without an offset."""
        tokens, heads = q.shape[1:3]
        if known_empty(self.start) and tokens <= self.capacity:
            return through_op(q, *self.floats(q.dtype, tokens), mask, **options)
        if not few(tokens):
            return through_op(q, *self.floats(q.dtype), mask, q_offset=self.start, kv_length=self.length, **options)
        if self.factors is not None:
            return by_op(q, self.held(tokens), mask, **options)
        if (done := by_kernel(q, self.held(tokens), mask, **options)) is not None:
            return done
        plan = mask.plan(heads, tokens, self.capacity, PLAN_BLOCK, PLAN_BLOCK)
        slots = jnp.arange(self.capacity, dtype=jnp.int32)
        columns = jnp.where(slots < jnp.asarray(self.length)[:, None], slots, -1)
        rows = jnp.asarray(self.start)[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        return attend_direct(q, self.k, self.v, visible(plan, rows, columns), **options)

    def stretch(self, first: Int[Array, "B"], tokens: int) -> "DenseCache":
        """Copies of `tokens` slots of each request from `first` on; what was at `first` is at 0, `length` with it."""
        at = jnp.minimum(first[:, None] + jnp.arange(tokens, dtype=jnp.int32), self.capacity - 1)
        rows = jnp.arange(at.shape[0])[:, None]
        factors = None if self.factors is None else jnp.take_along_axis(self.factors, at[:, None], axis=2)
        counts = (jnp.asarray(x) - first for x in (self.length, self.start))
        return DenseCache(self.k[rows, at], self.v[rows, at], factors, *counts)

    def fork(self, rows: Counts) -> "DenseCache":
        """Copies of the rows."""
        return DenseCache(*take_rows(rows, self.k, self.v, self.factors, self.length, self.start))

    def evict(self, drop: Bool[Array, "B"]) -> "DenseCache":
        """The slots stay as they are, beyond the length."""
        length, start = emptied(drop, self.length, self.start)
        return replace(self, length=length, start=start)

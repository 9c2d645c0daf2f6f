"""The cache of a layer with attention sinks and a window: its memory does not grow with the text.

The first `sink` tokens keep their slots; every later token j goes to slot sink + (j - sink) mod R of a ring with
R = window + chunk - 1, so that a chunk of `chunk` tokens can be written before its first query looks back over a
whole window. What a slot holds follows from `length` alone, and the window mask hides what has expired: the result
equals the dense cache under the same mask.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcjax.cache.base import (
    Counts,
    Options,
    appended,
    emptied,
    known_empty,
    no_tokens,
    take_rows,
    through_op,
    traced,
    with_lse,
    write_first,
    write_slots,
)
from lcjax.cache.direct import attend_direct
from lcjax.cache.few import by_kernel, few
from lcjax.cache.visible import visible
from pallas_kernels import KVCache, merge_attention
from pallas_kernels.masks import Causal, Mask, Sink, Window
from pallas_kernels.plan import Plan

UNBOUNDED = 2**31 - 1
PLAN_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache:
    """`k[:, :sink]` holds the sinks, the rest is the ring."""

    k: Any  # [B,S,K,D]
    v: Any  # [B,S,K,Dv]
    length: Any  # int32 [B]
    start: Any  # int32 [B]
    sink: int = field(metadata={"static": True})
    window: int = field(metadata={"static": True})

    @classmethod
    def init(
        cls, batch: int, window: int, num_kv_heads: int, head_dim: int, dtype: Any, *, sink: int = 0, chunk: int = 1
    ) -> "RingCache":
        """An empty ring that takes at most `chunk` tokens an append."""
        if window < 1 or sink < 0 or chunk < 1:
            raise ValueError(
                f"ring cache: window {window} and chunk {chunk} must be positive and sink {sink} not negative"
            )
        shape = (batch, sink + window + chunk - 1, num_kv_heads, head_dim)
        empty = no_tokens(batch)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, sink, window)

    @property
    def capacity(self) -> int:
        """Tokens that one request may reach: a ring never fills (positions are int32)."""
        return UNBOUNDED

    @property
    def bytes(self) -> int:
        """Bytes of keys and values: 2 B (sink + window + chunk - 1) K D times the width of the dtype."""
        return self.k.nbytes + self.v.nbytes

    @property
    def ring(self) -> int:
        """Slots behind the sinks."""
        return self.k.shape[1] - self.sink

    def with_keys(self, k: Float[Array, "B S K E"]) -> "RingCache":
        """The same tokens with other keys in the slots."""
        return replace(self, k=k)

    def append(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], valid: Bool[Array, "B T"] | None = None
    ) -> "RingCache":
        """Write the new tokens; each takes the place of the token R before it."""
        batch, tokens = k.shape[:2]
        if tokens > self.ring - self.window + 1:
            raise ValueError(
                f"ring cache: an append of {tokens} tokens is longer than its chunk of {self.ring - self.window + 1}; "
                "prefill in smaller chunks or make the cache with a larger chunk"
            )
        count = appended(tokens, valid, batch)
        k, v = k.astype(self.k.dtype), v.astype(self.v.dtype)
        if known_empty(self.length):  # slots are positions until the ring turns
            k, v = write_first(self.k, k), write_first(self.v, v)
            return replace(self, k=k, v=v, length=self.length + jnp.asarray(count), start=self.length)
        position = jnp.asarray(self.length)[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        slot = jnp.where(position < self.sink, position, self.sink + (position - self.sink) % self.ring)
        return replace(
            self,
            k=write_slots(self.k, k, slot, valid),
            v=write_slots(self.v, v, slot, valid),
            length=self.length + count,
            start=self.length,
        )

    def prepare(self, q: Array) -> "RingCache":
        """Nothing."""
        return self

    def fork(self, rows: Counts) -> "RingCache":
        """Copies of the rows."""
        k, v, length, start = take_rows(rows, self.k, self.v, self.length, self.start)
        return replace(self, k=k, v=v, length=length, start=start)

    def evict(self, drop: Bool[Array, "B"]) -> "RingCache":
        """The slots stay as they are; by the length, none of them holds a token."""
        length, start = emptied(drop, self.length, self.start)
        return replace(self, length=length, start=start)

    def positions(self) -> Int[Array, "B S"]:
        """The absolute position of the token in each slot; -1 where none has been written."""
        length = jnp.asarray(self.length)[:, None]
        fixed = jnp.arange(self.sink, dtype=jnp.int32)
        fixed = jnp.where(fixed < length, fixed, -1)
        last = length - self.sink - 1  # index, counted behind the sinks, of the newest token
        place = jnp.arange(self.ring, dtype=jnp.int32)
        index = last - (last - place) % self.ring
        turning = jnp.where((index >= 0) & (last >= 0), self.sink + index, -1)
        return jnp.concatenate([fixed, turning], axis=1)

    def attend(
        self, q: Float[Array, "B T H D"], mask: Mask, **options: Unpack[Options]
    ) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
        """As `DenseCache.attend`, for a causal mask of this ring's sinks and window."""
        tokens, heads = q.shape[1:3]
        plan = mask.plan(heads, tokens, self.sink + self.window, PLAN_BLOCK, PLAN_BLOCK)
        self._check(plan)
        if known_empty(self.start):
            return through_op(q, self.k[:, :tokens], self.v[:, :tokens], mask, **options)
        if few(tokens):
            held = KVCache(self.k, self.v, jnp.asarray(self.start) + tokens, ring=self.sink)
            if (done := by_kernel(q, held, mask, **options)) is not None:
                return done
            rows = jnp.asarray(self.start)[:, None] + jnp.arange(tokens, dtype=jnp.int32)
            return attend_direct(q, self.k, self.v, visible(plan, rows, self.positions()), **options)
        return self._attend_chunk(q, **options)

    def _attend_chunk(self, q: Array, **options: Unpack[Options]) -> tuple[Array, Array | None]:
        """Sinks and unrolled ring are disjoint key sets: two calls and a merge."""
        first = jnp.maximum(self.length - self.ring, self.sink)  # oldest token in the ring
        place = (first[:, None] - self.sink + jnp.arange(self.ring, dtype=jnp.int32)) % self.ring
        order = (self.sink + place)[:, :, None, None]
        k, v = (jnp.take_along_axis(x, order, axis=1) for x in (self.k, self.v))
        held = jnp.maximum(self.length - first, 0)
        near_mask = Causal() & Window(self.window)
        if self.sink == 0:
            return through_op(q, k, v, near_mask, q_offset=self.start - first, kv_length=held, **options)
        options.pop("return_lse", None)
        near = with_lse(q, k, v, near_mask, q_offset=self.start - first, kv_length=held, **options)
        options.pop("sink_logits", None)  # they are in the first part
        k, v, held = self.k[:, : self.sink], self.v[:, : self.sink], jnp.minimum(self.length, self.sink)
        far = with_lse(q, k, v, Causal() & Sink(self.sink), q_offset=self.start, kv_length=held, **options)
        return merge_attention(near, far)

    def _check(self, plan: Plan) -> None:
        """Refuse a mask that differs from the ring's own, as far as its numbers are known."""
        if not plan.causal or plan.expiry is not None or plan.second is not None or plan.window.shape != (1,):
            raise ValueError(
                "ring cache: its mask must be causal, of sinks and one window for all heads; use a dense cache"
            )
        for name, number, own in (("sink", plan.sink, self.sink), ("window", plan.window, self.window)):
            if not traced(number) and int(number[0]) != own:
                raise ValueError(
                    f"ring cache: the mask's {name} is {int(number[0])} and the ring's {own}; make them equal"
                )

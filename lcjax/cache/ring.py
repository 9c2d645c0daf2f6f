"""The cache of a layer with attention sinks and a window: its memory does not grow with the text.

The first `sink` tokens keep their slots; every later token j goes to slot sink + (j - sink) mod window. What a slot
holds follows from `length` alone. The queries of a chunk look back beyond what the ring holds after it was written:
until the cache is settled, it keeps its slots as they were, and the chunk. The result equals the dense cache under the
same mask, for chunks of any length.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Unpack

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
from lcjax.cache.few import by_kernel
from lcjax.cache.visible import visible
from pallas_kernels import KVCache, merge_attention
from pallas_kernels.masks import Causal, Mask, Sink, Window
from pallas_kernels.plan import Plan

UNBOUNDED = 2**31 - 1
PLAN_BLOCK = 128


class Chunk(NamedTuple):
    """The tokens of the last append, and the slots before it."""

    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K Dv"]
    k_before: Array
    v_before: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache:
    """`k[:, :sink]` holds the sinks, the rest is the ring."""

    k: Any  # [B,S,K,D]
    v: Any  # [B,S,K,Dv]
    length: Any  # int32 [B]
    start: Any  # int32 [B]
    chunk: Chunk | None
    sink: int = field(metadata={"static": True})

    @classmethod
    def init(
        cls, batch: int, window: int, num_kv_heads: int, head_dim: int, dtype: Any, *, sink: int = 0
    ) -> "RingCache":
        """An empty ring."""
        if window < 1 or sink < 0:
            raise ValueError(f"ring cache: window {window} must be positive and sink {sink} not negative")
        shape = (batch, sink + window, num_kv_heads, head_dim)
        empty = no_tokens(batch)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, None, sink)

    @property
    def capacity(self) -> int:
        """Tokens that one request may reach: a ring never fills (positions are int32)."""
        return UNBOUNDED

    @property
    def bytes(self) -> int:
        """Bytes of keys and values: 2 B (sink + window) K D times the width of the dtype."""
        return self.k.nbytes + self.v.nbytes

    @property
    def window(self) -> int:
        """Slots behind the sinks."""
        return self.k.shape[1] - self.sink

    def append(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], valid: Bool[Array, "B T"] | None = None
    ) -> "RingCache":
        """Write the new tokens; each takes the place of the token `window` before it."""
        batch, tokens = k.shape[:2]
        count = appended(tokens, valid, batch)
        k, v = k.astype(self.k.dtype), v.astype(self.v.dtype)
        length = jnp.asarray(self.length)
        end = length + jnp.asarray(count)
        chunk = Chunk(k, v, self.k, self.v)
        if known_empty(self.length) and tokens <= self.k.shape[1]:  # slots are positions until the ring turns
            k, v = write_first(self.k, k), write_first(self.v, v)
            return replace(self, k=k, v=v, length=end, start=self.length, chunk=chunk)
        position = length[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        slot = jnp.where(position < self.sink, position, self.sink + (position - self.sink) % self.window)
        if tokens > self.window:
            stays = (position < self.sink) | (position >= end[:, None] - self.window)
            valid = stays if valid is None else stays & valid
        k, v = write_slots(self.k, k, slot, valid), write_slots(self.v, v, slot, valid)
        return replace(self, k=k, v=v, length=end, start=self.length, chunk=chunk)

    def prepare(self, q: Array) -> "RingCache":
        """Nothing."""
        return self

    def settled(self) -> "RingCache":
        """Without the last chunk."""
        return replace(self, chunk=None)

    def fork(self, rows: Counts) -> "RingCache":
        """Copies of the rows."""
        k, v, length, start = take_rows(rows, self.k, self.v, self.length, self.start)
        return replace(self, k=k, v=v, length=length, start=start, chunk=None)

    def evict(self, drop: Bool[Array, "B"]) -> "RingCache":
        """The slots stay as they are; by the length, none of them holds a token."""
        length, start = emptied(drop, self.length, self.start)
        return replace(self, length=length, start=start, chunk=None)

    def positions(self) -> Int[Array, "B S"]:
        """The absolute position of the token in each slot; -1 where none has been written."""
        length = jnp.asarray(self.length)[:, None]
        fixed = jnp.arange(self.sink, dtype=jnp.int32)
        fixed = jnp.where(fixed < length, fixed, -1)
        last = length - self.sink - 1  # index, counted behind the sinks, of the newest token
        place = jnp.arange(self.window, dtype=jnp.int32)
        index = last - (last - place) % self.window
        turning = jnp.where((index >= 0) & (last >= 0), self.sink + index, -1)
        return jnp.concatenate([fixed, turning], axis=1)

    def attend(
        self, q: Float[Array, "B T H D"], mask: Mask, **options: Unpack[Options]
    ) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
        """One token reads the ring, a chunk also what the ring forgot for it. The mask is this ring's own."""
        tokens, heads = q.shape[1:3]
        plan = mask.plan(heads, tokens, self.sink + self.window, PLAN_BLOCK, PLAN_BLOCK)
        self._check(plan)
        if self.chunk is not None and known_empty(self.start):
            return through_op(q, self.chunk.k, self.chunk.v, mask, **options)
        if tokens > 1:
            return self._attend_chunk(q, **options)
        held = KVCache(self.k, self.v, jnp.asarray(self.start) + tokens, ring=self.sink)
        if (done := by_kernel(q, held, mask, **options)) is not None:
            return done
        rows = jnp.asarray(self.start)[:, None]
        return attend_direct(q, self.k, self.v, visible(plan, rows, self.positions()), **options)

    def _attend_chunk(self, q: Array, **options: Unpack[Options]) -> tuple[Array, Array | None]:
        """Sinks and what lies behind them are disjoint key sets: two calls and a merge."""
        if self.chunk is None:
            raise ValueError(f"ring cache: {q.shape[1]} tokens attend to a settled cache: attend after an append")
        start, length, tokens = jnp.asarray(self.start), jnp.asarray(self.length), q.shape[1]
        first = jnp.maximum(start - self.window, self.sink)  # the oldest token that the ring held
        place = (first[:, None] - self.sink + jnp.arange(self.window, dtype=jnp.int32)) % self.window
        slot = (start - first)[:, None] + jnp.arange(tokens, dtype=jnp.int32)  # negative: a sink

        def joined(before: Array, new: Array) -> Array:
            old = jnp.take_along_axis(before, (self.sink + place)[:, :, None, None], axis=1)
            return write_slots(jnp.pad(old, ((0, 0), (0, tokens), (0, 0), (0, 0))), new, slot, slot >= 0)

        k, v = joined(self.chunk.k_before, self.chunk.k), joined(self.chunk.v_before, self.chunk.v)
        near_mask, places = Causal() & Window(self.window), {"q_offset": start - first, "kv_length": length - first}
        places["kv_length"] = jnp.maximum(places["kv_length"], 0)
        if self.sink == 0:
            return through_op(q, k, v, near_mask, **places, **options)
        options.pop("return_lse", None)
        near = with_lse(q, k, v, near_mask, **places, **options)
        options.pop("sink_logits", None)  # they are in the first part
        k, v, held = self.k[:, : self.sink], self.v[:, : self.sink], jnp.minimum(length, self.sink)
        far = with_lse(q, k, v, Causal() & Sink(self.sink), q_offset=start, kv_length=held, **options)
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

"""Which key blocks each request and KV head reads, and an even division of those visits among programs.

A pair is one request and one KV head, `p = b * K + k`. Its visits are, in this order, the blocks that hold attention
sinks, the blocks from the start of its window to its length, and the blocks that a run-time list names. The visits
of all pairs lie on one line, which is cut into equal parts, one a program, so a batch of ragged lengths keeps every
processor busy. A program writes one partial result for every pair it touches: program c and pair p own slot c + p,
which no other combination reaches.

The arithmetic serves arrays of all pairs (XLA) and the scalars of one pair: kernels make their part of the schedule
themselves, from lengths and counts, as launches that prepare one take longer than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.decode.cache import KVCache
from pallas_kernels.plan import Ints, Plan

CHUNK = 8  # entries of a line looked up at once: their loads overlap


class Span(NamedTuple):
    """Visits that do not come from a list; int32 scalars or arrays of pairs.

    Attributes:
      sinks: leading blocks, visited because they hold sink tokens.
      tail: first block of the window.
      static: visits to sink and window blocks; visit `n >= static` is entry `n - static` of the list.
    """

    sinks: Any
    tail: Any
    static: Any


def per_kv_head(values: Int[Ints, " P"], plan: Plan, kv_heads: int) -> Int[Array, " K"]:
    """The largest value among the query heads that share each KV head."""
    return jnp.asarray(values)[jnp.asarray(plan.pattern_of_head)].reshape(kv_heads, -1).max(-1)


def whole(length: Any, capacity: int, block: int) -> Span:
    """Every block that holds a token."""
    held = jnp.minimum(length, capacity)
    zero = held * 0
    return Span(zero, zero, lax.div(held + (block - 1), jnp.int32(block)))


def span(length: Any, sink: Any, window: Any, capacity: int, queries: int, block: int) -> Span:
    """Sink and window blocks of the last `queries` of `length` tokens."""
    held = jnp.minimum(length, capacity)
    blocks = lax.div(held + (block - 1), jnp.int32(block))
    sinks = lax.div(jnp.minimum(sink, held) + (block - 1), jnp.int32(block))
    oldest = length - queries  # position of the first query
    start = jnp.where(window > oldest, 0, oldest - window + 1)
    tail = jnp.clip(jnp.where(window > 0, lax.div(start, jnp.int32(block)), blocks), sinks, blocks)
    return Span(sinks, tail, sinks + blocks - tail)


def reads_all(cache: KVCache, plan: Plan) -> bool:
    """Whether no block can be left out: the slots of a ring have no order, and columns may live anywhere."""
    return cache.kind == "ring" or plan.expiry is not None or plan.second is not None


def static_visits(cache: KVCache, plan: Plan, queries: int, block: int) -> Span:
    """The spans of every pair, `[B, K]`, for the last `queries` tokens of requests."""
    shape = cache.lengths.shape[0], cache.num_kv_heads
    length = jnp.broadcast_to(cache.lengths.astype(jnp.int32)[:, None], shape)
    if reads_all(cache, plan):
        return whole(length, cache.capacity, block)
    limit = lambda x: jnp.broadcast_to(per_kv_head(x, plan, shape[1])[None].astype(jnp.int32), shape)
    return span(length, limit(plan.sink), limit(plan.window), cache.capacity, queries, block)


def share(total: Any, program: Any, programs: int) -> tuple[Any, Any]:
    """First visit and number of visits of a program."""
    each, rest = lax.div(total, jnp.int32(programs)), lax.rem(total, jnp.int32(programs))
    return program * each + jnp.minimum(program, rest), each + jnp.where(program < rest, 1, 0)


def program_of(visit: Any, total: Any, programs: int) -> Any:
    """The program whose share holds a visit."""
    each, rest = lax.div(total, jnp.int32(programs)), lax.rem(total, jnp.int32(programs))
    wide = rest * (each + 1)  # visits of the programs that have one more
    return jnp.where(
        visit < wide, lax.div(visit, each + 1), rest + lax.div(jnp.maximum(visit - wide, 0), jnp.maximum(each, 1))
    )


@dataclasses.dataclass(frozen=True)
class Line:
    """The visits of all pairs one after another, for one program to find its place in.

    Attributes:
      visits: visits of an entry, from its index.
      entries: how many there are.
      repeat: neighbouring pairs that are one entry, since they have equally many visits: KV heads, or 1.
    """

    visits: Callable[[Any], Any]
    entries: int
    repeat: int

    def before(self, stop: Any) -> Any:
        """Visits of the entries below `stop`."""

        def add(n, total):
            for m in range(min(CHUNK, self.entries)):
                entry = n * CHUNK + m
                mine = self.visits(jnp.minimum(entry, self.entries - 1)) * self.repeat
                total += jnp.where(entry < stop, mine, 0)
            return total

        chunks = -(-self.entries // CHUNK)
        start = jnp.int32(0)
        return add(jnp.int32(0), start) if chunks == 1 else lax.fori_loop(0, chunks, add, start)

    def total(self) -> Any:
        """All visits."""
        return self.before(jnp.int32(self.entries))

    def start(self, pair: Any) -> tuple[Any, Any]:
        """First visit of a pair on the line, and its visits."""
        entry = lax.div(pair, jnp.int32(self.repeat))
        visits = self.visits(entry)
        return self.before(entry) + lax.rem(pair, jnp.int32(self.repeat)) * visits, visits

    def locate(self, visit: Any) -> tuple[Any, Any]:
        """The pair of a visit on the line, and which of the pair's visits it is."""
        after = lambda entry, start: start + self.visits(entry) * self.repeat
        entry, start = lax.while_loop(
            lambda at: (after(*at) <= visit) & (at[0] < self.entries - 1),
            lambda at: (at[0] + 1, after(*at)),
            (jnp.int32(0), jnp.int32(0)),
        )
        visits = jnp.maximum(self.visits(entry), 1)
        return entry * self.repeat + lax.div(visit - start, visits), lax.rem(visit - start, visits)

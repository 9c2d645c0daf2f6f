"""Which key blocks each request and KV head reads, and an even division of those visits among programs.

A pair is one request and one KV head, `p = b * K + k`. Its visits are, in this order, the blocks that hold attention
sinks, the blocks from the start of its window to its length, and the blocks that a run-time list names. The visits
of all pairs lie on one line, which is cut into equal parts, one a program, so a batch of ragged lengths keeps every
processor busy. A program writes one partial result for every pair it touches: program c and pair p own slot c + p,
which no other combination reaches.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.decode.cache import KVCache
from pallas_kernels.lists import BlockList
from pallas_kernels.plan import Ints, Plan
from pallas_kernels.pytrees import record


@record()
class Schedule:
    """Visits of N programs to the blocks of `pairs` pairs.

    Attributes:
      sinks: leading blocks that a pair visits because they hold sink tokens, `[pairs]`.
      tail: first block of its window, `[pairs]`.
      static: visits to sink and window blocks, `[pairs]`; visit `n >= static` is entry `n - static` of the list.
      visits: all visits of a pair, `[pairs]`.
      first_pair, first_visit: where each program begins, `[N]`.
      work: visits of each program, `[N]`.
      owner: first and last of the programs that share a pair, `[pairs, 2]`; (1, 0) for a pair without visits.
    """

    sinks: Int[Array, " pairs"]
    tail: Int[Array, " pairs"]
    static: Int[Array, " pairs"]
    visits: Int[Array, " pairs"]
    first_pair: Int[Array, " N"]
    first_visit: Int[Array, " N"]
    work: Int[Array, " N"]
    owner: Int[Array, "pairs 2"]


def per_kv_head(values: Int[Ints, " P"], plan: Plan, kv_heads: int) -> Int[Array, " K"]:
    """The largest value among the query heads that share each KV head."""
    return jnp.asarray(values)[jnp.asarray(plan.pattern_of_head)].reshape(kv_heads, -1).max(-1)


def static_visits(cache: KVCache, plan: Plan, queries: int, block: int) -> tuple[Array, Array, Array]:
    """(sink blocks, first window block, visits) of every pair `[B, K]`, for the last `queries` tokens of requests."""
    kv_heads = cache.num_kv_heads
    held = jnp.minimum(cache.lengths, cache.capacity)[:, None]
    blocks = -(-held // block)
    if cache.kind == "ring" or plan.expiry is not None or plan.second is not None:
        zero = jnp.zeros((held.shape[0], kv_heads), jnp.int32)
        return zero, zero, jnp.broadcast_to(blocks, zero.shape)
    sink, window = (per_kv_head(x, plan, kv_heads)[None] for x in (plan.sink, plan.window))
    sinks = jnp.minimum(-(-jnp.minimum(sink, held) // block), blocks)
    oldest = cache.lengths[:, None] - queries  # position of the first query
    start = jnp.where(window > oldest, 0, oldest - window + 1)
    tail = jnp.clip(jnp.where(window > 0, start // block, blocks), sinks, blocks)
    return sinks, tail, sinks + blocks - tail


def make_schedule(
    cache: KVCache, plan: Plan, lists: BlockList | None, queries: int, block: int, programs: int
) -> Schedule:
    batch, kv_heads = cache.lengths.shape[0], cache.num_kv_heads
    sinks, tail, static = static_visits(cache, plan, queries, block)
    visits = static
    if lists is not None:
        visits = static + jnp.broadcast_to(lists.count[:, :, 0], (batch, kv_heads))
    flat = lambda x: x.reshape(-1).astype(jnp.int32)
    # Comparisons of all with all: a few thousand operations in one launch, where a scan or a bisection takes dozens.
    pair = jnp.arange(batch * kv_heads)
    end = jnp.where(pair[None, :] <= pair[:, None], flat(visits)[None, :], 0).sum(1)
    total = end[-1]
    program = jnp.arange(programs, dtype=jnp.int32)
    share, rest = total // programs, total % programs
    begin = program * share + jnp.minimum(program, rest)
    work = share + (program < rest)
    first_pair = jnp.minimum((end[None, :] <= begin[:, None]).sum(1), end.size - 1).astype(jnp.int32)
    start = end - flat(visits)
    ends = jnp.stack([start, end - 1], -1)
    owner = (begin <= ends[..., None]).sum(-1).astype(jnp.int32) - 1
    owner = jnp.where(flat(visits)[:, None] > 0, owner, jnp.array([1, 0]))
    return Schedule(
        flat(sinks),
        flat(tail),
        flat(static),
        flat(visits),
        first_pair,
        begin - start[first_pair],
        work.astype(jnp.int32),
        owner,
    )

"""What the TPU decode kernel copies: for every request (and KV head) a stream of places in the cache.

XLA turns lengths, page tables, windows and block lists into one stream of visits. A visit is a unit of `Layout.unit`
tokens, two integers: where it lies in the cache, and which tokens it holds with two marks. The kernel streams the
visits through scalar memory in chunks, so that its scalar memory does not grow with the context, and copies exactly
the units that a stream names. The streams take 8 bytes a unit, a few thousandths of the keys and values they stand for.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.decode.cache import KVCache
from pallas_kernels.decode.call import Call
from pallas_kernels.decode.schedule import per_kv_head, static_visits
from pallas_kernels.pytrees import record

LANES = 128
CHUNK = 64  # visits of one row of a stream: their places, then their tags
WHOLE, LISTED = 1, 2  # marks in a tag: every row reads every key; from a list, so only what the mask leaves out counts

type Order = Literal["heads", "tokens", "transposed"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a cache lies in memory, and the units it is read in.

    Attributes:
      order: 'heads' `[., K, rows, D]`, 'tokens' `[B, S, K, D]`, 'transposed' `[., K, D, rows]`; rows of a request's
        slots, or of a page.
      unit: tokens of a visit.
      per_step: visits that the kernel multiplies at once, a power of two.
      sets: 1 where all KV heads of a request are read together, else K.
    """

    order: Order
    unit: int
    per_step: int
    sets: int

    @property
    def tokens(self) -> int:
        """Keys of a step."""
        return self.unit * self.per_step

    @property
    def steps_per_chunk(self) -> int:
        return CHUNK // self.per_step


@record()
class Visits:
    """Streams of V = parts * B * sets programs, in that order.

    Attributes:
      stream: places and tags, `[V, chunks, 1, 2 CHUNK]`.
      count: visits of each program, `[V]`.
    """

    stream: Int[Array, "V C 1 N"]
    count: Int[Array, " V"]


def order_of(cache: KVCache) -> Order:
    """The order in which XLA keeps an array of this shape on a TPU: the one that pads least.

    A kernel that asked for another order would get a copy of the cache at every step; a test holds this against the
    compiler.
    """
    kv_heads, dim = cache.num_kv_heads, cache.k.shape[-1]
    if dim % LANES:
        return "transposed"
    if cache.kind == "paged":
        return "heads"
    packing = 4 // cache.k.dtype.itemsize
    rows, rest = divmod(kv_heads, packing)
    return "tokens" if rest == 0 and (rows in (1, 2, 4) or kv_heads % 8 == 0) else "heads"


def make_visits(call: Call, layout: Layout, parts: int) -> Visits:
    """The streams of a call, each divided evenly among `parts` programs."""
    cache, unit = call.cache, layout.unit
    queries = call.q.shape[1]
    sinks, tail, static = static_visits(cache, call.plan, queries, unit)
    join = (lambda x, how: x) if layout.sets > 1 else (lambda x, how: how(x, 1)[:, None])
    blocks = join(tail + static - sinks, jnp.max)
    sinks, tail = join(sinks, jnp.max), join(tail, jnp.min)
    static = sinks + blocks - tail
    n = jnp.arange(-(-cache.capacity // unit), dtype=jnp.int32)
    logical = jnp.where(n < sinks[..., None], n, (tail - sinks)[..., None] + n)  # [B, sets, n]
    tag = logical * unit * 4 + _whole(call, layout, logical)
    count = static
    if call.lists is not None:
        logical, tag, count = _with_lists(call, layout, logical, tag, static)
    place = _place(cache, layout, logical)
    return _divide(place, tag, count, parts, layout.per_step)


def _whole(call: Call, layout: Layout, logical: Array) -> Array:
    """WHOLE where every query of the set reads all keys of a unit, else 0."""
    cache, unit = call.cache, layout.unit
    if cache.kind == "ring":
        return jnp.zeros_like(logical)
    length = cache.lengths[:, None, None]
    low, high = logical * unit, logical * unit + unit
    sink, window = (_least(x, call, layout.sets) for x in (call.plan.sink, call.plan.window))
    seen = (high <= sink) | (length - 1 - low < window)
    inside = (high <= length - call.q.shape[1] + 1) & (high <= cache.capacity)
    return jnp.where(seen & inside, WHOLE, 0)


def _least(values, call: Call, sets: int) -> Array:
    """[sets, 1]: the smallest number among the query heads of a set."""
    return -per_kv_head(-jnp.asarray(values), call.plan, call.cache.num_kv_heads).reshape(sets, -1).max(1)[:, None]


def _most(values, call: Call, sets: int) -> Array:
    return per_kv_head(values, call.plan, call.cache.num_kv_heads).reshape(sets, -1).max(1)[:, None]


def _with_lists(call: Call, layout: Layout, logical, tag, static) -> tuple[Array, Array, Array]:
    """The static visits followed by those of the block list: (logical unit, tag, count)."""
    lists, cache, unit = call.lists, call.cache, layout.unit
    assert lists is not None
    batch, sets = static.shape
    units = lists.block_k // unit  # of a listed block
    listed = jnp.asarray(lists.idx)[:, :, 0, :, None] * units + jnp.arange(units)
    listed = jnp.broadcast_to(listed.reshape(batch, lists.idx.shape[1], -1), (batch, sets, lists.idx.shape[3] * units))
    held = -(-jnp.minimum(cache.lengths, cache.capacity) // unit)[:, None, None]
    mine = jnp.arange(listed.shape[2]) < (lists.count[:, :, 0] * units)[..., None]
    more = (mine & (listed < held)).sum(-1)  # ascending: units beyond the length come last
    sink, window = (_most(x, call, sets) for x in (call.plan.sink, call.plan.window))
    low, high, first = listed * unit, listed * unit + unit, cache.lengths[:, None, None] - call.q.shape[1]
    alone = (low >= sink) & (first - (high - 1) >= window) & (high <= first + 1)
    listed_tag = low * 4 + LISTED + jnp.where(alone, WHOLE, 0)
    n = jnp.arange(logical.shape[2] + listed.shape[2])
    entry = jnp.clip(n - static[..., None], 0, listed.shape[2] - 1)
    own = jnp.broadcast_to(jnp.minimum(n, logical.shape[2] - 1), entry.shape)
    pick = lambda a, b: jnp.where(
        n < static[..., None], jnp.take_along_axis(a, own, 2), jnp.take_along_axis(b, entry, 2)
    )
    return pick(logical, listed), pick(tag, listed_tag), static + more


def _place(cache: KVCache, layout: Layout, logical: Array) -> Array:
    """Where a logical unit lies: a row of units in a pool of pages, or the first token of a contiguous cache."""
    if cache.page_table is None:
        return jnp.minimum(logical * layout.unit, cache.capacity - layout.unit)
    units = cache.k.shape[2] // layout.unit  # of a page
    table = cache.page_table if cache.page_table.ndim == 3 else cache.page_table[:, None]
    table = jnp.broadcast_to(table, (*logical.shape[:2], table.shape[2]))
    page = jnp.take_along_axis(table, jnp.minimum(logical // units, table.shape[2] - 1), axis=2)
    return page * units + logical % units


def _divide(place: Array, tag: Array, count: Array, parts: int, per_step: int) -> Visits:
    """Streams `[B, sets, n]` cut into `parts` even runs of whole steps and into chunks."""
    size = -(-place.shape[2] // per_step)  # steps of the longest stream
    each = -(-size // parts) * per_step
    pad = each * parts + -each % CHUNK - place.shape[2]
    place, tag = (jnp.pad(x, ((0, 0), (0, 0), (0, pad))) for x in (place, tag))
    steps = -(-count // per_step)
    share = -(-steps // parts) * per_step
    streams, counts = [], []
    for part in range(parts):
        at = part * share[..., None] + jnp.arange(each + -each % CHUNK)
        run = lambda x, at=at: x if parts == 1 else jnp.take_along_axis(x, jnp.minimum(at, x.shape[2] - 1), 2)
        chunks = [run(x).reshape(*count.shape, -1, 1, CHUNK) for x in (place, tag)]
        streams.append(jnp.concatenate(chunks, -1))
        counts.append(jnp.clip(count - part * share, 0, share))
    flat = lambda x: jnp.stack(x).reshape(-1, *x[0].shape[2:]).astype(jnp.int32)
    return Visits(flat(streams), flat(counts))

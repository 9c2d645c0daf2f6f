"""Attention with bounded masks over a sequence that is split between shards: only the keys that are read travel.

Runs inside `shard_map`, shard r holding positions [r C, (r+1) C). The keys of a shard's queries fall into two disjoint
sets, attended separately and merged by their log-sum-exp:

* near: its own keys and a halo of the positions just before them, as long as the longest window or band of blocks;
* far: earlier blocks that stay visible (sinks, strided columns), of which every shard gathers those that some shard
  reads, in ascending order.

Both are calls of the same op in shifted coordinates; the shifts depend on the shard, so they are traced numbers.

Sinks of packed rows are the first keys of the query's document, wherever that begins: of the far keys, those of the
document that runs into the shard are put before the near ones, where the op finds them as the start of their segment.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Shaped

from lcjax.parallel.dense import Result, Shard, Split, attend
from pallas_kernels import merge_attention
from pallas_kernels.masks import Causal, Intervals, Mask, Sink, Window, per_head
from pallas_kernels.plan import INF, Plan

ALIGN = 128  # a halo is whole tiles long where shards are


@dataclass(frozen=True)
class Exchange:
    """Which keys travel, known before anything runs."""

    plan: Plan  # of the whole sequence, on the host
    shard: int  # tokens of a shard
    shards: int
    halo: int  # tokens before the shard that come along, a multiple of the plan's block
    far: np.ndarray  # [shards, m] blocks that each shard gives to all, ascending, -1 where it has fewer
    document_sinks: int  # sinks of each document, in packed rows; those of the plan are then 0

    @property
    def received(self) -> int:
        """Keys that a shard gets from others or keeps a copy of, in tokens."""
        return self.halo + self.far.size * self.plan.block_k + 2 * self.shards * self.document_sinks

    @property
    def lead(self) -> int:
        """Places before the halo for a document's sinks, in whole blocks."""
        return -(-self.document_sinks // self.plan.block_k) * self.plan.block_k


def plan_exchange(mask: Mask, heads: int, shard: int, shards: int, packed: bool) -> Exchange | None:
    """The exchange for a causal mask, or None where its numbers are not known or it reads most of the sequence."""
    if mask.lists is not None or not mask.causal:
        return None
    length = shard * shards
    plan = mask.plan(heads, length, length, shard, math.gcd(shard, ALIGN))
    if any(x is not None and not isinstance(x, np.ndarray) for x in (plan.sink, plan.window, plan.expiry, plan.second)):
        return None
    if not isinstance(plan.pattern_of_head, tuple) or (plan.sink >= length).any():
        return None
    unit = math.lcm(plan.block_k, math.gcd(shard, ALIGN))
    reach = max(int(plan.window.max()) - 1, _longest_life(plan, length), 0)
    if reach >= length:
        return None
    halo = min(-(-reach // unit) * unit, (shards - 1) * shard)
    sinks = int(plan.sink.max()) if packed else 0
    if sinks and (sinks > shard or (plan.sink != sinks).any()):
        return None
    if sinks:
        plan = plan.without_sinks()
    exchange = Exchange(plan, shard, shards, halo, _far_blocks(plan, shard, shards, halo), sinks)
    return exchange if exchange.received < length - shard else None


def _longest_life(plan: Plan, length: int) -> int:
    """Tokens after whose first a block is still read, of blocks that expire within the sequence; 0 with intervals."""
    if plan.expiry is None or plan.second is not None:
        return 0
    first = np.arange(plan.expiry.shape[1]) * plan.block_k
    return int(np.where(plan.expiry < length, plan.expiry - first, 0).max(initial=0))


def _far_blocks(plan: Plan, shard: int, shards: int, halo: int) -> np.ndarray:
    """Blocks that some shard reads though they lie before its halo, as rows by owner `[shards, m]`."""
    first = np.arange(shard * shards // plan.block_k) * plan.block_k
    needed = np.zeros(first.shape, bool)
    for r in range(1, shards):
        begin, end = r * shard, (r + 1) * shard
        read = (first < plan.sink[:, None]).any(0)
        if plan.expiry is not None:
            read |= (plan.expiry > begin).any(0)
        if plan.second is not None:
            low, high = plan.second[..., 0], plan.second[..., 1]
            read |= ((low < end) & (high > begin) & (low < high)).any(0)
        needed |= read & (first < begin - halo)
    mine = needed.reshape(shards, -1)
    table = np.full((shards, int(mine.sum(1).max())), -1, np.int32)
    per_shard = mine.shape[1]
    for r in range(shards):
        found = np.flatnonzero(mine[r])
        table[r, : found.size] = found + r * per_shard
    return table


def bounded(x: Shard, exchange: Exchange, split: Split) -> Result:
    """(o, lse) of the shard's queries."""
    place = lax.axis_index(split.axis)
    start = place * exchange.shard
    held = jnp.minimum(exchange.halo, start)  # tokens of the halo that exist
    near = _near(x, exchange, split, start, held)
    if exchange.far.size == 0:
        return near
    return merge_attention(near, _far(x, exchange, split, start, start - held))


def _near(x: Shard, exchange: Exchange, split: Split, start: Array, held: Array) -> Result:
    """Own keys behind the halo. Early shards have a shorter one: theirs is moved up, and causality hides the rest."""

    def behind_halo(own: Array) -> Array:
        if exchange.halo == 0:
            return own
        rest = jnp.zeros_like(own, shape=(own.shape[0], exchange.halo, *own.shape[2:]))
        joined = jnp.concatenate([halo_before(own, exchange.halo, split), own, rest], axis=1)
        return lax.dynamic_slice_in_dim(joined, exchange.halo - held, exchange.halo + exchange.shard, axis=1)

    first = start - held
    k, v, ids = behind_halo(x.k), behind_halo(x.v), None if x.ids is None else behind_halo(x.ids)
    if exchange.document_sinks and ids is not None:
        sinks = _sinks_before(x, exchange, split, first)
        k, v, ids = (jnp.concatenate(pair, axis=1) for pair in zip(sinks, (k, v, ids), strict=True))
    mask = _masks(exchange.plan, lambda p: _near_terms(exchange, p, first))
    pair = None if ids is None else (x.ids, ids)
    return attend(split, x.q, k, v, Causal() & mask, segment_ids=pair, q_offset=exchange.lead + held)


def _sinks_before(x: Shard, exchange: Exchange, split: Split, near: Array) -> tuple[Array, Array, Array]:
    """(k, v, ids), `lead` keys: the sinks, before position `near`, of the document that runs into the shard.

    They stand right-aligned: with the keys behind them they are one run of the document from its first key, or from
    its sinks on to where the near keys begin. Every shard offers the first keys of the last document that begins in
    it and, should that be short of it, its own first keys.
    """
    assert x.ids is not None
    size, count = x.ids.shape[1], exchange.document_sinks
    place = lax.axis_index(split.axis)
    start, index = place * size, jnp.arange(size)
    begins = x.ids != jnp.concatenate([halo_before(x.ids, 1, split), x.ids[:, :-1]], axis=1)
    begins = begins.at[:, 0].set(begins[:, 0] | (place == 0))
    last = jnp.max(jnp.where(begins, index, -1), axis=1)  # [B] where the last document begins, -1: on an earlier shard
    offered = jnp.minimum(jnp.maximum(last, 0)[:, None] + jnp.arange(count), size - 1)  # [B,n]
    offered = jnp.concatenate([offered, jnp.broadcast_to(jnp.arange(count), offered.shape)], axis=1)

    def everyones(a: Array) -> Array:
        return lax.all_gather(_pick(a, offered), split.axis, axis=1, tiled=True)  # [B, shards * 2n, ...]

    starts = lax.all_gather(jnp.where(last < 0, -1, start + last), split.axis)  # [shards, B]
    earlier = jnp.arange(split.shards)[:, None] < place
    document = jnp.max(jnp.where(earlier, starts, 0), axis=0)[:, None]  # [B,1] its first position
    held = jnp.clip(near - document, 0, count)
    nth = jnp.arange(exchange.lead) - (exchange.lead - held)  # [B, lead] which of its keys, negative: none
    position = document + nth
    owner, home = position // size, document // size
    slot = 2 * count * owner + jnp.where(owner == home, nth, count + position % size)
    slot = jnp.clip(slot, 0, 2 * count * split.shards - 1)
    k, v, ids = (_pick(everyones(a), slot) for a in (x.k, x.v, x.ids))
    return k, v, jnp.where(nth >= 0, ids, jnp.iinfo(jnp.int32).min + 2)


def _pick(a: Shaped[Array, "B S *rest"], index: Int[Array, "B n"]) -> Shaped[Array, "B n *rest"]:
    return jnp.take_along_axis(a, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), axis=1)


def halo_before(own: Shaped[Array, "B C *rest"], tokens: int, split: Split) -> Shaped[Array, "B n *rest"]:
    """The `tokens` positions before the shard; those before the start of the sequence are the end of it."""
    size, parts = own.shape[1], []
    for hop in range(1, -(-tokens // size) + 1):
        from_hop = [(r, (r + hop) % split.shards) for r in range(split.shards)]
        parts.insert(0, lax.ppermute(own[:, -min(size, tokens - (hop - 1) * size) :], split.axis, from_hop))
    return jnp.concatenate(parts, axis=1)


def _far(x: Shard, exchange: Exchange, split: Split, start: Array, near: Array) -> Result:
    """Gathered blocks, of which those before position `near` are this shard's to read."""
    block = exchange.plan.block_k
    own = jnp.asarray(np.maximum(exchange.far, 0) % (exchange.shard // block))[lax.axis_index(split.axis)]  # [m]

    def everyones(a: Array) -> Array:
        picked = jnp.take(a.reshape(a.shape[0], -1, block, *a.shape[2:]), own, axis=1)
        picked = picked.reshape(a.shape[0], -1, *a.shape[2:])
        return lax.all_gather(picked, split.axis, axis=1, tiled=True)

    mask = _masks(exchange.plan, lambda p: _far_terms(exchange, p, start, near))
    ids = None if x.ids is None else (x.ids, everyones(x.ids))
    return attend(split, x.q, everyones(x.k), everyones(x.v), mask, segment_ids=ids)


def _masks(plan: Plan, terms: Any) -> Mask:
    """One mask per pattern, each the union of its terms."""
    united = []
    for p in range(plan.num_patterns):
        first, *rest = terms(p)
        for term in rest:
            first = first | term
        united.append(first)
    assert isinstance(plan.pattern_of_head, tuple)
    return united[0] if len(united) == 1 else per_head(united, plan.pattern_of_head)


def _near_terms(exchange: Exchange, p: int, first: Array) -> list[Mask]:
    """Pattern p where position `first` is called 0."""
    plan = exchange.plan
    terms: list[Mask] = [Window(int(plan.window[p]))]
    if exchange.document_sinks:
        terms.append(Sink(exchange.document_sinks))
    elif (plan.sink > 0).any():
        terms.append(Sink(jnp.maximum(int(plan.sink[p]) - first, 0)))
    if plan.expiry is not None or plan.second is not None:
        count = (exchange.halo + exchange.shard) // plan.block_k
        slice_of = lambda row: lax.dynamic_slice_in_dim(jnp.asarray(row), first // plan.block_k, count)
        ahead = exchange.lead // plan.block_k

        def moved(row: np.ndarray) -> Array:
            later = _earlier(slice_of(row), first - exchange.lead)
            return jnp.pad(later, ((ahead, 0), *((0, 0),) * (row.ndim - 1)))

        expiry, second = _columns(plan, p)
        terms.append(Intervals(plan.block_k, moved(expiry), None if second is None else moved(second)))
    return terms


def _far_terms(exchange: Exchange, p: int, start: Array, near: Array) -> list[Mask]:
    """Pattern p for the gathered blocks, where the shard's first query is row 0; without causality, all being past."""
    plan, blocks = exchange.plan, exchange.far.reshape(-1)
    exists = jnp.asarray(blocks >= 0) & (jnp.asarray(blocks) * plan.block_k < near)
    # The sink's blocks are the first ones gathered, so that their places are their positions.
    terms: list[Mask] = [Sink(jnp.minimum(int(plan.sink[p]), near))] if (plan.sink > 0).any() else []
    if plan.expiry is not None or plan.second is not None:
        expiry, second = _columns(plan, p)
        expiry = jnp.where(exists, _earlier(jnp.asarray(expiry[blocks]), start), 0)
        if second is not None:
            second = jnp.where(exists[:, None], _earlier(jnp.asarray(second[blocks]), start), 0)
        terms.append(Intervals(plan.block_k, expiry, second))
    return terms


def _columns(plan: Plan, p: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(expiry, second) of a pattern that has columns."""
    blank = np.zeros((plan.sink.shape[0], plan.second.shape[1] if plan.second is not None else 0), np.int32)
    expiry = blank if plan.expiry is None else plan.expiry
    return np.asarray(expiry[p]), None if plan.second is None else np.asarray(plan.second[p])


def _earlier(rows: Array, by: Array) -> Array:
    """Row numbers counted from position `by`; what never ends still doesn't, and what is empty stays empty."""
    return jnp.where((rows == INF) | (rows == 0), rows, jnp.maximum(rows - by, 0))

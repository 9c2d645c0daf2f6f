"""What TPU kernels visit, as a few integers per tile that stream through scalar memory.

A row of the forward table holds all that is scalar about one tile of queries: where it starts, which tiles it visits.
A row of the column table says which query tiles read one tile of keys. XLA makes both from the plan, so that traced
masks, offsets, cache lengths and segments need no other path.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.attention.call import Call
from pallas_kernels.plan import INF, Plan
from pallas_kernels.segments import sink_runs, sink_tiles

FIELDS = 16
CHUNK = 128  # entries of a packed run that one copy brings to scalar memory
ROW, SINK0, SINKS, LOW, MIDDLE, BEGIN, NEAR, KEYS, SINK, WINDOW = range(10)
COLUMN, FIRST0, FIRSTS, SECOND0, SECONDS, FULL_END, SPAN0, SPAN1, KEYS_C, SINK_C, WINDOW_C, OFFSET = range(12)


LIST_START, LIST_COUNT = range(2)


class Tiling(NamedTuple):
    """Rows and keys of a call and the tiles they are cut into."""

    length: int
    keys: int
    block_q: int
    block_k: int


@dataclasses.dataclass(frozen=True)
class Tables:
    """`rows` [Bt,P,nQ,1,FIELDS]; `columns` [Bt,P,nK,1,FIELDS]; `packed` [P,chunks,1,CHUNK]; `limits` [P,8,S]."""

    rows: Int[Array, "Bt P nQ 1 F"]
    columns: Int[Array, "Bt P nK 1 F"]
    packed: Int[Array, "P C 1 N"] | None
    limits: Int[Array, "P 8 S"] | None


def tables(call: Call, plan: Plan, tiling: Tiling) -> Tables:
    """The tables of a call in tiles of these sizes."""
    length, keys, block_q, block_k = tiling
    fixed = isinstance(call.q_offset, int)
    offset, size = _offset(call), _size(call)
    places = call.key_places
    marks = None if places is None else sink_tiles(places, jnp.asarray(plan.sink), block_k)
    runs = (plan if places is None else plan.without_sinks()).row_runs(
        length + call.q_offset if fixed else max(length, keys), keys, block_q, block_k
    )
    hulls = _segment_hulls(call, block_q, block_k)
    rows = _rows(plan, runs, offset, size, None if hulls is None else hulls[:2], marks, tiling)
    columns = _columns(plan, offset, size, None if hulls is None else hulls[2:], marks, tiling)
    packed = None
    if runs.packed is not None:
        forever = jnp.asarray(plan.columns(keys, block_k).full_end) == INF
        tile = jnp.asarray(runs.packed)
        full = jnp.take_along_axis(forever, jnp.minimum(tile, forever.shape[1] - 1), 1)
        packed = _chunks(tile * 2 + full)
    return Tables(rows, columns, packed, _limits(plan, keys))


def _offset(call: Call) -> Array:
    return jnp.reshape(jnp.asarray(call.q_offset, jnp.int32), (-1,))


def _size(call: Call) -> Array:
    sizes = call.k.shape[1] if call.kv_length is None else call.kv_length
    return jnp.reshape(jnp.asarray(sizes, jnp.int32), (-1,))


def _chunks(entries: Array) -> Array:
    """[..., n] as [..., chunks, 1, CHUNK]."""
    padded = jnp.pad(entries, ((0, 0),) * (entries.ndim - 1) + ((0, -entries.shape[-1] % CHUNK),))
    return padded.astype(jnp.int32).reshape(*entries.shape[:-1], -1, 1, CHUNK)


def _rows(plan, runs, offset, size, hull, marks, tiling):
    length, _, block_q, block_k = tiling
    pattern = jnp.arange(plan.num_patterns)[None, :, None]
    start = jnp.arange(-(-length // block_q), dtype=jnp.int32) * block_q
    row = offset[:, None, None] + start
    last = offset[:, None, None] + jnp.minimum(start + block_q, length) - 1
    sinks, low, middle, begin, near = runs.run(pattern, row, last)
    stop = begin + near
    tiles = -(-size[:, None, None] // block_k)
    least, most = (0, tiles) if hull is None else (hull[0][:, None], jnp.minimum(hull[1][:, None], tiles))
    sink0, sink_stop = jnp.minimum(sinks, least), jnp.minimum(sinks, most)
    if marks is not None:
        wanted = marks[:, :, None] | (jnp.arange(marks.shape[-1]) < sinks[..., None])
        sink0, sink_stop, begin, stop = _packed_sinks(wanted, least, most, last // block_k, begin, stop)
    window0 = jnp.maximum(begin, least)
    near = jnp.maximum(jnp.minimum(stop, most) - window0, 0)
    sink_stop = jnp.minimum(sink_stop, window0)
    if runs.packed is not None:
        # Long-lived columns lie between the sinks and the window, and only there.
        sink0 = jnp.where(sink_stop > sink0, jnp.minimum(sink0, least), sink0)
        rank = jnp.asarray(runs.rank)
        inside = lambda tile: rank[pattern, jnp.clip(tile, 0, rank.shape[1] - 1)]
        end = jnp.minimum(low + middle, inside(jnp.minimum(window0, most)))
        low = jnp.maximum(low, inside(jnp.maximum(sink_stop, least)))
        middle = jnp.maximum(end - low, 0)
    low = jnp.where(middle > 0, low, 0)
    sinks = jnp.maximum(sink_stop - sink0, 0)
    sink, window = (jnp.asarray(x)[None, :, None] for x in (plan.sink, plan.window))
    return _stack([row, sink0, sinks, low, middle, window0, near, size[:, None, None], sink, window])


def _packed_sinks(wanted, least, most, diagonal, begin, stop) -> tuple[Array, Array, Array, Array]:
    """(first, stop) of the sink tiles of a tile of rows' first segment, and (first, stop) of its widened window.

    `wanted [B,P,nQ,nK]`: key tiles that hold a sink, and those in front that all rows read. Segments that begin inside
    the tile of rows have theirs near the diagonal, so the window run takes them in.
    """
    at = jnp.arange(wanted.shape[-1], dtype=jnp.int32)
    inside = (at >= least[..., None]) & (at < most[..., None]) & (at <= diagonal[..., None])
    sink0, sink_stop, rest, rest_stop = sink_runs(wanted & inside)
    return sink0, sink_stop, jnp.minimum(begin, rest), jnp.maximum(stop, rest_stop)


def _columns(plan, offset, size, hull, marks, tiling):
    length, keys, block_q, block_k = tiling
    found = (plan if marks is None else plan.without_sinks()).columns(keys, block_k)
    first_key = jnp.arange(found.end.shape[1], dtype=jnp.int32) * block_k
    offset, size = offset[:, None, None], size[:, None, None]
    tiles = -(-length // block_q)
    tile_of = lambda row: (row - offset) // block_q  # rows are absolute
    after = lambda row: jnp.where(row >= INF - block_q, tiles, -(-(row - offset) // block_q))
    least, most = (0, tiles) if hull is None else (hull[0][:, None], hull[1][:, None])
    most = jnp.where(first_key < size, most, 0)
    oldest = first_key if plan.causal else jnp.int32(0)
    begin = jnp.clip(tile_of(oldest), least, tiles)
    ends = jnp.asarray(found.end)[None]
    ends = ends if marks is None else jnp.where(marks, INF, ends)  # to the last row of the tile's segments
    stop = jnp.where(ends > oldest, jnp.clip(after(ends), 0, most), 0)
    first_count = jnp.maximum(stop - begin, 0)
    if found.second is None:
        second0, second_count, span = jnp.int32(0), jnp.int32(0), (jnp.int32(0), jnp.int32(0))
    else:
        low, high = (jnp.asarray(found.second)[None, ..., n] for n in (0, 1))
        second0 = jnp.maximum(jnp.clip(tile_of(jnp.maximum(low, oldest)), least, tiles), begin + first_count)
        stop = jnp.where(high > jnp.maximum(low, oldest), jnp.clip(after(high), 0, most), 0)
        second_count = jnp.maximum(stop - second0, 0)
        span = tuple(jnp.asarray(found.full_second)[None, ..., n] for n in (0, 1))
    sink, window = (jnp.asarray(x)[None, :, None] for x in (plan.sink, plan.window))
    full = jnp.asarray(found.full_end)[None]
    place = jnp.broadcast_to(first_key, full.shape)
    return _stack([place, begin, first_count, second0, second_count, full, *span, size, sink, window, offset])


class Listed(NamedTuple):
    """Key tiles that run-time lists name for each tile of rows, ascending: `tile [B,Hs,nQ,W]`, `count [B,Hs,nQ]`."""

    tile: Int[Array, "B Hs nQ W"]
    count: Int[Array, "B Hs nQ"]


class Stream(NamedTuple):
    """Runs of a stream in HBM: `runs [B,Hs,n,1,FIELDS]` start and length of each, `entries [B,Hs,chunks,1,CHUNK]`."""

    runs: Int[Array, "B Hs n 1 F"]
    entries: Int[Array, "B Hs C 1 N"]


def listed_tiles(call: Call, tiling: Tiling) -> Listed:
    """The call's lists in these tiles, whose sizes divide the blocks of the lists; tiles without a key are left out."""
    lists = call.lists
    assert lists is not None
    length, _, block_q, block_k = tiling
    pieces, rows = lists.block_k // block_k, lists.block_q // block_q
    tile = (jnp.asarray(lists.idx)[..., None] * pieces + jnp.arange(pieces)).reshape(*lists.idx.shape[:3], -1)
    named = jnp.arange(tile.shape[3]) < (jnp.asarray(lists.count) * pieces)[..., None]
    count = -(-length // block_q)
    tile, named = (jnp.repeat(x, rows, axis=2)[:, :, :count] for x in (tile, named))
    stop = -(-_size(call)[:, None, None] // block_k)
    if call.mask.causal:
        end = _offset(call)[:, None, None] + jnp.minimum((jnp.arange(count) + 1) * block_q, length)
        stop = jnp.minimum(stop, (end - 1) // block_k + 1)
    return Listed(tile.astype(jnp.int32), (named & (tile < stop[..., None])).sum(-1, dtype=jnp.int32))


def by_rows(listed: Listed) -> Stream:
    """For each tile of rows, the key tiles that it reads."""
    batch, heads, rows, width = listed.tile.shape
    start = jnp.broadcast_to(jnp.arange(rows) * width, listed.count.shape)
    return Stream(_stack([start, listed.count]), _chunks(listed.tile.reshape(batch, heads, -1)))


def by_keys(listed: Listed, tiles: int) -> Stream:
    """For each of the `tiles` of keys, the tiles of rows that read it: the lists transposed by one sort."""
    batch, heads, _, width = listed.tile.shape
    used = jnp.arange(width) < listed.count[..., None]
    key = jnp.where(used, listed.tile, tiles).reshape(batch, heads, -1)
    order = jnp.argsort(key, axis=-1, stable=True)
    ends = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, jnp.arange(tiles + 1))))(jnp.sort(key, axis=-1))
    return Stream(_stack([ends[..., :-1], jnp.diff(ends, axis=-1)]), _chunks(order // width))


def _stack(fields: list) -> Array:
    table = jnp.stack([x.astype(jnp.int32) for x in jnp.broadcast_arrays(*fields)], -1)[..., None, :]
    return jnp.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, FIELDS - len(fields))])


def _segment_hulls(call: Call, block_q: int, block_k: int) -> tuple[Array, Array, Array, Array] | None:
    """(first, stop) key tile per query tile and (first, stop) query tile per key tile sharing a segment; each [B,n]."""
    if call.segment_ids is None:
        return None
    (q_low, q_high), (k_low, k_high) = (
        _extremes(ids, n) for ids, n in zip(call.segment_ids, (block_q, block_k), strict=True)
    )
    meet = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    ends = lambda m: (jnp.argmax(m, -1), jnp.where(m.any(-1), m.shape[-1] - jnp.argmax(m[..., ::-1], -1), 0))
    return (*ends(meet), *ends(jnp.swapaxes(meet, 1, 2)))


def _extremes(ids: Array, block: int) -> tuple[Array, Array]:
    pad = -ids.shape[1] % block
    tiles = jnp.pad(ids, ((0, 0), (0, pad)), mode="edge").reshape(ids.shape[0], -1, block)
    return tiles.min(-1), tiles.max(-1)


def _limits(plan: Plan, keys: int) -> Any:
    """Expiry and second interval of every key, int32 [P,8,S]: what a tile's token mask compares rows with."""
    if plan.expiry is None and plan.second is None:
        return None
    zero = np.zeros((plan.num_patterns, -(-keys // plan.block_k)), np.int32)
    expiry = zero if plan.expiry is None else plan.expiry
    second = (zero, zero) if plan.second is None else (plan.second[..., 0], plan.second[..., 1])
    rows = jnp.stack([jnp.asarray(x) for x in (expiry, *second)], 1)
    rows = jnp.repeat(rows, plan.block_k, axis=2)[..., :keys]
    return jnp.pad(rows, ((0, 0), (0, 5), (0, -keys % 128)))

"""Block-sparse attention on any device: tiles of queries and keys in loops, skipping the tiles that no query reads.

Memory is linear in length. One loop runs over (unit, query tile); inside it another runs over the key tiles that the
tile visits, as many as there are. A unit shares its visits: all heads if they share a pattern, else one KV head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.call import KEPT, Call
from pallas_kernels.lists import BlockList
from pallas_kernels.op import platform
from pallas_kernels.plan import INF, Columns, Plan
from pallas_kernels.pytrees import record
from pallas_kernels.segments import sink_tiles

MAX_TILES = 1024  # tiles along an axis: beyond it tiles grow, so that the visit table stays small


def attend(call: Call) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """(o, lse) of the call; refuses nothing."""
    schedule = _schedule(call)
    if call.whole is not None:
        return _part(schedule.settings, call.q, call.k, call.v, schedule, *call.whole)
    return _attend(schedule.settings, call.q, call.k, call.v, schedule)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static part of a schedule."""

    block_q: int
    block_k: int
    tiles_q: int
    unit_batch: int  # batch rows and KV heads in a unit
    unit_heads: int
    one_pattern: bool
    scale: float
    soft_cap: float | None


@record("settings")
class Schedule:
    """What each query tile visits, and what the mask of a tile is made of."""

    settings: Settings
    order: Any  # [units, tiles_q, tiles_k] key tiles to visit first
    count: Any  # [units, tiles_q] how many
    plan: Plan
    pattern: Any  # [K, G]
    q_offset: Any  # [B] or [1]
    kv_length: Any  # [B], [1], or None where every key of every tile exists
    segment_ids: tuple[Array, Array] | None  # padded to whole tiles
    key_places: Array | None  # what sinks count where that is not the position, padded to whole tiles
    lists: BlockList | None  # padded to whole tiles


def _tile(length: int, target: int, unit: int) -> int:
    """About `target` rows, or the whole length; a multiple or a divisor of `unit` (a list's block)."""
    target = max(target, -(-length // MAX_TILES))
    if unit > target:
        return next(n for n in range(target, 0, -1) if unit % n == 0)
    return -(-min(target, length) // unit) * unit


def _schedule(call: Call) -> Schedule:
    (batch, length, heads, _), (keys, kv_heads) = call.q.shape, call.k.shape[1:3]
    lists = call.lists
    # On a CPU the scores of a tile should stay in cache; on an accelerator few large steps win.
    target = 1024 if platform() != "cpu" else 128 if max(length, keys) <= 8192 else 256
    block_q = _tile(length, target, lists.block_q if lists else 1)
    block_k = _tile(keys, target, lists.block_k if lists else 1)
    tiles_q, tiles_k = -(-length // block_q), -(-keys // block_k)
    plan = call.mask.plan(heads, length, keys, block_q, block_k)
    one_pattern = plan.num_patterns == 1
    by_head = not one_pattern or (lists is not None and lists.idx.shape[1] > 1)
    settings = Settings(
        block_q=block_q,
        block_k=block_k,
        tiles_q=tiles_q,
        unit_batch=1 if lists is not None else batch,
        unit_heads=1 if by_head else kv_heads,
        one_pattern=one_pattern,
        scale=call.scale,
        soft_cap=call.soft_cap,
    )
    host = np.asarray([call.q_offset], np.int32) if isinstance(call.q_offset, int) else None
    q_offset = call.q_offset if host is None else host
    kv_length = call.kv_length
    if kv_length is None and keys % block_k:
        kv_length = np.asarray([keys], np.int32)
    segment_ids = call.segment_ids
    places = call.key_places
    if segment_ids is not None:
        pads = (tiles_q * block_q - length, tiles_k * block_k - keys)
        # Ids of rows that do not exist are never equal to one another.
        padded = lambda n, fill: jnp.pad(segment_ids[n], ((0, 0), (0, pads[n])), constant_values=fill)
        segment_ids = (padded(0, -(2**31) + 1), padded(1, -(2**31)))
        places = None if places is None else jnp.pad(places, ((0, 0), (0, pads[1])), constant_values=INF)
    pattern = plan.pattern_of_head
    pattern = np.asarray(pattern, np.int32) if isinstance(pattern, tuple) else pattern
    schedule = Schedule(
        settings,
        None,
        None,
        plan,
        pattern.reshape(kv_heads, -1),
        q_offset,
        kv_length,
        segment_ids,
        places,
        _padded(lists, settings),
    )
    fixed = plan if places is None else plan.without_sinks()
    visits = _visits(schedule, fixed.columns(tiles_k * block_k, block_k), batch, length, tiles_k)
    xp = np if isinstance(visits, np.ndarray) else jnp
    order = xp.argsort(~visits, axis=-1, stable=True).astype(np.int32)
    return dataclasses.replace(schedule, order=order, count=visits.sum(-1, dtype=np.int32))


def _padded(lists: BlockList | None, settings: Settings) -> BlockList | None:
    if lists is None:
        return None
    rows = -(-settings.tiles_q * settings.block_q // lists.block_q)
    pad = ((0, 0), (0, 0), (0, rows - lists.idx.shape[2]))
    idx = jnp.pad(lists.idx, (*pad, (0, 0)), constant_values=-1)
    return dataclasses.replace(lists, idx=idx, count=jnp.pad(lists.count, pad))


def _visits(schedule: Schedule, columns: Columns, batch: int, length: int, tiles_k: int):
    """bool [units, tiles_q, tiles_k]: whether any head and batch row of the unit reads the tile."""
    s = schedule.settings
    host = all(isinstance(x, np.ndarray) for x in (schedule.q_offset, columns.end, schedule.pattern))
    host &= schedule.segment_ids is None and schedule.lists is None
    host &= schedule.kv_length is None or isinstance(schedule.kv_length, np.ndarray)
    xp = np if host else jnp
    start = xp.arange(s.tiles_q, dtype=np.int32) * s.block_q
    first = schedule.q_offset[:, None, None] + start[:, None]  # [B, tiles_q, 1]
    last = schedule.q_offset[:, None, None] + xp.minimum(start + s.block_q, length)[:, None] - 1
    key = xp.arange(tiles_k, dtype=np.int32) * s.block_k
    places = schedule.key_places
    sinks = None if places is None else sink_tiles(places, schedule.plan.sink, s.block_k)  # [B, P, tiles_k]

    def reached(pattern):  # [..., B, tiles_q, tiles_k]
        at = lambda x: x[pattern][..., None, None, :]
        live = first < at(columns.end)
        if columns.second is not None:
            live = live | ((first < at(columns.second[..., 1])) & (last >= at(columns.second[..., 0])))
        if sinks is not None:
            live = live | jnp.moveaxis(sinks[:, pattern], 0, -2)[..., None, :]
        return live

    live = reached(np.zeros((1, 1), np.int32) if s.one_pattern else schedule.pattern)  # [K, G, B, tiles_q, tiles_k]
    live = live.any(1)
    if schedule.lists is not None:
        live = live | _listed(schedule, schedule.lists, tiles_k)
    if schedule.plan.causal:
        live = live & (last >= key)
    if schedule.kv_length is not None:
        live = live & (key < schedule.kv_length[:, None, None])
    if schedule.segment_ids is not None:
        queries, key_ids = schedule.segment_ids
        (q_low, q_high), (k_low, k_high) = _extremes(queries, s.block_q), _extremes(key_ids, s.block_k)
        live = live & (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    heads = schedule.pattern.shape[0] if s.unit_heads == 1 else 1
    if s.unit_batch == 1:  # units run over batch rows, then KV heads
        live = xp.broadcast_to(live, (heads if live.shape[0] == 1 else live.shape[0], batch, *live.shape[2:]))
        live = xp.swapaxes(live if heads > 1 else live.any(0, keepdims=True), 0, 1)
        return live.reshape(-1, *live.shape[2:])
    live = live.any(1)
    return xp.broadcast_to(live if heads > 1 else live.any(0, keepdims=True), (heads, *live.shape[1:]))


def _extremes(ids: Int[Array, "B N"], block: int) -> tuple[Array, Array]:
    tiles = ids.reshape(ids.shape[0], -1, block)
    unreal = tiles < -(2**31) + 2
    return jnp.where(unreal, 2**31 - 1, tiles).min(-1), tiles.max(-1)


def _listed(schedule: Schedule, lists: BlockList, tiles_k: int) -> Array:
    """bool [K or 1, B, tiles_q, tiles_k]: tiles that hold a listed block."""
    s = schedule.settings
    batch, rows_of_heads, rows, width = lists.idx.shape
    tile_q = jnp.arange(s.tiles_q)
    row_tile = jnp.arange(rows) * lists.block_q // s.block_q
    hit = jnp.zeros((batch, rows_of_heads, s.tiles_q, tiles_k + 1), bool)
    used = jnp.arange(width) < lists.count[..., None]
    spread = max(1, lists.block_k // s.block_k)  # key tiles in a listed block
    tile_k = lists.idx[..., None] * lists.block_k // s.block_k + jnp.arange(spread)
    tile_k = jnp.where(used[..., None], tile_k, tiles_k)
    b, h = jnp.arange(batch)[:, None, None, None, None], jnp.arange(rows_of_heads)[:, None, None, None]
    if lists.block_q > s.block_q:  # a listed row block is several query tiles
        own = tile_q * s.block_q // lists.block_q
        hit = hit.at[b, h, tile_q[:, None, None], tile_k[:, :, own]].set(True, mode="drop")
    else:
        hit = hit.at[b, h, row_tile[:, None, None], tile_k].set(True, mode="drop")
    kv_heads = schedule.pattern.shape[0]
    hit = jnp.swapaxes(hit[..., :tiles_k], 0, 1)
    if rows_of_heads > kv_heads:
        hit = hit.reshape(kv_heads, -1, *hit.shape[1:]).any(1)
    return hit


def _mask(schedule: Schedule, where: tuple[Any, Any], tile_q, tile_k):
    """bool, broadcastable to [Bc, Kc, G, block_q, block_k]: who reads what in one tile."""
    s, (b, h) = schedule.settings, where
    rows = lambda x: x if x.shape[0] == 1 else lax.dynamic_slice_in_dim(x, b, s.unit_batch)
    wide = lambda x: x[:, None, None, None, None]
    i = wide(rows(jnp.asarray(schedule.q_offset))) + (tile_q * s.block_q + jnp.arange(s.block_q))[:, None]
    j = tile_k * s.block_k + jnp.arange(s.block_k)
    if s.one_pattern:
        pattern = jnp.int32(0)
    else:
        pattern = lax.dynamic_slice_in_dim(jnp.asarray(schedule.pattern), h, s.unit_heads)[:, :, None, None]
    place = schedule.key_places
    if place is not None:
        place = lax.dynamic_slice(place, (b, tile_k * s.block_k), (s.unit_batch, s.block_k))[:, None, None, None]
    keep = schedule.plan.allow(i, j, pattern, place)
    if schedule.lists is not None:
        hit = _tile_lists(schedule, schedule.lists, where, tile_q, tile_k)
        keep = keep | (hit & (j <= i) if schedule.plan.causal else hit)
    if schedule.kv_length is not None:
        keep = keep & (j < wide(rows(jnp.asarray(schedule.kv_length))))
    if schedule.segment_ids is not None:
        queries = lax.dynamic_slice(schedule.segment_ids[0], (b, tile_q * s.block_q), (s.unit_batch, s.block_q))
        keys = lax.dynamic_slice(schedule.segment_ids[1], (b, tile_k * s.block_k), (s.unit_batch, s.block_k))
        keep = keep & (queries[:, None, None, :, None] == keys[:, None, None, None, :])
    return keep


def _tile_lists(schedule: Schedule, lists: BlockList, where: tuple[Any, Any], tile_q, tile_k):
    """bool [Bc, Kc or 1, G or 1, block_q, block_k]: the listed keys of a tile."""
    s, (b, h) = schedule.settings, where
    heads_of_lists, width, (kv_heads, groups) = lists.idx.shape[1], lists.idx.shape[3], schedule.pattern.shape
    size = {1: 1, kv_heads: s.unit_heads}.get(heads_of_lists, s.unit_heads * groups)
    head = h * (size // s.unit_heads) if heads_of_lists > 1 else 0
    rows, cols = max(1, s.block_q // lists.block_q), max(1, s.block_k // lists.block_k)
    row = tile_q * s.block_q // lists.block_q
    idx = lax.dynamic_slice(lists.idx, (b, head, row, 0), (s.unit_batch, size, rows, width))
    count = lax.dynamic_slice(lists.count, (b, head, row), (s.unit_batch, size, rows))
    col = tile_k * s.block_k // lists.block_k + jnp.arange(cols)
    used = jnp.arange(width) < count[..., None]
    hit = ((idx[..., None] == col) & used[..., None]).any(-2)  # [Bc, size, rows, cols]
    hit = jnp.repeat(jnp.repeat(hit, s.block_q // rows, axis=2), s.block_k // cols, axis=3)
    return hit.reshape(s.unit_batch, -1, groups if size > s.unit_heads else 1, s.block_q, s.block_k)


def _slice(x, start, size):
    """A block of x [B, N, heads, D] at (batch, row, head)."""
    return lax.dynamic_slice(x, (start[0], start[1], start[2], 0), (*size, x.shape[3]))


def _keys(x, where, tile_k, s: Settings):
    """float [Bc, Kc, block_k, D] of one tile, and which of its rows are finite."""
    tile = _slice(x, (where[0], tile_k * s.block_k, where[1]), (s.unit_batch, s.block_k, s.unit_heads))
    tile = jnp.swapaxes(tile, 1, 2)
    return tile, jnp.isfinite(tile).all(-1, keepdims=True)


def _queries(x, where, tile_q, s: Settings, groups: int):
    """[Bc, Kc, G, block_q, D] of one tile of x [B, T, H, D]."""
    size = (s.unit_batch, s.block_q, s.unit_heads * groups)
    tile = _slice(x, (where[0], tile_q * s.block_q, where[1] * groups), size)
    tile = tile.reshape(s.unit_batch, s.block_q, s.unit_heads, groups, x.shape[3])
    return jnp.transpose(tile, (0, 2, 3, 1, 4))


def _rows_back(tile):
    """The inverse layout of `_queries`: [Bc, block_q, Kc * G, D]."""
    b, k, g, t, d = tile.shape
    return jnp.transpose(tile, (0, 3, 1, 2, 4)).reshape(b, t, k * g, d)


def _dot(pattern: str, a, b, precision):
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32, precision=precision)


def _scores(s: Settings, q, k, finite, precision):
    """(score, its derivative by the plain score or None); keys or values that are not finite score NaN."""
    score = _dot("bkgqd,bksd->bkgqs", q, jnp.where(finite, k, jnp.nan), precision) * s.scale
    if s.soft_cap is None:
        return score, None
    capped = jnp.tanh(score / s.soft_cap)
    return capped * s.soft_cap, 1 - capped * capped


def _where(s: Settings, kv_heads: int, unit):
    """(batch row, KV head) at which a unit begins."""
    per_row = kv_heads // s.unit_heads
    return (unit // per_row) * s.unit_batch, (unit % per_row) * s.unit_heads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, q, k, v, schedule):
    return _forward(settings, q, k, v, schedule)[0]


def _pad_rows(x, multiple: int, axis: int = 1):
    pad = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, pad if n == axis else 0) for n in range(x.ndim)]) if pad else x


def _forward(s: Settings, q, k, v, schedule):
    (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
    groups, precision = heads // kv_heads, _precision(q.dtype)
    q_, k_, v_ = _pad_rows(q, s.block_q), _pad_rows(k, s.block_k), _pad_rows(v, s.block_k)
    order, count = jnp.asarray(schedule.order), jnp.asarray(schedule.count)

    def visit(n, state, unit, tile_q, where, q_tile):
        total, top, mass = state
        tile_k = order[unit, tile_q, n]
        k_tile, k_fine = _keys(k_, where, tile_k, s)
        v_tile, v_fine = _keys(v_, where, tile_k, s)
        score, _ = _scores(s, q_tile, k_tile, k_fine & v_fine, precision)
        score = jnp.where(_mask(schedule, where, tile_q, tile_k), score, -jnp.inf)
        new = jnp.maximum(top, score.max(-1))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        weight = jnp.exp(score - base[..., None])
        keep = jnp.exp(top - base)
        out = _dot("bkgqs,bksd->bkgqd", weight.astype(v.dtype), jnp.where(v_fine, v_tile, 0), precision)
        return total * keep[..., None] + out, new, mass * keep + weight.sum(-1)

    def row(n, carry):
        o, lse = carry
        unit, tile_q = n // s.tiles_q, n % s.tiles_q
        where = _where(s, kv_heads, unit)
        q_tile = _queries(q_, where, tile_q, s, groups)
        shape = q_tile.shape[:-1]
        state = (jnp.zeros((*shape, v.shape[3]), jnp.float32), jnp.full(shape, -jnp.inf), jnp.zeros(shape))
        body = functools.partial(visit, unit=unit, tile_q=tile_q, where=where, q_tile=q_tile)
        total, top, mass = lax.fori_loop(0, count[unit, tile_q], body, state)
        seen = mass != 0
        total = total / jnp.where(seen, mass, 1.0)[..., None]
        sums = jnp.where(seen, top + jnp.log(jnp.where(seen, mass, 1.0)), -jnp.inf)
        place = (where[0], tile_q * s.block_q, where[1] * groups)
        o = lax.dynamic_update_slice(o, _rows_back(total).astype(q.dtype), (*place, 0))
        sums = sums.reshape(shape[0], -1, s.block_q)
        return o, lax.dynamic_update_slice(lse, sums, (place[0], place[2], place[1]))

    o = jnp.zeros((*q_.shape[:3], v.shape[3]), q.dtype)
    lse = jnp.zeros((batch, heads, q_.shape[1]), jnp.float32)
    o, lse = lax.fori_loop(0, order.shape[0] * s.tiles_q, row, (o, lse))
    o, lse = checkpoint_name((o[:, :length], lse[:, :, :length]), KEPT)
    return (o, lse), (q, k, v, schedule, o, lse)


def _backward(s: Settings, residuals, cotangents):
    q, k, v, schedule, o, lse = residuals
    do, dlse = cotangents
    (length, heads), (keys, kv_heads) = q.shape[1:3], k.shape[1:3]
    groups, precision = heads // kv_heads, _precision(q.dtype)
    # ds = p (dp - delta); the gradient through lse enters as -dlse.
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1) - jnp.swapaxes(dlse, 1, 2)
    rows = jnp.stack([jnp.swapaxes(lse, 1, 2), delta], -1)
    q_, do_, rows_ = _pad_rows(q, s.block_q), _pad_rows(do, s.block_q), _pad_rows(rows, s.block_q)
    k_, v_ = _pad_rows(k, s.block_k), _pad_rows(v, s.block_k)
    order, count = jnp.asarray(schedule.order), jnp.asarray(schedule.count)
    finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)

    def visit(n, state, unit, tile_q, where, tiles):
        dq_tile, dk, dv = state
        q_tile, do_tile, lse_tile, delta_tile = tiles
        tile_k = order[unit, tile_q, n]
        k_tile, k_fine = _keys(k_, where, tile_k, s)
        v_tile, v_fine = _keys(v_, where, tile_k, s)
        score, slope = _scores(s, q_tile, k_tile, k_fine & v_fine, precision)
        keep = _mask(schedule, where, tile_q, tile_k)
        weight = jnp.where(keep, jnp.exp(score - lse_tile), 0.0)
        dweight = _dot("bkgqd,bksd->bkgqs", do_tile, jnp.where(v_fine, v_tile, 0), precision)
        dscore = jnp.where(keep, weight * (dweight - delta_tile), 0.0) * s.scale
        dscore = (dscore if slope is None else jnp.where(keep, dscore * slope, 0.0)).astype(q.dtype)
        dq_tile += _dot("bkgqs,bksd->bkgqd", dscore, jnp.where(k_fine, k_tile, 0), precision)
        place = (where[0], tile_k * s.block_k, where[1])
        size = (s.unit_batch, s.block_k, s.unit_heads)
        for_k = _dot("bkgqs,bkgqd->bksd", dscore, finite(q_tile), precision)
        for_v = _dot("bkgqs,bkgqd->bksd", weight.astype(v.dtype), finite(do_tile), precision)
        dk = lax.dynamic_update_slice(dk, _slice(dk, place, size) + jnp.swapaxes(for_k, 1, 2), (*place, 0))
        dv = lax.dynamic_update_slice(dv, _slice(dv, place, size) + jnp.swapaxes(for_v, 1, 2), (*place, 0))
        return dq_tile, dk, dv

    def row(n, carry):
        dq, dk, dv = carry
        unit, tile_q = n // s.tiles_q, n % s.tiles_q
        where = _where(s, kv_heads, unit)
        q_tile, do_tile, row_tile = (_queries(x, where, tile_q, s, groups) for x in (q_, do_, rows_))
        tiles = (q_tile, do_tile, row_tile[..., :1], row_tile[..., 1:])
        body = functools.partial(visit, unit=unit, tile_q=tile_q, where=where, tiles=tiles)
        state = (jnp.zeros(q_tile.shape, jnp.float32), dk, dv)
        dq_tile, dk, dv = lax.fori_loop(0, count[unit, tile_q], body, state)
        place = (where[0], tile_q * s.block_q, where[1] * groups, 0)
        return lax.dynamic_update_slice(dq, _rows_back(dq_tile).astype(q.dtype), place), dk, dv

    carry = (jnp.zeros(q_.shape, q.dtype), jnp.zeros(k_.shape, jnp.float32), jnp.zeros(v_.shape, jnp.float32))
    dq, dk, dv = lax.fori_loop(0, order.shape[0] * s.tiles_q, row, carry)
    return dq[:, :length], dk[:, :keys].astype(k.dtype), dv[:, :keys].astype(v.dtype), None


_attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _part(settings, q, k, v, schedule, o, lse):
    return o, lse


_part.defvjp(
    lambda settings, q, k, v, schedule, o, lse: ((o, lse), (q, k, v, schedule, o, lse)),
    lambda settings, residuals, cotangents: (*_backward(settings, residuals, cotangents), None, None),
)


def _precision(dtype) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None

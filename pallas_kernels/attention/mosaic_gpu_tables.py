"""What each tile visits, as small int32 tables that the Hopper kernels read.

Row tables drive the forward and dQ kernels (one row per batch, pattern and tile of queries), column tables the dK/dV
kernel (one row per batch, pattern and key unit). Their size is patterns x tiles.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.call import Call
from pallas_kernels.lists import BlockList
from pallas_kernels.one_run import OneRun
from pallas_kernels.plan import INF, Plan, RowRuns
from pallas_kernels.segments import NONE, first_run, sink_runs, sink_tiles

UNIT = 64  # keys per entry of a list; tiles of keys are one or two units
ROW_TILE = 128  # query rows of a forward block, keys of a dK/dV block

# Fields of a row table, in tokens unless named otherwise. Steps INNER .. INNER + INNER_STEPS - 1 need no mask; they are
# counted from the first window step, or from 0 where there is none.
SINK_STEPS, LIST_LEN, WINDOW_STEPS, LIST_LOW, SINK_BEGIN, WINDOW_BEGIN, SINK_STOP = range(7)
SINK, WINDOW, KEY_STOP, OFFSET, INNER, INNER_STEPS = range(7, 13)
# Fields of a column table, in tiles of rows counted from the call's first query: two runs that the unit's block of 128
# keys visits, the unit's own part of them, and the own tiles that need no mask.
STEPS_1, BEGIN_1, STEPS_2, BEGIN_2, OWN_1, OWN_END_1, OWN_2, OWN_END_2, C_INNER, C_INNER_END = range(10)
C_SINK, C_WINDOW, C_KEY_STOP, C_OFFSET = range(10, 14)


class Lists(NamedTuple):
    """Key units beyond sink and window: per pattern, or for run-time lists per batch, head and tile of rows."""

    units: Int[Array, "R n"]
    full: Int[Array, "R n"]  # first row position that no longer reads all keys of the unit
    length: Int[Array, "B Hs nQ"] | None  # entries used, for run-time lists


class ColumnLists(NamedTuple):
    """Run-time lists by key: blocks of rows that list one of the two units of a block of 128 keys.

    Entry `e` of row `(b, list head)` is 4 x row block + a bit for each unit that is listed, or 0: skip. Key block `n`
    owns entries `begin[b, list head, n]` up to `begin[b, list head, n + 1]`.
    """

    entries: Int[Array, "R n"]
    begin: Int[Array, "B Hs m"]


class Rules(NamedTuple):
    """Rows that read a key unit beyond sink and window: below `expiry`, or in the later interval [start, stop)."""

    expiry: Int[Array, "P n"] | None
    start: Int[Array, "P n"] | None
    stop: Int[Array, "P n"] | None


class Segments(NamedTuple):
    """Segment ids padded to whole tiles (padding equals nothing) and their range per 64 rows and per key unit.

    `places` is what sinks count, where that is not the key's position (`Call.key_places`).
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]
    query_range: Int[Array, "B 2 m"]
    key_range: Int[Array, "B 2 n"]
    places: Int[Array, "B S"] | None


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def in_units(plan: Plan, keys: int) -> Plan:
    """The same plan, whose columns are whole key units, with columns counted in units."""
    if plan.expiry is None and plan.second is None:
        return dataclasses.replace(plan, block_k=UNIT)
    times, units = plan.block_k // UNIT, cdiv(keys, UNIT)

    def widen(x):
        if x is None:
            return None
        xp = np if isinstance(x, np.ndarray) else jnp
        x = xp.repeat(x, times, axis=1)[:, :units]
        return xp.pad(x, ((0, 0), (0, units - x.shape[1]), *((0, 0),) * (x.ndim - 2)))

    return dataclasses.replace(plan, block_k=UNIT, expiry=widen(plan.expiry), second=widen(plan.second))


def rules(plan: Plan) -> Rules:
    if plan.expiry is None and plan.second is None:
        return Rules(None, None, None)
    if plan.second is None:
        return Rules(jnp.asarray(plan.expiry), None, None)
    second = jnp.asarray(plan.second)
    expiry = jnp.zeros_like(second[..., 0]) if plan.expiry is None else jnp.asarray(plan.expiry)
    return Rules(expiry, second[..., 0], second[..., 1])


def segments(call: Call, rows: int, key_rows: int) -> Segments | None:
    """Ids of a call whose arrays are padded to `rows` queries and `key_rows` keys."""
    if call.segment_ids is None:
        return None
    (queries, keys), places, low = call.segment_ids, call.key_places, -(2**31)
    key_rows = (cdiv(key_rows, ROW_TILE) + 1) * ROW_TILE  # a step may begin in the last unit
    fill = lambda x, size, value: jnp.pad(x, ((0, 0), (0, size - x.shape[1])), constant_values=value)
    rows = cdiv(rows, ROW_TILE) * ROW_TILE

    def extremes(x, size):  # padding widens no range: rows past the end are dropped, keys past it lie beyond KEY_STOP
        x = jnp.pad(x, ((0, 0), (0, size - x.shape[1])), mode="edge").reshape(x.shape[0], -1, UNIT)
        return jnp.stack([x.min(-1), x.max(-1)], axis=1)

    ranges = extremes(queries, rows), extremes(keys, key_rows)
    places = None if places is None else fill(places, key_rows, INF)
    return Segments(fill(queries, rows, low + 1), fill(keys, key_rows, low), *ranges, places)


def run_time_lists(chosen: BlockList, plan: Plan, keys: int, offset: Array) -> Lists:
    """A call's block lists in key units, with the tiles that need no mask marked."""
    batch, list_heads, list_rows, width = chosen.idx.shape
    times, units = chosen.block_k // UNIT, cdiv(keys, UNIT)
    used = jnp.arange(width) < chosen.count[..., None]
    block = jnp.where(used, chosen.idx, units)[..., None]
    unit = jnp.minimum(block * times + jnp.arange(times), units).reshape(batch, list_heads, list_rows, width * times)
    first = offset[:, None, None, None] + chosen.block_q * jnp.arange(list_rows)[None, None, :, None]
    last = first + chosen.block_q - 1
    # Static rules own the keys of sink and window: a listed unit is whole only beyond both, for all heads.
    sink, window = jnp.asarray(plan.sink).max(), jnp.asarray(plan.window).max()
    begin, end = unit * UNIT, unit * UNIT + UNIT - 1
    whole = (begin >= sink) & ((window <= 0) | (first - end >= window))
    whole &= (end <= first) | (not plan.causal)
    full = jnp.where(whole, last + 1, 0)
    flat = lambda x: x.reshape(-1, width * times).astype(jnp.int32)
    return Lists(flat(unit), flat(full), jnp.asarray(chosen.count) * times)


def column_lists(chosen: BlockList, keys: int) -> ColumnLists:
    """The same lists by key block, with the two units of a block merged: one sort per list head."""
    batch, heads, rows, width = chosen.idx.shape
    times, blocks = chosen.block_k // UNIT, cdiv(keys, ROW_TILE)
    used = jnp.arange(width) < chosen.count[..., None]
    unit = chosen.idx[..., None] * times + jnp.arange(times)
    key_block = jnp.where(used[..., None] & (unit < 2 * blocks), unit // 2, blocks)
    pair = key_block * rows + jnp.arange(rows)[:, None, None]  # (key block, row block) as one number
    code = jnp.sort((pair * 2 + unit % 2).reshape(batch * heads, -1), axis=-1)
    pair, bit = code // 2, 1 << code % 2
    differs = pair[:, 1:] != pair[:, :-1]
    first = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    entries = jnp.where(first, pair % rows * 4 + jnp.where(last, bit, 3), 0)
    ends = jnp.arange(blocks + 1, dtype=jnp.int32) * rows
    begin = jax.vmap(lambda row: jnp.searchsorted(row, ends))(pair)
    return ColumnLists(entries.astype(jnp.int32), begin.astype(jnp.int32).reshape(batch, heads, -1))


def _ranges(rows: Int[Array, "B 2 m"], tile: int) -> tuple[Int[Array, "B M 1"], Int[Array, "B M 1"]]:
    """Lowest and highest id of each `tile` entries."""
    tiles = rows.reshape(rows.shape[0], 2, -1, tile)
    return tiles[:, 0].min(-1)[:, :, None], tiles[:, 1].max(-1)[:, :, None]


def _meet(rows: Int[Array, "B 2 m"], columns: Int[Array, "B 2 n"], tile: int) -> Bool[Array, "B M n"]:
    """Which entries of `columns` have an id range that meets that of each `tile` entries of `rows`."""
    low, high = _ranges(rows, tile)
    return (low <= columns[:, 1][:, None]) & (columns[:, 0][:, None] <= high)


def _same(rows: Int[Array, "B 2 m"], columns: Int[Array, "B 2 n"], tile: int) -> tuple[Array, Array]:
    """First run [begin, end) of keys (or rows), int32 [B,M], that are of one segment with each `tile` units of rows."""
    low, high = _ranges(rows, tile)
    begin, end = first_run((low == high) & (columns[:, 0][:, None] == low) & (columns[:, 1][:, None] == low))
    return begin * UNIT, end * UNIT


def _ends(meet: Bool[Array, "... M n"]) -> tuple[Array, Array]:
    """First and one-past-last entry that is met."""
    at = jnp.arange(meet.shape[-1], dtype=jnp.int32)
    return jnp.where(meet, at, NONE).min(-1), jnp.where(meet, at + 1, 0).max(-1)


def row_table(
    plan: Plan,
    rows: int,
    keys: int,
    tile_k: int,
    offset: Array,
    kv_length: Array,
    segs: Segments | None,
    one: OneRun | None = None,
) -> tuple[Int[Array, "B P nQ F"], Lists | None]:
    """Forward schedule: steps of `tile_k` keys over sink and window, and the run of listed units between them.

    `plan` counts columns in units. Positions of row r of batch b are `offset[b] + r`. The runs of a plan that has but
    `one` a row are visited as windows are.
    """
    count = cdiv(rows, ROW_TILE)
    off, length = offset[:, None, None], kv_length[:, None, None]
    first = off + ROW_TILE * jnp.arange(count, dtype=jnp.int32)
    last = off + jnp.minimum(ROW_TILE * jnp.arange(1, count + 1, dtype=jnp.int32), rows) - 1
    shape = (offset.shape[0], plan.num_patterns, count)
    visits, lists = _visits(plan, keys, (first, last), max(rows, keys) + rows, length, segs, one)
    sink_begin, sinks, low, listed, begin, stop = visits
    per = tile_k // UNIT
    steps = lambda units: (jnp.maximum(units, 0) + per - 1) // per
    sink, window = (jnp.broadcast_to(jnp.asarray(x)[:, None], shape) for x in (plan.sink, plan.window))
    sink_steps, window_steps = steps(sinks - sink_begin), steps(stop - begin)
    sink_stop = jnp.minimum(sinks * UNIT, length)
    # Unmasked run of steps: of the window if there is one, else of the sink (dense patterns).
    by_window = window_steps > 0
    base = jnp.where(by_window, begin, sink_begin) * UNIT
    until = jnp.minimum(
        jnp.where(by_window, length, jnp.minimum(sink_stop, sink)), first + 1 if plan.causal else length
    )
    oldest = jnp.where(by_window & (window < last), last - window + 1, 0)
    if one is not None:
        oldest, end = one.all(first, last)
        until = jnp.minimum(until, end)
    if segs is not None:
        same, same_end = (x[:, None] for x in _same(segs.query_range, segs.key_range, ROW_TILE // UNIT))
        oldest, until = jnp.maximum(oldest, same), jnp.minimum(until, same_end)
    inner = (jnp.maximum(oldest - base, 0) + tile_k - 1) // tile_k
    inner_stop = jnp.minimum((until - base) // tile_k, jnp.where(by_window, window_steps, sink_steps))
    inner_steps = jnp.maximum(inner_stop - inner, 0)
    fields = {
        SINK_STEPS: sink_steps,
        LIST_LEN: listed,
        WINDOW_STEPS: window_steps,
        LIST_LOW: low,
        SINK_BEGIN: sink_begin * UNIT,
        WINDOW_BEGIN: begin * UNIT,
        SINK_STOP: sink_stop,
        SINK: sink,
        WINDOW: window,
        KEY_STOP: length,
        OFFSET: off,
        INNER: inner,
        INNER_STEPS: inner_steps,
    }
    return _stack(fields, shape), lists


class Visits(NamedTuple):
    """Key units of each row tile, int32 [B,P,nQ]: sinks, `listed` entries of the plan's list from `low` on, window."""

    sink_begin: Array
    sink_stop: Array
    low: Array
    listed: Array
    begin: Array
    stop: Array


def _visits(
    plan: Plan,
    keys: int,
    positions: tuple[Array, Array],
    end: int,
    length: Array,
    segs: Segments | None,
    one: OneRun | None,
) -> tuple[Visits, Lists | None]:
    """What tiles of rows with these first and last `positions`, all below `end`, visit of keys below `length`."""
    first, last = positions
    plain = plan if segs is None or segs.places is None else plan.without_sinks()
    pattern = jnp.arange(plan.num_patterns, dtype=jnp.int32)[None, :, None]
    runs = None
    if one is None:
        runs = plain.row_runs(end, keys, ROW_TILE, UNIT)
        found = runs.run(pattern, first, last)
    else:
        found = _single(one, first, last)
    shape = (first.shape[0], plan.num_patterns, first.shape[-1])
    sinks, low, listed, begin, width = (jnp.broadcast_to(x, shape) for x in found)
    stop = jnp.minimum(begin + width, (length + UNIT - 1) // UNIT)
    sinks = jnp.minimum(sinks, (length + UNIT - 1) // UNIT)
    sink_begin = jnp.zeros(shape, jnp.int32)
    if segs is not None:
        meet = _meet(segs.query_range, segs.key_range, ROW_TILE // UNIT)[:, None]
        sink_begin, sinks, begin, stop = _cut_to_segments(plan, segs, meet, last, length, (sinks, begin, stop))
        nearest, farthest = _ends(meet)
        low, listed = _cut_list(runs, pattern, (low, listed), jnp.maximum(nearest, sinks), jnp.minimum(farthest, begin))
    return Visits(sink_begin, sinks, low, listed, begin, stop), _plan_lists(plain, runs, keys)


def _single(one: OneRun, first: Array, last: Array) -> tuple[Array | int, ...]:
    """As `RowRuns.run`, of a plan with one run a row."""
    begin, stop = one.any(first, last)
    begin, stop = begin // UNIT, (jnp.minimum(stop, last + 1) + UNIT - 1) // UNIT
    return 0, 0, 0, begin, jnp.maximum(stop - begin, 0)


def _plan_lists(plan: Plan, runs: RowRuns | None, keys: int) -> Lists | None:
    """The units that outlive sink and window, of each pattern."""
    if runs is None or runs.packed is None:
        return None
    units, packed = cdiv(keys, UNIT), jnp.asarray(runs.packed)
    full = jnp.take_along_axis(jnp.asarray(plan.columns(keys, UNIT).full_end), jnp.minimum(packed, units - 1), axis=1)
    return Lists(packed, jnp.where(packed < units, full, 0), None)


def _cut_list(
    runs: RowRuns | None, pattern: Array, entries: tuple[Array, Array], begin: Array, stop: Array
) -> tuple[Array, Array]:
    """(first entry, count) of each tile's list, without units outside [begin, stop)."""
    low, listed = entries
    if runs is None or runs.rank is None:
        return low, listed
    rank = jnp.asarray(runs.rank)
    before = lambda unit: rank[pattern, jnp.minimum(unit, rank.shape[1] - 1)]
    first = jnp.maximum(low, before(begin))
    return first, jnp.maximum(jnp.minimum(low + listed, before(stop)) - first, 0)


def _cut_to_segments(
    plan: Plan, segs: Segments, meet: Array, last: Array, length: Array, runs: tuple[Array, Array, Array]
):
    """(sink begin, sink stop, window begin, window stop), int32 [B,P,nQ], from runs that know nothing of segments.

    `meet` [B,1,nQ,n]: key units that may hold a segment of the tile.
    """
    sinks, begin, stop = runs
    nearest, farthest = _ends(meet)
    begin, stop = jnp.maximum(begin, nearest), jnp.minimum(stop, farthest)
    if segs.places is None:
        return jnp.minimum(sinks, nearest), jnp.minimum(sinks, farthest), begin, stop
    at = UNIT * jnp.arange(meet.shape[-1], dtype=jnp.int32)
    front = at < UNIT * sinks[..., None]  # without the mask's sinks, which packed rows have in each document
    wanted = meet & (sink_tiles(segs.places, plan.sink, UNIT)[:, :, None] | front) & (at < length[..., None])
    wanted &= (at <= last[..., None]) | (not plan.causal)
    sink_begin, sinks, rest, rest_stop = sink_runs(jnp.broadcast_to(wanted, (*begin.shape, meet.shape[-1])))
    return sink_begin, sinks, jnp.maximum(jnp.minimum(begin, rest), sinks), jnp.maximum(stop, rest_stop)


def column_table(
    plan: Plan, rows: int, keys: int, tile_q: int, offset: Array, kv_length: Array, segs: Segments | None
) -> Int[Array, "B P n F"]:
    """dK/dV schedule: one or two runs of `tile_q` rows for every key unit, and their union over a block's units."""
    per = ROW_TILE // UNIT
    count = cdiv(keys, ROW_TILE) * per
    packed_sinks = segs is not None and segs.places is not None
    columns = (plan.without_sinks() if packed_sinks else plan).columns(count * UNIT, UNIT)
    end = jnp.asarray(columns.end)[None]
    if packed_sinks:
        end = jnp.where(sink_tiles(segs.places, plan.sink, UNIT)[..., :count], INF, end)
    key = UNIT * jnp.arange(count, dtype=jnp.int32)
    shape = (offset.shape[0], plan.num_patterns, count)
    off, length = offset[:, None, None], kv_length[:, None, None]
    ceil = lambda x: (x + tile_q - 1) // tile_q
    local = lambda x: jnp.clip(x, off, off + rows) - off  # a position as a row, without overflow at INF
    least = jnp.maximum(key - off, 0) if plan.causal else jnp.zeros(shape, jnp.int32)
    live = jnp.broadcast_to(key < length, shape)
    begin_1, end_1 = _run(live, least // tile_q, ceil(local(end)))
    begin_2, end_2 = _run(jnp.zeros(shape, bool), least, least)
    if columns.second is not None:
        start_2, stop_2 = (local(jnp.asarray(columns.second)[None, ..., n]) for n in (0, 1))
        begin_2, end_2 = _run(live & (start_2 < stop_2), jnp.maximum(start_2, least) // tile_q, ceil(stop_2))
    if segs is not None:
        nearest, farthest = (x[:, None] for x in _ends(_meet(segs.key_range[:, :, :count], segs.query_range, 1)))
        near, far = nearest * UNIT // tile_q, ceil(farthest * UNIT)
        cut = lambda begin, end: _run(end > 0, jnp.maximum(begin, near), jnp.minimum(end, far))
        (begin_1, end_1), (begin_2, end_2) = cut(begin_1, end_1), cut(begin_2, end_2)
    pair = lambda x, reduce: jnp.repeat(reduce(x.reshape(*shape[:2], -1, per), axis=-1), per, axis=-1)
    block_1, block_end_1 = pair(begin_1, jnp.min), pair(end_1, jnp.max)
    block_2, block_end_2 = jnp.maximum(pair(begin_2, jnp.min), block_end_1), pair(end_2, jnp.max)
    oldest, newest = jnp.zeros(shape, jnp.int32), jnp.asarray(columns.full_end)[None]
    if columns.full_second is not None:  # of two intervals only one is read without a mask
        start, stop = (jnp.asarray(columns.full_second)[None, ..., n] for n in (0, 1))
        later = (newest <= key) & (stop > 0)
        oldest, newest = jnp.where(later, start, oldest), jnp.where(later, stop, newest)
    oldest = jnp.maximum(oldest, key + UNIT - 1) if plan.causal else oldest
    inner, inner_end = ceil(local(oldest)), jnp.where(key + UNIT <= length, local(newest) // tile_q, 0)
    if segs is not None:
        same, same_end = (x[:, None] for x in _same(segs.key_range[:, :, :count], segs.query_range, 1))
        inner, inner_end = jnp.maximum(inner, ceil(same)), jnp.minimum(inner_end, same_end // tile_q)
    fields = {
        STEPS_1: jnp.maximum(block_end_1 - block_1, 0),
        BEGIN_1: block_1,
        STEPS_2: jnp.maximum(block_end_2 - block_2, 0),
        BEGIN_2: block_2,
        OWN_1: begin_1,
        OWN_END_1: end_1,
        OWN_2: begin_2,
        OWN_END_2: end_2,
        C_INNER: inner,
        C_INNER_END: inner_end,
        C_SINK: jnp.asarray(plan.sink)[None, :, None],
        C_WINDOW: jnp.asarray(plan.window)[None, :, None],
        C_KEY_STOP: length,
        C_OFFSET: off,
    }
    return _stack(fields, shape)


def _run(live: Array, begin: Array, end: Array) -> tuple[Array, Array]:
    """Tiles [begin, end) where `live`, else an empty run that no union with another run widens."""
    live = live & (end > begin)
    return jnp.where(live, begin, NONE), jnp.where(live, end, 0)


def _stack(fields: dict[int, Array], shape: tuple[int, ...]) -> Int[Array, "B P n F"]:
    rows = [jnp.broadcast_to(jnp.asarray(fields[n], jnp.int32), shape) for n in range(len(fields))]
    return jnp.stack(rows, axis=-1)

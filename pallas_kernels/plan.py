"""The normal form of a mask: a few integers per pattern and per key block, and what tiles of it to visit.

Query `i` may read key `j` (absolute positions) under pattern `p` when

    (not causal or j <= i) and same segment and (
        place of j < sink[p] or i - j < window[p] or
        i < expiry[p, j // block_k] or second[p, j // block_k] has i or a list does
    )

The place of a key is its position, or with packed segments its index in its segment (`segments.key_places`).
A column of keys is therefore read by the rows up to its expiry, and perhaps by one later interval: the backward pass
reads its rows straight from these numbers (`columns`), the forward pass from `row_runs`. All is O(patterns x blocks).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.pytrees import record

INF = 2**31 - 1
Ints = Array | np.ndarray


def namespace(*arrays: Any):
    """`numpy` if every array is a host value, else `jax.numpy`: plans of static masks are made on the host."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays if x is not None) else np


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A mask's numbers for one call; `block_k` is the key block that `expiry` and `second` count in."""

    causal: bool
    block_k: int
    sink: Int[Ints, " P"]
    window: Int[Ints, " P"]
    expiry: Int[Ints, "P nK"] | None
    second: Int[Ints, "P nK 2"] | None
    pattern_of_head: tuple[int, ...] | Int[Ints, " H"]

    @property
    def num_patterns(self) -> int:
        return self.sink.shape[0]

    @property
    def dense(self) -> bool:
        """Known on the host to allow every key that causality allows, for all heads."""
        return isinstance(self.sink, np.ndarray) and bool((self.sink == INF).all())

    def without_sinks(self) -> Plan:
        """The same without sinks: of packed rows, whose sinks are found by `segments.sink_tiles`."""
        return dataclasses.replace(self, sink=namespace(self.sink).zeros_like(self.sink))

    def allow(self, i: Any, j: Any, pattern: Any, place: Any = None) -> Bool[Array, ...]:
        """Whether position `i` may read key `j` under `pattern`; they broadcast. Segments and lists are not in it.

        `place` is the key's index in its segment where segments are packed.
        """
        i, j = jnp.asarray(i), jnp.asarray(j)
        place = j if place is None else place
        keep = (place < jnp.asarray(self.sink)[pattern]) | (i - j < jnp.asarray(self.window)[pattern])
        if self.expiry is not None:
            keep |= i < jnp.asarray(self.expiry)[pattern, j // self.block_k]
        if self.second is not None:
            start, stop = (jnp.asarray(self.second)[..., n][pattern, j // self.block_k] for n in (0, 1))
            keep |= (start <= i) & (i < stop)
        return keep & (j <= i) if self.causal else keep

    def columns(self, keys: int, block: int) -> Columns:
        """The rows that read each tile of `block` keys (a multiple of `self.block_k`) out of `keys`."""
        if block % self.block_k:
            raise ValueError(f"columns: a tile of {block} keys is not a multiple of the plan's block_k={self.block_k}")
        xp = namespace(self.sink, self.window, self.expiry, self.second)
        tiles = -(-keys // block)
        first = xp.arange(tiles, dtype=np.int32) * np.int32(block)
        last = xp.minimum(first + np.int32(block - 1), np.int32(keys - 1))
        sink, window = self.sink[:, None], self.window[:, None]
        end = xp.where(first < sink, np.int32(INF), _window_end(xp, last, window, self.causal))
        full = xp.where(last < sink, np.int32(INF), _window_end(xp, first, window, self.causal))
        if self.expiry is not None:
            expiry = _tiled(xp, self.expiry, tiles, block // self.block_k)
            end, full = xp.maximum(end, _over(xp.maximum, expiry)), xp.maximum(full, _over(xp.minimum, expiry))
        if self.second is None:
            return Columns(end, full, None, None)
        start, stop = (_tiled(xp, self.second[..., n], tiles, block // self.block_k) for n in (0, 1))
        empty = start >= stop
        none = np.int32(INF), np.int32(0)
        first_start = _over(xp.minimum, xp.where(empty, none[0], start))
        hull = xp.stack([first_start, _over(xp.maximum, xp.where(empty, none[1], stop))], -1)
        inner = xp.stack([_over(xp.maximum, start), _over(xp.minimum, stop)], -1)
        return Columns(end, full, hull.astype(np.int32), inner.astype(np.int32))

    def row_runs(self, rows: int, keys: int, block_q: int, block_k: int) -> RowRuns:
        """What each tile of `block_q` positions visits in tiles of `block_k` keys, for positions below `rows`."""
        xp = namespace(self.sink, self.window, self.expiry, self.second)
        sink_tiles = (xp.minimum(self.sink, np.int32(keys)) + np.int32(block_k - 1)) // np.int32(block_k)
        if self.expiry is None and self.second is None:
            return RowRuns(self.causal, block_q, block_k, keys, sink_tiles, self.window, None, None, None, False)
        bare = dataclasses.replace(self, sink=xp.zeros_like(self.sink), window=xp.zeros_like(self.window), causal=True)
        columns = bare.columns(keys, block_k)
        tiles = columns.end.shape[1]
        first_key = xp.arange(tiles, dtype=np.int32) * np.int32(block_k)
        least = first_key if self.causal else xp.zeros_like(first_key)
        lives = columns.end > least
        if columns.second is not None:
            lives |= columns.second[..., 1] > xp.maximum(columns.second[..., 0], least)
            # A tile of rows visits from its first living column on: those that open every row's list and never end
            # would drag in all that ended before it, and go with the sinks.
            forever = xp.cumprod(columns.end >= np.int32(rows), axis=1).sum(1, dtype=np.int32)
            sink_tiles = xp.maximum(sink_tiles, forever)
        lives &= xp.arange(tiles) >= sink_tiles[:, None]
        gaps, window = _has_gaps(xp, columns, lives), self.window
        if gaps and self.causal and columns.second is None and xp is np:
            # Short-lived columns among ones that stay would be visited dead: they join the window's run.
            band = _band(columns.end, first_key, keys)
            lives &= columns.end - first_key > band[:, None]
            window = np.maximum(window, band)
        rank = xp.concatenate([xp.zeros_like(sink_tiles)[:, None], xp.cumsum(lives, 1, dtype=np.int32)], 1)
        order = xp.argsort(~lives, axis=1, stable=True).astype(np.int32)
        packed = xp.where(xp.arange(tiles) < rank[:, -1:], order, np.int32(tiles))
        blocks = max(1, -(-rows // block_q))
        first = _first_live(xp, self.causal, columns, lives, rank[:, :-1], blocks, block_q, first_key)
        return RowRuns(self.causal, block_q, block_k, keys, sink_tiles, window, packed, rank, first, gaps)

    def tree_flatten(self):
        static = self.pattern_of_head if isinstance(self.pattern_of_head, tuple) else None
        heads = None if static is not None else self.pattern_of_head
        return (self.sink, self.window, self.expiry, self.second, heads), (self.causal, self.block_k, static)

    @classmethod
    def tree_unflatten(cls, static, children):
        plan = object.__new__(cls)  # around placeholders, which __init__ would refuse
        values = (*static[:2], *children[:4], children[4] if static[2] is None else static[2])
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(plan, field.name, value)
        return plan


@record()
class Columns:
    """Rows (absolute positions) that read a tile of keys. A causal caller adds `row >= first key of the tile`.

    Some key of tile n is read by rows below `end[p,n]` and by rows in `second[p,n]`; all its keys are read by rows
    below `full_end[p,n]` (with causality: at or after the tile's last key) and by rows in `full_second[p,n]`.
    """

    end: Int[Ints, "P n"]
    full_end: Int[Ints, "P n"]
    second: Int[Ints, "P n 2"] | None
    full_second: Int[Ints, "P n 2"] | None


@record("causal", "block_q", "block_k", "keys", "gaps")
class RowRuns:
    """Key tiles that a tile of rows visits, as three ascending runs that do not overlap.

    Sink tiles (and others in front that all rows read), then long-lived columns older than the window, then window
    tiles up to the diagonal. `run` gives their lengths for any rows; `nth` gives the tile of a visit.
    """

    causal: bool
    block_q: int
    block_k: int
    keys: int
    sink_tiles: Int[Ints, " P"]
    window: Int[Ints, " P"]  # of the mask, or as long as its short-lived columns live
    packed: Int[Ints, "P n"] | None  # long-lived tiles beyond the sink, ascending, packed left
    rank: Int[Ints, "P m"] | None  # m = n + 1: how many of them lie before tile n
    first: Int[Ints, "P R"] | None  # first entry of `packed` alive in positions [R block_q, (R+1) block_q)
    gaps: bool  # some visits may be to dead tiles: ask `Columns`

    def run(self, pattern: Any, row: Any, last_row: Any) -> tuple[Any, Any, Any, Any, Any]:
        """(sink count, first packed entry, packed count, first window tile, window count) for `row`..`last_row`."""
        tiles = -(-self.keys // self.block_k)
        stop = jnp.clip(last_row // self.block_k + 1, 0, tiles) if self.causal else jnp.int32(tiles)
        sink_tiles, window = jnp.asarray(self.sink_tiles)[pattern], jnp.asarray(self.window)[pattern]
        sinks = jnp.minimum(sink_tiles, stop)
        oldest = jnp.maximum(row - jnp.maximum(window, 0) + 1, 0)
        begin = jnp.clip(oldest // self.block_k, sinks, stop)
        begin = jnp.where(window <= (0 if self.causal else -INF), stop, begin)
        if self.packed is None:
            return sinks, jnp.int32(0), jnp.int32(0), begin, stop - begin
        first, rank = jnp.asarray(self.first), jnp.asarray(self.rank)
        blocks = first.shape[1] - 1
        low = jnp.minimum(
            first[pattern, jnp.clip(row // self.block_q, 0, blocks)],
            first[pattern, jnp.clip(last_row // self.block_q, 0, blocks)],
        )
        return sinks, low, jnp.maximum(rank[pattern, begin] - low, 0), begin, stop - begin

    def nth(self, pattern: Any, runs: tuple[Any, Any, Any, Any, Any], n: Any) -> Any:
        """The key tile of visit `n` among the runs that `run` returned."""
        sinks, low, middle, begin, _ = runs
        tile = jnp.where(n < sinks, n, begin + n - sinks - middle)
        if self.packed is None:
            return tile
        entry = jnp.clip(low + n - sinks, 0, self.packed.shape[1] - 1)
        return jnp.where((n >= sinks) & (n < sinks + middle), jnp.asarray(self.packed)[pattern, entry], tile)


def _window_end(xp, key: Ints, window: Ints, causal: bool) -> Ints:
    """First row that no longer sees `key` through the window, saturating at INF."""
    end = xp.where(window >= np.int32(INF) - key, np.int32(INF), key + window)
    return xp.where(window > 0, end, np.int32(0)) if causal else end


def _tiled(xp, row: Ints, tiles: int, per_tile: int) -> Ints:
    """[P, nK] as [P, tiles, per_tile]; columns past the end repeat the last one."""
    need = tiles * per_tile
    row = row[:, :need]
    pad = need - row.shape[1]
    if pad:
        row = xp.concatenate([row, xp.repeat(row[:, -1:], pad, axis=1)], 1)
    return row.reshape(row.shape[0], tiles, per_tile)


def _over(choose, tiles: Ints) -> Ints:
    """Largest or smallest of the last axis, a tile's few columns: NumPy reduces short axes slowly."""
    if tiles.shape[-1] > 8:
        return choose.reduce(tiles, axis=-1)
    return functools.reduce(choose, (tiles[..., n] for n in range(tiles.shape[-1])))


def _first_live(xp, causal, columns, lives, entry, blocks, block_q, first_key) -> Ints:
    """For each block of rows the first packed entry alive in it; `entry` [P,n] is each tile's place in `packed`.

    Each column's rows are one or two intervals of row blocks: a range minimum by doubling, O(n log n).
    """
    none = np.int32(INF)
    intervals = [(xp.broadcast_to(first_key // block_q, entry.shape) if causal else xp.zeros_like(entry), columns.end)]
    if columns.second is not None:
        start = xp.maximum(columns.second[..., 0], first_key) if causal else columns.second[..., 0]
        intervals.append((start // block_q, columns.second[..., 1]))
    levels = max(1, blocks.bit_length())
    table = xp.full((levels, entry.shape[0], blocks), none, np.int32)
    patterns = xp.broadcast_to(xp.arange(entry.shape[0])[:, None], entry.shape)
    for begin, end in intervals:
        begin = xp.minimum(begin, np.int32(blocks - 1))
        stop = xp.minimum(end // block_q + (end % block_q > 0), np.int32(blocks))
        stop = xp.where((end > begin * block_q) & lives, xp.maximum(stop, begin + 1), begin)
        value = xp.where(stop > begin, entry, none)
        level = xp.frexp(xp.maximum(stop - begin, 1).astype(np.float32))[1].astype(np.int32) - 1  # floor(log2)
        right = xp.maximum(stop - (xp.ones_like(level) << level), begin)
        some = value < none if xp is np else Ellipsis  # on the host most columns are dead or short-lived
        for place in (begin, right):
            table = _scatter_min(xp, table, tuple(x[some] for x in (level, patterns, place)), value[some])
    for level in range(levels - 1, 0, -1):
        half = 1 << (level - 1)
        low = xp.minimum(table[level - 1], table[level])
        edge = xp.full((low.shape[0], min(half, blocks)), none, np.int32)
        shifted = xp.concatenate([edge, table[level][:, :-half]], 1)
        table = _replace(xp, table, level - 1, xp.minimum(low, shifted[:, :blocks]))
    return table[0]


def _scatter_min(xp, table, where, value):
    if xp is jnp:
        return table.at[where].min(value)
    np.minimum.at(table, where, value)
    return table


def _replace(xp, table, n, row):
    if xp is jnp:
        return table.at[n].set(row)
    table[n] = row
    return table


def _band(end: Ints, first: Ints, keys: int) -> np.ndarray:
    """[P] how long the columns live that end before `keys`; 0 where all do."""
    stays = end >= keys
    return (np.where(stays, 0, np.maximum(end - first, 0)).max(1) * stays.any(1)).astype(np.int32)


def _has_gaps(xp, columns, lives) -> bool:
    """False only if, for every row, the living columns after the first living one all live."""
    if xp is jnp or columns.second is not None:
        return True
    ends = [end[alive] for end, alive in zip(columns.end, lives, strict=True)]
    return any((np.diff(end) < 0).any() for end in ends)

"""Pieces shared by the Hopper attention kernels: matrix products, the tensor-core turn, masks of one tile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm

from pallas_kernels.attention import mosaic_gpu_tables as tb

LOG2E = math.log2(math.e)
NEG = -1e30  # a running maximum that no finite score reaches and no difference overflows
TILE = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLS = plgpu.Layout.WGMMA.reduce(0)
WGS = 2  # compute warpgroups
WG = 64  # rows of one warpgroup's wgmma
ROW_TILE = tb.ROW_TILE
SMEM_BYTES = 227 * 1024
TURN = 8  # named barriers 8 and 9; lower ones belong to the compiler


class Static(NamedTuple):
    """What a kernel is specialised to."""

    batch: int
    rows: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    dim_v: int
    patterns: int
    causal: bool
    dense: bool  # every key that causality allows, and no lists
    scale: float
    soft_cap: float | None
    lists: str  # "none", "plan" (per pattern) or "call" (per batch, head and row tile)
    list_rows: int  # rows of a run-time list's block
    interpret: bool


class Inputs(NamedTuple):
    """Kernel operands in global memory; absent ones are None."""

    q: Any
    k: Any
    v: Any
    table: Any  # [B, P, tiles, F] int32, a row or a column table
    pattern: Any  # [H] int32
    lists: Any  # tables.Lists, of dK/dV tables.ColumnLists
    rules: Any  # tables.Rules
    segments: Any  # tables.Segments


class Work(NamedTuple):
    """One tile of queries: batch, head, tile index and its row of the schedule."""

    batch: jax.Array
    head: jax.Array
    index: jax.Array
    pattern: jax.Array
    row: Any  # field -> scalar


def tiled(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory laid out for TMA and wgmma: 8 x 64 tiles with a 128-byte swizzle."""
    layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=layout)


def launch(interpret: bool) -> dict[str, Any]:
    """Compiler settings. No thread here reads and writes the same shared memory, as dropping the barriers demands.

    Sums along rows stay inside a warp and need no scratch memory.
    """
    if interpret:
        return {"interpret": plgpu.InterpretGPUParams()}
    lane = plgpu.LoweringSemantics.Lane
    params = plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=lane, reduction_scratch_bytes=0
    )
    return {"compiler_params": params}


def zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)


def accumulate(acc: jax.Array, a: Any, b: Any, interpret: bool, during=lambda: None) -> jax.Array:
    """`acc + a @ b`, `a` in registers or, as `b`, in shared memory; `during` runs while the tensor core does."""
    if interpret:  # the interpreter has neither initialised accumulators nor wgmma operands in registers
        during()
        return acc + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))

    def compute(ref):
        plgpu.wgmma(ref, a, b)
        during()

    return pl.run_state(compute)(plgpu.ACC.init(acc))


def named_barrier(op: str, index: jax.Array) -> None:
    """`op` "sync" or "arrive" at a hardware barrier of the two compute warpgroups."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def emit(_, barrier):
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [barrier.registers[()]], f"bar.{op} $0, 256;", "r", has_side_effects=True)

    emit(index)


@dataclasses.dataclass(frozen=True)
class Turn:
    """Two compute warpgroups take turns on the tensor cores: one multiplies while the other does its softmax."""

    wg: jax.Array
    enabled: bool

    def take(self) -> None:
        if self.enabled:
            named_barrier("sync", TURN + self.wg)

    def give(self) -> None:
        if self.enabled:
            named_barrier("arrive", TURN + 1 - self.wg)


def fields(table: Any, batch: jax.Array, pattern: jax.Array, index: jax.Array) -> Any:
    """Reader of one row of a schedule table: field -> scalar. It reads anew each time, which costs no register."""
    return lambda field: table[batch, pattern, index, field]


class Steps(NamedTuple):
    """Steps of a row tile. Those in [inner, inner_end) need no mask; `place(n)` says where step n is."""

    total: jax.Array
    inner: jax.Array
    inner_end: jax.Array
    place: Any


class Place(NamedTuple):
    """Keys of a step: first of all, first of the second unit, limit; `full_until` is -1 where no list is visited."""

    first: jax.Array
    second: jax.Array
    limit: jax.Array
    full_until: Any


def steps(s: Static, block_k: int, g: Inputs, w: Work) -> Steps:
    sink_steps, window_steps = w.row(tb.SINK_STEPS), w.row(tb.WINDOW_STEPS)
    per = block_k // tb.UNIT
    listed = None if s.lists == "none" else _listed(s, g, w, per)
    list_steps = jnp.int32(0) if listed is None else listed[0]
    total = sink_steps + list_steps + window_steps
    inner = w.row(tb.INNER) + jnp.where(window_steps > 0, sink_steps + list_steps, 0)

    def direct(n):
        past = n - sink_steps - list_steps
        in_sink = n < sink_steps
        first = jnp.where(in_sink, w.row(tb.SINK_BEGIN) + n * block_k, w.row(tb.WINDOW_BEGIN) + past * block_k)
        limit = jnp.where(in_sink, w.row(tb.SINK_STOP), w.row(tb.KEY_STOP))
        return Place(first, first + tb.UNIT, limit, None if listed is None else jnp.int32(-1))

    def place(n):
        if listed is None:
            return direct(n)
        at = n - sink_steps
        return lax.cond((at >= 0) & (at < list_steps), lambda: listed[1](at), lambda: direct(n))

    return Steps(total, inner, inner + w.row(tb.INNER_STEPS), place)


def _listed(s: Static, g: Inputs, w: Work, per: int) -> tuple[jax.Array, Any]:
    """Steps over a tile's list of key units, `per` units a step, and the function from such a step to its place."""
    if s.lists == "plan":
        which, low, length = w.pattern, w.row(tb.LIST_LOW), w.row(tb.LIST_LEN)
    else:
        _, heads, rows = g.lists.length.shape
        head = lax.div(w.head, s.heads // heads)
        row = lax.div(w.index, tb.cdiv(tb.cdiv(s.rows, ROW_TILE), rows))
        which, low, length = (w.batch * heads + head) * rows + row, jnp.int32(0), g.lists.length[w.batch, head, row]
    outside = tb.cdiv(s.keys, tb.UNIT)

    def place(at):
        limit = w.row(tb.KEY_STOP)
        entry = low + at * per
        unit, full = g.lists.units[which, entry], g.lists.full[which, entry]
        last = unit
        if per == 2:
            pair = at * per + 1 < length
            other = entry + jnp.where(pair, 1, 0)
            last = jnp.where(pair, g.lists.units[which, other], outside)
            full = jnp.minimum(full, g.lists.full[which, other])
        stop = (last + 1) * tb.UNIT
        full = jnp.where(stop <= limit, full, 0)
        if s.causal:
            full = jnp.where(stop - 1 <= w.row(tb.OFFSET) + w.index * ROW_TILE, full, 0)
        return Place(unit * tb.UNIT, last * tb.UNIT, limit, full)

    return lax.div(length + (per - 1), per), place


def key_copies(s: Static, block_k: int) -> int:
    """Copies that bring the keys of one step: listed units need not be neighbours."""
    return block_k // tb.UNIT if s.lists != "none" else 1


def load_keys(s: Static, place: Place, src: Any, dst: Any, ready: Any) -> None:
    """Starts the copies of a step's keys [S,D] to shared memory [block_k,D]; each arrives at `ready`."""
    begins = (place.first, jnp.minimum(place.second, (tb.cdiv(s.keys, tb.UNIT) - 1) * tb.UNIT))
    copies = key_copies(s, dst.shape[0])
    size = dst.shape[0] // copies
    for part in range(copies):
        plgpu.copy_gmem_to_smem(src.at[pl.ds(begins[part], size)], dst.at[pl.ds(part * size, size)], ready)


def mask_rows(g: Inputs, s: Static, block_k: int, w: Work, row_lo, x: jax.Array, place: Place) -> jax.Array:
    """Scores with -inf where the row may not see the key; passes tiles known to have every pair allowed."""
    first, second, limit, full_until = place
    shape = x.shape
    sink, window, row = w.row(tb.SINK), w.row(tb.WINDOW), row_lo - w.row(tb.OFFSET)

    def by_rules(col, j, i):
        places = places_of(g)
        keep = ((j if places is None else _by_key(places, w.batch, place, shape)) < sink) | (i - j < window)
        if g.rules.expiry is not None:
            keep |= _column_rules(g, w, (first, second), col, i)
        return keep ^ (full_until >= 0) if s.lists == "call" else keep  # static rules have their own steps

    def edge():
        col = iota(shape, 1)
        j = first + col
        if full_until is not None:
            j = jnp.where(col < tb.UNIT, j, second - tb.UNIT + col)
        i = row_lo + iota(shape, 0)
        keep = j < limit
        if not s.dense:
            keep &= by_rules(col, j, i)
        if s.causal:
            keep &= j <= i
        if g.segments is not None:
            q_seg = plgpu.load(g.segments.queries.at[w.batch, pl.ds(row, WG)], layout=ROWS, optimized=False)
            keep &= spread(q_seg, shape, 0) == _by_key(g.segments.keys, w.batch, place, shape)
        return jnp.where(keep, x, -jnp.inf)

    whole = None if full_until is None else row_lo + (WG - 1) < full_until
    if g.segments is not None:
        beside = (first + block_k <= limit) & ((first + block_k <= row_lo + 1) | (not s.causal))
        if not s.dense:
            beside &= all_sinks(g, w.batch, first, block_k, sink) | (row_lo + (WG - 1) - first < window)
        whole = beside if full_until is None else whole | (beside & (full_until < 0))
        units = [lax.div(f, tb.UNIT) for f in (first, second)[: block_k // tb.UNIT]]
        whole &= one_segment(g, w.batch, lax.div(row, WG), 1, units)
    return edge() if whole is None else lax.cond(whole, lambda: x, edge)


def _by_key(values: Any, batch, place: Place, shape: tuple[int, ...]) -> jax.Array:
    """What `values` [B,S] hold for the keys of a step, along the columns of its scores."""
    load = lambda at: plgpu.load(values.at[batch, pl.ds(at, shape[1])], layout=COLS, optimized=False)
    if place.full_until is None or shape[1] == tb.UNIT:
        return spread(load(place.first), shape, 1)
    left, right = (spread(load(at), shape, 1) for at in (place.first, place.second - tb.UNIT))
    return jnp.where(iota(shape, 1) < tb.UNIT, left, right)


def _column_rules(g: Inputs, w: Work, firsts: tuple, col: jax.Array, i: jax.Array) -> jax.Array:
    """Rows that a key column outlives, or that its later interval covers: two scalars a step, as columns are units."""
    last = g.rules.expiry.shape[1] - 1
    units = [jnp.minimum(lax.div(f, tb.UNIT), last) for f in firsts]
    pick = lambda table: jnp.where(col < tb.UNIT, table[w.pattern, units[0]], table[w.pattern, units[1]])
    keep = i < pick(g.rules.expiry)
    if g.rules.start is not None:
        keep |= (pick(g.rules.start) <= i) & (i < pick(g.rules.stop))
    return keep


def places_of(g: Inputs) -> Any:
    """What sinks count where it is not the position of the key."""
    return None if g.segments is None else g.segments.places


def all_sinks(g: Inputs, batch, first, size: int, sink) -> jax.Array:
    """Whether `size` keys of one segment, from `first` on, are all sinks."""
    places = places_of(g)
    return (first if places is None else places[batch, first]) <= sink - size


def one_segment(g: Inputs, batch, row, row_count: int, units: Sequence[Any]) -> jax.Array:
    """Whether `row_count` groups of 64 rows from `row` on, and these key units, are one segment."""
    rows, keys = g.segments.query_range, g.segments.key_range
    low = rows[batch, 0, row]
    full = low == rows[batch, 1, row]
    for table, at in [*((rows, row + n) for n in range(1, row_count)), *((keys, unit) for unit in units)]:
        full &= (table[batch, 0, at] == low) & (table[batch, 1, at] == low)
    return full

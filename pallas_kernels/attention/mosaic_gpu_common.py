"""Pieces shared by the Hopper attention kernels: matrix products, the tensor-core turn, masks of one tile."""

from __future__ import annotations

import dataclasses
import math
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
ROW_TILE = WGS * WG
SMEM_BYTES = 227 * 1024
TURN = 8  # named barriers 8 and 9; lower ones belong to the compiler


class Static(NamedTuple):
    """What the kernel is specialised to."""

    batch: int
    rows: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    dim_v: int
    patterns: int
    causal: bool
    scale: float
    soft_cap: float | None
    lists: str  # "none", "plan" (per pattern) or "call" (per batch, head and row tile)
    segments: bool
    sink_logits: bool
    interpret: bool


class Inputs(NamedTuple):
    """Kernel operands in global memory; absent ones are None."""

    q: Any
    k: Any
    v: Any
    table: Any  # [B, P, nQ, F] int32
    pattern: Any  # [H] int32
    units: Any  # [lists, n] int32
    full: Any
    lengths: Any  # [lists] int32, run-time lists only
    rules: Any  # tables.Rules per unit
    q_segments: Any  # [B, rows padded]
    k_segments: Any  # [B, keys padded]
    segment_ranges: Any  # ([B, 2, row units], [B, 2, key units])
    sink_logits: Any  # [H] f32


class Work(NamedTuple):
    """One tile of queries: batch, head, tile index and its row of the schedule."""

    batch: jax.Array
    head: jax.Array
    index: jax.Array
    pattern: jax.Array
    row: Any  # field -> scalar


def tiled(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory laid out for TMA and wgmma: 8 x 64 tiles with a 128-byte swizzle."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def launch(interpret: bool) -> dict[str, Any]:
    """Compiler settings. No thread here reads and writes the same shared memory, as dropping the barriers demands."""
    if interpret:
        return {"interpret": plgpu.InterpretGPUParams()}
    lane = plgpu.LoweringSemantics.Lane
    params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=lane)
    return {"compiler_params": params}


def zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)


def accumulate(acc: jax.Array, a: jax.Array, b: Any, interpret: bool, during=lambda: None) -> jax.Array:
    """`acc + a @ b` for `a` in registers and `b` in shared memory; `during` runs while the tensor core does."""
    if interpret:  # the interpreter has neither initialised accumulators nor wgmma operands in registers
        during()
        return acc + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))

    def compute(ref):
        plgpu.wgmma(ref, a, b)
        during()

    return pl.run_state(compute)(plgpu.ACC.init(acc))


def _named_barrier(op: str, index: jax.Array) -> None:
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
            _named_barrier("sync", TURN + self.wg)

    def give(self) -> None:
        if self.enabled:
            _named_barrier("arrive", TURN + 1 - self.wg)


def fields(table: Any, batch: jax.Array, pattern: jax.Array, index: jax.Array) -> Any:
    """One row of a schedule table, read now; the result maps a field to its scalar."""
    values = [table[batch, pattern, index, f] for f in range(table.shape[-1])]
    return values.__getitem__


def step_keys(n: jax.Array, row: Any, tile_k: int) -> tuple[jax.Array, jax.Array]:
    """First key and key limit of step `n` where no lists are visited: sink tiles, then window tiles."""
    past = n - row(tb.SINK_STEPS)
    in_sink = past < 0
    first = jnp.where(in_sink, n * tile_k, row(tb.WINDOW_BEGIN) + past * tile_k)
    return first, jnp.where(in_sink, row(tb.SINK_STOP), row(tb.KEY_STOP))


def static_full(first: jax.Array, stop: jax.Array, limit, row_lo, row_hi, sink, window, causal: bool) -> jax.Array:
    """Whether all rows row_lo..row_hi see every key of [first, stop) through the causal, sink and window rules."""
    full = (stop <= limit) & ((stop <= sink) | (row_hi - first < window))
    return full & (stop - 1 <= row_lo) if causal else full


def steps(s: Static, block_k: int, g: Inputs, w: Work) -> tuple[jax.Array, Any]:
    """Number of steps of a tile, and the function from a step to its two key starts, key limit and list fullness."""
    if s.lists == "none":
        total = w.row(tb.SINK_STEPS) + w.row(tb.WINDOW_STEPS)

        def keys(n):
            first, limit = step_keys(n, w.row, block_k)
            return first, first + tb.UNIT, limit, None

        return total, keys
    per = block_k // tb.UNIT
    if s.lists == "plan":
        which, low, length = w.pattern, w.row(tb.LIST_LOW), w.row(tb.LIST_LEN)
    else:
        heads = g.lengths.shape[1]
        head = lax.div(w.head, s.heads // heads)
        which = (w.batch * heads + head) * g.lengths.shape[2] + lax.div(w.index, list_ratio(s, g))
        low, length = jnp.int32(0), g.lengths[w.batch, head, lax.div(w.index, list_ratio(s, g))]
    list_steps = lax.div(length + (per - 1), per)
    sink_steps = w.row(tb.SINK_STEPS)
    outside = tb.cdiv(s.keys, tb.UNIT)

    def keys(n):
        at = n - sink_steps

        def listed():
            limit = w.row(tb.KEY_STOP)
            entry = low + at * per
            unit, full = g.units[which, entry], g.full[which, entry]
            last = unit
            if per == 2:
                pair = at * per + 1 < length
                other = entry + jnp.where(pair, 1, 0)
                last = jnp.where(pair, g.units[which, other], outside)
                full = jnp.minimum(full, g.full[which, other])
            stop = (last + 1) * tb.UNIT
            full = jnp.where(stop <= limit, full, 0)
            if s.causal:
                full = jnp.where(stop - 1 <= w.row(tb.OFFSET) + w.index * ROW_TILE, full, 0)
            return unit * tb.UNIT, last * tb.UNIT, limit, full

        def direct():
            skip = jnp.where(at < 0, n, n - list_steps)
            first, limit = step_keys(skip, w.row, block_k)
            return first, first + tb.UNIT, limit, jnp.int32(-1)

        return lax.cond((at >= 0) & (at < list_steps), listed, direct)

    return sink_steps + list_steps + w.row(tb.WINDOW_STEPS), keys


def list_ratio(s: Static, g: Inputs) -> int:
    return tb.cdiv(tb.cdiv(s.rows, ROW_TILE), g.lengths.shape[2])


def mask_rows(g: Inputs, s: Static, block_k: int, w: Work, row_lo, x: jax.Array, where) -> jax.Array:
    """Scores with -inf where the row may not see the key; passes tiles whose every pair is allowed."""
    first, second, limit, listed = where
    shape = x.shape
    sink, window, row_hi = w.row(tb.SINK), w.row(tb.WINDOW), row_lo + (WG - 1)
    full = static_full(first, first + block_k, limit, row_lo, row_hi, sink, window, s.causal)
    if listed is not None:
        full = jnp.where(listed >= 0, row_hi < listed, full)
    if s.segments:
        full &= one_segment(g, block_k, w, row_lo - w.row(tb.OFFSET), first)

    def edge():
        col = iota(shape, 1)
        j = first + col
        if listed is not None:
            j = jnp.where(col < tb.UNIT, j, second - tb.UNIT + col)
        i = row_lo + iota(shape, 0)
        keep = (j < sink) | (i - j < window)
        if g.rules.expiry is not None:
            keep |= column_rules(g, w, (first, second), col, i)
        if s.lists == "call":
            keep = jnp.where(listed >= 0, ~keep, keep)
        keep &= j < limit
        if s.causal:
            keep &= j <= i
        if s.segments:
            rows = pl.ds(row_lo - w.row(tb.OFFSET), WG)
            q_seg = plgpu.load(g.q_segments.at[w.batch, rows], layout=ROWS, optimized=False)
            k_seg = plgpu.load(g.k_segments.at[w.batch, pl.ds(first, block_k)], layout=COLS, optimized=False)
            keep &= spread(q_seg, shape, 0) == spread(k_seg, shape, 1)
        return jnp.where(keep, x, -jnp.inf)

    return lax.cond(full, lambda: x, edge)


def column_rules(g: Inputs, w: Work, firsts, col, i) -> jax.Array:
    """Rows that a key column outlives, or that its later interval covers: two scalars a step, as columns are units."""
    last = g.rules.expiry.shape[1] - 1
    units = [jnp.minimum(lax.div(f, tb.UNIT), last) for f in firsts]
    pick = lambda table: jnp.where(col < tb.UNIT, table[w.pattern, units[0]], table[w.pattern, units[1]])
    keep = i < pick(g.rules.expiry)
    if g.rules.start is not None:
        keep |= (pick(g.rules.start) <= i) & (i < pick(g.rules.stop))
    return keep


def one_segment(g: Inputs, block_k: int, w: Work, row, first) -> jax.Array:
    rows, keys = g.segment_ranges
    r, u = lax.div(row, WG), lax.div(first, tb.UNIT)
    same = lambda x, y: x == y
    low = rows[w.batch, 0, r]
    full = same(low, rows[w.batch, 1, r])
    for half in range(block_k // tb.UNIT):
        at = jnp.minimum(u + half, keys.shape[2] - 1)
        full &= same(low, keys[w.batch, 0, at]) & same(low, keys[w.batch, 1, at])
    return full

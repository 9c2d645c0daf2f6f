"""Decode attention on Hopper: programs that copy equal shares of the cache through shared memory, merged afterwards.

One warpgroup keeps copies of key and value blocks in flight, another multiplies. The queries of a KV head (its group
times the new tokens) are the rows of one 64-row product, so each key is read once for all of them. The time is the time
to read the cache; the arithmetic hides behind it. `schedule.py` says how the blocks are shared out.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import op
from pallas_kernels.decode.call import Call
from pallas_kernels.decode.combine import combine, padded
from pallas_kernels.decode.schedule import make_schedule

ROWS = 64  # rows of a warpgroup's product
TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a launch is shaped: keys a block, copies in flight, programs an SM, SMs."""

    block: int = 64
    stages: int = 2
    programs_per_sm: int = 2
    sms: int = 132

    @property
    def programs(self) -> int:
        return self.programs_per_sm * self.sms


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static facts of one call, for the kernel body."""

    kv_heads: int
    rows8: int  # rows of the output that are kept, a multiple of 8
    capacity: int
    ring: int  # -1 where slots are positions
    period: int
    paged: bool
    table_per_head: bool
    masked: bool  # the plan limits keys beyond causality
    by_row: bool  # rows differ in position, sink or window; otherwise all share `sink` and `window`
    sink: int
    window: int
    listed: bool
    list_heads: int
    page: int
    scale: float
    soft_cap: float | None
    quantized: bool


READ_FROM_SCHEDULE = ("sinks", "tail", "static", "visits", "first_pair", "first_visit", "work")


class Scratch(NamedTuple):
    """Shared memory of a program."""

    q: Any
    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    k_wide: Any
    v_wide: Any
    o: Any
    lse: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    free: Any


def transforms(dim: int, dtype):
    """Layout of a block in shared memory: rows swizzled over as many of 128 bytes as they have."""
    width = jnp.dtype(dtype).itemsize
    swizzle = min(128, dim * width)
    return plgpu.TilingTransform((8, swizzle // width)), plgpu.SwizzleTransform(swizzle)


def product(acc: Array, a, b, interpret: bool) -> Array:
    """acc + a @ b on the tensor cores; the interpreter has no accumulator to start from."""
    if interpret:
        load = lambda x: x[...] if hasattr(x, "at") and not isinstance(x, jax.Array) else x
        return acc + jnp.dot(load(a), load(b), preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))


def scores(q_smem, k_smem, block: int, interpret: bool) -> Array:
    if interpret:
        return jnp.dot(q_smem[...], k_smem[...].T, preferred_element_type=jnp.float32)

    def compute(ref):
        plgpu.wgmma(ref, q_smem, k_smem.transpose((1, 0)))
        return ref[...]

    return pl.run_scoped(compute, plgpu.ACC((ROWS, block), jnp.float32))


def kernel(tiles: Tiles, shape: Shape, interpret: bool, refs, scratch) -> None:
    role = lax.axis_index("wg")

    @pl.when(role == 0)
    def _compute():
        if not interpret:
            plgpu.set_max_registers(200, action="increase")
        compute(tiles, shape, interpret, refs, scratch)

    @pl.when(role == 1)
    def _fetch():
        if not interpret:
            plgpu.set_max_registers(40, action="decrease")
        fetch(tiles, shape, refs, scratch)


def segments(refs, run):
    """Call `run(pair, first visit, visits done before, visits)` for each pair in this program's share."""
    program = lax.axis_index("program")
    total = refs.work[program]

    def per_pair(state):
        pair, start, done = state
        count = jnp.minimum(refs.visits[pair] - start, total - done)
        run(pair, start, done, count)
        return pair + 1, jnp.int32(0), done + count

    begin = refs.first_pair[program], refs.first_visit[program], jnp.int32(0)
    lax.while_loop(lambda state: state[2] < total, per_pair, begin)


def block_of(shape: Shape, pair, n, refs):
    """Logical block of visit `n`."""
    sinks = refs.sinks[pair]
    where = jnp.where(n < sinks, n, refs.tail[pair] + n - sinks)
    if not shape.listed:
        return where
    static = refs.static[pair]
    head = pair % shape.kv_heads if shape.list_heads > 1 else 0
    listed = refs.lists[pair // shape.kv_heads, head, jnp.maximum(n - static, 0)]
    return jnp.where(n < static, where, listed)


def place(shape: Shape, block: int, refs, pair, logical):
    """Index of a logical block in the cache arrays: [block, D] in global memory."""
    batch, head = pair // shape.kv_heads, pair % shape.kv_heads
    if not shape.paged:
        return batch, pl.ds(logical * block, block), head
    per_page = shape.page // block
    entry = logical // per_page
    page = refs.table[batch, head, entry] if shape.table_per_head else refs.table[batch, entry]
    return page, head, pl.ds(logical % per_page * block, block)


def slot_to_position(shape: Shape, slot, length):
    """Positions that ring slots hold: of this lap up to the newest slot, of the lap before beyond it."""
    laps = jnp.maximum(length - 1 - shape.ring, 0)
    newest, lap = shape.ring + laps % shape.period, laps // shape.period * shape.period
    turned = jnp.where(slot <= newest, slot + lap, slot + (lap - shape.period))
    return jnp.where(slot < shape.ring, slot, jnp.where(turned < shape.ring, jnp.int32(2**30), turned))


def fetch(tiles: Tiles, shape: Shape, refs, scratch) -> None:
    """Keep `stages` blocks of keys and values on their way into shared memory."""

    def run(pair, start, done, count):
        def visit(m, _):
            g = done + m
            slot = lax.rem(g, tiles.stages)
            where = place(shape, tiles.block, refs, pair, block_of(shape, pair, start + m, refs))

            @pl.when(g >= tiles.stages)
            def _():
                plgpu.barrier_wait(scratch.free.at[slot])

            plgpu.copy_gmem_to_smem(refs.k.at[where], scratch.k.at[slot], scratch.k_ready.at[slot])
            plgpu.copy_gmem_to_smem(refs.v.at[where], scratch.v.at[slot], scratch.v_ready.at[slot])
            if shape.quantized:
                outer, *inner = where
                at = (outer, *inner) if shape.paged else (outer, *reversed(inner))  # scales are head-major
                plgpu.copy_gmem_to_smem(refs.k_scale.at[at], scratch.k_scale.at[slot], scratch.k_ready.at[slot])
                plgpu.copy_gmem_to_smem(refs.v_scale.at[at], scratch.v_scale.at[slot], scratch.v_ready.at[slot])

        lax.fori_loop(0, count, visit, None)

    segments(refs, run)
    total = refs.work[lax.axis_index("program")]
    drain = lambda g, _: plgpu.barrier_wait(scratch.free.at[lax.rem(g, tiles.stages)])
    lax.fori_loop(jnp.maximum(total - tiles.stages, 0), total, drain, None)


def operand(shape: Shape, stored, wide, slot):
    """The block in `slot` as the tensor cores take it: int8 codes are widened into `wide`, exactly."""
    if not shape.quantized:
        return stored.at[slot]
    codes = plgpu.load(stored.at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X)
    wide[...] = plgpu.layout_cast(codes.astype(wide.dtype), plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    return wide


def blank_rows(values, held) -> None:
    """Zero the values of slots that hold no token: nothing was written there, and 0 x NaN is NaN."""

    @pl.when(held < values.shape[0])
    def _():
        rows = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
        stored = plgpu.load(values, layout=plgpu.Layout.WGMMA)
        values[...] = jnp.where(rows < held, stored, jnp.zeros_like(stored))
        plgpu.commit_smem()


def compute(tiles: Tiles, shape: Shape, interpret: bool, refs, scratch) -> None:
    """Attention of the queries over the blocks as they arrive; one partial result a pair."""
    q_smem, o_smem, lse_smem = scratch.q, scratch.o, scratch.lse
    dv, block = o_smem.shape[-1], tiles.block
    by_row, grid = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
    full = lambda value, dims, layout: plgpu.layout_cast(jnp.full(dims, value, jnp.float32), layout)
    spread = lambda x: x if jnp.ndim(x) == 0 else lax.broadcast_in_dim(x, (ROWS, block), [0])
    by_key = lambda ref: lax.broadcast_in_dim(plgpu.load(ref, layout=grid.reduce(0)), (ROWS, block), [1])

    def run(pair, start, done, count):
        batch, head = pair // shape.kv_heads, pair % shape.kv_heads
        plgpu.copy_gmem_to_smem(refs.q.at[pair], q_smem, scratch.q_ready)
        length = refs.lengths[batch]
        query, sink, window = length - 1, shape.sink, shape.window
        if shape.by_row:
            load = lambda n, at: plgpu.load(refs.rows.at[n, at], layout=by_row, optimized=False)
            query, sink, window = load(0, batch), load(1, head), load(2, head)
        plgpu.barrier_wait(scratch.q_ready)

        def visit(m, carry):
            acc, top, total = carry
            slot = lax.rem(done + m, tiles.stages)
            logical = block_of(shape, pair, start + m, refs)
            plgpu.barrier_wait(scratch.k_ready.at[slot])
            s = scores(q_smem, operand(shape, scratch.k, scratch.k_wide, slot), block, interpret) * shape.scale
            if shape.quantized:
                s *= by_key(scratch.k_scale.at[slot])
            if shape.soft_cap is not None:
                s = shape.soft_cap * jnp.tanh(s / shape.soft_cap)
            key = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=grid) + logical * block
            if shape.ring >= 0:
                key = slot_to_position(shape, key, length)
            keep = key <= spread(query)
            if shape.masked:
                limited = (key < spread(sink)) | (spread(query) - key < spread(window))
                if shape.listed:  # a listed block adds only keys that the static part lacks
                    limited = limited == (start + m < refs.static[pair])
                keep &= limited
            s = jnp.where(keep, s * LOG2E, -jnp.inf)
            new_top = jnp.maximum(top, s.max(axis=1))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            p = jnp.exp2(s - spread(base))
            shrink = jnp.exp2(top - base)
            total = total * shrink + p.sum(axis=1)
            acc *= lax.broadcast_in_dim(shrink, (ROWS, dv), [0])
            plgpu.barrier_wait(scratch.v_ready.at[slot])
            if shape.quantized:
                p = jnp.where(keep, p * by_key(scratch.v_scale.at[slot]), 0.0)
            else:
                blank_rows(scratch.v.at[slot], jnp.minimum(length, shape.capacity) - logical * block)
            values = operand(shape, scratch.v, scratch.v_wide, slot)
            acc = product(acc, p.astype(q_smem.dtype), values, interpret)
            plgpu.barrier_arrive(scratch.free.at[slot])
            return acc, new_top, total

        start_state = full(0.0, (ROWS, dv), grid), full(-jnp.inf, (ROWS,), by_row), full(0.0, (ROWS,), by_row)
        acc, top, total = lax.fori_loop(0, count, visit, start_state)
        some = jnp.where(total > 0, total, 1.0)
        acc /= lax.broadcast_in_dim(some, (ROWS, dv), [0])
        o_smem[...] = acc.astype(o_smem.dtype)
        lse_smem[...] = jnp.where(total > 0, (top + jnp.log2(some)) / LOG2E, -jnp.inf)
        plgpu.commit_smem()
        part = lax.axis_index("program") + pair
        plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, shape.rows8)], refs.o.at[part, :, pl.ds(0, dv)])
        plgpu.copy_smem_to_gmem(lse_smem, refs.lse.at[part])
        plgpu.wait_smem_to_gmem(0)

    segments(refs, run)


def attend(
    call: Call, tiles: Tiles | None = None, interpret: plgpu.InterpretGPUParams | None = None
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    tiles = tiles or Tiles()
    refuse(call, tiles, interpret is not None)
    q, cache, group = call.q, call.cache, call.group
    batch, queries, heads, dim = q.shape
    kv_heads, dv = cache.num_kv_heads, cache.v.shape[-1]
    rows = queries * group
    schedule = make_schedule(cache, call.plan, call.lists, queries, tiles.block, tiles.programs)
    # rows of a pair: new tokens by heads of the group
    packed = q.reshape(batch, queries, kv_heads, group, dim).swapaxes(1, 2).reshape(batch * kv_heads, rows, dim)
    shape = describe(call)
    inputs = {
        "q": jnp.pad(packed, ((0, 0), (0, ROWS - rows), (0, 0))),
        "k": cache.k,
        "v": cache.v,
        "lengths": cache.lengths,
        "k_scale": cache.k_scale,
        "v_scale": cache.v_scale,
        "table": cache.page_table,
        "lists": None if call.lists is None else call.lists.idx[:, :, 0],
        "rows": row_tables(call) if shape.by_row else None,
    } | {name: getattr(schedule, name) for name in READ_FROM_SCHEDULE}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    o, lse = launch(tiles, shape, tiles.programs + batch * kv_heads, dv, tuple(inputs), interpret)(*inputs.values())
    o, lse = (x[:, :rows] for x in combine(o, lse, schedule.owner, interpret))
    o = o[..., :dv].reshape(batch, kv_heads, queries, group, dv).swapaxes(1, 2).reshape(batch, queries, heads, dv)
    lse = lse.reshape(batch, kv_heads, queries, group).swapaxes(2, 3).reshape(batch, heads, queries)
    return o.astype(q.dtype), lse


def describe(call: Call) -> Shape:
    cache, lists, plan = call.cache, call.lists, call.plan
    ring = -1 if cache.ring is None else cache.ring
    one_pattern = plan.num_patterns == 1 and isinstance(plan.sink, np.ndarray) and isinstance(plan.window, np.ndarray)
    by_row = call.q.shape[1] > 1 or not one_pattern
    return Shape(
        kv_heads=cache.num_kv_heads,
        rows8=-(-call.q.shape[1] * call.group // 8) * 8,
        capacity=cache.capacity,
        ring=ring,
        period=cache.capacity - max(ring, 0),
        paged=cache.page_table is not None,
        table_per_head=cache.page_table is not None and cache.page_table.ndim == 3,
        masked=not plan.dense,
        by_row=by_row,
        sink=0 if by_row else int(plan.sink[0]),
        window=0 if by_row else int(plan.window[0]),
        listed=lists is not None,
        list_heads=1 if lists is None else lists.idx.shape[1],
        page=cache.k.shape[2] if cache.page_table is not None else 0,
        scale=call.scale,
        soft_cap=call.soft_cap,
        quantized=cache.k_scale is not None,
    )


def row_tables(call: Call) -> Int[Array, "3 n 64"]:
    """Position of each row's query (by request; -1 for padding), its sink and its window (by KV head)."""
    cache, plan, group, queries = call.cache, call.plan, call.group, call.q.shape[1]
    batch, kv_heads = cache.lengths.shape[0], cache.num_kv_heads
    row = jnp.arange(ROWS)
    query = cache.lengths[:, None] - queries + row[None] // group
    query = jnp.where(row[None] < queries * group, query, -1)
    head = jnp.arange(kv_heads)[:, None] * group + row[None] % group
    pattern = jnp.asarray(plan.pattern_of_head)[head]
    pad = lambda x: jnp.pad(x.astype(jnp.int32), ((0, max(batch, kv_heads) - x.shape[0]), (0, 0)))
    return jnp.stack([pad(query), pad(jnp.asarray(plan.sink)[pattern]), pad(jnp.asarray(plan.window)[pattern])])


def launch(tiles: Tiles, shape: Shape, slots: int, dv: int, names: tuple[str, ...], interpret):
    """The kernel over inputs called `names`; partial o [slots, rows8, Dv padded] and lse [slots, 64]."""
    dtype = jnp.bfloat16

    def entry(*inputs_and_outputs):
        refs = types.SimpleNamespace(**dict(zip((*names, "o", "lse"), inputs_and_outputs, strict=True)))
        dim = refs.q.shape[-1]
        stored = lambda ref, d: plgpu.SMEM(
            (tiles.stages, tiles.block, d), ref.dtype, transforms=transforms(d, ref.dtype)
        )
        wide = lambda d: plgpu.SMEM((tiles.block, d), dtype, transforms=TILE) if shape.quantized else None
        scales = plgpu.SMEM((tiles.stages, tiles.block), jnp.float32) if shape.quantized else None
        arrived = plgpu.Barrier(num_arrivals=1 + shape.quantized, num_barriers=tiles.stages)
        pl.run_scoped(
            lambda *scratch: kernel(tiles, shape, interpret is not None, refs, Scratch(*scratch)),
            *Scratch(
                q=plgpu.SMEM((ROWS, dim), dtype, transforms=TILE),
                k=stored(refs.k, dim),
                v=stored(refs.v, dv),
                k_scale=scales,
                v_scale=scales,
                k_wide=wide(dim),
                v_wide=wide(dv),
                o=plgpu.SMEM((ROWS, dv), dtype, transforms=TILE),
                lse=plgpu.SMEM((ROWS,), jnp.float32),
                q_ready=plgpu.Barrier(),
                k_ready=arrived,
                v_ready=arrived,
                free=plgpu.Barrier(num_barriers=tiles.stages),
            ),
            collective_axes="wg",
        )

    return plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct((slots, shape.rows8, padded(dv)), dtype),
            jax.ShapeDtypeStruct((slots, ROWS), jnp.float32),
        ),
        grid=(tiles.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def refuse(call: Call, tiles: Tiles, interpreting: bool) -> None:
    """Raises Unsupported with the reason where the kernel cannot do what was asked."""
    q, cache, plan, lists, group = call.q, call.cache, call.plan, call.lists, call.group
    if q.dtype != jnp.bfloat16 or cache.k.dtype not in (jnp.bfloat16, jnp.int8):
        raise op.Unsupported(f"q is {q.dtype} and the cache {cache.k.dtype}; it takes bfloat16 and int8 caches")
    if q.shape[1] * group > ROWS:
        raise op.Unsupported(f"{q.shape[1]} tokens of {group} heads a KV head are more than {ROWS} rows")
    if q.shape[-1] % 64 or cache.v.shape[-1] % 64 or max(q.shape[-1], cache.v.shape[-1]) > 256:
        raise op.Unsupported(f"head dims {q.shape[-1]} and {cache.v.shape[-1]} are not 64, 128, 192 or 256")
    if cache.page_table is not None and cache.k.shape[2] % tiles.block:
        raise op.Unsupported(f"pages of {cache.k.shape[2]} tokens are not a multiple of {tiles.block}")
    if plan.expiry is not None or plan.second is not None:
        raise op.Unsupported(
            "the mask has column blocks or a second interval; sinks, windows and block lists are supported"
        )
    if lists is not None and (lists.block_k != tiles.block or lists.idx.shape[1] not in (1, cache.num_kv_heads)):
        raise op.Unsupported(f"block lists must count blocks of {tiles.block} keys, for all heads or for each KV head")
    if not interpreting and op.platform() != "gpu":
        raise op.Unsupported("it runs on Hopper GPUs only")

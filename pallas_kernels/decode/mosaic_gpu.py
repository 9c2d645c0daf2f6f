"""Decode attention on Hopper: programs that copy equal shares of the cache through shared memory, merged afterwards.

One warpgroup keeps copies of key and value blocks in flight, another multiplies. Both products are taken transposed:
the keys of a block are the 64 rows that the tensor cores want, and the queries of a KV head (its group times the new
tokens) are as few columns as there are, in eights. So each key is read once for all of them, and int8 codes can be
widened in registers, where the left operand may lie. The time is the time to read the cache. `schedule.py` says how
the blocks are shared out; programs work it out themselves, and the rest of a call is `combine.py`.
"""

from __future__ import annotations

import dataclasses
import functools
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
from pallas_kernels.attention.mosaic_gpu_common import COLS, LOG2E, ROWS, TILE, accumulate, tiled, zeros
from pallas_kernels.decode import mosaic_gpu_int8 as codes
from pallas_kernels.decode.cache import unpack_factors
from pallas_kernels.decode.call import Call
from pallas_kernels.decode.combine import SLOTS, combine
from pallas_kernels.decode.schedule import Line, Span, per_kv_head, reads_all, share, span, whole
from pallas_kernels.plan import Plan

MAX_ROWS = 64  # new tokens by heads of a group
SMEM_BYTES = 220 * 1024  # of an SM, for all its programs
# Blocks in flight, at most. int8 on an H100 (head dim 128, 128K tokens): four take 108.5 us at batch 1 and 787 at 8,
# five 109.0 and 795, six 110.1 and 788.
MOST_STAGES, MOST_STAGES_INT8 = 6, 4


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a launch is shaped: keys a block, copies in flight, programs an SM, SMs."""

    block: int = 64
    stages: int = 3
    programs_per_sm: int = 2
    sms: int = 132

    @property
    def programs(self) -> int:
        return self.programs_per_sm * self.sms


def choose_tiles(call: Call) -> Tiles:
    """As many copies in flight as fit beside the queries and the result, in two programs an SM where they fit."""
    cache, block = call.cache, 64
    dims = cache.k.shape[-1] + cache.v.shape[-1]
    stage = block * (dims * cache.k.dtype.itemsize + (4 if cache.factors is not None else 0))
    fixed = columns(call) * (2 * dims + 2 * block + 4) + 4096
    for programs in (2, 1):
        stages = (SMEM_BYTES // programs - fixed) // stage
        if stages >= 2:
            break
    return Tiles(block, min(stages, MOST_STAGES if cache.factors is None else MOST_STAGES_INT8), programs)


def columns(call: Call) -> int:
    """Query rows of a KV head, in eights."""
    return -(-call.q.shape[1] * call.group // 8) * 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static facts of one call, for the kernel body."""

    batch: int
    kv_heads: int
    queries: int
    group: int
    columns: int
    capacity: int
    ring: int  # -1 where slots are positions
    period: int
    paged: bool
    table_per_head: bool
    masked: bool  # the plan limits keys beyond causality
    reads_all: bool
    sink: int  # of all heads, where `uniform`
    window: int
    uniform: bool  # one pattern for all heads, known to the host
    listed: bool
    list_heads: int
    page: int
    scale: float
    soft_cap: float | None
    quantized: bool


def describe(call: Call) -> Shape:
    cache, lists, plan = call.cache, call.lists, call.plan
    ring = -1 if cache.ring is None else cache.ring
    uniform = plan.num_patterns == 1 and isinstance(plan.sink, np.ndarray) and isinstance(plan.window, np.ndarray)
    return Shape(
        batch=call.q.shape[0],
        kv_heads=cache.num_kv_heads,
        queries=call.q.shape[1],
        group=call.group,
        columns=columns(call),
        capacity=cache.capacity,
        ring=ring,
        period=cache.capacity - max(ring, 0),
        paged=cache.page_table is not None,
        table_per_head=cache.page_table is not None and cache.page_table.ndim == 3,
        masked=not plan.dense,
        reads_all=reads_all(cache, plan),
        sink=int(plan.sink[0]) if uniform else 0,
        window=int(plan.window[0]) if uniform else 0,
        uniform=uniform,
        listed=lists is not None,
        list_heads=1 if lists is None else lists.idx.shape[1],
        page=cache.k.shape[2] if cache.page_table is not None else 0,
        scale=call.scale,
        soft_cap=call.soft_cap,
        quantized=cache.factors is not None,
    )


class Scratch(NamedTuple):
    """Shared memory of a program."""

    q: Any  # [N, D]
    k: Any  # [stages, block, D]
    v: Any  # [stages, block, Dv]
    factors: Any  # [stages, block] or None; they arrive with the keys
    p: Any  # [N, block]
    o: Any  # [N, Dv]
    lse: Any  # [N]
    q_ready: Any
    k_ready: Any
    v_ready: Any
    free: Any


COUNTS = ("lengths", "count", "limits")  # the operands that the schedule is made from


def pair_span(tiles: Tiles, shape: Shape, refs, batch, head) -> Span:
    length = refs.lengths[batch]
    if shape.reads_all:
        return whole(length, shape.capacity, tiles.block)
    sink, window = jnp.int32(shape.sink), jnp.int32(shape.window)
    if not shape.uniform:
        sink, window = refs.limits[0, head], refs.limits[1, head]
    return span(length, sink, window, shape.capacity, shape.queries, tiles.block)


def pair_visits(tiles: Tiles, shape: Shape, refs, batch, head):
    visits = pair_span(tiles, shape, refs, batch, head).static
    return visits + refs.count[batch, head if shape.list_heads > 1 else 0] if shape.listed else visits


def make_line(tiles: Tiles, shape: Shape, refs) -> Line:
    heads = 1 if shape.uniform and (not shape.listed or shape.list_heads == 1) else shape.kv_heads
    visits = lambda entry: pair_visits(
        tiles, shape, refs, lax.div(entry, jnp.int32(heads)), lax.rem(entry, jnp.int32(heads))
    )
    return Line(visits, shape.batch * heads, shape.kv_heads // heads)


def segments(tiles: Tiles, shape: Shape, refs, run):
    """Call `run(batch, head, first visit, visits done before, visits)` for each pair in this program's share."""
    line = make_line(tiles, shape, refs)
    first, total = share(line.total(), lax.axis_index("program"), tiles.programs)

    def per_pair(state):
        pair, start, done = state
        batch, head = lax.div(pair, jnp.int32(shape.kv_heads)), lax.rem(pair, jnp.int32(shape.kv_heads))
        count = jnp.minimum(pair_visits(tiles, shape, refs, batch, head) - start, total - done)
        run(batch, head, start, done, count)
        return pair + 1, jnp.int32(0), done + count

    begin = *line.locate(first), jnp.int32(0)
    lax.while_loop(lambda state: state[2] < total, per_pair, begin)
    return total


def block_of(shape: Shape, visits: Span, batch, head, n, refs):
    """Logical block of visit `n`."""
    where = jnp.where(n < visits.sinks, n, visits.tail + n - visits.sinks)
    if not shape.listed:
        return where
    listed = refs.lists[batch, head if shape.list_heads > 1 else 0, jnp.maximum(n - visits.static, 0)]
    return jnp.where(n < visits.static, where, listed)


def place(shape: Shape, block: int, refs, batch, head, logical):
    """Index of a logical block in the cache arrays: [block, D] in global memory."""
    if not shape.paged:
        return batch, pl.ds(logical * block, block), head
    per_page = shape.page // block
    entry = lax.div(logical, jnp.int32(per_page))
    page = refs.table[batch, head, entry] if shape.table_per_head else refs.table[batch, entry]
    return page, head, pl.ds(lax.rem(logical, jnp.int32(per_page)) * block, block)


def slot_to_position(shape: Shape, slot, length):
    """Positions that ring slots hold: of this lap up to the newest slot, of the lap before beyond it."""
    laps = jnp.maximum(length - 1 - shape.ring, 0)
    newest, lap = shape.ring + laps % shape.period, laps // shape.period * shape.period
    turned = jnp.where(slot <= newest, slot + lap, slot + (lap - shape.period))
    return jnp.where(slot < shape.ring, slot, jnp.where(turned < shape.ring, jnp.int32(2**30), turned))


def fetch(tiles: Tiles, shape: Shape, refs, scratch) -> None:
    """Keep `stages` blocks of keys and values on their way into shared memory."""

    def run(batch, head, start, done, count):
        visits = pair_span(tiles, shape, refs, batch, head)

        def visit(m, _):
            g = done + m
            slot = lax.rem(g, jnp.int32(tiles.stages))
            logical = block_of(shape, visits, batch, head, start + m, refs)
            where = place(shape, tiles.block, refs, batch, head, logical)

            @pl.when(g >= tiles.stages)
            def _():
                plgpu.barrier_wait(scratch.free.at[slot])

            plgpu.copy_gmem_to_smem(refs.k.at[where], scratch.k.at[slot], scratch.k_ready.at[slot])
            plgpu.copy_gmem_to_smem(refs.v.at[where], scratch.v.at[slot], scratch.v_ready.at[slot])
            if shape.quantized:
                outer, *inner = where
                at = where if shape.paged else (outer, *reversed(inner))  # factors are head-major
                plgpu.copy_gmem_to_smem(refs.factors.at[at], scratch.factors.at[slot], scratch.k_ready.at[slot])

        lax.fori_loop(0, count, visit, None)

    total = segments(tiles, shape, refs, run)
    drain = lambda g, _: plgpu.barrier_wait(scratch.free.at[lax.rem(g, jnp.int32(tiles.stages))])
    lax.fori_loop(jnp.maximum(total - tiles.stages, 0), total, drain, None)


def blank_rows(values, held) -> None:
    """Zero the values of slots that hold no token: nothing was written there, and 0 x NaN is NaN."""

    @pl.when(held < values.shape[0])
    def _():
        rows = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=TILE)
        stored = plgpu.load(values, layout=TILE)
        values[...] = jnp.where(rows < held, stored, jnp.zeros_like(stored))
        plgpu.commit_smem()


def visible(tiles: Tiles, shape: Shape, refs, batch, head):
    """`keep(logical block, whether it is a static visit) -> bool [block, N]` for the queries of a pair."""
    dims = (tiles.block, shape.columns)
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, dims, layout=TILE)
    by_column = lambda ref: lax.broadcast_in_dim(plgpu.load(ref, layout=COLS, optimized=False), dims, [1])
    length = refs.lengths[batch]
    query = length - 1
    if shape.queries > 1:
        query = length - shape.queries + lax.div(iota(1), jnp.int32(shape.group))
    sink, window = shape.sink, shape.window
    if not shape.uniform:
        sink, window = by_column(refs.rules.at[0, head]), by_column(refs.rules.at[1, head])

    def keep(logical, static):
        key = iota(0) + logical * tiles.block
        if shape.ring >= 0:
            position = slot_to_position(shape, key, length)
            key = (
                jnp.where(key < shape.capacity, position, jnp.int32(2**30))
                if shape.capacity % tiles.block
                else position
            )
        seen = key <= query
        if not shape.masked:
            return seen
        limited = (key < sink) | (query - key < window)
        if shape.listed:  # a listed block adds only keys that the static part lacks
            limited = limited == static
        return seen & limited

    return keep


def compute(tiles: Tiles, shape: Shape, interpret: bool, refs, scratch) -> None:
    """Attention of the queries over the blocks as they arrive; one partial result a pair."""
    block, n, dv = tiles.block, shape.columns, scratch.o.shape[-1]
    dims = (block, n)
    ref = lambda x: x[...] if interpret else x
    flip = lambda x: x[...].T if interpret else x.transpose((1, 0))
    by_key = lambda x: lax.broadcast_in_dim(x, dims, [0])
    by_query = lambda x, rows: lax.broadcast_in_dim(x, (rows, n), [1])
    full = lambda value, dims, layout: plgpu.layout_cast(jnp.full(dims, value, jnp.float32), layout)

    def run(batch, head, start, done, count):
        pair = batch * shape.kv_heads + head
        plgpu.copy_gmem_to_smem(refs.q.at[pair], scratch.q, scratch.q_ready)
        length = refs.lengths[batch]
        visits = pair_span(tiles, shape, refs, batch, head)
        keep = visible(tiles, shape, refs, batch, head)
        plgpu.barrier_wait(scratch.q_ready)

        def visit(m, carry):
            acc, top, total = carry
            slot = lax.rem(done + m, jnp.int32(tiles.stages))
            logical = block_of(shape, visits, batch, head, start + m, refs)
            plgpu.barrier_wait(scratch.k_ready.at[slot])
            keys = codes.widen(scratch.k.at[slot], interpret) if shape.quantized else ref(scratch.k.at[slot])
            s = accumulate(zeros(dims, TILE), keys, flip(scratch.q), interpret) * shape.scale
            if shape.quantized:
                k_factor, v_factor = unpack_factors(plgpu.load(scratch.factors.at[slot], layout=ROWS))
                s *= by_key(k_factor)
            if shape.soft_cap is not None:
                s = shape.soft_cap * jnp.tanh(s / shape.soft_cap)
            allowed = keep(logical, start + m < visits.static)
            s = jnp.where(allowed, s * LOG2E, -jnp.inf)
            new_top = jnp.maximum(top, s.max(axis=0))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            p = jnp.exp2(s - by_query(base, block))
            shrink = jnp.exp2(top - base)
            total = total * by_query(shrink, block) + p  # summed over keys at the end
            acc *= by_query(shrink, dv)
            plgpu.barrier_wait(scratch.v_ready.at[slot])
            if shape.quantized:
                p = jnp.where(allowed, p * by_key(v_factor), 0.0)
                values = codes.widen_transposed(scratch.v.at[slot], interpret)
            else:
                blank_rows(scratch.v.at[slot], jnp.minimum(length, shape.capacity) - logical * block)
                values = flip(scratch.v.at[slot])
            store_transposed(scratch.p, p.astype(scratch.p.dtype), interpret)
            acc = accumulate(acc, values, flip(scratch.p), interpret)
            plgpu.barrier_arrive(scratch.free.at[slot])
            return acc, new_top, total

        state = full(0.0, (dv, n), TILE), full(-jnp.inf, (n,), COLS), full(0.0, dims, TILE)
        acc, top, total = lax.fori_loop(0, count, visit, state)
        total = total.sum(axis=0)
        some = jnp.where(total > 0, total, 1.0)
        acc = (acc / by_query(some, dv)).astype(scratch.o.dtype)
        store = codes.store_transposed if shape.quantized else store_transposed
        store(scratch.o, acc, interpret)
        scratch.lse[...] = jnp.where(total > 0, (top + jnp.log2(some)) / LOG2E, -jnp.inf)
        plgpu.commit_smem()
        part = lax.axis_index("program") + pair
        plgpu.copy_smem_to_gmem(scratch.o, refs.o.at[part])
        plgpu.copy_smem_to_gmem(scratch.lse, refs.lse.at[part])
        plgpu.wait_smem_to_gmem(0)

    segments(tiles, shape, refs, run)


def store_transposed(ref, x: Array, interpret: bool) -> None:
    """ref = x.T, for the tensor cores to read next."""
    if interpret:
        ref[...] = x.T
    else:
        ref.transpose((1, 0))[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()


def attend(call: Call, tiles: Tiles | None = None) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    tiles = tiles or choose_tiles(call)
    refuse(call, tiles)
    q, cache, shape = call.q, call.cache, describe(call)
    batch, queries, _, dim = q.shape
    kv_heads, group = shape.kv_heads, shape.group
    # rows of a pair: new tokens by heads of the group
    packed = q.reshape(batch, queries, kv_heads, group, dim).swapaxes(1, 2).reshape(batch * kv_heads, -1, dim)
    inputs = {
        "q": jnp.pad(packed, ((0, 0), (0, shape.columns - packed.shape[1]), (0, 0))),
        "k": cache.k,
        "v": cache.v,
        "lengths": cache.lengths,
        "factors": cache.factors,
        "table": cache.page_table,
        "lists": None if call.lists is None else call.lists.idx[:, :, 0],
        "count": None if call.lists is None else call.lists.count[:, :, 0],
        "limits": None if shape.uniform else head_limits(call.plan, kv_heads),
        "rules": None if shape.uniform else row_rules(shape, call.plan),
    }
    inputs = {name: x for name, x in inputs.items() if x is not None}
    return run(tiles, shape, tuple(inputs), op.interpreter(), *inputs.values())


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def run(tiles: Tiles, shape: Shape, names: tuple[str, ...], interpret, *inputs: Array) -> tuple[Array, Array]:
    """Both kernels over inputs called `names`. Jitted, so that the layers of a model share one lowering."""
    by_name = dict(zip(names, inputs, strict=True))
    o, lse = launch(tiles, shape, by_name["v"].shape[-1], names, interpret)(*inputs)
    counts = {name: by_name[name] for name in COUNTS if name in names}
    line = lambda *refs: make_line(tiles, shape, types.SimpleNamespace(**dict(zip(counts, refs, strict=True))))
    sizes = shape.batch, shape.queries, shape.kv_heads, shape.group, o.shape[-1]
    return combine(o, lse, line, tuple(counts.values()), sizes, tiles.programs, interpret)


def head_limits(plan: Plan, kv_heads: int) -> Int[Array, "2 K"]:
    """Sinks and window of each KV head: the largest of its group."""
    return jnp.stack([per_kv_head(x, plan, kv_heads) for x in (plan.sink, plan.window)]).astype(jnp.int32)


def row_rules(shape: Shape, plan: Plan) -> Int[Array, "2 K N"]:
    """Sinks and window of each query row of a KV head."""
    head = jnp.arange(shape.kv_heads)[:, None] * shape.group + jnp.arange(shape.columns)[None] % shape.group
    pattern = jnp.asarray(plan.pattern_of_head)[head]
    return jnp.stack([jnp.asarray(plan.sink)[pattern], jnp.asarray(plan.window)[pattern]]).astype(jnp.int32)


def launch(tiles: Tiles, shape: Shape, dv: int, names: tuple[str, ...], interpret):
    """The kernel over inputs called `names`; partial o [slots, N, Dv] and lse [slots, N]."""
    dtype, n = jnp.bfloat16, shape.columns
    slots = tiles.programs + shape.batch * shape.kv_heads + SLOTS

    def entry(*inputs_and_outputs):
        refs = types.SimpleNamespace(**dict(zip((*names, "o", "lse"), inputs_and_outputs, strict=True)))
        dim = refs.q.shape[-1]
        stored = lambda ref, d: plgpu.SMEM(
            (tiles.stages, tiles.block, d), ref.dtype, transforms=codes.transforms(d, ref.dtype)
        )

        def body(*scratch):
            role, memory = lax.axis_index("wg"), Scratch(*scratch)
            pl.when(role == 0)(lambda: compute(tiles, shape, interpret is not None, refs, memory))
            pl.when(role == 1)(lambda: fetch(tiles, shape, refs, memory))

        pl.run_scoped(
            body,
            *Scratch(
                q=tiled((n, dim)),
                k=stored(refs.k, dim),
                v=stored(refs.v, dv),
                factors=plgpu.SMEM((tiles.stages, tiles.block), jnp.int32) if shape.quantized else None,
                p=tiled((n, tiles.block)),
                o=plgpu.SMEM((n, dv), dtype) if shape.quantized else tiled((n, dv)),
                lse=plgpu.SMEM((n,), jnp.float32),
                q_ready=plgpu.Barrier(),
                k_ready=plgpu.Barrier(num_arrivals=1 + shape.quantized, num_barriers=tiles.stages),
                v_ready=plgpu.Barrier(num_barriers=tiles.stages),
                free=plgpu.Barrier(num_barriers=tiles.stages),
            ),
            collective_axes="wg",
        )

    return plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct((slots, n, dv), dtype),
            jax.ShapeDtypeStruct((slots, n), jnp.float32),
        ),
        grid=(tiles.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def refuse(call: Call, tiles: Tiles) -> None:
    """Raises Unsupported with the reason where the kernel cannot do what was asked."""
    q, cache, plan, lists, group = call.q, call.cache, call.plan, call.lists, call.group
    dims = q.shape[-1], cache.v.shape[-1]
    if q.dtype != jnp.bfloat16 or cache.k.dtype not in (jnp.bfloat16, jnp.int8):
        raise op.Unsupported(f"q is {q.dtype} and the cache {cache.k.dtype}; it takes bfloat16 and int8 caches")
    if q.shape[1] * group > MAX_ROWS:
        raise op.Unsupported(f"{q.shape[1]} tokens of {group} heads a KV head are more than {MAX_ROWS} rows")
    if any(d not in (64, 128, 256) and (d != 192 or cache.factors is not None) for d in dims):
        raise op.Unsupported(f"head dims {dims[0]} and {dims[1]} are not 64, 128 or 256 (192 in bfloat16 only)")
    if cache.page_table is not None and cache.k.shape[2] % tiles.block:
        raise op.Unsupported(f"pages of {cache.k.shape[2]} tokens are not a multiple of {tiles.block}")
    if plan.expiry is not None or plan.second is not None:
        raise op.Unsupported(
            "the mask has column blocks or a second interval; sinks, windows and block lists are supported"
        )
    if lists is not None and (lists.block_k != tiles.block or lists.idx.shape[1] not in (1, cache.num_kv_heads)):
        raise op.Unsupported(f"block lists must count blocks of {tiles.block} keys, for all heads or for each KV head")
    op.require_hopper()

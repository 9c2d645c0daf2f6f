"""Block-sparse attention on TPU: entry, forward kernel.

A program owns one tile of queries of one head. It reads its row of the table (`tpu_tables`) from scalar memory, then
loops over exactly the key tiles that the row names, copying the next tile from HBM while it works on this one: skipped
tiles cost neither a copy nor a grid step. Tiles that are wholly visible skip the token mask. Scores are in base 2.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.attention import tpu_tables as tt
from pallas_kernels.attention.call import KEPT, Call
from pallas_kernels.attention.mosaic_tpu_parts import (
    HIDDEN,
    LANES,
    LN2,
    LOWEST,
    Config,
    Scope,
    as_column,
    finite,
    lane_home,
    named,
    prescale,
    product,
    rows_of_lanes,
    scores,
    streamed,
    sweep,
    token_mask,
    transfer,
    wide,
)
from pallas_kernels.op import Unsupported, interpreter, platform


def attend(call: Call) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """(o, lse) of the call on a TPU, or interpreted where `op.interpret` says so."""
    if reason := _reason(call):
        raise Unsupported(reason)
    tiles = default_tiles(call)
    return attend_with(call, *tiles)


def attend_with(call: Call, block_q: int, block_k: int, compute_k: int):
    """`attend` with chosen tiles: rows of queries, keys in memory, keys per step of the product; multiples of 128."""
    for name, value in (("block_q", block_q), ("block_k", block_k), ("compute_k", compute_k)):
        if value < LANES or value % LANES:
            raise ValueError(f"{name}: {value} is not a positive multiple of {LANES}")
    if block_k % compute_k:
        raise ValueError(f"compute_k: {compute_k} does not divide block_k={block_k}")
    batch, length, heads, dim = call.q.shape
    keys, kv_heads, value_dim = call.v.shape[1:]
    plan = call.mask.plan(heads, length, keys, block_q, block_k)
    tiling = tt.Tiling(length, keys, block_q, block_k)
    table = tt.tables(call, plan, tiling)
    lists = None if plan.dense else call.lists  # a mask that allows every key leaves nothing to a list
    places = call.key_places
    config = Config(
        batch=batch,
        length=length,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=value_dim,
        block_q=block_q,
        block_k=block_k,
        compute_k=compute_k,
        causal=plan.causal,
        dense=plan.dense,
        scale=call.scale,
        soft_cap=call.soft_cap,
        segments=call.segment_ids is not None,
        places=places is not None,
        packed=table.packed is not None,
        limits=table.limits is not None,
        list_heads=0 if lists is None else lists.idx.shape[1],
        tables_batch=table.rows.shape[0],
        vmem_bytes=48 * 2**20,
    )
    extras = {"heads": jnp.asarray(plan.pattern_of_head, jnp.int32), "rows": table.rows, "columns": table.columns}
    if table.packed is not None:
        extras["packed"] = table.packed
    if table.limits is not None:
        extras["limits"] = table.limits
    if call.segment_ids is not None:
        q_ids, k_ids = call.segment_ids
        k_ids = (k_ids,) if places is None else (k_ids, places)
        extras["q_ids"], extras["k_ids"] = (
            jnp.pad(jnp.stack(x, 1), ((0, 0), (0, 0), (0, -x[0].shape[1] % LANES))) for x in ((q_ids,), k_ids)
        )
    if lists is not None:
        extras["listed"] = tt.listed_tiles(call, tiling)
    if call.whole is not None:
        return _part(config, call.q, call.k, call.v, extras, *call.whole)
    return _attend(config, call.q, call.k, call.v, extras)


def default_tiles(call: Call) -> tuple[int, int, int]:
    """The tuned tiles, none longer than its axis rounded up to 128, and such that they divide the blocks of a list."""
    best = tuning.tiles("attention_tpu", dim=max(call.q.shape[-1], call.v.shape[-1]))
    rounded = lambda n, most: min(-(-n // LANES) * LANES, most)
    block_q, block_k = rounded(call.q.shape[1], best["block_q"]), rounded(call.k.shape[1], best["block_k"])
    if call.lists is not None:
        block_q, block_k = math.gcd(block_q, call.lists.block_q), math.gcd(block_k, call.lists.block_k)
    return block_q, block_k, best["compute_k"] if block_k % best["compute_k"] == 0 else LANES


def _reason(call: Call) -> str | None:
    dims = (call.q.shape[-1], call.v.shape[-1])
    if platform() != "tpu" and interpreter() is None:
        return f"its kernels run on TPUs, this is {platform()}"
    if call.lists is not None and (call.lists.block_q % LANES or call.lists.block_k % LANES):
        return f"lists in blocks of {call.lists.block_q} x {call.lists.block_k}, it takes multiples of {LANES}"
    if call.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {call.q.dtype}, it takes bfloat16 and float32"
    if any(dim not in (32, 64, 128, 256) for dim in dims):
        return f"head dims {dims[0]} and {dims[1]}, it takes 32, 64, 128 and 256"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(c, q, k, v, extras):
    return forward(c, q, k, v, extras)


def _attend_forward(c, q, k, v, extras):
    o, lse = checkpoint_name(forward(c, q, k, v, extras), KEPT)
    return (o, lse), (q, k, v, extras, o, lse)


def _attend_backward(c, residuals, cotangents):
    from pallas_kernels.attention import mosaic_tpu_bwd

    return *mosaic_tpu_bwd.backward(c, *residuals, *cotangents), None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _part(c, q, k, v, extras, o, lse):
    return o, lse


_part.defvjp(
    lambda c, q, k, v, extras, o, lse: ((o, lse), (q, k, v, extras, o, lse)),
    lambda c, residuals, cotangents: (*_attend_backward(c, residuals, cotangents), None, None),
)


def table_spec(c: Config, tile_axis: int, head_of):
    """One row of a table in scalar memory: that of the grid's tile and the head's pattern."""

    def index(*grid):
        *place, heads = grid
        batch = place[0] if c.tables_batch > 1 else 0
        return batch, heads[jnp.minimum(head_of(*place), c.heads - 1)], place[tile_axis], 0, 0

    return pl.BlockSpec((1, 1, 1, 1, tt.FIELDS), index, memory_space=pltpu.SMEM)


def forward(c: Config, q, k, v, extras):
    """o [B,T,H,Dv] and lse [B,H,T]."""
    head = lambda b, pair, i, n: pair * c.together + n
    clipped = lambda *at: jnp.minimum(head(*at), c.heads - 1)
    inputs = {
        "rows": (extras["rows"], table_spec(c, 2, head)),
        "q": (
            q.reshape(c.batch, c.length, -1),
            pl.BlockSpec((1, c.block_q, c.block), lambda *a: (a[0], a[2], clipped(*a[:4]) // c.shared)),
        ),
        "k": (rows_of_lanes(k, c.block), pl.BlockSpec(memory_space=pltpu.HBM)),
        "v": (rows_of_lanes(v, c.value_block), pl.BlockSpec(memory_space=pltpu.HBM)),
    }
    inputs |= optional_inputs(c, extras, head)
    outputs = {
        "o": (
            jax.ShapeDtypeStruct((c.batch, c.length, c.heads * c.value_dim), q.dtype),
            pl.BlockSpec((1, c.block_q, c.value_block), lambda *a: (a[0], a[2], clipped(*a[:4]) // c.value_shared)),
        ),
        "lse": (
            jax.ShapeDtypeStruct((c.batch, c.heads, 1, c.length), jnp.float32),
            pl.BlockSpec((1, 1, 1, c.block_q), lambda *a: (a[0], clipped(*a[:4]), 0, a[2])),
        ),
    }
    scratch = {
        "scaled": pltpu.VMEM((c.block_q, c.block), q.dtype),
        "total": pltpu.VMEM((c.block_q, c.value_block), jnp.float32),
        "top": pltpu.VMEM((c.block_q, LANES), jnp.float32),
        "mass": pltpu.VMEM((c.block_q, LANES), jnp.float32),
        **key_scratch(c, k.dtype),
    }
    grid = (c.batch, -(-c.heads // c.together), c.tiles_q, c.together)
    o, lse = launch(_forward_kernel, c, grid, extras["heads"], inputs, outputs, scratch, "block_sparse_attention_fwd")
    return o.reshape(c.batch, c.length, c.heads, c.value_dim), lse[:, :, 0]


def optional_inputs(c: Config, extras, head_of) -> dict:
    """What only some masks need. Query ids come by tile; key ids, limits and streams stay in HBM and are copied."""
    found = list_inputs(c, tt.by_rows(extras["listed"]), head_of) if c.list_heads else {}
    if c.segments:
        found["q_ids"] = (extras["q_ids"], pl.BlockSpec((1, 1, c.block_q), lambda *a: (a[0], 0, a[2])))
        found["k_ids"] = (extras["k_ids"], pl.BlockSpec(memory_space=pltpu.HBM))
    for name in ("packed", "limits"):
        if getattr(c, name):
            found[name] = (extras[name], pl.BlockSpec(memory_space=pltpu.HBM))
    return found


def list_inputs(c: Config, stream: tt.Stream, head_of) -> dict:
    """Where each tile's run of a stream begins, a row at a time in scalar memory, and the stream itself."""

    def index(*grid):
        *place, _ = grid
        return place[0], list_row(c, jnp.minimum(head_of(*place), c.heads - 1)), place[2], 0, 0

    return {
        "list_rows": (stream.runs, pl.BlockSpec((1, 1, 1, 1, tt.FIELDS), index, memory_space=pltpu.SMEM)),
        "lists": (stream.entries, pl.BlockSpec(memory_space=pltpu.HBM)),
    }


def list_row(c: Config, head):
    """The row of the lists that a head reads."""
    return head // (c.heads // c.list_heads)


def list_scratch() -> dict:
    """A chunk of a stream of listed tiles."""
    return {"list_chunk": pltpu.SMEM((1, tt.CHUNK), jnp.int32), "list_sem": pltpu.SemaphoreType.DMA(())}


def key_scratch(c: Config, dtype) -> dict:
    """Two slots of everything that comes with a tile of keys."""
    found = {
        "k_tile": pltpu.VMEM((2, c.block_k, c.block), dtype),
        "v_tile": pltpu.VMEM((2, c.block_k, c.value_block), dtype),
        "sems": pltpu.SemaphoreType.DMA((4, 2)),
    }
    if c.segments:
        found["k_ids_tile"] = pltpu.VMEM((2, 1 + c.places, c.block_k), jnp.int32)
        found["q_ids_column"] = pltpu.VMEM((c.block_q, LANES), jnp.int32)
    if c.limits:
        found["limits_tile"] = pltpu.VMEM((2, 8, c.block_k), jnp.int32)
    if c.packed:
        found["chunk"] = pltpu.SMEM((1, tt.CHUNK), jnp.int32)
        found["chunk_sem"] = pltpu.SemaphoreType.DMA(())
    return found | (list_scratch() if c.list_heads else {})


def launch(kernel, c: Config, grid, heads, inputs: dict, outputs: dict, scratch: dict, name: str):
    """`pallas_call` with operands, results and scratch by name; `heads` is the pattern of each head.

    An operand named like a result, with `_start` after it, is that result's buffer.
    """
    names = ["heads", *inputs, *outputs, *scratch]
    mode = interpreter()

    def body(*refs):
        r = named(names, refs)
        kernel(c, r)

    starts = {n + 1: list(outputs).index(x[:-6]) for n, x in enumerate(inputs) if x.endswith("_start")}
    # Tiles of different batch rows and heads are independent; inside a head, scratch carries from step to step.
    semantics = ("parallel", "parallel", *("arbitrary",) * (len(grid) - 2))
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=c.vmem_bytes),
        input_output_aliases=starts,
        interpret=mode if mode is not None else False,
        name=name,
    )
    return call(heads, *(x for x, _ in inputs.values()))


def key_copies(c: Config, r, batch, head) -> list:
    """(HBM slice, VMEM slot) of everything that comes with a tile of keys."""
    kv_head = head // c.groups
    lanes = lambda width, shared: pl.ds(pl.multiple_of(kv_head // shared * width, LANES), width)
    source = lambda ref, at: lambda start, size: ref.at[batch, pl.ds(start, size), at]
    target = lambda ref: lambda slot, size: ref.at[slot, pl.ds(0, size)]
    row = lambda ref: lambda slot, size: ref.at[slot, :, pl.ds(0, size)]
    found = [
        (source(r.k, lanes(c.block, c.shared)), target(r.k_tile)),
        (source(r.v, lanes(c.value_block, c.value_shared)), target(r.v_tile)),
    ]
    if c.segments:
        found.append((lambda start, size: r.k_ids.at[batch, :, pl.ds(start, size)], row(r.k_ids_tile)))
    if c.limits:
        pattern = r.heads[head]
        found.append((lambda start, size: r.limits.at[pattern, :, pl.ds(start, size)], row(r.limits_tile)))
    return found


def visit_keys(c: Config, r, batch, head, row_of, step) -> None:
    """Loop over a row's key tiles with the next one in flight.

    `step(visit, slot, at, masked)` works on the keys from `at` on of the tile in `slot`, with or without a token mask.
    """
    sinks, middle = row_of(tt.SINKS), row_of(tt.MIDDLE)
    static = sinks + middle + row_of(tt.NEAR)
    of_list = lambda field: r.list_rows[0, 0, 0, 0, field]
    count = static + (of_list(tt.LIST_COUNT) if c.list_heads else 0)
    copies, sizes = key_copies(c, r, batch, head), (c.block_k, c.padded_keys)

    def nth(n):
        """(tile, whether all its keys live for ever, whether a list brought it) of a visit."""
        tile = jnp.where(n < sinks, row_of(tt.SINK0) + n, row_of(tt.BEGIN) + n - sinks - middle)
        forever = listed = jnp.int32(0)
        if c.packed:
            inside, pattern = (n >= sinks) & (n < sinks + middle), r.heads[head]
            entry = row_of(tt.LOW) + n - sinks
            found = streamed(lambda m: r.packed.at[pattern, m], r.chunk, r.chunk_sem, entry, inside, n == sinks)
            tile, forever = jnp.where(inside, found // 2, tile), jnp.where(inside, lax.rem(found, 2), 0)
        if c.list_heads:
            inside, own = n >= static, list_row(c, head)
            entry = of_list(tt.LIST_START) + n - static
            found = streamed(lambda m: r.lists.at[batch, own, m], r.list_chunk, r.list_sem, entry, inside, n == static)
            tile, listed = jnp.where(inside, found, tile), inside.astype(jnp.int32)
        return tile, forever, listed

    def body(n, visit):
        slot = lax.rem(n, 2)
        transfer(copies, r.sems, visit[0], slot, sizes, "wait")
        following = nth(jnp.minimum(n + 1, count - 1))

        @pl.when(n + 1 < count)
        def _():
            transfer(copies, r.sems, following[0], 1 - slot, sizes, "start")

        work = lambda at, masked: step(visit, slot, at, masked)
        sweep(_whole(c, row_of, *visit), work, c.block_k, c.compute_k)
        return following

    @pl.when(count > 0)
    def _():
        first = nth(jnp.int32(0))
        transfer(copies, r.sems, first[0], jnp.int32(0), sizes, "start")
        lax.fori_loop(0, count, body, first)


def _whole(c: Config, row_of, tile, forever, listed):
    """Whether every row of the tile of queries reads every key of the tile, and through this visit."""
    if c.segments:
        return jnp.bool_(False)
    row, key = row_of(tt.ROW), tile * c.block_k
    whole = key + c.block_k <= row_of(tt.KEYS)
    if c.causal:
        whole &= row >= key + c.block_k - 1
    if c.dense:
        return whole
    last = row + c.block_q - 1
    seen = (key + c.block_k <= row_of(tt.SINK)) | (last - key < row_of(tt.WINDOW)) | (forever == 1)
    if c.list_heads:
        unseen = (key >= row_of(tt.SINK)) & (row - (key + c.block_k - 1) >= row_of(tt.WINDOW))
        seen = jnp.where(listed == 1, unseen if not c.limits else jnp.bool_(False), seen)
    return whole & seen


def tile_mask(c: Config, r, row_of, visit, slot, at: int):
    """Token mask [block_q, compute_k] of the keys from `at` on in a tile."""
    span = pl.ds(at, c.compute_k)
    tile, _, listed = visit
    scope = Scope(
        rows=row_of(tt.ROW),
        keys=tile * c.block_k + at,
        stop=row_of(tt.KEYS),
        sink=row_of(tt.SINK),
        window=row_of(tt.WINDOW),
        limits=[r.limits_tile[slot, n : n + 1, span] for n in range(3)] if c.limits else None,
        ids=(wide(r.q_ids_column[...], c.compute_k), r.k_ids_tile[slot, :1, span]) if c.segments else None,
        places=r.k_ids_tile[slot, 1:, span] if c.places else None,
        listed=listed if c.list_heads else None,
    )
    return token_mask(c, (c.block_q, c.compute_k), 0, scope)


def _forward_kernel(c: Config, r) -> None:
    batch, head = pl.program_id(0), pl.program_id(1) * c.together + pl.program_id(3)
    row_of = lambda field: r.rows[0, 0, 0, 0, field]
    kv_head = head // c.groups

    def begin():
        q = r.q[0].astype(jnp.float32) * prescale(c)
        home = lane_home(q, c.dim, lax.rem(head, c.shared), lax.rem(kv_head, c.shared))
        r.scaled[...] = home.astype(r.scaled.dtype)
        r.total[...] = jnp.zeros_like(r.total)
        r.top[...] = jnp.full_like(r.top, LOWEST)
        r.mass[...] = jnp.zeros_like(r.mass)
        if c.segments:
            r.q_ids_column[...] = as_column(r.q_ids[0])

    def step(visit, slot, at: int, masked: bool):
        k, v = r.k_tile[slot, pl.ds(at, c.compute_k)], r.v_tile[slot, pl.ds(at, c.compute_k)]
        score, _ = scores(c, r.scaled[...], k)
        if masked:
            score, v = jnp.where(tile_mask(c, r, row_of, visit, slot, at), score, HIDDEN), finite(v)
        old = r.top[...]
        new = jnp.maximum(old, score.max(1, keepdims=True))
        weight = jnp.exp2(score - wide(new, c.compute_k))
        keep = jnp.exp2(old - new)
        r.mass[...] = r.mass[...] * keep + weight.sum(1, keepdims=True)
        r.total[...] = r.total[...] * wide(keep, c.value_block) + product(weight.astype(v.dtype), v, "nn")
        r.top[...] = new

    def end():
        mass = r.mass[...]
        empty = mass == 0.0
        o = r.total[...] * wide(jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, mass)), c.value_block)
        store_lanes(c, r.o, o, head, kv_head, c.value_dim, c.value_shared)
        lse = jnp.where(empty, -jnp.inf, r.top[...] * LN2 + jnp.log(jnp.where(empty, 1.0, mass)))
        r.lse[0, 0] = jnp.transpose(lse)[:1]

    @pl.when(head < c.heads)
    def _():
        begin()
        visit_keys(c, r, batch, head, row_of, step)
        end()


def store_lanes(c: Config, ref, x, head, kv_head, dim: int, shared: int) -> None:
    """Write a head's rows into its lanes of the block that it may share with its neighbours."""
    if shared == 1:
        ref[0] = x.astype(ref.dtype)
        return
    own = lax.rem(head, shared)
    x = lane_home(x, dim, lax.rem(kv_head, shared), own)
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) // dim
    ref[0] = jnp.where(lane == own, x, ref[0].astype(jnp.float32)).astype(ref.dtype)

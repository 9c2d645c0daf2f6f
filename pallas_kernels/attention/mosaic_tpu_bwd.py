"""Gradients of block-sparse attention on TPU.

A program of the key kernel owns a tile of keys and one head. It walks the rows that read the tile, which a plan gives
as one or two intervals, sums dK and dV, and adds its part of dQ to a float32 buffer in HBM: programs of one head run in
a row, so no two hold the same tile of dQ. Where heads share lanes (head dim below 128), dQ comes from a kernel of its
own that walks the forward's table. ds = p (dp - delta), p = exp(s - lse), delta = rowsum(do o) - dlse.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_tables as tt
from pallas_kernels.attention.mosaic_tpu import (
    key_scratch,
    launch,
    list_inputs,
    list_row,
    list_scratch,
    optional_inputs,
    store_lanes,
    table_spec,
    tile_mask,
    visit_keys,
)
from pallas_kernels.attention.mosaic_tpu_parts import (
    LANES,
    LOG2E,
    NO_ROW,
    Config,
    Scope,
    as_column,
    finite,
    lane_home,
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

SMALL = 128  # rows of a tile


def backward(c: Config, q, k, v, extras, o, lse, do, dlse):
    """(dq, dk, dv) from the cotangents of o and lse."""
    delta = jnp.swapaxes((do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1), 1, 2) - dlse
    stats = jnp.stack([jnp.where(lse == -jnp.inf, NO_ROW, lse * LOG2E), delta], axis=2)
    if c.fused:
        return _key_gradients(c, q, k, v, extras, do, stats)
    dq = _query_gradient(c, q, k, v, extras, do, stats)
    return dq, *_key_gradients(c, q, k, v, extras, do, stats)


def _query_gradient(c: Config, q, k, v, extras, do, stats):
    head = lambda b, pair, i, n: pair * c.together + n
    clipped = lambda *at: jnp.minimum(head(*at), c.heads - 1)
    rows = lambda width, shared: pl.BlockSpec((1, c.block_q, width), lambda *a: (a[0], a[2], clipped(*a[:4]) // shared))
    inputs = {
        "rows": (extras["rows"], table_spec(c, 2, head)),
        "q": (q.reshape(c.batch, c.length, -1), rows(c.block, c.shared)),
        "k": (rows_of_lanes(k, c.block), pl.BlockSpec(memory_space=pltpu.HBM)),
        "v": (rows_of_lanes(v, c.value_block), pl.BlockSpec(memory_space=pltpu.HBM)),
        "do": (do.reshape(c.batch, c.length, -1), rows(c.value_block, c.value_shared)),
        "stats": (stats, pl.BlockSpec((1, 1, 2, c.block_q), lambda *a: (a[0], clipped(*a[:4]), 0, a[2]))),
    }
    inputs |= optional_inputs(c, extras, head)
    shape = jax.ShapeDtypeStruct((c.batch, c.length, c.heads * c.dim), q.dtype)
    scratch = {
        "scaled": pltpu.VMEM((c.block_q, c.block), q.dtype),
        "do_home": pltpu.VMEM((c.block_q, c.value_block), do.dtype),
        "total": pltpu.VMEM((c.block_q, c.block), jnp.float32),
        "lse_column": pltpu.VMEM((c.block_q, LANES), jnp.float32),
        "delta_column": pltpu.VMEM((c.block_q, LANES), jnp.float32),
        **key_scratch(c, k.dtype),
    }
    grid = (c.batch, -(-c.heads // c.together), c.tiles_q, c.together)
    outputs = {"dq": (shape, rows(c.block, c.shared))}
    (dq,) = launch(_dq_kernel, c, grid, extras["heads"], inputs, outputs, scratch, "block_sparse_attention_dq")
    return dq.reshape(q.shape)


def _dq_kernel(c: Config, r) -> None:
    batch, head = pl.program_id(0), pl.program_id(1) * c.together + pl.program_id(3)
    row_of = lambda field: r.rows[0, 0, 0, 0, field]
    kv_head = head // c.groups

    def begin():
        q = r.q[0].astype(jnp.float32) * prescale(c)
        r.scaled[...] = lane_home(q, c.dim, lax.rem(head, c.shared), lax.rem(kv_head, c.shared)).astype(r.scaled.dtype)
        do, shared = r.do[0].astype(jnp.float32), c.value_shared
        r.do_home[...] = lane_home(do, c.value_dim, lax.rem(head, shared), lax.rem(kv_head, shared)).astype(
            r.do_home.dtype
        )
        r.total[...] = jnp.zeros_like(r.total)
        r.lse_column[...] = as_column(r.stats[0, 0, :1])
        r.delta_column[...] = as_column(r.stats[0, 0, 1:])
        if c.segments:
            r.q_ids_column[...] = as_column(r.q_ids[0])

    def step(visit, slot, at: int, masked: bool):
        k, v = r.k_tile[slot, pl.ds(at, c.compute_k)], r.v_tile[slot, pl.ds(at, c.compute_k)]
        score, slope = scores(c, r.scaled[...], k)
        weight = jnp.exp2(score - wide(r.lse_column[...], c.compute_k))
        dscore = weight * (product(r.do_home[...], v, "nt") - wide(r.delta_column[...], c.compute_k))
        if slope is not None:
            dscore = dscore * slope
        if masked:
            dscore, k = jnp.where(tile_mask(c, r, row_of, visit, slot, at), dscore, 0.0), finite(k)
        r.total[...] += product(dscore.astype(k.dtype), k, "nn")

    @pl.when(head < c.heads)
    def _():
        begin()
        visit_keys(c, r, batch, head, row_of, step)
        store_lanes(c, r.dq, r.total[...] * c.scale, head, kv_head, c.dim, c.shared)


def _key_gradients(c: Config, q, k, v, extras, do, stats):
    head = lambda b, pair, j, n: pair * c.together * c.groups + n
    clipped = lambda *at: jnp.minimum(head(*at), c.heads - 1)
    keys = lambda width, shared: pl.BlockSpec(
        (1, c.block_k, width), lambda *a: (a[0], a[2], clipped(*a[:4]) // c.groups // shared)
    )
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    pad = c.padded_length - c.length
    inputs = {
        "columns": (extras["columns"], table_spec(c, 2, head)),
        "k": (rows_of_lanes(k, c.block), keys(c.block, c.shared)),
        "v": (rows_of_lanes(v, c.value_block), keys(c.value_block, c.value_shared)),
        "q": (rows_of_lanes(q, c.block), hbm),
        "do": (rows_of_lanes(do, c.value_block), hbm),
        "stats": (jnp.pad(stats, ((0, 0), (0, 0), (0, 0), (0, pad))) if pad else stats, hbm),
    }
    scratch = {
        "scaled": pltpu.VMEM((c.block_k, c.block), k.dtype),
        "dk_total": pltpu.VMEM((c.block_k, c.block), jnp.float32),
        "dv_total": pltpu.VMEM((c.block_k, c.value_block), jnp.float32),
        "q_tile": pltpu.VMEM((2, c.block_q, c.block), q.dtype),
        "do_tile": pltpu.VMEM((2, c.block_q, c.value_block), do.dtype),
        "stats_tile": pltpu.VMEM((2, 2, c.block_q), jnp.float32),
        "sems": pltpu.SemaphoreType.DMA((4, 2)),
    }
    if c.segments:
        inputs["q_ids"] = (extras["q_ids"], hbm)
        inputs["k_ids"] = (extras["k_ids"], pl.BlockSpec((1, 1 + c.places, c.block_k), lambda *a: (a[0], 0, a[2])))
        scratch["q_ids_tile"] = pltpu.VMEM((2, 1, c.block_q), jnp.int32)
        scratch["k_ids_columns"] = pltpu.VMEM((1 + c.places, c.block_k, LANES), jnp.int32)
    if c.limits:
        index = lambda *a: (a[4][clipped(*a[:4])], 0, a[2])
        inputs["limits"] = (extras["limits"], pl.BlockSpec((1, 8, c.block_k), index))
        scratch["limit_columns"] = pltpu.VMEM((3, c.block_k, LANES), jnp.int32)
    if c.list_heads:
        inputs |= list_inputs(c, tt.by_keys(extras["listed"], c.tiles_k), head)
        scratch |= list_scratch()
    outputs = {
        "dk": (jax.ShapeDtypeStruct((c.batch, c.keys, c.kv_heads * c.dim), k.dtype), keys(c.block, c.shared)),
        "dv": (
            jax.ShapeDtypeStruct((c.batch, c.keys, c.kv_heads * c.value_dim), v.dtype),
            keys(c.value_block, c.value_shared),
        ),
    }
    name = "block_sparse_attention_dkv"
    if c.fused:
        name = "block_sparse_attention_bwd"
        buffer = (c.batch, c.padded_length, c.heads * c.dim)
        inputs["dq_start"] = (jnp.zeros(buffer, jnp.float32), hbm)
        outputs["dq"] = (jax.ShapeDtypeStruct(buffer, jnp.float32), hbm)
        scratch["dq_tile"] = pltpu.VMEM((2, c.block_q, c.block), jnp.float32)
        scratch["dq_in"] = scratch["dq_out"] = pltpu.SemaphoreType.DMA((1, 2))
    grid = (c.batch, -(-c.kv_heads // c.together), c.tiles_k, c.together * c.groups)
    dk, dv, *dq = launch(_dkv_kernel, c, grid, extras["heads"], inputs, outputs, scratch, name)
    dq = [(x[:, : c.length] * c.scale).astype(q.dtype).reshape(q.shape) for x in dq]
    return *dq, dk.reshape(k.shape), dv.reshape(v.shape)


def _dkv_kernel(c: Config, r) -> None:
    batch, turn = pl.program_id(0), pl.program_id(3)
    head = pl.program_id(1) * c.together * c.groups + turn
    kv_head = head // c.groups
    of = lambda field: r.columns[0, 0, 0, 0, field]

    def begin():
        r.scaled[...] = (r.k[0].astype(jnp.float32) * prescale(c)).astype(r.scaled.dtype)
        if c.segments:
            for n in range(1 + c.places):
                r.k_ids_columns[n] = as_column(r.k_ids[0, n : n + 1])
        if c.limits:
            for n in range(3):
                r.limit_columns[n] = as_column(r.limits[0, n : n + 1])

    def mask(visit, slot, at: int):
        column = lambda ref, n: wide(ref[n, pl.ds(at, c.compute_k)], c.block_q)
        scope = Scope(
            rows=of(tt.OFFSET) + visit[0] * c.block_q,
            keys=of(tt.COLUMN) + at,
            stop=of(tt.KEYS_C),
            sink=of(tt.SINK_C),
            window=of(tt.WINDOW_C),
            last=of(tt.OFFSET) + c.length,
            limits=[column(r.limit_columns, n) for n in range(3)] if c.limits else None,
            ids=(r.q_ids_tile[slot], column(r.k_ids_columns, 0)) if c.segments else None,
            places=column(r.k_ids_columns, 1) if c.places else None,
            listed=visit[1] if c.list_heads else None,
        )
        return token_mask(c, (c.compute_k, c.block_q), 1, scope)

    def bring_home(tile, dim: int, shared: int):
        if shared > 1:
            moved = lane_home(tile[...].astype(jnp.float32), dim, lax.rem(head, shared), lax.rem(kv_head, shared))
            tile[...] = moved.astype(tile.dtype)

    def step(visit, slot, at: int, masked: bool):
        span = pl.ds(at, c.compute_k)
        q, do, k = r.q_tile[slot], r.do_tile[slot], r.k[0, span]
        if masked:
            q, do, k = finite(q), finite(do), finite(k)
        score, slope = scores(c, r.scaled[span], q)
        weight = jnp.exp2(score - r.stats_tile[slot, :1])
        dscore = weight * (product(r.v[0, span], do, "nt") - r.stats_tile[slot, 1:])
        if slope is not None:
            dscore = dscore * slope
        if masked:
            keep = mask(visit, slot, at)
            weight, dscore = jnp.where(keep, weight, 0.0), jnp.where(keep, dscore, 0.0)
        weight, dscore = weight.astype(do.dtype), dscore.astype(q.dtype)

        def add_keys():
            r.dv_total[span] += product(weight, do, "nn")
            r.dk_total[span] += product(dscore, q, "nn")

        def add_rows():
            if c.fused:
                r.dq_tile[slot] += product(dscore, k, "tn")

        # Schedules of large tiles are shorter with dQ last; of 128 rows, v5p's is 12 % shorter with dQ first.
        for add in (add_rows, add_keys) if c.block_q <= SMALL else (add_keys, add_rows):
            add()

    def work(visit, slot):
        bring_home(r.q_tile.at[slot], c.dim, c.shared)
        bring_home(r.do_tile.at[slot], c.value_dim, c.value_shared)
        sweep(_whole(c, of, *visit), lambda at, masked: step(visit, slot, at, masked), c.block_k, c.compute_k)

    for total, shared in ((r.dk_total, c.shared), (r.dv_total, c.value_shared)):

        @pl.when(lax.rem(turn, shared * c.groups) == 0)
        def _(total=total):
            total[...] = jnp.zeros_like(total)

    @pl.when(head < c.heads)
    def _():
        begin()
        _visit_rows(c, r, batch, head, of, work)
        r.dk[0] = (r.dk_total[...] * c.scale).astype(r.dk.dtype)
        r.dv[0] = r.dv_total[...].astype(r.dv.dtype)


def _visit_rows(c: Config, r, batch, head, of, work) -> None:
    """Loop over the query tiles that read a tile of keys, with the next one in flight; `work(visit, slot)`."""
    firsts = of(tt.FIRSTS)
    static = firsts + of(tt.SECONDS)
    of_list = lambda field: r.list_rows[0, 0, 0, 0, field]
    count = static + (of_list(tt.LIST_COUNT) if c.list_heads else 0)

    def nth(n):
        """(tile, whether a list brought it) of a visit."""
        tile = jnp.where(n < firsts, of(tt.FIRST0) + n, of(tt.SECOND0) + n - firsts)
        if not c.list_heads:
            return tile, jnp.int32(0)
        inside, own = n >= static, list_row(c, head)
        entry = of_list(tt.LIST_START) + n - static
        found = streamed(lambda m: r.lists.at[batch, own, m], r.list_chunk, r.list_sem, entry, inside, n == static)
        return jnp.where(inside, found, tile), inside.astype(jnp.int32)

    lanes = lambda width, shared: pl.ds(pl.multiple_of(head // shared * width, LANES), width)
    source = lambda ref, at: lambda start, size: ref.at[batch, pl.ds(start, size), at]
    target = lambda ref: lambda slot, size: ref.at[slot, pl.ds(0, size)]
    row = lambda ref: lambda slot, size: ref.at[slot, :, pl.ds(0, size)]
    copies = [
        (source(r.q, lanes(c.block, c.shared)), target(r.q_tile)),
        (source(r.do, lanes(c.value_block, c.value_shared)), target(r.do_tile)),
        (lambda start, size: r.stats.at[batch, head, :, pl.ds(start, size)], row(r.stats_tile)),
    ]
    if c.segments:
        copies.append((lambda start, size: r.q_ids.at[batch, :, pl.ds(start, size)], row(r.q_ids_tile)))
    sizes = (c.block_q, c.padded_length)
    sums = [(source(r.dq, lanes(c.block, c.shared)), target(r.dq_tile))] if c.fused else []

    def write(n, act: str):
        if sums:
            transfer(sums, r.dq_out, nth(n)[0], lax.rem(n, 2), sizes, act, out=True)

    def read(tile, n, act: str):
        transfer(copies, r.sems, tile, lax.rem(n, 2), sizes, act)
        if sums:
            transfer(sums, r.dq_in, tile, lax.rem(n, 2), sizes, act)

    def body(n, visit):
        read(visit[0], n, "wait")
        following = nth(jnp.minimum(n + 1, count - 1))

        @pl.when(n + 1 < count)
        def _():
            # The slot that the next tile of sums takes must have left for HBM.
            pl.when(n > 0)(lambda: write(n - 1, "wait"))
            read(following[0], n + 1, "start")

        work(visit, lax.rem(n, 2))
        write(n, "start")
        return following

    @pl.when(count > 0)
    def _():
        first = nth(jnp.int32(0))
        read(first[0], jnp.int32(0), "start")
        lax.fori_loop(0, count, body, first)
        pl.when(count > 1)(lambda: write(count - 2, "wait"))
        write(count - 1, "wait")


def _whole(c: Config, of, tile, listed):
    """Whether every row of the tile of queries reads every key of the column, and through this visit."""
    if c.segments:
        return jnp.bool_(False)
    row, key = of(tt.OFFSET) + tile * c.block_q, of(tt.COLUMN)
    last = row + c.block_q - 1
    whole = (key + c.block_k <= of(tt.KEYS_C)) & (tile * c.block_q + c.block_q <= c.length)
    if c.causal:
        whole &= row >= key + c.block_k - 1
    if c.dense:
        return whole
    spanned = (of(tt.SPAN0) <= row) & (last < of(tt.SPAN1))
    seen = (last < of(tt.FULL_END)) | spanned
    if c.list_heads:
        unseen = (key >= of(tt.SINK_C)) & (row - (key + c.block_k - 1) >= of(tt.WINDOW_C))
        seen = jnp.where(listed == 1, unseen if not c.limits else jnp.bool_(False), seen)
    return whole & seen

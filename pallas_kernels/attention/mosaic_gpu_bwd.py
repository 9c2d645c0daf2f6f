"""Block-sparse attention on Hopper, backward: a kernel over columns for dK and dV, and dQ in it or by one over rows.

They recompute the scores from lse. dK/dV visits, for 128 keys, the rows that read them, for all query heads of the KV
head, so that the sum over a group stays in registers. With `BackwardTiles.fused` it gives dQ as well, which spares two
of seven products and leaves the order of dQ's sums open; the dQ kernel visits the forward's tiles, and two runs of it
are equal to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention import mosaic_gpu_row_gradient as rg
from pallas_kernels.attention import mosaic_gpu_tables as tb
from pallas_kernels.attention.mosaic_gpu_common import (
    COLS,
    LOG2E,
    ROW_TILE,
    ROWS,
    TILE,
    WG,
    WGS,
    Inputs,
    Static,
    Work,
    accumulate,
    all_sinks,
    fields,
    iota,
    key_copies,
    launch,
    load_keys,
    mask_rows,
    one_segment,
    places_of,
    spread,
    steps,
    tiled,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tiles of the backward kernels: keys a step and stages of dQ, query rows a step and stages of dK/dV.

    `fused` kernels are one: dK/dV gives dQ too.
    """

    dq_block_k: int = 64
    dq_stages: int = 2
    dkv_block_q: int = 64
    dkv_stages: int = 2
    group_inside: bool = True
    fused: bool = False


class Cotangents(NamedTuple):
    """o and do in the inputs' dtype; lse in base 2 and dlse, f32, padded to whole row tiles."""

    o: Any  # [B, T, H, Dv]
    do: Any
    lse: Any  # [B, H, rows]
    dlse: Any


def cotangents(o, lse, do, dlse) -> Cotangents:
    """What both kernels read; rows that saw no key, and padding rows, weigh nothing."""
    pad = ((0, 0), (0, 0), (0, (-lse.shape[-1]) % ROW_TILE))
    lse = jnp.pad(jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E), pad, constant_values=jnp.inf)
    return Cotangents(o, do, lse, jnp.pad(dlse, pad))


def _capped(s: Static, x: jax.Array) -> tuple[jax.Array, float]:
    """Scores, or the tanh of their soft cap, and the factor that makes them exponents of 2."""
    if s.soft_cap is None:
        return x, s.scale * LOG2E
    return jnp.tanh(x * (s.scale / s.soft_cap)), s.soft_cap * LOG2E


def _call(body, inputs: tuple, out_type, scratch: dict, blocks: int, s: Static):
    flat, tree = jax.tree.flatten(inputs)

    def kernel(*refs, **scratch_refs):
        body(*jax.tree.unflatten(tree, refs[: len(flat)]), *refs[len(flat) :], **scratch_refs)

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WGS + 1,
        thread_name="wg",
        **launch(s.interpret),
    )(*flat)


@functools.partial(jax.jit, static_argnums=(2, 3))  # the layers of a model share one lowering
def backward_dq(
    g: Inputs, ct: Cotangents, s: Static, tiles: BackwardTiles
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H N"]]:
    """dQ, and delta = rowsum(do * o) - dlse for the dK/dV kernel; `g.table` counts steps of `dq_block_k` keys."""
    row_tiles, stages, keys = tb.cdiv(s.rows, ROW_TILE), tiles.dq_stages, tiles.dq_block_k
    dtype = g.q.dtype
    scratch = {
        "q_s": tiled((WGS, WG, s.dim), dtype),
        "do_s": tiled((WGS, WG, s.dim_v), dtype),
        "o_s": tiled((WGS, WG, s.dim_v), dtype),
        "delta_s": plgpu.SMEM((WGS, WG), jnp.float32),
        "k_s": tiled((stages, keys, s.dim), dtype),
        "v_s": tiled((stages, keys, s.dim_v), dtype),
        "q_ready": plgpu.Barrier(num_barriers=WGS, num_arrivals=3),
        "k_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=key_copies(s, keys)),
        "k_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WGS),
        "v_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=key_copies(s, keys)),
        "v_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WGS),
    }
    body = functools.partial(_dq_kernel, static=s, tiles=tiles, row_tiles=row_tiles)
    out = (
        jax.ShapeDtypeStruct((s.batch, s.rows, s.heads, s.dim), dtype),
        jax.ShapeDtypeStruct((s.batch, s.heads, row_tiles * ROW_TILE), jnp.float32),
    )
    return _call(body, (g, ct), out, scratch, s.batch * s.heads * row_tiles, s)


def _dq_kernel(
    g: Inputs, ct: Cotangents, dq_g, delta_g, *, static: Static, tiles: BackwardTiles, row_tiles: int, **m
) -> None:
    s = static
    wg, t = lax.axis_index("wg"), lax.axis_index("block")
    head = lax.rem(t, s.heads)
    t = lax.div(t, s.heads)
    index = lax.rem(t, row_tiles)
    index = row_tiles - 1 - index if s.causal else index
    batch = lax.div(t, row_tiles)
    pattern = g.pattern[head] if s.patterns > 1 else jnp.int32(0)
    w = Work(batch, head, index, pattern, fields(g.table, batch, pattern, index))
    plan = steps(s, tiles.dq_block_k, g, w)
    total = plan.total
    slot_of = lambda n: lax.rem(n, jnp.int32(tiles.dq_stages))

    @pl.when(wg < WGS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        _dq_rows(g, ct, dq_g, delta_g, s, tiles, m, wg, w, plan, slot_of)

    @pl.when(wg == WGS)
    def _load():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, s.heads // s.kv_heads)

        @pl.loop(0, total)
        def _step(n):
            slot = slot_of(n)
            place = plan.place(n)
            for name, src in (("v", g.v), ("k", g.k)):
                free = m[name + "_free"].at[slot]
                pl.when(n >= tiles.dq_stages)(lambda free=free: plgpu.barrier_wait(free))
                load_keys(s, place, src.at[batch, :, kv_head], m[name + "_s"].at[slot], m[name + "_ready"].at[slot])

        _drain(total, tiles.dq_stages, m["k_free"], m["v_free"])


def _drain(total, stages: int, *barriers) -> None:
    """Sees the last release of every buffer, so that no barrier is left in mid-phase."""
    for slot in range(stages):

        @pl.when(total > slot)
        def _(slot=slot):
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[slot])


def _dq_rows(g, ct, dq_g, delta_g, s: Static, tiles: BackwardTiles, m: dict, wg, w: Work, plan, slot_of) -> None:
    row = w.index * ROW_TILE + wg * WG
    rows = pl.ds(row, WG)
    plgpu.copy_gmem_to_smem(g.q.at[w.batch, rows, w.head], m["q_s"].at[wg], m["q_ready"].at[wg])
    plgpu.copy_gmem_to_smem(ct.do.at[w.batch, rows, w.head], m["do_s"].at[wg], m["q_ready"].at[wg])
    plgpu.copy_gmem_to_smem(ct.o.at[w.batch, rows, w.head], m["o_s"].at[wg], m["q_ready"].at[wg])
    lse = plgpu.load(ct.lse.at[w.batch, w.head, rows], layout=ROWS, optimized=False)
    dlse = plgpu.load(ct.dlse.at[w.batch, w.head, rows], layout=ROWS, optimized=False)
    mask = functools.partial(mask_rows, g, s, tiles.dq_block_k, w, w.row(tb.OFFSET) + row)
    shape = (WG, tiles.dq_block_k)
    plgpu.barrier_wait(m["q_ready"].at[wg])
    o, do = (plgpu.load(m[name].at[wg], layout=TILE).astype(jnp.float32) for name in ("o_s", "do_s"))
    delta = (o * do).sum(axis=1) - dlse
    m["delta_s"][wg] = delta
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(m["delta_s"].at[wg], delta_g.at[w.batch, w.head, rows])

    def step(n, dq):
        slot = slot_of(n)

        def products(x_ref, dp_ref):
            plgpu.barrier_wait(m["k_ready"].at[slot])
            plgpu.barrier_wait(m["v_ready"].at[slot])
            plgpu.wgmma(x_ref, m["q_s"].at[wg], m["k_s"].at[slot].transpose((1, 0)))
            plgpu.wgmma(dp_ref, m["do_s"].at[wg], m["v_s"].at[slot].transpose((1, 0)))
            x, factor = _capped(s, plgpu.wgmma_accumulator_load(x_ref, wait_n=1))
            seen = lax.cond((n >= plan.inner) & (n < plan.inner_end), lambda: x, lambda: mask(x, plan.place(n)))
            p = jnp.exp2(seen * factor - spread(lse, shape, 0))
            ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=0) - spread(delta, shape, 0))
            return ds if s.soft_cap is None else ds * (1 - x * x)

        acc = plgpu.ACC(shape, jnp.float32)
        ds = pl.run_scoped(products, acc, acc)
        plgpu.barrier_arrive(m["v_free"].at[slot])
        dq = accumulate(dq, ds.astype(g.k.dtype), m["k_s"].at[slot], s.interpret)
        plgpu.barrier_arrive(m["k_free"].at[slot])
        return dq

    dq = lax.fori_loop(0, plan.total, step, zeros((WG, s.dim), TILE))
    m["q_s"][wg] = (dq * s.scale).astype(dq_g.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(m["q_s"].at[wg], dq_g.at[w.batch, rows, w.head])
    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnums=(2, 3))
def backward_fused(
    g: Inputs, ct: Cotangents, s: Static, tiles: BackwardTiles
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K Dv"]]:
    """dQ, dK and dV; `g.table` is a column table, one row per key unit."""
    dq = jax.new_ref(rg.empty(s, tb.cdiv(s.keys, ROW_TILE)))
    dk, dv = _by_column(g, ct, rg.row_sums(ct.o, ct.do, ct.dlse), dq, s, tiles)
    return rg.finished(dq[...], s, g.q.dtype), dk, dv


@functools.partial(jax.jit, static_argnums=(3, 4))
def backward_dkv(
    g: Inputs, ct: Cotangents, delta: Float[Array, "B H N"], s: Static, tiles: BackwardTiles
) -> tuple[Float[Array, "B S K D"], Float[Array, "B S K Dv"]]:
    """dK and dV; `g.table` is a column table, one row per key unit."""
    return _by_column(g, ct, delta, None, s, tiles)


def _by_column(g: Inputs, ct: Cotangents, delta: Array, dq: Any, s: Static, tiles: BackwardTiles):
    """(dK, dV); adds dQ, not scaled, to the reference `dq` if there is one."""
    rows, stages, dtype = tiles.dkv_block_q, tiles.dkv_stages, g.q.dtype
    key_tiles = tb.cdiv(s.keys, ROW_TILE)
    out_heads = s.kv_heads if tiles.group_inside else s.heads
    scratch = {
        "k_s": tiled((WGS, WG, s.dim), dtype),
        "v_s": tiled((WGS, WG, s.dim_v), dtype),
        "q_s": tiled((stages, rows, s.dim), dtype),
        "do_s": tiled((stages, rows, s.dim_v), dtype),
        "lse_s": plgpu.SMEM((stages, rows), jnp.float32),
        "delta_s": plgpu.SMEM((stages, rows), jnp.float32),
        "kv_ready": plgpu.Barrier(num_barriers=WGS, num_arrivals=2),
        "q_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        "q_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WGS),
        "do_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        "do_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WGS),
    }
    if dq is not None:
        scratch |= rg.scratch(s, rows, dtype)
    out = tuple(jax.ShapeDtypeStruct((s.batch, s.keys, out_heads, d), dtype) for d in (s.dim, s.dim_v))
    body = functools.partial(_dkv_kernel, static=s, tiles=tiles, key_tiles=key_tiles, out_heads=out_heads)
    dk, dv = _call(body, (g, ct, delta, dq), out, scratch, s.batch * out_heads * key_tiles, s)
    if tiles.group_inside or s.heads == s.kv_heads:
        return dk, dv
    fold = lambda x: x.reshape(s.batch, s.keys, s.kv_heads, -1, x.shape[-1]).sum(3, dtype=jnp.float32).astype(dtype)
    return fold(dk), fold(dv)


class Column(NamedTuple):
    """One block of the dK/dV kernel: 128 keys of one KV head, read by `heads_here` query heads from `head` on."""

    batch: jax.Array
    out_head: jax.Array
    kv_head: jax.Array
    head: jax.Array
    heads_here: int
    index: jax.Array


def _dkv_kernel(
    g, ct, delta_g, dq_g, dk_g, dv_g, *, static: Static, tiles: BackwardTiles, key_tiles: int, out_heads: int, **m
) -> None:
    s = static
    wg, t = lax.axis_index("wg"), lax.axis_index("block")
    out_head, t = lax.rem(t, out_heads), lax.div(t, out_heads)  # the columns that most rows read come first
    group = s.heads // s.kv_heads
    here = s.heads // out_heads
    kv_head = lax.div(out_head, group // here)
    w = Column(lax.div(t, key_tiles), out_head, kv_head, out_head * here, here, lax.rem(t, key_tiles))

    @pl.when(wg < WGS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        rows_of = lambda *step: None
        if dq_g is not None:
            block = w.index * s.batch + w.batch if s.interpret else w.batch
            rows_of = functools.partial(rg.RowGradient, s, m, dq_g, block, wg)
        _dkv_keys(g, (rows_of, dk_g, dv_g), s, tiles, m, wg, w)

    @pl.when(wg == WGS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")
        stages = tiles.dkv_stages

        def load(head, tile, done):
            slot = lax.rem(done, jnp.int32(stages))
            rows = pl.ds(tile * tiles.dkv_block_q, tiles.dkv_block_q)
            for name, src, stat, stat_g in (("q", g.q, "lse", ct.lse), ("do", ct.do, "delta", delta_g)):
                ready, free = m[name + "_ready"].at[slot], m[name + "_free"].at[slot]
                pl.when(done >= stages)(lambda free=free: plgpu.barrier_wait(free))
                plgpu.copy_gmem_to_smem(src.at[w.batch, rows, head], m[name + "_s"].at[slot], ready)
                plgpu.copy_gmem_to_smem(stat_g.at[w.batch, head, rows], m[stat + "_s"].at[slot], ready)
            return done + 1

        unit = w.index * (ROW_TILE // tb.UNIT)
        done = _each_row_tile(
            g, s, tiles, w, unit, lambda visit, done: load(visit.head, visit.tile, done), jnp.int32(0)
        )
        _drain(done, stages, m["q_free"], m["do_free"])


class Visit(NamedTuple):
    """A tile of rows of one query head that reads the keys of a block.

    Tiles in [inner, inner_end) need no mask. `listed` is 0 for rows by the mask's own rules, else the units that a
    run-time list names (bit 0 and bit 1).
    """

    head: jax.Array
    tile: jax.Array
    pattern: jax.Array
    field: Any  # field -> scalar, of one key unit
    inner: Any
    inner_end: Any
    listed: Any


def _each_row_tile(g: Inputs, s: Static, tiles: BackwardTiles, w: Column, unit, body, carry):
    """Runs `body(visit, carry)` over the rows that read the keys, head by head; the fields are those of `unit`."""

    def one_head(n, carry):
        head = w.head + n
        pattern = g.pattern[head] if s.patterns > 1 else jnp.int32(0)
        field = fields(g.table, w.batch, pattern, unit)
        first, begin_1, begin_2 = field(tb.STEPS_1), field(tb.BEGIN_1), field(tb.BEGIN_2)
        inner, count = (field(tb.C_INNER), field(tb.C_INNER_END)), first + field(tb.STEPS_2)
        start = lax.rem(w.index * (ROW_TILE // tiles.dkv_block_q), jnp.maximum(count, 1))

        def step(r, carry):
            if not s.causal:  # causal columns begin apart, at their diagonals; others would all add to one tile of dQ
                r = r + start - jnp.where(r + start < count, 0, count)
            tile = jnp.where(r < first, begin_1 + r, begin_2 + r - first)
            return body(Visit(head, tile, pattern, field, *inner, jnp.int32(0)), carry)

        carry = lax.fori_loop(0, count, step, carry)
        return carry if s.lists != "call" else _each_listed(g, s, tiles, w, head, pattern, field, body, carry)

    if w.heads_here == 1:
        return one_head(jnp.int32(0), carry)
    return lax.fori_loop(0, w.heads_here, one_head, carry)


def _each_listed(g: Inputs, s: Static, tiles: BackwardTiles, w: Column, head, pattern, field, body, carry):
    """Runs `body` over the rows whose run-time list names keys of the block."""
    heads = g.lists.begin.shape[1]
    list_head = lax.div(head, s.heads // heads)
    begin, end = (g.lists.begin[w.batch, list_head, w.index + n] for n in (0, 1))
    per = s.list_rows // tiles.dkv_block_q

    def step(r, carry):
        entry = g.lists.entries[w.batch * heads + list_head, begin + lax.div(r, per)]
        tile = lax.div(entry, 4) * per + lax.rem(r, per)
        row = tile * tiles.dkv_block_q
        real = (lax.rem(entry, 4) > 0) & (row < s.rows)
        if s.causal:
            real &= field(tb.C_OFFSET) + row + tiles.dkv_block_q > w.index * ROW_TILE
        visit = Visit(head, tile, pattern, field, jnp.int32(0), jnp.int32(0), lax.rem(entry, 4))
        return lax.cond(real, lambda c: body(visit, c), lambda c: c, carry)

    return lax.fori_loop(0, (end - begin) * per, step, carry)


def _dkv_keys(g, gradients, s: Static, tiles: BackwardTiles, m: dict, wg, w: Column) -> None:
    rows_of, dk_g, dv_g = gradients
    first = w.index * ROW_TILE + wg * WG
    keys = pl.ds(first, WG)
    plgpu.copy_gmem_to_smem(g.k.at[w.batch, keys, w.kv_head], m["k_s"].at[wg], m["kv_ready"].at[wg])
    plgpu.copy_gmem_to_smem(g.v.at[w.batch, keys, w.kv_head], m["v_s"].at[wg], m["kv_ready"].at[wg])
    for unit in range(WGS) if tiles.fused else [wg]:  # dQ takes the keys of both
        plgpu.barrier_wait(m["kv_ready"].at[unit])
    shape = (WG, tiles.dkv_block_q)

    def step(visit, carry):
        dk, dv, done = carry
        tile = visit.tile
        slot = lax.rem(done, jnp.int32(tiles.dkv_stages))
        q_s, do_s = m["q_s"].at[slot], m["do_s"].at[slot]
        plgpu.barrier_wait(m["q_ready"].at[slot])
        plgpu.barrier_wait(m["do_ready"].at[slot])

        def products(x_ref, dp_ref, start_dv):
            # `wg`, but nothing that the compiler finds the same at every step: addresses kept over the loop would spill
            mine = lax.rem(wg + WGS * done, jnp.int32(WGS)) if tiles.fused else wg
            plgpu.wgmma(x_ref, m["k_s"].at[mine], q_s.transpose((1, 0)))
            plgpu.wgmma(dp_ref, m["v_s"].at[mine], do_s.transpose((1, 0)))
            x, factor = _capped(s, plgpu.wgmma_accumulator_load(x_ref, wait_n=1))
            edge = lambda: _mask_columns(g, s, w, visit, first, tile * tiles.dkv_block_q, x)
            seen = lax.cond((tile >= visit.inner) & (tile < visit.inner_end), lambda: x, edge)
            lse = plgpu.load(m["lse_s"].at[slot], layout=COLS)
            p = jnp.exp2(seen * factor - spread(lse, shape, 1))
            p16 = p.astype(g.k.dtype)
            started = start_dv(p16)
            delta = plgpu.load(m["delta_s"].at[slot], layout=COLS)
            ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=started) - spread(delta, shape, 1))
            return p16, (ds if s.soft_cap is None else ds * (1 - x * x)).astype(g.k.dtype)

        dq = rows_of(visit.head, tile * tiles.dkv_block_q, done)
        add = functools.partial(_add_products, products, dv, do_s, dk, q_s, shape, s.interpret)
        new_dv, new_dk = _products_of_step(add, _owns(g, s, wg, visit), dq, (dv, dk), shape)
        plgpu.barrier_arrive(m["do_free"].at[slot])
        plgpu.barrier_arrive(m["q_free"].at[slot])
        return new_dk, new_dv, done + 1

    start = zeros((WG, s.dim), TILE), zeros((WG, s.dim_v), TILE), jnp.int32(0)
    dk, dv, _ = _each_row_tile(g, s, tiles, w, w.index * (ROW_TILE // tb.UNIT) + wg, step, start)
    if tiles.fused:
        rg.meet(s, m)  # the other warpgroup no longer reads these keys
    m["k_s"][wg] = (dk * s.scale).astype(dk_g.dtype)
    m["v_s"][wg] = dv.astype(dv_g.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(m["k_s"].at[wg], dk_g.at[w.batch, keys, w.out_head])
    plgpu.copy_smem_to_gmem(m["v_s"].at[wg], dv_g.at[w.batch, keys, w.out_head])
    plgpu.wait_smem_to_gmem(0)


def _owns(g: Inputs, s: Static, wg, visit: Visit) -> jax.Array | None:
    """Whether the visited rows read this warpgroup's unit of the two; None where they always may."""
    tile, field = visit.tile, visit.field
    if s.lists == "call":
        return (visit.listed == 0) | ((visit.listed & jnp.where(wg == 0, 1, 2)) > 0)
    if g.rules.expiry is None:
        return None
    own = (tile >= field(tb.OWN_1)) & (tile < field(tb.OWN_END_1))
    return own | ((tile >= field(tb.OWN_2)) & (tile < field(tb.OWN_END_2)))


def _products_of_step(add_products, own, dq: rg.RowGradient | None, grads, shape) -> tuple[jax.Array, jax.Array]:
    """(dV, dK) with a step's products added, where the rows `own` the unit of keys; dQ's share goes out too."""
    if dq is None:
        add = functools.partial(add_products, lambda _, start_dk: start_dk())
        return add() if own is None else lax.cond(own, add, lambda: grads)
    if own is None:
        return add_products(dq.share)

    def keep(ds, start_dk) -> None:
        dq.keep(ds)
        start_dk()

    def nothing():
        dq.keep(zeros(shape, TILE).astype(dq.memory["ds_s"].dtype))
        return grads

    grads = lax.cond(own, functools.partial(add_products, keep), nothing)
    dq.share_kept(lambda: 0)
    return grads


def _add_products(products, dv, do_s, dk, q_s, shape, interpret: bool, finish) -> tuple[jax.Array, jax.Array]:
    """dV + p @ do and dK + ds @ q; the first product runs while `products` turns p into ds.

    `finish(ds, start_dk)` starts the second product, which leaves as many in flight as `start_dk` returns.
    """
    acc = plgpu.ACC(shape, jnp.float32)
    if interpret:
        p, ds = pl.run_scoped(functools.partial(products, start_dv=lambda _: 0), acc, acc)
        finish(ds, lambda: 0)
        return accumulate(dv, p, do_s, True), accumulate(dk, ds, q_s, True)

    def compute(refs):
        def start_dv(p) -> int:
            plgpu.wgmma(refs[0], p, do_s)
            return 1

        def start_dk() -> int:
            plgpu.wgmma(refs[1], ds, q_s)
            return 1

        _, ds = pl.run_scoped(functools.partial(products, start_dv=start_dv), acc, acc)
        finish(ds, start_dk)

    return pl.run_state(compute)((plgpu.ACC.init(dv), plgpu.ACC.init(dk)))


def _mask_columns(g: Inputs, s: Static, w: Column, visit: Visit, first, row, x: jax.Array) -> jax.Array:
    """Transposed scores (keys by rows) with -inf where the row may not see the key."""
    shape, pattern, field = x.shape, visit.pattern, visit.field
    row_lo, limit = field(tb.C_OFFSET) + row, field(tb.C_KEY_STOP)
    sink, window, unit = field(tb.C_SINK), field(tb.C_WINDOW), lax.div(first, tb.UNIT)
    if g.rules.expiry is not None:
        unit = jnp.minimum(unit, g.rules.expiry.shape[1] - 1)

    def by_rules(j, i):
        place, places = j, places_of(g)
        if places is not None:
            place = spread(plgpu.load(places.at[w.batch, pl.ds(first, WG)], layout=ROWS, optimized=False), shape, 0)
        keep = (place < sink) | (i - j < window)
        if g.rules.expiry is not None:
            keep |= i < g.rules.expiry[pattern, unit]
        if g.rules.start is not None:
            keep |= (g.rules.start[pattern, unit] <= i) & (i < g.rules.stop[pattern, unit])
        return keep ^ (visit.listed > 0) if s.lists == "call" else keep  # the mask's own keys have their own visits

    def edge():
        j, i = first + iota(shape, 0), row_lo + iota(shape, 1)
        keep = j < limit
        if not s.dense:
            keep &= by_rules(j, i)
        if s.causal:
            keep &= j <= i
        if g.segments is not None:
            k_seg = plgpu.load(g.segments.keys.at[w.batch, pl.ds(first, WG)], layout=ROWS, optimized=False)
            q_seg = plgpu.load(g.segments.queries.at[w.batch, pl.ds(row, shape[1])], layout=COLS, optimized=False)
            keep &= spread(k_seg, shape, 0) == spread(q_seg, shape, 1)
        return jnp.where(keep, x, -jnp.inf)

    if s.lists == "call":  # a listed tile is whole beyond sinks and window
        whole = (visit.listed > 0) & (first >= sink) & (row_lo - first - (WG - 1) >= window) & (first + WG <= limit)
        return lax.cond(whole & ((first + WG <= row_lo + 1) | (not s.causal)), lambda: x, edge)
    if g.segments is None:
        return edge()
    full = one_segment(g, w.batch, lax.div(row, WG), shape[1] // WG, [lax.div(first, tb.UNIT)])
    full &= (first + WG <= limit) & ((first + WG <= row_lo + 1) | (not s.causal))
    if not s.dense:
        ruled = all_sinks(g, w.batch, first, WG, sink) | (row_lo + shape[1] - 1 - first < window)
        if g.rules.expiry is not None:
            ruled |= row_lo + shape[1] - 1 < g.rules.expiry[pattern, unit]
        full &= ruled
    return lax.cond(full, lambda: x, edge)

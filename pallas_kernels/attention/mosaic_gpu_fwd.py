"""Block-sparse attention on Hopper, forward: TMA loads, wgmma, three warpgroups a block.

Two compute warpgroups own 64 query rows each and take turns on the tensor cores; the third loads tiles of keys and
values for both. Which tiles are visited comes from `mosaic_gpu_tables`; only tiles on an edge of the mask apply it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention import mosaic_gpu_tables as tb
from pallas_kernels.attention.mosaic_gpu_common import (
    LOG2E,
    NEG,
    ROW_TILE,
    ROWS,
    TILE,
    WG,
    WGS,
    Inputs,
    Static,
    Turn,
    Work,
    accumulate,
    fields,
    key_copies,
    launch,
    load_keys,
    mask_rows,
    spread,
    steps,
    tiled,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tiles of the forward kernel: keys per step, steps in flight, whether a block walks over many row tiles."""

    block_k: int = 128
    stages: int = 2
    persistent: bool = False


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # the layers of a model share one lowering
def forward(
    inputs: Inputs, static: Static, tiles: ForwardTiles, num_sms: int
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """o in the inputs' dtype and lse in float32 (natural log, -inf for rows without a key)."""
    s, tile_q = static, ROW_TILE
    row_tiles = tb.cdiv(s.rows, tile_q)
    total = s.batch * s.heads * row_tiles
    blocks = min(total, num_sms) if tiles.persistent else total
    out_type = (
        jax.ShapeDtypeStruct((s.batch, s.rows, s.heads, s.dim_v), inputs.q.dtype),
        jax.ShapeDtypeStruct((s.batch, s.heads, row_tiles * tile_q), jnp.float32),
    )
    scratch = {
        "q_s": tiled((WGS, WG, s.dim), inputs.q.dtype),
        "k_s": tiled((tiles.stages, tiles.block_k, s.dim), inputs.q.dtype),
        "v_s": tiled((tiles.stages, tiles.block_k, s.dim_v), inputs.q.dtype),
        "o_s": tiled((WGS, 2 if s.dim_v == 128 else 1, WG, 64), inputs.q.dtype),
        "lse_s": plgpu.SMEM((WGS, WG), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=WGS),
        "q_free": plgpu.Barrier(num_barriers=WGS),
        "k_ready": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=key_copies(s, tiles.block_k)),
        "k_free": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=WGS),
        "v_ready": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=key_copies(s, tiles.block_k)),
        "v_free": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=WGS),
    }
    flat, tree = jax.tree.flatten(inputs)

    def body(*refs, **scratch_refs):
        g = jax.tree.unflatten(tree, refs[: len(flat)])
        _kernel(g, *refs[len(flat) :], static=s, tiles=tiles, blocks=blocks, row_tiles=row_tiles, **scratch_refs)

    o, lse = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WGS + 1,
        thread_name="wg",
        **launch(s.interpret),
    )(*flat)
    return o, lse[..., : s.rows]


def _kernel(g: Inputs, o_g, lse_g, *, static: Static, tiles: ForwardTiles, blocks: int, row_tiles: int, **m) -> None:
    s = static
    wg, block = lax.axis_index("wg"), lax.axis_index("block")
    total = s.batch * s.heads * row_tiles
    rounds = tb.cdiv(total, blocks)

    def work(n) -> Work:
        # Blocks walk the tiles to and fro, longest rows first, so that their sums of steps come out even.
        turn = jnp.where(lax.rem(n, 2) == 0, block, blocks - 1 - block)
        t = n * blocks + turn
        batch, t = lax.div(t, s.heads * row_tiles), lax.rem(t, s.heads * row_tiles)
        head, index = lax.rem(t, s.heads), lax.div(t, s.heads)
        index = row_tiles - 1 - index if s.causal else index
        pattern = g.pattern[head] if s.patterns > 1 else jnp.int32(0)
        row = fields(g.table, batch, pattern, index)
        return Work(batch, head, index, pattern, row)

    def each(body, carry):
        if rounds == 1:
            return body(work(jnp.int32(0)), carry)

        def guarded(n, carry):
            turn = jnp.where(lax.rem(n, 2) == 0, block, blocks - 1 - block)
            return lax.cond(n * blocks + turn < total, lambda c: body(work(n), c), lambda c: c, carry)

        return lax.fori_loop(0, rounds, guarded, carry)

    @pl.when(wg < WGS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        turn = Turn(wg, not s.interpret)
        pl.when(wg == 1)(turn.give)
        each(functools.partial(_attend, g, o_g, lse_g, s, tiles, m, wg, turn), jnp.int32(0))
        pl.when(wg == 0)(turn.take)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == WGS)
    def _load():
        plgpu.set_max_registers(40, action="decrease")
        walked, done = each(functools.partial(_fetch, g, s, tiles, m), (jnp.int32(0), jnp.int32(0)))
        _drain(tiles.stages, m, walked, done)


def _fetch(g: Inputs, s: Static, tiles: ForwardTiles, m: dict, w: Work, carry) -> tuple[jax.Array, jax.Array]:
    """Loads one tile's queries and the keys and values of its steps; `carry` counts tiles and steps so far."""
    walked, done = carry
    plan = steps(s, tiles.block_k, g, w)
    kv_head = lax.div(w.head, s.heads // s.kv_heads)

    def load(n):
        slot = lax.rem(done + n, jnp.int32(tiles.stages))
        place = plan.place(n)
        for name, src in (("k", g.k), ("v", g.v)):
            free = m[name + "_free"].at[slot]
            pl.when(done + n >= tiles.stages)(lambda free=free: plgpu.barrier_wait(free))
            load_keys(s, place, src.at[w.batch, :, kv_head], m[name + "_s"].at[slot], m[name + "_ready"].at[slot])

    # The first keys do not wait for the previous tile to be done with its queries.
    pl.when(plan.total > 0)(lambda: load(jnp.int32(0)))
    for wg in range(WGS):
        pl.when(walked > 0)(lambda wg=wg: plgpu.barrier_wait(m["q_free"].at[wg]))
        rows = pl.ds(w.index * ROW_TILE + wg * WG, WG)
        plgpu.copy_gmem_to_smem(g.q.at[w.batch, rows, w.head], m["q_s"].at[wg], m["q_ready"].at[wg])
    pl.loop(1, plan.total)(load)
    return walked + 1, done + plan.total


def _drain(stages: int, m: dict, walked: jax.Array, done: jax.Array) -> None:
    """Sees the last release of every buffer, so that no barrier is left in mid-phase."""
    for wg in range(WGS):
        pl.when(walked > 0)(lambda wg=wg: plgpu.barrier_wait(m["q_free"].at[wg]))
    for slot in range(stages):

        @pl.when(done > slot)
        def _(slot=slot):
            plgpu.barrier_wait(m["k_free"].at[slot])
            plgpu.barrier_wait(m["v_free"].at[slot])


def _attend(g: Inputs, o_g, lse_g, s: Static, tiles: ForwardTiles, m: dict, wg, turn: Turn, w: Work, done) -> jax.Array:
    """One warpgroup's 64 rows against the tile's steps. `done` counts the steps of earlier tiles."""
    total, inner, inner_end, place = steps(s, tiles.block_k, g, w)
    row_lo = w.row(tb.OFFSET) + w.index * ROW_TILE + wg * WG
    slot_of = lambda step: lax.rem(step, jnp.int32(tiles.stages))
    scale = s.scale * LOG2E if s.soft_cap is None else s.soft_cap * LOG2E

    plgpu.barrier_wait(m["q_ready"].at[wg])

    @pl.when(total > 0)
    def _first_keys():
        plgpu.barrier_wait(m["k_ready"].at[slot_of(done)])
        turn.take()

    def step(n, carry):
        acc, top, norm = carry
        slot = slot_of(done + n)

        def scores(ref):
            plgpu.wgmma(ref, m["q_s"].at[wg], m["k_s"].at[slot].transpose((1, 0)))
            turn.give()
            return ref[...]

        x = pl.run_scoped(scores, plgpu.ACC((WG, tiles.block_k), jnp.float32))
        plgpu.barrier_arrive(m["k_free"].at[slot])
        pl.when(n + 1 == total)(lambda: plgpu.barrier_arrive(m["q_free"].at[wg]))
        if s.soft_cap is not None:
            x = jnp.tanh(x * (s.scale / s.soft_cap))
        edge = lambda: mask_rows(g, s, tiles.block_k, w, row_lo, x, place(n))
        x = lax.cond((n >= inner) & (n < inner_end), lambda: x, edge)

        new_top = jnp.maximum(top, x.max(axis=1) * scale)
        fade = jnp.exp2(top - new_top)
        p = jnp.exp2(x * scale - spread(new_top, x.shape, 0))
        acc *= spread(fade, acc.shape, 0)
        p16 = p.astype(m["v_s"].dtype)
        if s.dim_v <= 128:
            norm = norm * fade + p.sum(axis=1)
            acc, norm, new_top, p16 = lax.optimization_barrier((acc, norm, new_top, p16))
        plgpu.barrier_wait(m["v_ready"].at[slot])
        turn.take()
        next_keys = lambda: pl.when(n + 1 < total)(lambda: plgpu.barrier_wait(m["k_ready"].at[slot_of(done + n + 1)]))
        acc = accumulate(acc, p16, m["v_s"].at[slot], s.interpret, next_keys)
        if s.dim_v > 128:
            norm = norm * fade + p.sum(axis=1)
        plgpu.barrier_arrive(m["v_free"].at[slot])
        return acc, new_top, norm

    carry = zeros((WG, s.dim_v), TILE), plgpu.layout_cast(jnp.full((WG,), NEG, jnp.float32), ROWS), zeros((WG,), ROWS)
    acc, top, norm = lax.fori_loop(0, total, step, carry)

    @pl.when(total > 0)
    def _last_turn():
        turn.give()

    @pl.when(total == 0)
    def _unused_queries():
        plgpu.barrier_arrive(m["q_free"].at[wg])

    _store(o_g, lse_g, s, m, wg, w, acc, top, norm)
    return done + total


def _store(o_g, lse_g, s: Static, m: dict, wg, w: Work, acc, top, norm) -> None:
    """Normalises and writes 64 rows, 64 columns at a time through two buffers. TMA drops rows past the end."""
    some = norm > 0
    inverse = jnp.where(some, 1.0 / norm, 0.0)
    row = w.index * ROW_TILE + wg * WG
    o_s, lse_s = m["o_s"], m["lse_s"]
    acc = jnp.where(spread(some, acc.shape, 0), acc * spread(inverse, acc.shape, 0), 0.0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    lse_s[wg] = jnp.where(some, (top + jnp.log2(norm)) * (1 / LOG2E), -jnp.inf)
    for c in range(s.dim_v // 64):
        buffer = c % o_s.shape[1]
        if c >= o_s.shape[1]:
            plgpu.wait_smem_to_gmem(o_s.shape[1] - 1, wait_read_only=True)
        o_s[wg, buffer] = acc[:, c * 64 : (c + 1) * 64].astype(o_s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s.at[wg, buffer], o_g.at[w.batch, pl.ds(row, WG), w.head, pl.ds(c * 64, 64)])
        if c == 0:
            plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_g.at[w.batch, w.head, pl.ds(row, WG)])

"""Gated linear attention on Hopper, forward.

Heads alone do not fill the chip, so the sequence is cut in segments. Three steps: (1) every segment's own final state,
from a zero start, reading k, v and the decay; (2) a short scan over segments; (3) every segment again, now with its true
entry state, giving outputs and, for the backward, the state that enters each chunk. A warpgroup runs one head of one segment and
keeps the state in registers. Bytes at 2 per element: (1) 3 arrays, (3) 5, so 8/5 of the least possible.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.gated_linear import mosaic_gpu_parts as parts
from pallas_kernels.gated_linear.mosaic_gpu_parts import CHUNK, LEVELS, WIDTH, Split, Sums, products, read, tile

WARPGROUPS = 3


def _launch(body, split: Split, out_type, scratch, *, interpret, warpgroups=WARPGROUPS):
    """A kernel of `ceil(units / warpgroups)` blocks; `body(unit, refs, wg, scratch)` runs per warpgroup."""
    outs = len(jax.tree.leaves(out_type))

    def entry(*refs):
        ins, outs_refs = refs[: len(refs) - outs], refs[len(refs) - outs :]
        sums_gmem, ins = ins[0], ins[1:]

        def scoped(sums, sums_barrier, buffers):
            wg = jax.lax.axis_index("wg")

            @pl.when(wg == 0)
            def _():
                plgpu.copy_gmem_to_smem(sums_gmem, sums, sums_barrier)

            plgpu.barrier_wait(sums_barrier)
            unit = jax.lax.axis_index("block") * warpgroups + wg

            @pl.when(unit < split.units)
            def _():
                body(unit, sums, ins, outs_refs, jax.tree.map(lambda ref: ref.at[wg], buffers))

        pl.run_scoped(
            scoped,
            tile(6),
            plgpu.Barrier(),
            scratch,
            collective_axes="wg",
        )

    kernel = plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(-(-split.units // warpgroups),),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return lambda *args: kernel(jnp.asarray(parts.sum_matrices(), jnp.bfloat16), *args)


def _states_body(unit, sums, ins, outs, scratch, *, split: Split, reverse: bool, interpret: bool):
    """A segment's own state from zero. Forward: `(k suffix)^T v`; reverse: `(q prefix)^T do`, chunks from the last."""
    (x_gmem, y_gmem, g_gmem), (state_gmem, decay_gmem) = ins, outs
    x, y, g, weighted, barrier = scratch
    b, h, first, count = split.place(unit)
    mm = functools.partial(products, interpret=interpret)

    def load(i):
        n = first + (count - 1 - i if reverse else i)
        at = (b, pl.ds(n * CHUNK, CHUNK), h)
        for gmem, smem, slot in ((x_gmem, x, 0), (y_gmem, y, 1), (g_gmem, g, 2)):
            plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[jax.lax.rem(i, 2)], barrier.at[jax.lax.rem(i, 2) * 3 + slot])

    load(jnp.int32(0))

    def chunk(i, carry):
        state, decay = carry
        slot = jax.lax.rem(i, 2)
        plgpu.barrier_wait(barrier.at[slot * 3 + 2])
        parts.clamp_decay(g.at[slot])
        pl.when(i + 1 < count)(lambda: load(i + 1))  # after a barrier: every warp is done with the other slot
        prefix = mm([(sums.at[Sums.PREFIX], g.at[slot])])
        exponent = prefix if reverse else mm([(sums.at[Sums.TOTAL], g.at[slot])]) - prefix
        total = jnp.exp(mm([(g.at[slot].transpose((1, 0)), sums.at[Sums.TOTAL])]))
        plgpu.barrier_wait(barrier.at[slot * 3])
        weighted[...] = (read(x.at[slot]) * jnp.exp(exponent)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_wait(barrier.at[slot * 3 + 1])
        return mm([(weighted.transpose((1, 0)), y.at[slot])], state * total), decay * total

    ones = plgpu.layout_cast(jnp.full((WIDTH, WIDTH), 1, jnp.float32), plgpu.Layout.WGMMA)
    state, decay = jax.lax.fori_loop(0, count, chunk, (parts.zeros(), ones))
    state_gmem[unit] = state
    decay_gmem[unit] = decay


def segment_states(x, y, g, split: Split, *, reverse: bool, interpret=False):
    """States of every segment from a zero start, and the segment's decay along the key axis: both `[units, Dk, Dv]`."""
    n = WARPGROUPS
    shape = jax.ShapeDtypeStruct((split.units, WIDTH, WIDTH), jnp.float32)
    scratch = [tile(n, 2), tile(n, 2), tile(n, 2), tile(n), plgpu.Barrier(num_barriers=(n, 6))]
    body = functools.partial(_states_body, split=split, reverse=reverse, interpret=bool(interpret))
    return _launch(body, split, (shape, shape), scratch, interpret=interpret)(x, y, g)


def _outputs_body(unit, sums, ins, outs, scratch, *, split: Split, scale: float, save: bool, interpret: bool):
    """A segment from its true entry state: outputs, and the state that enters each chunk (`save`)."""
    q_gmem, k_gmem, v_gmem, g_gmem, entry_gmem = ins
    q, k, v, g, weighted, state_tile, o_tile, barrier = scratch
    b, h, first, count = split.place(unit)
    mm = functools.partial(products, interpret=interpret)

    def load(i, *names):
        at = (b, pl.ds((first + i) * CHUNK, CHUNK), h)
        buffers = {"q": (q_gmem, q, 0), "k": (k_gmem, k, 1), "g": (g_gmem, g, 2), "v": (v_gmem, v, 3)}
        for gmem, smem, slot in (buffers[name] for name in names):
            plgpu.copy_gmem_to_smem(gmem.at[at], smem, barrier.at[slot])

    load(jnp.int32(0), "g", "q", "k", "v")
    entry = plgpu.load(entry_gmem.at[unit], layout=plgpu.Layout.WGMMA, optimized=False)
    state_tile[...] = entry.astype(jnp.bfloat16)
    plgpu.commit_smem()

    def chunk(i, state):
        if save:
            plgpu.copy_smem_to_gmem(state_tile, outs[1].at[b, first + i, h])
        plgpu.barrier_wait(barrier.at[2])
        parts.clamp_decay(g)
        plgpu.barrier_wait(barrier.at[0])
        plgpu.barrier_wait(barrier.at[1])
        scores = parts.zeros(CHUNK, CHUNK)
        for level in range(1 + len(LEVELS)):
            factor = jnp.exp(mm([(sums.at[Sums.INNER + level], g)]))
            column = 1 / factor if level == 0 else factor
            weighted[...] = (read(k) * column).astype(jnp.bfloat16)
            row = (read(q) * factor).astype(jnp.bfloat16)
            plgpu.commit_smem()
            scores = jnp.where(parts.level_mask(level), mm([(row, weighted.transpose((1, 0)))]), scores)
        prefix = mm([(sums.at[Sums.PREFIX], g)])
        suffix = jnp.exp(mm([(sums.at[Sums.TOTAL], g)]) - prefix)
        total = jnp.exp(mm([(g.transpose((1, 0)), sums.at[Sums.TOTAL])]))
        weighted[...] = (read(k) * suffix).astype(jnp.bfloat16)
        row = (read(q) * jnp.exp(prefix)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        pl.when(i + 1 < count)(lambda: load(i + 1, "g", "q", "k"))
        plgpu.barrier_wait(barrier.at[3])
        o = mm([(row, state_tile), (scores.astype(jnp.bfloat16), v)])
        state = mm([(weighted.transpose((1, 0)), v)], state * total)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's copies out of both tiles
        o_tile[...] = (o * scale).astype(jnp.bfloat16)
        state_tile[...] = state.astype(jnp.bfloat16)
        plgpu.commit_smem()
        pl.when(i + 1 < count)(lambda: load(i + 1, "v"))
        plgpu.copy_smem_to_gmem(o_tile, outs[0].at[b, pl.ds((first + i) * CHUNK, CHUNK), h])
        return state

    jax.lax.fori_loop(0, count, chunk, entry)
    plgpu.wait_smem_to_gmem(0)


def outputs(q, k, v, g, entry, split: Split, *, scale: float, save: bool, interpret=False):
    """`o`, and with `save` the chunk-entry states `[B, N, H, Dk, Dv]`, in bfloat16."""
    n = WARPGROUPS
    out_type = [jax.ShapeDtypeStruct(v.shape, jnp.bfloat16)]
    if save:
        shape = (split.batch, split.total_chunks, split.heads, WIDTH, WIDTH)
        out_type.append(jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    scratch = [*(tile(n) for _ in range(7)), plgpu.Barrier(num_barriers=(n, 4))]
    body = functools.partial(_outputs_body, split=split, scale=scale, save=save, interpret=bool(interpret))
    return _launch(body, split, out_type, scratch, interpret=interpret)(q, k, v, g, entry)


def entry_states(local: Array, decay: Array, start: Array, split: Split, *, reverse: bool) -> tuple[Array, Array]:
    """From every segment's own state to the state that enters it (`[units, Dk, Dv]`), and the one after all."""

    def by_segment(x):
        x = x.reshape(split.batch, split.segments, split.heads, WIDTH, WIDTH)
        return jnp.moveaxis(x, 1, 0)

    def combine(a, b):
        return a[0] * b[0], a[1] * b[0] + b[1]

    decays, states = by_segment(decay), by_segment(local)
    product, total = jax.lax.associative_scan(combine, (decays, states), reverse=reverse)
    after = product * start + total
    last = after[0] if reverse else after[-1]
    if reverse:
        entry = jnp.concatenate([after[1:], start[None]])
    else:
        entry = jnp.concatenate([start[None], after[:-1]])
    return jnp.moveaxis(entry, 0, 1).reshape(split.units, WIDTH, WIDTH), last


def forward(q, k, v, g, s0, *, scale: float, save: bool, interpret=False):
    """q, k, v, g `[B, T, H, 64]` bfloat16, T a multiple of 64; s0 `[B, H, 64, 64]`. Returns o, last state, chunk states."""
    b, t, h, _ = q.shape
    split = choose(b, h, t)
    local, decay = segment_states(k, v, g, split, reverse=False, interpret=interpret)
    entry, last = entry_states(local, decay, s0, split, reverse=False)
    o, *chunk_states = outputs(q, k, v, g, entry, split, scale=scale, save=save, interpret=interpret)
    return o, last, chunk_states[0] if save else None


def choose(b: int, h: int, t: int) -> Split:
    return parts.choose_split(b, h, t // CHUNK)

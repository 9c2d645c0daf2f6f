"""Gated linear attention on Hopper, forward.

Heads alone do not fill the chip, so the sequence is cut in segments. Three steps: (1) every segment's own final state,
from zero, reading k, v and the decay; (2) a short scan over segments; (3) every segment again, now from its true
entry state, giving outputs and, for the backward, the state that enters each chunk. A warpgroup runs one head of one
segment and keeps the state in registers. Step 1 reads 3 arrays, step 3 moves 5: 8/5 of the least possible bytes.
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


def launch(body, split: Split, out_type, scratch, signals: int, *, interpret, warpgroups=WARPGROUPS):
    """A kernel of `ceil(units / warpgroups)` blocks; `body` runs once per warpgroup, on its slice of `scratch`.

    `body(unit, sums, inputs, outputs, buffers, signal)`: `signal(i)` is the warpgroup's own barrier i of `signals`.
    """
    outs = len(jax.tree.leaves(out_type))

    def entry(*refs):
        ins, outs_refs = refs[: len(refs) - outs], refs[len(refs) - outs :]
        sums_gmem, ins = ins[0], ins[1:]

        def scoped(sums, sums_barrier, buffers, barriers):
            wg = jax.lax.axis_index("wg")

            @pl.when(wg == 0)
            def _():
                plgpu.copy_gmem_to_smem(sums_gmem, sums, sums_barrier)

            plgpu.barrier_wait(sums_barrier)
            unit = jax.lax.axis_index("block") * warpgroups + wg

            @pl.when(unit < split.units)
            def _():
                own = [ref.at[wg] for ref in buffers]
                body(unit, sums, ins, outs_refs, own, lambda i: barriers.at[wg * signals + i])

        pl.run_scoped(
            scoped,
            tile(6),
            plgpu.Barrier(),
            scratch,
            plgpu.Barrier(num_barriers=warpgroups * signals),
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
        interpret=interpret or False,
    )
    return lambda *args: kernel(jnp.asarray(parts.sum_matrices(), jnp.bfloat16), *args)


def _states_body(unit, sums, ins, outs, buffers, signal, *, split: Split, reverse: bool, interpret: bool):
    """A segment's own state from zero. Forward: `(k suffix)^T v`; reverse: `(q prefix)^T do`, chunks from the last."""
    (x_gmem, y_gmem, g_gmem), (state_gmem, decay_gmem) = ins, outs
    x, y, g, weighted = buffers
    place = split.place(unit)
    count = place.count
    mm = functools.partial(products, interpret=interpret)

    def load(i):
        chunk = place.first + (count - 1 - i if reverse else i)
        slot = jax.lax.rem(i, 2)
        keys, values = place.tokens(chunk, place.key_tile), place.tokens(chunk, place.value_tile)
        for n, (gmem, smem, at) in enumerate(((x_gmem, x, keys), (y_gmem, y, values), (g_gmem, g, keys))):
            plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], signal(slot * 3 + n))

    load(jnp.int32(0))

    def chunk(i, carry):
        state, decay = carry
        slot = jax.lax.rem(i, 2)
        plgpu.barrier_wait(signal(slot * 3 + 2))
        parts.clamp_decay(g.at[slot])
        pl.when(i + 1 < count)(lambda: load(i + 1))  # after a barrier: every warp is done with the other slot
        prefix = mm([(sums.at[Sums.PREFIX], g.at[slot])])
        exponent = prefix if reverse else mm([(sums.at[Sums.TOTAL], g.at[slot])]) - prefix
        total = jnp.exp(mm([(g.at[slot].transpose((1, 0)), sums.at[Sums.TOTAL])]))
        plgpu.barrier_wait(signal(slot * 3))
        weighted[...] = (read(x.at[slot]) * jnp.exp(exponent)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_wait(signal(slot * 3 + 1))
        return mm([(weighted.transpose((1, 0)), y.at[slot])], state * total), decay * total

    ones = plgpu.layout_cast(jnp.full((WIDTH, WIDTH), 1, jnp.float32), plgpu.Layout.WGMMA)
    state, decay = jax.lax.fori_loop(0, count, chunk, (parts.zeros(), ones))
    state_gmem[unit] = state
    decay_gmem[unit] = decay


def segment_states(x, y, g, split: Split, *, reverse: bool, interpret=None, warpgroups: int = WARPGROUPS):
    """States of every segment from a zero start, and the segment's decay along the key axis: both `[units, Dk, Dv]`."""
    n = warpgroups
    shape = jax.ShapeDtypeStruct((split.units, WIDTH, WIDTH), jnp.float32)
    scratch = [tile(n, 2), tile(n, 2), tile(n, 2), tile(n)]
    body = functools.partial(_states_body, split=split, reverse=reverse, interpret=bool(interpret))
    return launch(body, split, (shape, shape), scratch, 6, interpret=interpret, warpgroups=n)(x, y, g)


def _outputs_body(unit, sums, ins, outs, buffers, signal, *, split: Split, scale: float, save: bool, interpret: bool):
    """A segment from its true entry state: outputs, and the state that enters each chunk (`save`)."""
    q_gmem, k_gmem, v_gmem, g_gmem, entry_gmem = ins
    q, k, v, g, weighted, state_tile, o_tile = buffers
    place = split.place(unit)
    first, count = place.first, place.count
    mm = functools.partial(products, interpret=interpret)

    def load_keys(i):
        at = place.tokens(first + i, place.key_tile)
        for n, (gmem, smem) in enumerate(((q_gmem, q), (k_gmem, k), (g_gmem, g))):
            plgpu.copy_gmem_to_smem(gmem.at[at], smem, signal(n))

    def load_values(i):
        plgpu.copy_gmem_to_smem(v_gmem.at[place.tokens(first + i, place.value_tile)], v, signal(3))

    load_keys(jnp.int32(0))
    load_values(jnp.int32(0))
    entry = plgpu.load(entry_gmem.at[unit], layout=plgpu.Layout.WGMMA, optimized=False)
    state_tile[...] = entry.astype(jnp.bfloat16)
    plgpu.commit_smem()

    def chunk(i, state):
        if save:
            plgpu.copy_smem_to_gmem(state_tile, outs[1].at[place.state(first + i)])
        plgpu.barrier_wait(signal(2))
        parts.clamp_decay(g)
        plgpu.barrier_wait(signal(0))
        plgpu.barrier_wait(signal(1))
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
        pl.when(i + 1 < count)(lambda: load_keys(i + 1))
        plgpu.barrier_wait(signal(3))
        o = mm([(row, state_tile), (scores.astype(jnp.bfloat16), v)])
        state = mm([(weighted.transpose((1, 0)), v)], state * total)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's copies out of both tiles
        o_tile[...] = (o * scale).astype(jnp.bfloat16)
        state_tile[...] = state.astype(jnp.bfloat16)
        plgpu.commit_smem()
        pl.when(i + 1 < count)(lambda: load_values(i + 1))
        plgpu.copy_smem_to_gmem(o_tile, outs[0].at[(place.key_tile, *place.tokens(first + i, place.value_tile))])
        return state

    jax.lax.fori_loop(0, count, chunk, entry)
    plgpu.wait_smem_to_gmem(0)


def outputs(q, k, v, g, entry, split: Split, *, scale: float, save: bool, interpret=None):
    """`o` by key tile `[Dk/64, B, T, H, Dv]`, and with `save` the chunk-entry states `[B, N, H, Dk, Dv]`; bfloat16."""
    n = WARPGROUPS
    out_type = [jax.ShapeDtypeStruct((split.key_tiles, *v.shape), jnp.bfloat16)]
    if save:
        shape = (split.batch, split.total_chunks, split.heads, q.shape[-1], v.shape[-1])
        out_type.append(jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    scratch = [tile(n) for _ in range(7)]
    body = functools.partial(_outputs_body, split=split, scale=scale, save=save, interpret=bool(interpret))
    return launch(body, split, out_type, scratch, 4, interpret=interpret)(q, k, v, g, entry)


def to_units(state: Array, split: Split) -> Array:
    """`[..., B, H, Dk, Dv]` to `[..., B, lanes, 64, 64]`."""
    *lead, b, h, dk, dv = state.shape
    state = state.reshape(*lead, b, h, dk // WIDTH, WIDTH, dv // WIDTH, WIDTH)
    return jnp.moveaxis(state, -3, -2).reshape(*lead, b, split.lanes, WIDTH, WIDTH)


def from_units(state: Array, split: Split) -> Array:
    """The inverse of `to_units`."""
    *lead, b, _, _, _ = state.shape
    state = state.reshape(*lead, b, split.heads, split.key_tiles, split.value_tiles, WIDTH, WIDTH)
    state = jnp.moveaxis(state, -2, -3)
    return state.reshape(*lead, b, split.heads, split.key_tiles * WIDTH, split.value_tiles * WIDTH)


def entry_states(local: Array, decay: Array, start: Array, split: Split, *, reverse: bool) -> tuple[Array, Array]:
    """From every segment's own state to the state that enters it (`[units, 64, 64]`), and the one after all."""

    def by_segment(x):
        return jnp.moveaxis(x.reshape(split.batch, split.segments, split.lanes, WIDTH, WIDTH), 1, 0)

    def combine(a, b):
        return a[0] * b[0], a[1] * b[0] + b[1]

    start = to_units(start, split)
    product, total = jax.lax.associative_scan(combine, (by_segment(decay), by_segment(local)), reverse=reverse)
    after = product * start + total
    ends = (after[1:], start[None]) if reverse else (start[None], after[:-1])
    entry = jnp.moveaxis(jnp.concatenate(ends), 0, 1).reshape(split.units, WIDTH, WIDTH)
    return entry, from_units(after[0] if reverse else after[-1], split)


def forward(q, k, v, g, s0, *, scale: float, save: bool, interpret=None, slots: int = 396):
    """q, k, g `[B, T, H, Dk]`, v `[B, T, H, Dv]` bfloat16, T and widths multiples of 64; s0 `[B, H, Dk, Dv]`.

    Returns o by key tile, the last state, and the chunk-entry states if `save`.
    """
    b, t, h, dk = q.shape
    split = parts.choose_split(b, h, t, (dk, v.shape[-1]), slots)
    local, decay = segment_states(k, v, g, split, reverse=False, interpret=interpret)
    entry, last = entry_states(local, decay, s0, split, reverse=False)
    o, *chunk_states = outputs(q, k, v, g, entry, split, scale=scale, save=save, interpret=interpret)
    return o, last, chunk_states[0] if save else None

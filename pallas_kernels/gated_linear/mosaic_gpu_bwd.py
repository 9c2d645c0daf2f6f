"""Gated linear attention on Hopper, backward.

Two passes over the segments of the sequence, as forward: every segment's own state cotangent, then, with the true one
entering from the right, all gradients chunk by chunk from the last. The decay gradient of a chunk is a reversed sum of
`q dq - k dk` over the chunk plus what the leaving state owes, `rowsum(S dS)`, carried from chunk to chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.gated_linear import mosaic_gpu_parts as parts
from pallas_kernels.gated_linear.mosaic_gpu_fwd import entry_states, launch, to_units
from pallas_kernels.gated_linear.mosaic_gpu_parts import (
    CHUNK,
    LEVELS,
    WIDTH,
    Halves,
    Split,
    Sums,
    bf16,
    products,
    read,
    tile,
)

STATE_WARPGROUPS = 3
WARPGROUPS = 2


def _cotangents_body(unit, sums, ins, outs, buffers, signal, *, split: Split, interpret: bool):
    """A segment's own state cotangent from zero, `(q prefix)^T do`, chunks from the last."""
    *arrays, strong_gmem = ins
    q, do, g, half, weighted = buffers
    place = split.place(unit)
    strong = strong_gmem[unit] != 0
    mm = functools.partial(products, interpret=interpret)

    def load(i):
        chunk = place.first + place.count - 1 - i
        slot = jax.lax.rem(i, 2)
        keys, values = (place.tokens(chunk, n) for n in (place.key_tile, place.value_tile))
        decays = place.tokens(chunk, place.key_tile, arrays[2].shape[2])
        routes = zip(arrays, (q, do, g, half), (keys, values, decays, place.sums(chunk)), strict=True)
        for n, (gmem, smem, at) in enumerate(routes):
            plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], signal(slot * 4 + n))

    load(jnp.int32(0))

    def chunk(i, leaving):
        slot = jax.lax.rem(i, 2)
        for n in (2, 3, 0):
            plgpu.barrier_wait(signal(slot * 4 + n))
        pl.when(strong)(lambda: parts.clamp_decay(g.at[slot]))
        first, second = half.at[slot, 0], half.at[slot, 1]
        prefix = jnp.exp(mm([(sums.at[0], g.at[slot])]) + parts.per_column(first))
        pl.when(i + 1 < place.count)(lambda: load(i + 1))  # every warp is done with the other slot
        weighted[...] = bf16(read(q.at[slot]) * prefix)
        plgpu.commit_smem()
        plgpu.barrier_wait(signal(slot * 4 + 1))
        total = parts.per_row(first, jnp.exp) * parts.per_row(second, jnp.exp)
        return mm([(weighted.transpose((1, 0)), do.at[slot])], leaving * total)

    outs[0][unit] = jax.lax.fori_loop(0, place.count, chunk, parts.zeros())


def segment_cotangents(q, do, g, found: Halves, split: Split, *, interpret=None):
    """State cotangents of every segment from a zero start, `[units, Dk, Dv]`."""
    n = STATE_WARPGROUPS
    shape = jax.ShapeDtypeStruct((split.units, WIDTH, WIDTH), jnp.float32)
    scratch = [tile(n, 2), tile(n, 2), tile(n, 2), plgpu.SMEM((n, 2, 2, WIDTH), jnp.float32), tile(n)]
    body = functools.partial(_cotangents_body, split=split, interpret=bool(interpret))
    run = launch(body, split, Sums.PAIRS[:1], [shape], scratch, 8, interpret=interpret, warpgroups=n)
    return run(q, do, g, found.sums, parts.strong_units(found, split))[0]


def _mild_chunk(tiles, work, half, sums, mm, prefetch, leaving, scale):
    """Gradients with all pairs from one factorisation at the chunk's middle.

    Leaves dv in `pairs` and returns dq, dk, `q dq - k dk`, the entering state cotangent and `rowsum(S dS)` there.
    """
    q, k, v, g, do, state = tiles
    q_tile, k_tile, pairs, leaving_tile = work
    d_scores = bf16(jnp.where(parts.causal(), mm([(do, v.transpose((1, 0)))]), 0.0))
    factor = jnp.exp(mm([(sums.at[Sums.MIDDLE], g)]))
    k_tile[...] = bf16(read(k) / factor)
    q_tile[...] = bf16(read(q) * (factor * scale))
    pairs[...] = d_scores
    leaving = leaving * parts.per_row(half.at[1], jnp.exp)
    leaving_tile[...] = bf16(leaving)
    state[...] = bf16(read(state) * parts.per_row(half.at[0], jnp.exp))
    plgpu.commit_smem()
    prefetch()
    scores = k  # which is used up
    scores[...] = bf16(jnp.where(parts.causal(), mm([(q_tile, k_tile.transpose((1, 0)))]), 0.0))
    entering = mm([(q_tile.transpose((1, 0)), do)], leaving)
    owed = (read(state) * entering).sum(1)
    entering = entering * parts.per_row(half.at[0], jnp.exp)
    plgpu.commit_smem()
    dv = bf16(mm([(scores.transpose((1, 0)), do), (k_tile, leaving_tile)]))
    dq = mm([(pairs, k_tile), (do, state.transpose((1, 0)))])
    balance, dq = read(q_tile) * dq, bf16(dq * (factor * scale))
    dk = mm([(pairs.transpose((1, 0)), q_tile), (v, leaving_tile.transpose((1, 0)))])
    balance, dk = balance - read(k_tile) * dk, bf16(dk / factor)
    pairs[...] = dv
    return dq, dk, balance, entering, owed


def _strong_chunk(tiles, work, half, sums, mm, prefetch, leaving, scale):
    """The same level by level: any decay."""
    q, k, v, g, do, state = tiles
    q_tile, k_tile, pairs, leaving_tile = work
    parts.clamp_decay(g)
    d_scores = bf16(mm([(do, v.transpose((1, 0)))]))

    def level(n, carry):
        found, dq, dk = carry
        exponent = mm([(sums.at[Sums.INNER + n], g)])
        row, column = jnp.exp(exponent), jnp.exp(exponent * jnp.where(n == 0, -1.0, 1.0))
        mask = parts.causal(n)
        k_tile[...] = bf16(read(k) * column)
        q_tile[...] = bf16(read(q) * (row * scale))
        pairs[...] = jnp.where(mask, d_scores, jnp.zeros_like(d_scores))
        plgpu.commit_smem()
        found = jnp.where(mask, bf16(mm([(q_tile, k_tile.transpose((1, 0)))])), found)
        dq += mm([(pairs, k_tile)]) * row
        return found, dq, dk + mm([(pairs.transpose((1, 0)), q_tile)]) * column

    start = (bf16(parts.zeros(CHUNK, CHUNK)), parts.zeros(), parts.zeros())
    found, dq, dk = jax.lax.fori_loop(0, 1 + len(LEVELS), level, start)
    exponent = mm([(sums.at[Sums.MIDDLE], g)])
    suffix = jnp.exp(parts.per_column(half.at[1]) - exponent)
    prefix = jnp.exp(parts.per_column(half.at[0]) + exponent)
    pairs[...] = found
    leaving_tile[...] = bf16(leaving)
    k_tile[...] = bf16(read(k) * suffix)
    q_tile[...] = bf16(read(q) * (prefix * scale))
    plgpu.commit_smem()
    dv = mm([(pairs.transpose((1, 0)), do), (k_tile, leaving_tile)])
    dk += mm([(v, leaving_tile.transpose((1, 0)))]) * suffix
    dq = (dq + mm([(do, state.transpose((1, 0)))]) * prefix) * scale
    total = parts.per_row(half.at[0], jnp.exp) * parts.per_row(half.at[1], jnp.exp)
    entering = mm([(q_tile.transpose((1, 0)), do)], leaving * total)
    balance = read(q) * dq - read(k) * dk
    pairs[...] = bf16(dv)
    plgpu.commit_smem()
    prefetch()
    return bf16(dq), bf16(dk), balance, entering, (read(state) * entering).sum(1)


def _body(unit, sums, ins, outs, buffers, signal, *, split: Split, scale: float, interpret: bool):
    *arrays, strong_gmem, leaving_gmem, ends_gmem = ins
    *tiles, half = buffers[:7]
    *work, ends = buffers[7:]
    q_tile, k_tile, pairs, dg_tile = work
    place = split.place(unit)
    mm = functools.partial(products, interpret=interpret)

    def load(i, wanted):
        chunk = place.first + place.count - 1 - i
        features = (place.key_tile, place.key_tile, place.value_tile, place.key_tile, place.value_tile)
        heads = (x.shape[2] for x in arrays[:5])
        where = [place.tokens(chunk, *at) for at in zip(features, heads, strict=True)]
        where += [place.state(chunk), place.sums(chunk)]
        for n in wanted:
            plgpu.copy_gmem_to_smem(arrays[n].at[where[n]], buffers[n], signal(n))

    early, late = (0, 3), (1, 2, 4, 5, 6)
    load(jnp.int32(0), (*early, *late))
    leaving = plgpu.load(leaving_gmem.at[unit], layout=plgpu.Layout.WGMMA, optimized=False)
    ends[...] = plgpu.load(ends_gmem.at[unit], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    plgpu.commit_smem()

    def chunk(step, i, leaving):
        at = place.first + place.count - 1 - i
        for n in (2, 4, 3, 0, 1, 5, 6):
            plgpu.barrier_wait(signal(n))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        more = i + 1 < place.count
        prefetch = lambda: pl.when(more)(lambda: load(i + 1, early))
        dq, dk, balance, entering, owed = step(tiles, work, half, sums, mm, prefetch, leaving, scale)
        high = bf16(balance)
        q_tile[...] = high
        k_tile[...] = bf16(balance - high.astype(jnp.float32))
        plgpu.commit_smem()
        pl.when(more)(lambda: load(i + 1, late))
        later = sums.at[Sums.LATER]
        dg = mm([(later, q_tile), (later, k_tile)]) + parts.per_column(ends)
        plgpu.commit_smem()
        ends[...] = owed
        q_tile[...], k_tile[...], dg_tile[...] = dq, dk, bf16(dg)
        plgpu.commit_smem()
        keys, values = place.tokens(at, place.key_tile), place.tokens(at, place.value_tile)
        for smem, gmem in ((q_tile, outs[0]), (k_tile, outs[1]), (dg_tile, outs[3])):
            plgpu.copy_smem_to_gmem(smem, gmem.at[(place.value_tile, *keys)])
        plgpu.copy_smem_to_gmem(pairs, outs[2].at[(place.key_tile, *values)])
        return entering

    def run(step):
        jax.lax.fori_loop(0, place.count, functools.partial(chunk, step), leaving)

    strong = strong_gmem[unit] != 0
    pl.when(strong)(lambda: run(_strong_chunk))
    pl.when(~strong)(lambda: run(_mild_chunk))
    plgpu.wait_smem_to_gmem(0)


def backward(q, k, v, g, saved, last, do, d_last, *, scale: float, interpret=None, slots: int = 264):
    """Gradients dq, dk, dv, dg of every query head, in bfloat16, and ds0.

    dv comes by key tile `[Dk/64, ...]`, the others by value tile.
    """
    chunk_states, found = saved
    b, t, h, dk = q.shape
    split = parts.choose_split(b, h, t, (dk, v.shape[-1]), slots)
    local = segment_cotangents(q, do, g, found, split, interpret=interpret)
    leaving, d_first = entry_states(local * scale, parts.unit_decays(found, split), d_last, split, reverse=True)
    by_key = jax.ShapeDtypeStruct((split.value_tiles, *q.shape), jnp.bfloat16)
    by_value = jax.ShapeDtypeStruct((split.key_tiles, *do.shape), jnp.bfloat16)
    n = WARPGROUPS
    inputs = [*(tile(n) for _ in range(6)), plgpu.SMEM((n, 2, WIDTH), jnp.float32)]
    scratch = [*inputs, *(tile(n) for _ in range(4)), plgpu.SMEM((n, WIDTH), jnp.float32)]
    body = functools.partial(_body, split=split, scale=scale, interpret=bool(interpret))
    types = (by_key, by_key, by_value, by_key)
    run = launch(body, split, Sums.PAIRS, types, scratch, 7, interpret=interpret, warpgroups=n)
    strong, owed = parts.strong_units(found, split), _owed(chunk_states, last, leaving, split)
    grads = run(q, k, v, g, do, chunk_states, found.sums, strong, leaving, owed)
    return (*grads, d_first)


def _owed(chunk_states: Array, last: Array, leaving: Array, split: Split) -> Array:
    """`rowsum(S dS)` of the states that leave the segments, `[units, 64]`."""
    after = chunk_states[:, split.chunks :: split.chunks].astype(jnp.float32)
    after = to_units(jnp.moveaxis(jnp.concatenate([after, last[:, None]], axis=1), 1, 0), split)
    return (jnp.moveaxis(after, 0, 1).reshape(leaving.shape) * leaving).sum(-1)

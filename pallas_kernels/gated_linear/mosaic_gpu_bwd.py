"""Gated linear attention on Hopper, backward.

Two passes over the segments of the sequence, as forward: every segment's own state cotangent, then, with the true one
entering from the right, all gradients chunk by chunk from the last. The decay gradient of a chunk is a reversed sum of
`q dq - k dk` over the chunk plus what the leaving state owes, `rowsum(S dS)`, carried from chunk to chunk.

The normaliser is one more value, 1 everywhere, whose state z is a vector. Its cotangents are small: the first pass sums
them up by chunk, a scan over chunks (`Normaliser`) makes them those that leave each one, and the second pass adds what
they give to the gradients of q, k and the decay.
"""

import functools
from typing import Any, NamedTuple

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
from pallas_kernels.gated_linear.problem import LinearState

STATE_WARPGROUPS = 3
WARPGROUPS = 2


class Normaliser(NamedTuple):
    """What the second pass knows of the normaliser, rows of an array `[B, N, H, 2 + 4, Dk]` after the halves' two."""

    keys: Array  # z that enters the chunk
    leaving: Array  # the cotangent of z that leaves it
    owed: Array  # their product where the chunk ends
    weights: Array  # cotangents of the chunk's 64 sums of weights, once for each key tile

    @classmethod
    def of(cls, keys, last, own, d_last, d_weights, found: Halves) -> tuple["Normaliser", Array]:
        """From z at each entry `[B, N, H, Dk]` and `last` `[B, H, Dk]`, the cotangents that each chunk alone gives to
        its entry, `own`, and `d_last`, and those of the weights; also the cotangent of the first z."""

        def combine(a, b):
            return a[0] * b[0], a[1] * b[0] + b[1]

        decay = jnp.exp(found.sums.sum(3))
        product, total = jax.lax.associative_scan(combine, (decay, own), axis=1, reverse=True)
        entering = product * d_last[:, None] + total
        leaving = jnp.concatenate([entering[:, 1:], d_last[:, None]], axis=1)
        after = jnp.concatenate([keys[:, 1:], last[:, None]], axis=1)
        return cls(keys, leaving, after * leaving, d_weights), entering[:, 0]


class OneMore(NamedTuple):
    """`Normaliser` of a chunk in shared memory; `once` is 1 for the value tile that counts it and 0 for the others."""

    rows: Any  # [6, 64]
    once: Any

    def scores(self):
        """Cotangents of the scores, alike along a query's row."""
        return parts.per_row(self.rows.at[5]) * self.once

    def queries(self):
        """What z adds to dq, before the decay from the chunk's start."""
        return self.scores() * parts.per_column(self.rows.at[2])

    def keys(self):
        """What z's cotangent adds to dk, before the decay to the chunk's end."""
        return parts.per_column(self.rows.at[3]) * self.once

    def owed(self):
        return parts.per_column(self.rows.at[4]) * self.once


def _cotangents_body(unit, sums, ins, outs, buffers, signal, *, split: Split, interpret: bool):
    """A segment's own state cotangent from zero, `(q prefix)^T do`, chunks from the last.

    With a second output, also each chunk's `(q prefix)^T dw`, dw being the weights' cotangents.
    """
    *arrays, strong_gmem = ins
    normalise = len(outs) > 1
    q, do, g, half, weighted, *weights_tile = buffers
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
        if normalise:  # every column of the product is the sum
            (alike,) = weights_tile
            alike[...] = bf16(parts.per_row(half.at[slot, 2]))
            plgpu.commit_smem()
            found = mm([(weighted.transpose((1, 0)), alike)]).sum(1) / CHUNK

            @pl.when(place.value_tile == 0)
            def _():
                outs[1][place.keys(place.first + place.count - 1 - i)] = found

        total = parts.per_row(first, jnp.exp) * parts.per_row(second, jnp.exp)
        return mm([(weighted.transpose((1, 0)), do.at[slot])], leaving * total)

    outs[0][unit] = jax.lax.fori_loop(0, place.count, chunk, parts.zeros())


def segment_cotangents(q, do, g, found: Halves, d_weights, split: Split, *, interpret=None) -> list[Array]:
    """State cotangents of every segment from a zero start, `[units, Dk, Dv]`; given `d_weights` `[B, N, H, Dk]` (see
    `Normaliser`), also those that each chunk adds to z, `[B, N, H, Dk]`."""
    n, rows = STATE_WARPGROUPS, found.sums
    shapes = [jax.ShapeDtypeStruct((split.units, WIDTH, WIDTH), jnp.float32)]
    if d_weights is not None:
        shapes.append(jax.ShapeDtypeStruct(d_weights.shape, jnp.float32))
        rows = jnp.concatenate([rows, d_weights[:, :, :, None]], axis=3)
    scratch = [tile(n, 2), tile(n, 2), tile(n, 2), plgpu.SMEM((n, 2, rows.shape[3], WIDTH), jnp.float32), tile(n)]
    scratch += [tile(n)] * (len(shapes) - 1)
    body = functools.partial(_cotangents_body, split=split, interpret=bool(interpret))
    run = launch(body, split, Sums.PAIRS[:1], shapes, scratch, 8, interpret=interpret, warpgroups=n)
    return run(q, do, g, rows, parts.strong_units(found, split))


def _mild_chunk(tiles, work, half, extra: OneMore | None, sums, mm, prefetch, leaving, scale):
    """Gradients with all pairs from one factorisation at the chunk's middle.

    Leaves dv in `pairs` and returns dq, dk, `q dq - k dk`, the entering state cotangent and `rowsum(S dS)` there.
    """
    q, k, v, g, do, state = tiles
    q_tile, k_tile, pairs, leaving_tile = work
    d_scores = mm([(do, v.transpose((1, 0)))])
    d_scores = d_scores if extra is None else d_scores + extra.scores()
    d_scores = bf16(jnp.where(parts.causal(), d_scores, 0.0))
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
    if extra is not None:
        dq = dq + extra.queries() * parts.per_column(half.at[0], jnp.exp)
    balance, dq = read(q_tile) * dq, bf16(dq * (factor * scale))
    dk = mm([(pairs.transpose((1, 0)), q_tile), (v, leaving_tile.transpose((1, 0)))])
    if extra is not None:
        dk = dk + extra.keys() * parts.per_column(half.at[1], jnp.exp)
    balance, dk = balance - read(k_tile) * dk, bf16(dk / factor)
    pairs[...] = dv
    return dq, dk, balance, entering, owed


def _strong_chunk(tiles, work, half, extra: OneMore | None, sums, mm, prefetch, leaving, scale):
    """The same level by level: any decay."""
    q, k, v, g, do, state = tiles
    q_tile, k_tile, pairs, leaving_tile = work
    parts.clamp_decay(g)
    d_scores = mm([(do, v.transpose((1, 0)))])
    d_scores = bf16(d_scores if extra is None else d_scores + extra.scores())

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
    dk_after, dq_before = mm([(v, leaving_tile.transpose((1, 0)))]), mm([(do, state.transpose((1, 0)))])
    if extra is not None:
        dk_after, dq_before = dk_after + extra.keys(), dq_before + extra.queries()
    dk, dq = dk + dk_after * suffix, (dq + dq_before * prefix) * scale
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
    normalise = half.shape[0] > 2
    extra = OneMore(half, jnp.where(place.value_tile == 0, 1.0, 0.0)) if normalise else None

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
        dq, dk, balance, entering, owed = step(tiles, work, half, extra, sums, mm, prefetch, leaving, scale)
        owed_by_z = None if extra is None else extra.owed()
        high = bf16(balance)
        q_tile[...] = high
        k_tile[...] = bf16(balance - high.astype(jnp.float32))
        plgpu.commit_smem()
        pl.when(more)(lambda: load(i + 1, late))
        later = sums.at[Sums.LATER]
        dg = mm([(later, q_tile), (later, k_tile)]) + parts.per_column(ends)
        dg = dg if owed_by_z is None else dg + owed_by_z
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


@functools.partial(jax.jit, static_argnames=("scale", "interpret", "slots"))  # the layers of a model share one lowering
def backward(
    q, k, v, g, saved, last: LinearState, cotangents, *, scale: float, interpret=None, slots: int = 264
) -> tuple[tuple[Array, ...], LinearState]:
    """Gradients dq, dk, dv, dg of every query head, in bfloat16, and that of the first state.

    dv comes by key tile `[Dk/64, ...]`, the others by value tile. `cotangents` are those of o `[B, T, H, Dv]`, of the
    sums of weights times `scale` `[B, T, H]` (None without the normaliser), and of the last state.
    """
    do, d_weights, d_last = cotangents
    entered, found = saved
    b, t, h, dk = q.shape
    split = parts.choose_split(b, h, t, (dk, v.shape[-1]), slots)
    if d_weights is not None:
        by_chunk = d_weights.reshape(b, split.total_chunks, CHUNK, h).swapaxes(2, 3)
        d_weights = jnp.tile(by_chunk, (1, 1, 1, split.key_tiles))
    local, *local_z = segment_cotangents(q, do, g, found, d_weights, split, interpret=interpret)
    leaving, d_first = entry_states(local * scale, parts.unit_decays(found, split), d_last.s, split, reverse=True)
    rows, dz_first = found.sums, None
    if d_weights is not None:
        z, dz_first = Normaliser.of(entered.z, last.z, local_z[0] * scale, d_last.z, d_weights, found)
        rows = jnp.concatenate([rows, jnp.stack(z, axis=3)], axis=3)
    by_key = jax.ShapeDtypeStruct((split.value_tiles, *q.shape), jnp.bfloat16)
    by_value = jax.ShapeDtypeStruct((split.key_tiles, *do.shape), jnp.bfloat16)
    n = WARPGROUPS
    inputs = [*(tile(n) for _ in range(6)), plgpu.SMEM((n, rows.shape[3], WIDTH), jnp.float32)]
    scratch = [*inputs, *(tile(n) for _ in range(4)), plgpu.SMEM((n, WIDTH), jnp.float32)]
    body = functools.partial(_body, split=split, scale=scale, interpret=bool(interpret))
    types = (by_key, by_key, by_value, by_key)
    run = launch(body, split, Sums.PAIRS, types, scratch, 7, interpret=interpret, warpgroups=n)
    strong, owed = parts.strong_units(found, split), _owed(entered.s, last.s, leaving, split)
    return run(q, k, v, g, do, entered.s, rows, strong, leaving, owed), LinearState(d_first, dz_first)


def _owed(chunk_states: Array, last: Array, leaving: Array, split: Split) -> Array:
    """`rowsum(S dS)` of the states that leave the segments, `[units, 64]`."""
    after = chunk_states[:, split.chunks :: split.chunks].astype(jnp.float32)
    after = to_units(jnp.moveaxis(jnp.concatenate([after, last[:, None]], axis=1), 1, 0), split)
    return (jnp.moveaxis(after, 0, 1).reshape(leaving.shape) * leaving).sum(-1)

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
from pallas_kernels.gated_linear.mosaic_gpu_fwd import entry_states, launch, segment_states, to_units
from pallas_kernels.gated_linear.mosaic_gpu_parts import CHUNK, LEVELS, WIDTH, Split, Sums, products, read, tile

WARPGROUPS = 2


def _body(unit, sums, ins, outs, buffers, signal, *, split: Split, scale: float, interpret: bool):
    q_gmem, k_gmem, v_gmem, g_gmem, do_gmem, states_gmem, leaving_gmem, ends_gmem = ins
    q, k, v, g, do, state_tile, q_tile, k_tile, pair_tile, leaving_tile, ends = buffers
    place = split.place(unit)
    mm = functools.partial(products, interpret=interpret)

    def load(i):
        chunk = place.first + place.count - 1 - i
        keys, values = place.tokens(chunk, place.key_tile), place.tokens(chunk, place.value_tile)
        routes = ((q_gmem, q, keys), (k_gmem, k, keys), (g_gmem, g, keys), (v_gmem, v, values), (do_gmem, do, values))
        for n, (gmem, smem, at) in enumerate(routes):
            plgpu.copy_gmem_to_smem(gmem.at[at], smem, signal(n))

    load(jnp.int32(0))
    leaving = plgpu.load(leaving_gmem.at[unit], layout=plgpu.Layout.WGMMA, optimized=False)
    leaving_tile[...] = leaving.astype(jnp.bfloat16)
    ends[...] = plgpu.load(ends_gmem.at[unit], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    plgpu.commit_smem()

    def chunk(i, leaving):
        at = place.first + place.count - 1 - i
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(states_gmem.at[place.state(at)], state_tile, signal(5))
        plgpu.barrier_wait(signal(2))
        parts.clamp_decay(g)
        for n in (0, 1, 3, 4):
            plgpu.barrier_wait(signal(n))
        d_scores = mm([(do, v.transpose((1, 0)))]).astype(jnp.bfloat16)
        scores = parts.zeros(CHUNK, CHUNK).astype(jnp.bfloat16)
        dq, dk = parts.zeros(), parts.zeros()
        for level in range(1 + len(LEVELS)):
            factor = jnp.exp(mm([(sums.at[Sums.INNER + level], g)]))
            column = 1 / factor if level == 0 else factor
            mask = parts.level_mask(level)
            masked = jnp.where(mask, d_scores, jnp.zeros_like(d_scores))
            k_tile[...] = (read(k) * column).astype(jnp.bfloat16)
            q_tile[...] = (read(q) * (factor * scale)).astype(jnp.bfloat16)
            pair_tile[...] = masked
            plgpu.commit_smem()
            scores = jnp.where(mask, mm([(q_tile, k_tile.transpose((1, 0)))]).astype(jnp.bfloat16), scores)
            dq += mm([(pair_tile, k_tile)]) * factor
            dk += mm([(pair_tile.transpose((1, 0)), q_tile)]) * column
        prefix = mm([(sums.at[Sums.PREFIX], g)])
        suffix = jnp.exp(mm([(sums.at[Sums.TOTAL], g)]) - prefix)
        prefix = jnp.exp(prefix)
        pair_tile[...] = scores
        k_tile[...] = (read(k) * suffix).astype(jnp.bfloat16)
        q_tile[...] = (read(q) * (prefix * scale)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        dv = mm([(pair_tile.transpose((1, 0)), do), (k_tile, leaving_tile)])
        dk += mm([(v, leaving_tile.transpose((1, 0)))]) * suffix
        plgpu.barrier_wait(signal(5))
        dq += mm([(do, state_tile.transpose((1, 0)))]) * prefix
        total = jnp.exp(mm([(g.transpose((1, 0)), sums.at[Sums.TOTAL])]))
        entering = mm([(q_tile.transpose((1, 0)), do)], leaving * total)
        balance = read(q) * (dq * scale) - read(k) * dk
        high = balance.astype(jnp.bfloat16)
        q_tile[...] = high
        k_tile[...] = (balance - high.astype(jnp.float32)).astype(jnp.bfloat16)
        pair_tile[...] = dv.astype(jnp.bfloat16)
        plgpu.commit_smem()
        pl.when(i + 1 < place.count)(lambda: load(i + 1))
        later = sums.at[Sums.PREFIX].transpose((1, 0))
        owed = plgpu.load(ends, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        dg = mm([(later, q_tile), (later, k_tile)]) + jax.lax.broadcast_in_dim(owed, (CHUNK, WIDTH), (1,))
        ends[...] = (read(state_tile) * entering).sum(axis=1)
        q_tile[...] = (dq * scale).astype(jnp.bfloat16)
        k_tile[...] = dk.astype(jnp.bfloat16)
        state_tile[...] = dg.astype(jnp.bfloat16)
        leaving_tile[...] = entering.astype(jnp.bfloat16)
        plgpu.commit_smem()
        keys, values = place.tokens(at, place.key_tile), place.tokens(at, place.value_tile)
        for smem, gmem in ((q_tile, outs[0]), (k_tile, outs[1]), (state_tile, outs[3])):
            plgpu.copy_smem_to_gmem(smem, gmem.at[(place.value_tile, *keys)])
        plgpu.copy_smem_to_gmem(pair_tile, outs[2].at[(place.key_tile, *values)])
        return entering

    jax.lax.fori_loop(0, place.count, chunk, leaving)
    plgpu.wait_smem_to_gmem(0)


def backward(q, k, v, g, chunk_states, last, do, d_last, *, scale: float, interpret=None, slots: int = 264):
    """Gradients dq, dk, dv, dg, in bfloat16, and ds0. dv comes by key tile `[Dk/64, ...]`, the others by value tile."""
    b, t, h, dk = q.shape
    split = parts.choose_split(b, h, t, (dk, v.shape[-1]), slots)
    local, decay = segment_states(q, do, g, split, reverse=True, interpret=interpret, warpgroups=WARPGROUPS)
    leaving, d_first = entry_states(local * scale, decay, d_last, split, reverse=True)
    by_key = jax.ShapeDtypeStruct((split.value_tiles, *q.shape), jnp.bfloat16)
    by_value = jax.ShapeDtypeStruct((split.key_tiles, *v.shape), jnp.bfloat16)
    n = WARPGROUPS
    scratch = [*(tile(n) for _ in range(10)), plgpu.SMEM((n, WIDTH), jnp.float32)]
    body = functools.partial(_body, split=split, scale=scale, interpret=bool(interpret))
    run = launch(body, split, (by_key, by_key, by_value, by_key), scratch, 6, interpret=interpret, warpgroups=n)
    grads = run(q, k, v, g, do, chunk_states, leaving, _owed(chunk_states, last, leaving, split))
    return (*grads, d_first)


def _owed(chunk_states: Array, last: Array, leaving: Array, split: Split) -> Array:
    """`rowsum(S dS)` of the states that leave the segments, `[units, 64]`."""
    after = chunk_states[:, split.chunks :: split.chunks].astype(jnp.float32)
    after = to_units(jnp.moveaxis(jnp.concatenate([after, last[:, None]], axis=1), 1, 0), split)
    return (jnp.moveaxis(after, 0, 1).reshape(leaving.shape) * leaving).sum(-1)

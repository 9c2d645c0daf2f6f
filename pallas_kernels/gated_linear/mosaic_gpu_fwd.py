"""Gated linear attention on Hopper, forward.

Heads alone do not fill the chip, so the sequence is cut in segments. Three steps: (1) every segment's own final state,
from zero, reading k, v and the decay; (2) a short scan over segments; (3) every segment again, now from its true
entry state, giving outputs and, for the backward, the state that enters each chunk. A warpgroup runs one head of one
segment and keeps the state in registers. Step 1 reads 3 arrays, step 3 moves 5: 8/5 of the least possible bytes. With
the normaliser a second state, of one number a key, goes beside the first, and step 3 gives each sum of weights.

Step 1 also finds how strong the decays are (`Halves`), which decides for each unit of step 3, and of the backward, how
it forms the decayed scores of a chunk: by one factorisation at the chunk's middle, or level by level.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.gated_linear import mosaic_gpu_parts as parts
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
from pallas_kernels.gated_linear.problem import NORMALISER_FLOOR, LinearState

WARPGROUPS = 3
type Also = Literal["states", "weights", "keys"]


def launch(body, split: Split, matrices, out_type, scratch, signals: int, *, interpret, warpgroups=WARPGROUPS):
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
            tile(len(matrices)),
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
    return lambda *args: kernel(jnp.asarray(matrices, jnp.bfloat16), *args)


def _states_body(unit, sums, ins, outs, buffers, signal, *, split: Split, interpret: bool):
    """A segment's own state from zero, `(k suffix)^T v` chunk by chunk; also the decay sums of `Halves`.

    With a sixth output the sums of `k suffix` too.
    """
    state_gmem, strongest_gmem, decay_gmem, weakest_gmem, halves_gmem, *keys_gmem = outs
    k, v, g, half, weighted = buffers
    place = split.place(unit)
    mm = functools.partial(products, interpret=interpret)

    def load(i):
        slot = jax.lax.rem(i, 2)
        features = (place.key_tile, place.value_tile, place.key_tile)
        for n, (gmem, smem, at) in enumerate(zip(ins, (k, v, g), features, strict=True)):
            where = place.tokens(place.first + i, at, gmem.shape[2])
            plgpu.copy_gmem_to_smem(gmem.at[where], smem.at[slot], signal(slot * 3 + n))

    load(jnp.int32(0))

    def chunk(i, carry):
        state, strongest, log_decay, weakest, keys = carry
        slot = jax.lax.rem(i, 2)
        plgpu.barrier_wait(signal(slot * 3 + 2))
        raw = read(g.at[slot])
        strongest = jnp.maximum(strongest, (-raw).max(1))
        g[slot] = bf16(jnp.maximum(raw, parts.FLOOR))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        pl.when(i + 1 < place.count)(lambda: load(i + 1))  # after a barrier: every warp is done with the other slot
        first, second = (parts.over_tokens(g.at[slot], sums.at[n], mm) for n in (Sums.FIRST, Sums.SECOND))
        suffix = jnp.exp(mm([(sums.at[Sums.SUFFIX], g.at[slot])]))
        plgpu.barrier_wait(signal(slot * 3))
        weighted[...] = bf16(read(k.at[slot]) * suffix)
        half[0], half[1] = first, second
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(half, halves_gmem.at[place.sums(place.first + i)])
        log_decay, weakest = log_decay + (first + second), jnp.minimum(weakest, jnp.minimum(first, second))
        total = jnp.exp(first + second)
        if keys_gmem:
            keys = keys * total + parts.over_tokens(weighted, sums.at[Sums.ALL], mm)
        plgpu.barrier_wait(signal(slot * 3 + 1))
        state = state * jax.lax.broadcast_in_dim(total, (WIDTH, WIDTH), (0,))
        state = mm([(weighted.transpose((1, 0)), v.at[slot])], state)
        return state, strongest, log_decay, weakest, keys

    start = (parts.zeros(), *(parts.vector() for _ in range(3)), parts.vector() if keys_gmem else None)
    found = jax.lax.fori_loop(0, place.count, chunk, start)
    state_gmem[unit], strongest_gmem[unit], log_decay, weakest_gmem[unit], keys = found
    decay_gmem[unit] = jnp.exp(log_decay)
    for gmem in keys_gmem:
        gmem[unit] = keys
    plgpu.wait_smem_to_gmem(0)


class SegmentStates(NamedTuple):
    """What a unit finds of its segment from a zero start."""

    state: Array  # [units, 64, 64]
    keys: Array | None  # [units, 64], their sums, with the normaliser
    decay: Array  # [units, 64], over all of its tokens
    strong: Array  # [units] int32: 1 where it has to go level by level


def segment_states(k, v, g, split: Split, *, normalise: bool = False, interpret=None) -> tuple[SegmentStates, Halves]:
    """Of every segment, and what the backward kernels must know of g."""
    n = WARPGROUPS
    (b, t, _, dk), h = k.shape, split.heads
    out_type = [
        jax.ShapeDtypeStruct((split.units, WIDTH, WIDTH), jnp.float32),
        *[jax.ShapeDtypeStruct((split.units, CHUNK), jnp.float32)] * 3,
        jax.ShapeDtypeStruct((b, t // CHUNK, h, 2, dk), jnp.float32),
        *[jax.ShapeDtypeStruct((split.units, WIDTH), jnp.float32)] * normalise,
    ]
    scratch = [tile(n, 2), tile(n, 2), tile(n, 2), plgpu.SMEM((n, 2, WIDTH), jnp.float32), tile(n)]
    body = functools.partial(_states_body, split=split, interpret=bool(interpret))
    matrices = Sums.STATES[: Sums.ALL + normalise]
    run = launch(body, split, matrices, out_type, scratch, 6, interpret=interpret)
    local, strongest, decay, weakest, sums, *keys = run(k, v, g)
    strong = ((weakest < -parts.RANGE) | (strongest > -parts.FLOOR)).any(1).astype(jnp.int32)
    by_head = strongest.reshape(b, split.segments, h, split.key_tiles, split.value_tiles, CHUNK)
    found = SegmentStates(local, keys[0] if normalise else None, decay, strong)
    return found, Halves(sums, by_head.max((1, 4, 5)) > -parts.FLOOR)


class Carried(NamedTuple):
    """What a unit carries from chunk to chunk: the state, and with the normaliser the sums of its keys."""

    state: Array  # [64, 64]
    keys: Array | None  # [64]

    def decayed(self, half) -> "Carried":
        """After the half of a chunk whose log-decays sum to `half`."""
        keys = None if self.keys is None else self.keys * jnp.exp(parts.row_vector(half))
        return Carried(self.state * parts.per_row(half, jnp.exp), keys)

    def store(self, state_tile, keys_ref) -> None:
        """To shared memory, for the products."""
        state_tile[...] = bf16(self.state)
        if self.keys is not None:
            keys_ref[...] = self.keys

    def add(self, weighted, v, sums, mm) -> "Carried":
        """With the chunk's keys, decayed as the state is."""
        state = mm([(weighted.transpose((1, 0)), v)], self.state)
        if self.keys is None:
            return Carried(state, None)
        return Carried(state, self.keys + parts.over_tokens(weighted, sums.at[Sums.OUTPUTS_ALL], mm))


def _read(row, scores, v, state_tile, keys_ref, mm):
    """Each query's sum of values, and (with the normaliser) of weights, over the chunk and the state before it."""
    weights = None
    if keys_ref is not None:
        before = row.astype(jnp.float32) * parts.per_column(keys_ref)
        weights = before.sum(1) + scores.astype(jnp.float32).sum(1)
    return mm([(row, state_tile), (scores, v)]), weights


def _mild_chunk(tiles, half, sums, mm, carried: Carried):
    """Outputs and next state with all scores from one factorisation at the chunk's middle."""
    q, k, v, g, weighted, state_tile, keys_ref = tiles
    factor = jnp.exp(mm([(sums.at[Sums.MIDDLE], g)]))
    weighted[...] = bf16(read(k) / factor)
    row = bf16(read(q) * factor)
    carried = carried.decayed(half.at[0])
    carried.store(state_tile, keys_ref)
    plgpu.commit_smem()
    scores = bf16(jnp.where(parts.causal(), mm([(row, weighted.transpose((1, 0)))]), 0.0))
    found = _read(row, scores, v, state_tile, keys_ref, mm)
    return found, carried.add(weighted, v, sums, mm).decayed(half.at[1])


def _strong_chunk(tiles, half, sums, mm, carried: Carried):
    """The same with scores by level: any decay."""
    q, k, v, g, weighted, state_tile, keys_ref = tiles
    parts.clamp_decay(g)

    def level(n, scores):
        exponent = mm([(sums.at[Sums.INNER + n], g)])
        weighted[...] = bf16(read(k) * jnp.exp(exponent * jnp.where(n == 0, -1.0, 1.0)))
        row = bf16(read(q) * jnp.exp(exponent))
        plgpu.commit_smem()
        return jnp.where(parts.causal(n), bf16(mm([(row, weighted.transpose((1, 0)))])), scores)

    scores = jax.lax.fori_loop(0, 1 + len(LEVELS), level, bf16(parts.zeros(CHUNK, CHUNK)))
    exponent = mm([(sums.at[Sums.MIDDLE], g)])
    weighted[...] = bf16(read(k) * jnp.exp(parts.per_column(half.at[1]) - exponent))
    row = bf16(read(q) * jnp.exp(parts.per_column(half.at[0]) + exponent))
    carried.store(state_tile, keys_ref)
    plgpu.commit_smem()
    found = _read(row, scores, v, state_tile, keys_ref, mm)
    return found, carried.decayed(half.at[0]).decayed(half.at[1]).add(weighted, v, sums, mm)


def _outputs_body(
    unit, sums, ins, outs, buffers, signal, *, split: Split, scale: float, also: tuple[Also, ...], interpret: bool
):
    """A segment from its true entry state: outputs, and what `also` names."""
    *arrays, strong_gmem, entry_gmem, entry_keys_gmem = ins if "weights" in also else (*ins, None)
    *tiles, half, weighted, state_tile, o_tile, keys_ref = buffers if "weights" in also else (*buffers, None)
    o_gmem, named = outs[0], dict(zip(also, outs[1:], strict=True))
    place = split.place(unit)
    mm = functools.partial(products, interpret=interpret)

    def load(i):
        features = (place.key_tile, place.key_tile, place.value_tile, place.key_tile)
        heads = (x.shape[2] for x in arrays[:4])
        where = [place.tokens(place.first + i, *at) for at in zip(features, heads, strict=True)]
        where.append(place.sums(place.first + i))
        for n, (gmem, smem, at) in enumerate(zip(arrays, (*tiles, half), where, strict=True)):
            plgpu.copy_gmem_to_smem(gmem.at[at], smem, signal(n))

    load(jnp.int32(0))
    entry = plgpu.load(entry_gmem.at[unit], layout=plgpu.Layout.WGMMA, optimized=False)
    entry_keys = None if entry_keys_gmem is None else parts.row_vector(entry_keys_gmem.at[unit])

    def chunk(step, i, carried):
        for n in range(len(arrays)):
            plgpu.barrier_wait(signal(n))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's copy out of o_tile
        if "states" in also:
            o_tile[...] = bf16(carried.state)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_tile, named["states"].at[place.state(place.first + i)])
        if "keys" in also:

            @pl.when(place.value_tile == 0)
            def _():
                named["keys"][place.keys(place.first + i)] = carried.keys

        (o, weights), carried = step((*tiles, weighted, state_tile, keys_ref), half, sums, mm, carried)
        if "weights" in also:

            @pl.when(place.value_tile == 0)
            def _():
                named["weights"][place.weights(place.first + i)] = weights

        if "weights" in also and split.key_tiles == 1:
            o /= jax.lax.broadcast_in_dim(scale * weights + NORMALISER_FLOOR, o.shape, (0,))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        o_tile[...] = bf16(o * scale)
        plgpu.commit_smem()
        pl.when(i + 1 < place.count)(lambda: load(i + 1))
        plgpu.copy_smem_to_gmem(o_tile, o_gmem.at[(place.key_tile, *place.tokens(place.first + i, place.value_tile))])
        return carried

    def run(step):
        jax.lax.fori_loop(0, place.count, functools.partial(chunk, step), Carried(entry, entry_keys))

    strong = strong_gmem[unit] != 0
    pl.when(strong)(lambda: run(_strong_chunk))
    pl.when(~strong)(lambda: run(_mild_chunk))
    plgpu.wait_smem_to_gmem(0)


def outputs(
    q, k, v, g, decays: tuple[Array, Array], entry, split: Split, *,
    scale: float, also: tuple[Also, ...], interpret=None,
):  # fmt: skip
    """`o` by key tile `[Dk/64, B, T, H, Dv]` in bfloat16, and of the normaliser's or the backward's what `also` names.

    'states': those that enter each chunk `[B, N, H, Dk, Dv]` in bfloat16; 'keys': the sums of keys that do
    `[B, N, H, Dk]`; 'weights': the sums of weights by key tile `[Dk/64, B, H, T]`, both in float32; where there is one
    tile, o is divided by them. `decays` are `Halves.sums` and `SegmentStates.strong`.
    """
    n = WARPGROUPS
    normalise = "weights" in also
    b, t, h, dk = q.shape
    types = {
        "states": jax.ShapeDtypeStruct((b, split.total_chunks, h, dk, v.shape[-1]), jnp.bfloat16),
        "keys": jax.ShapeDtypeStruct((b, split.total_chunks, h, dk), jnp.float32),
        "weights": jax.ShapeDtypeStruct((split.key_tiles, b, h, t), jnp.float32),
    }
    o_type = jax.ShapeDtypeStruct((split.key_tiles, b, t, h, v.shape[-1]), jnp.bfloat16)
    out_type = [o_type, *(types[name] for name in also)]
    scratch = [*(tile(n) for _ in range(4)), plgpu.SMEM((n, 2, WIDTH), jnp.float32), *(tile(n) for _ in range(3))]
    scratch += [plgpu.SMEM((n, WIDTH), jnp.float32)] * normalise
    body = functools.partial(_outputs_body, split=split, scale=scale, also=also, interpret=bool(interpret))
    matrices = Sums.OUTPUTS[: Sums.OUTPUTS_ALL + normalise]
    run = launch(body, split, matrices, out_type, scratch, 5, interpret=interpret)
    return run(q, k, v, g, *decays, *(x for x in entry if x is not None))


def to_units(state: Array, split: Split) -> Array:
    """`[..., B, H, Dk, Dv]` to `[..., B, lanes, 64, width of a value tile]`."""
    *lead, b, h, dk, _ = state.shape
    state = state.reshape(*lead, b, h, dk // WIDTH, WIDTH, split.value_tiles, -1)
    return jnp.moveaxis(state, -3, -2).reshape(*lead, b, split.lanes, WIDTH, -1)


def from_units(state: Array, split: Split) -> Array:
    """The inverse of `to_units`."""
    *lead, b, _, _, width = state.shape
    state = state.reshape(*lead, b, split.heads, split.key_tiles, split.value_tiles, WIDTH, width)
    state = jnp.moveaxis(state, -2, -3)
    return state.reshape(*lead, b, split.heads, split.key_tiles * WIDTH, split.value_tiles * width)


def entry_states(local: Array, decay: Array, start: Array, split: Split, *, reverse: bool) -> tuple[Array, Array]:
    """From every segment's own state `[units, 64, n]` and decay `[units, 64]` to the state that enters it (as the
    first), and the one after all (as `start`, `[B, H, Dk, value tiles x n]`)."""

    def by_segment(x):
        return jnp.moveaxis(x.reshape(split.batch, split.segments, split.lanes, WIDTH, -1), 1, 0)

    def combine(a, b):
        return a[0] * b[0], a[1] * b[0] + b[1]

    start = to_units(start, split)
    product, total = jax.lax.associative_scan(combine, (by_segment(decay), by_segment(local)), reverse=reverse)
    after = product * start + total
    ends = (after[1:], start[None]) if reverse else (start[None], after[:-1])
    entry = jnp.moveaxis(jnp.concatenate(ends), 0, 1).reshape(local.shape)
    return entry, from_units(after[0] if reverse else after[-1], split)


class Result(NamedTuple):
    """Of `forward`; several key tiles are to be added up, and then divided by the sum of `weights` if there are any."""

    o: Array  # [key tiles, B, T, H, Dv]
    weights: Array | None  # [key tiles, B, H, T], with the normaliser
    state: LinearState
    saved: tuple[LinearState, Halves] | None  # what enters each chunk, and what the backward must know of g


# The layers of a model share one lowering.
@functools.partial(jax.jit, static_argnames=("scale", "save", "interpret", "slots"))
def forward(q, k, v, g, start: LinearState, *, scale: float, save: bool = False, interpret=None, slots: int = 396):
    """q, k, g `[B, T, H, Dk]`, v `[B, T, H, Dv]` bfloat16, T and widths multiples of 64; k, v, g of H heads or fewer.

    `save` what the backward needs.
    """
    b, t, h, dk = q.shape
    split = parts.choose_split(b, h, t, (dk, v.shape[-1]), slots)
    normalise = start.z is not None
    own, halves = segment_states(k, v, g, split, normalise=normalise, interpret=interpret)
    over_segments = functools.partial(entry_states, decay=own.decay, split=split, reverse=False)
    entry, last = over_segments(own.state, start=start.s)
    entry_keys = last_keys = None
    if start.z is not None and own.keys is not None:
        by_value_tile = jnp.broadcast_to(start.z[..., None], (*start.z.shape, split.value_tiles))
        entry_keys, last_keys = over_segments(own.keys[..., None], start=by_value_tile)
        entry_keys, last_keys = entry_keys[..., 0], last_keys[..., 0]
    wanted: dict[Also, bool] = {"states": save, "keys": save and normalise, "weights": normalise}
    also = tuple(name for name, needed in wanted.items() if needed)
    decays = halves.sums, own.strong
    o, *more = outputs(q, k, v, g, decays, (entry, entry_keys), split, scale=scale, also=also, interpret=interpret)
    named = dict(zip(also, more, strict=True))
    saved = (LinearState(named["states"], named.get("keys")), halves) if save else None
    return Result(o, named.get("weights"), LinearState(last, last_keys), saved)

"""One result from the partial results that several programs left for each pair (see `schedule.py`), on Hopper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic_gpu_common import COLS, ROWS, TILE
from pallas_kernels.decode.schedule import Line, program_of

SLOTS = 64  # read together, as rows of a tile: what a program would read one after the other costs a wait each
REDUCED = 128  # bytes of shared memory to sum a column of a tile: a share of eight columns from each of 128 threads


def combine(
    o: Float[Array, "slots N Dv"],
    lse: Float[Array, "slots N"],
    line: Callable[..., Line],
    counts: tuple[Array, ...],
    shape: tuple[int, int, int, int, int],
    programs: int,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """Softmax-weighted mean over the slots `program + pair` of a pair's programs; 0 and -inf for a pair without any.

    The first two end in `SLOTS` slots that are read and not used. `line(*refs)` is the schedule, read from `counts`;
    `shape` is (batch, new tokens, KV heads, group, Dv).
    """
    batch, queries, kv_heads, group, dim = shape
    by_slot = lambda x: lax.broadcast_in_dim(x, (SLOTS, dim), [0])

    def kernel(o_ref, lse_ref, *rest: Any):
        *count_refs, out_ref, out_lse_ref = rest
        pair, row = lax.axis_index("pair"), lax.axis_index("row")
        along = line(*count_refs)
        total_visits = along.total()
        begin, visits = along.start(pair)
        first = program_of(begin, total_visits, programs) + pair
        last = jnp.where(visits > 0, program_of(begin + visits - 1, total_visits, programs) + pair, first - 1)
        slot = plgpu.broadcasted_iota(jnp.int32, (SLOTS,), 0, layout=ROWS)

        def add(step, carry):
            top, total, mean = carry
            at = first + step * SLOTS
            part = plgpu.load(lse_ref.at[pl.ds(at, SLOTS), row], layout=ROWS, optimized=False)
            value = plgpu.load(o_ref.at[pl.ds(at, SLOTS), row], layout=TILE, optimized=False).astype(jnp.float32)
            part = jnp.where(at + slot <= last, part, -jnp.inf)
            value = jnp.where(by_slot(part) == -jnp.inf, 0.0, value)  # slots that nobody wrote may hold anything
            new_top = jnp.maximum(top, part.max())
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            weight, shrink = jnp.exp(part - base), jnp.exp(top - base)
            return new_top, total * shrink + weight.sum(), mean * shrink + (value * by_slot(weight)).sum(axis=0)

        zeros = plgpu.layout_cast(jnp.zeros((dim,), jnp.float32), COLS)
        steps = lax.div(last - first + SLOTS, jnp.int32(SLOTS))
        start = jnp.float32(-jnp.inf), jnp.float32(0.0), zeros
        top, total, mean = lax.fori_loop(0, steps, add, start)
        some = jnp.where(total > 0, total, 1.0)
        b, query = lax.div(pair, jnp.int32(kv_heads)), lax.div(row, jnp.int32(group))
        head = lax.rem(pair, jnp.int32(kv_heads)) * group + lax.rem(row, jnp.int32(group))
        out_ref[b, query, head] = (mean / some).astype(out_ref.dtype)
        out_lse_ref[b, head, query] = jnp.where(total > 0, top + jnp.log(some), -jnp.inf)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, queries, kv_heads * group, dim), o.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads * group, queries), jnp.float32),
        ),
        grid=(batch * kv_heads, queries * group),
        grid_names=("pair", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=dim * REDUCED),
        interpret=interpret,
    )(o, lse, *counts)

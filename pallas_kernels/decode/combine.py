"""One result from the partial results that several programs left for each pair (see `schedule.py`), on Hopper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.decode.schedule import Line, program_of

THREADS = 128  # of a warpgroup
BATCH = 16  # slots loaded together: a load takes as long as a hundred multiply-adds


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

    `line(*refs)` is the schedule, read from `counts`; `shape` is (batch, new tokens, KV heads, group, Dv).
    """
    batch, queries, kv_heads, group, dim = shape
    layout = plgpu.Layout.WG_STRIDED((dim,), dim // THREADS)
    if dim % THREADS:
        layout = plgpu.Layout.WGMMA.reduce(1)  # multiples of 64, each value in four threads

    def kernel(o_ref, lse_ref, *rest: Any):
        *count_refs, out_ref, out_lse_ref = rest
        pair, row = lax.axis_index("pair"), lax.axis_index("row")
        along = line(*count_refs)
        total_visits = along.total()
        begin, visits = along.start(pair)
        first = program_of(begin, total_visits, programs) + pair
        last = jnp.where(visits > 0, program_of(begin + visits - 1, total_visits, programs) + pair, first - 1)

        def add(step, carry):
            top, total, mean = carry
            mine = [first + step * BATCH + n for n in range(BATCH)]
            at = [jnp.minimum(slot, last) for slot in mine]
            part = [jnp.where(slot <= last, lse_ref[n, row], -jnp.inf) for slot, n in zip(mine, at, strict=True)]
            value = [plgpu.load(o_ref.at[n, row], layout=layout, optimized=False).astype(jnp.float32) for n in at]
            new_top = top
            for x in part:
                new_top = jnp.maximum(new_top, x)
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            shrink = jnp.exp(top - base)
            total, mean = total * shrink, mean * shrink
            for x, v in zip(part, value, strict=True):
                weight = jnp.exp(x - base)
                total, mean = total + weight, mean + weight * v
            return new_top, total, mean

        zeros = plgpu.layout_cast(jnp.zeros((dim,), jnp.float32), layout)
        steps = lax.div(jnp.maximum(last - first + 1, 0) + (BATCH - 1), jnp.int32(BATCH))
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
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(o, lse, *counts)

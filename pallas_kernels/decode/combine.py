"""One result from the partial results that several programs left for each pair (see `schedule.py`), on Hopper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

LANES = 128  # threads of a warpgroup; a row of the result is a multiple of it
BATCH = 8  # slots loaded together: a load takes as long as a hundred multiply-adds


def padded(dim: int) -> int:
    """Columns that a row of partial results is stored with."""
    return -(-dim // LANES) * LANES


def combine(
    o: Float[Array, "slots R Dv"],
    lse: Float[Array, "slots _"],
    owner: Int[Array, "pairs 2"],
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "pairs R Dv"], Float[Array, "pairs R"]]:
    """Softmax-weighted mean over the slots `program + pair` of a pair's programs. Slots of nobody are not used."""
    pairs, (_, rows, dim) = owner.shape[0], o.shape
    layout = plgpu.Layout.WG_STRIDED((dim,), dim // LANES)

    def kernel(o_ref, lse_ref, owner_ref, out_ref, out_lse_ref):
        pair, row = lax.axis_index("pair"), lax.axis_index("row")
        first, last = owner_ref[pair, 0] + pair, owner_ref[pair, 1] + pair

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
        steps = lax.div(jnp.maximum(last - first + 1, 0) + (BATCH - 1), BATCH)
        start = jnp.float32(-jnp.inf), jnp.float32(0.0), zeros
        top, total, mean = lax.fori_loop(0, steps, add, start)
        some = jnp.where(total > 0, total, 1.0)
        out_ref[pair, row] = (mean / some).astype(out_ref.dtype)
        out_lse_ref[pair, row] = jnp.where(total > 0, top + jnp.log(some), -jnp.inf)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((pairs, rows, dim), o.dtype),
            jax.ShapeDtypeStruct((pairs, rows), jnp.float32),
        ),
        grid=(pairs, rows),
        grid_names=("pair", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(o, lse, owner)

"""The delta rule on Hopper: gated linear attention of the values that it writes.

Those are found first, by a recurrence of their own (`mosaic_gpu_solve`). Backwards the same recurrence finds what their
cotangents are. From there on both are fixed, and the gradients are those of two readers of one state: the queries, and
the keys, which read it in order to erase.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.gated_linear import mosaic_gpu_bwd, mosaic_gpu_fwd, mosaic_gpu_solve
from pallas_kernels.gated_linear.mosaic_gpu_parts import add_tiles, add_up, bf16
from pallas_kernels.gated_linear.problem import LinearState


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def delta_rule(q, k, v, g, beta, start: Array, scale: float, interpret):
    """Outputs `[B, T, H, Dv]` and the last state, from q, k, v `[B, T, H, features]` in bfloat16.

    g `[B, T, 1 or H, Dk]` is alike in all channels; beta `[B, T, H]` and `start` `[B, H, Dk, Dv]` are float32. T and
    the widths are multiples of 64.
    """
    found, _ = _forward(q, k, v, g, beta, start, scale, interpret, save=False)
    return add_tiles(found.o), found.state.s


def _forward(q, k, v, g, beta, start, scale, interpret, *, save: bool):
    rows = mosaic_gpu_solve.Rows.of(g[..., 0], beta)
    u, w = mosaic_gpu_solve.missing(k, v, rows, interpret=interpret)
    lacked, written = mosaic_gpu_solve.through_chunks(u, w, k, rows, start, interpret=interpret)
    state = LinearState(start, None)
    found = mosaic_gpu_fwd.forward(q, k, written, g, state, scale=scale, save=save, interpret=interpret)
    return found, (lacked, written, rows)


def _delta_forward(q, k, v, g, beta, start, scale, interpret):
    found, solved = _forward(q, k, v, g, beta, start, scale, interpret, save=True)
    return (add_tiles(found.o), found.state.s), (q, k, g, solved, found.saved, found.state)


def _delta_backward(scale, interpret, residuals, cotangents):
    q, k, g, (lacked, written, rows), saved, last = residuals
    do, d_last = cotangents
    scaled = bf16(scale * q)
    u, w = mosaic_gpu_solve.owed(scaled, k, do, rows, interpret=interpret)
    d_written, dv = mosaic_gpu_solve.through_chunks(u, w, k, rows, d_last, (scaled, do), interpret=interpret)

    def of_reader(queries, d_read, d_last, scale):
        cotangents = (d_read, None, LinearState(d_last, None))
        (d_queries, dk, _, dg), d_first = mosaic_gpu_bwd.backward(
            queries, k, written, g, saved, last, cotangents, scale=scale, interpret=interpret
        )
        return add_tiles(d_queries), add_tiles(dk), add_up(dg, g.shape[2]), d_first.s

    dq, dk, dg, d_first = of_reader(q, do, d_last, scale)
    *dk_erasing, dg_erasing, d_first_erasing = of_reader(k, -dv, jnp.zeros_like(d_last), 1.0)
    # That reader also sees its own token's write, which a key does not erase.
    own = 2 * (dv.astype(jnp.float32) * written.astype(jnp.float32)).sum(-1, keepdims=True) * k.astype(jnp.float32)
    dk = own + sum(x.astype(jnp.float32) for x in (dk, *dk_erasing))
    d_beta = (d_written.astype(jnp.float32) * lacked.astype(jnp.float32)).sum(-1)
    return dq, bf16(dk), dv, dg + dg_erasing, d_beta, d_first + d_first_erasing


delta_rule.defvjp(_delta_forward, _delta_backward)

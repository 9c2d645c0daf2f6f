"""Gated linear attention on TPU: backward kernel, over the chunks from the last to the first.

The state cotangent stays in scratch memory, transposed like the state. Scores are computed again, level by level. The
decay gradient is a reversed running sum of `q dq - k dk` over the chunk, plus `colsum(S dS)` of the state that leaves,
which the chunk after has left in scratch.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear import mosaic_tpu as fwd
from pallas_kernels.gated_linear.mosaic_tpu import BLOCK_TOKENS, CHUNK, PREFIX, dot

Ref = Any  # a block in memory


def _levels(qc, kc, d_scores, x, kind):
    """Scores again, and the gradients that pass through them: `(scores, dq, dk)`."""
    scores, dq, dk = jnp.zeros((CHUNK, CHUNK), jnp.float32), 0.0, 0.0
    for mask, (row, column) in zip(fwd.level_masks(), fwd.level_factors(x), strict=True):
        rows, columns = (qc * row).astype(kind), (kc * column).astype(kind)
        scores = jnp.where(mask, dot(rows, columns, (1, 1)), scores)
        part = jnp.where(mask, d_scores, 0.0).astype(kind)
        dq = dq + dot(part, columns, (1, 0)) * row
        dk = dk + dot(part, rows, (0, 0)) * column
    return scores, dq, dk


class _Refs(NamedTuple):
    """Blocks of inputs, outputs and scratch, in the order of the call."""

    sums: Ref
    q: Ref
    k: Ref
    v: Ref
    g: Ref
    do: Ref
    states: Ref  # entering each chunk
    d_last: Ref
    last: Ref
    dq: Ref
    dk: Ref
    dv: Ref
    dg: Ref
    d_first: Ref
    leaving: Ref  # cotangent of the state that leaves the chunk
    owed: Ref  # colsum(S dS) there


def _body(*refs, scale: float):
    r = _Refs(*refs)
    block, blocks = pl.program_id(2), pl.num_programs(2)
    chunks = r.q.shape[2] // CHUNK

    @pl.when(block == 0)
    def _():
        r.leaving[...] = r.d_last[0, 0]
        r.owed[...] = (r.d_last[0, 0] * r.last[0, 0]).sum(0, keepdims=True)

    @pl.loop(0, chunks)
    def _(step):
        _chunk(r, chunks - 1 - step, scale)

    @pl.when(block == blocks - 1)
    def _():
        r.d_first[0, 0] = r.leaving[...]


def _chunk(r: _Refs, n, scale: float):
    at = (0, 0, pl.ds(n * CHUNK, CHUNK))
    vc, doc, kind = r.v[at], r.do[at], r.v.dtype
    qc, kc = r.q[at].astype(jnp.float32) * scale, r.k[at].astype(jnp.float32)
    s, ds = r.states[0, 0, n], r.leaving[...]
    x = fwd.chunk_sums(r.g[at], r.sums[...])
    scores, d_row, d_column = _levels(qc, kc, dot(doc, vc, (1, 1)), x, kind)
    prefix, whole = jnp.exp(x[PREFIX]), x[PREFIX][CHUNK - 1 :]
    suffix = jnp.exp(whole - x[PREFIX])
    d_row = d_row + dot(doc, s.astype(kind), (1, 0)) * prefix
    d_column = d_column + dot(vc, ds.astype(kind), (1, 0)) * suffix
    d_value = dot(scores.astype(kind), doc, (0, 0)) + dot((kc * suffix).astype(kind), ds.astype(kind), (1, 1))
    entering = ds * jnp.exp(whole) + dot(doc, (qc * prefix).astype(kind), (0, 0))
    balance = qc * d_row - kc * d_column
    later = r.sums[PREFIX * CHUNK :].astype(jnp.float32)
    d_decay = dot(later, balance, (0, 0)) + r.owed[...]
    r.owed[...] = (s * entering).sum(0, keepdims=True)
    r.leaving[...] = entering
    for ref, value in ((r.dq, d_row * scale), (r.dk, d_column), (r.dv, d_value), (r.dg, d_decay)):
        ref[at] = value.astype(ref.dtype)


def backward(q, k, v, g, states, last, do, d_last, *, scale: float, interpret=None):
    """Gradients of q, k, v, g and the initial state, shaped and typed like them."""
    (_, _, t, dk), dv = q.shape, v.shape[-1]
    grid, rows, whole, per_chunk, constant = fwd.specs((q.shape, dv), min(BLOCK_TOKENS, t), reverse=True)

    call = pl.pallas_call(
        functools.partial(_body, scale=scale),
        grid=grid,
        in_specs=[constant, rows(dk), rows(dk), rows(dv), rows(dk), rows(dv), per_chunk, whole, whole],
        out_specs=[rows(dk), rows(dk), rows(dv), rows(dk), whole],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, g, d_last)],
        scratch_shapes=[pltpu.VMEM((dv, dk), jnp.float32), pltpu.VMEM((1, dk), jnp.float32)],
        compiler_params=fwd.params(),
        interpret=interpret or False,
        name="gated_linear_bwd",
    )
    return call(jnp.asarray(fwd.sum_matrices(), jnp.bfloat16), q, k, v, g, do, states, d_last, last)

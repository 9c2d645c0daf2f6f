"""Gated linear attention and the delta rule on TPU: backward kernel, over the chunks from the last to the first.

The state cotangent stays in scratch memory, transposed like the state. Scores are computed again, level by level. The
decay gradient is a reversed running sum of `q dq - k dk` over the chunk (of k as a row less as a column), plus
`colsum(S dS)` of the state that leaves, which the chunk after has left in scratch.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.gated_linear import mosaic_tpu as fwd
from pallas_kernels.gated_linear.mosaic_tpu import CHUNK, PREFIX, Inputs
from pallas_kernels.gated_linear.mosaic_tpu_delta import Written, dot

Ref = Any  # a block in memory


def _levels(rows: tuple[Array, ...], columns, cotangents, factors, kind):
    """`decayed_products` again, and the gradients through them: `(products, d_rows, d_columns)`."""
    products, d_rows, d_columns = [jnp.zeros((CHUNK, CHUNK), jnp.float32) for _ in rows], [0.0 for _ in rows], 0.0
    for mask, (row, column) in zip(fwd.level_masks(), factors, strict=True):
        decayed = (columns * column).astype(kind)
        for n, (x, cotangent) in enumerate(zip(rows, cotangents, strict=True)):
            x, part = (x * row).astype(kind), jnp.where(mask, cotangent, 0.0).astype(kind)
            products[n] = jnp.where(mask, dot(x, decayed, (1, 1)), products[n])
            d_rows[n] = d_rows[n] + dot(part, decayed, (1, 0)) * row
            d_columns = d_columns + dot(part, x, (0, 0)) * column
    return products, d_rows, d_columns


class _Refs(NamedTuple):
    """Blocks of inputs, outputs and scratch, in the order of the call."""

    sums: Ref
    q: Ref
    k: Ref
    v: Ref
    g: Ref
    beta: Ref  # None without the delta rule
    s0: Ref
    states: Ref  # entering each chunk
    last: Ref
    do: Ref
    d_last: Ref
    dq: Ref
    dk: Ref
    dv: Ref
    dg: Ref
    dbeta: Ref
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


class _Chunk(NamedTuple):
    """A chunk's inputs in float32, except those of products with the state alone, and its decays."""

    q: Array  # scaled
    k: Array
    v: Array
    do: Array
    s: Array
    ds: Array  # of the state that leaves
    x: Array  # `chunk_sums`
    prefix: Array
    suffix: Array

    @classmethod
    def read(cls, r: _Refs, n, scale: float) -> "_Chunk":
        at = (0, 0, pl.ds(n * CHUNK, CHUNK))
        q, k, x = r.q[at].astype(jnp.float32) * scale, r.k[at].astype(jnp.float32), fwd.chunk_sums(r.g[at], r.sums[...])
        sums = x[PREFIX]
        factors = jnp.exp(sums), jnp.exp(sums[CHUNK - 1 :] - sums)
        return cls(q, k, r.v[at], r.do[at], r.states[0, 0, n], r.leaving[...], x, *factors)

    @property
    def kind(self):
        return self.v.dtype

    def d_values(self, scores) -> Array:
        """Cotangents of what the chunk writes."""
        late = (self.k * self.suffix).astype(self.kind)
        return dot(scores.astype(self.kind), self.do, (0, 0)) + dot(late, self.ds.astype(self.kind), (1, 1))

    def entering(self) -> Array:
        """Cotangent of the state that enters, but for what the delta rule reads of it."""
        whole = self.x[PREFIX][CHUNK - 1 :]
        return self.ds * jnp.exp(whole) + dot(self.do, (self.q * self.prefix).astype(self.kind), (0, 0))

    def d_read(self, d_out) -> Array:
        """From the cotangent of what decayed rows read of the state to that of the rows."""
        return dot(d_out, self.s.astype(self.kind), (1, 0)) * self.prefix

    def d_written(self, values) -> Array:
        """From the values that are written to the cotangent of the keys they are written at."""
        return dot(values, self.ds.astype(self.kind), (1, 0)) * self.suffix


def _chunk(r: _Refs, n, scale: float):
    c = _Chunk.read(r, n, scale)
    dq, dk_rows, dk, dv, entering = _add(c) if r.beta is None else _delta(c, r.beta, r.dbeta, (0, 0, 0, pl.ds(n, 1)))
    later = r.sums[PREFIX * CHUNK :].astype(jnp.float32)
    # the decay from j to i has a factor of each token after j up to i: credit row i, debit column j, sum from the end
    d_decay = dot(later, c.q * dq + c.k * (dk_rows - dk), (0, 0)) + r.owed[...]
    r.owed[...] = (c.s * entering).sum(0, keepdims=True)
    r.leaving[...] = entering
    at = (0, 0, pl.ds(n * CHUNK, CHUNK))
    for ref, value in ((r.dq, dq * scale), (r.dk, dk + dk_rows), (r.dv, dv), (r.dg, d_decay)):
        ref[at] = value.astype(ref.dtype)


def _add(c: _Chunk):
    """Gradients where tokens write their values: `dq, dk as a row, dk as a column, dv`, and the entering cotangent."""
    factors = fwd.level_factors(c.x)
    (scores,), (dq,), dk = _levels((c.q,), c.k, (dot(c.do, c.v, (1, 1)),), factors, c.kind)
    return dq + c.d_read(c.do), 0.0, dk + c.d_written(c.v), c.d_values(scores), c.entering()


def _delta(c: _Chunk, beta: Ref, dbeta: Ref, at):
    """The same under the delta rule."""
    rows, factors, kind = (c.q, c.k), tuple(fwd.level_factors(c.x)), c.kind
    scores, keys = fwd.decayed_products(rows, c.k, factors, kind)
    early = (c.k * c.prefix).astype(kind)
    written = Written.of(c.v, dot(early, c.s.astype(kind), (1, 1)), beta[at], keys)
    dv, d_keys, dbeta[at] = written.gradients(c.d_values(scores), kind)
    values, erased = written.values.astype(kind), dv.astype(kind)
    _, (dq, dk_rows), dk = _levels(rows, c.k, (dot(c.do, values, (1, 1)), d_keys), factors, kind)
    entering = c.entering() - dot(erased, early, (0, 0))
    return dq + c.d_read(c.do), dk_rows - c.d_read(erased), dk + c.d_written(values), dv, entering


def backward(inputs: Inputs, states, last, do, d_last, *, scale: float, interpret=None) -> Inputs:
    """Gradients of the inputs, shaped and typed like them."""
    at = fwd.Specs.of(inputs.q, inputs.v.shape[-1], reverse=True)
    like_inputs = [at.keys, at.keys, at.values, at.keys, None if inputs.beta is None else at.beta, at.whole]
    state = inputs.s0.shape[2:]
    call = pl.pallas_call(
        functools.partial(_body, scale=scale),
        grid=at.grid,
        in_specs=[at.sums, *like_inputs, at.per_chunk, at.whole, at.values, at.whole],
        out_specs=like_inputs,
        out_shape=[None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs],
        scratch_shapes=[pltpu.VMEM(state, jnp.float32), pltpu.VMEM((1, state[1]), jnp.float32)],
        compiler_params=fwd.params(),
        interpret=interpret or False,
        name="gated_linear_bwd",
    )
    return Inputs(*call(jnp.asarray(fwd.sum_matrices(), jnp.bfloat16), *inputs, states, last, do, d_last))

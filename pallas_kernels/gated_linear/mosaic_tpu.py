"""Gated linear attention and the delta rule on TPU: forward kernel, what it takes, its pairing with the backward.

The grid runs over (batch row, head, block of tokens), the last one in order; the state stays in scratch memory from
block to block. It is kept transposed, `[Dv, Dk]`, so that decays per key channel run along the lanes. Decay factors are
`exp` of signed sums of log-decays, and all the sums of a chunk come from one product with a constant matrix.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.gated_linear.mosaic_tpu_delta import Written, dot
from pallas_kernels.gated_linear.problem import LinearState, Problem, varying_like, widen, widened_results
from pallas_kernels.op import Unsupported, interpreter, platform

CHUNK = 128
BLOCK_TOKENS = 512  # tokens a grid step
FLOOR = (
    -16.0
)  # a stronger log-decay counts as this one: e^-16 = 1e-7 is the rounding of float32, and e^(4*16) is in range
LEVELS = (8, 16, 32, 64)  # block widths of the one-sided levels; below them, pairs inside a block of 8 rows
PREFIX = 1 + len(LEVELS)  # index of the running sums
MAX_WIDTH = 256


class Inputs(NamedTuple):
    """What the kernels differentiate in. T is in whole blocks."""

    q: Array  # [B, H, T, Dk]
    k: Array
    v: Array  # [B, H, T, Dv]
    g: Array  # [B, H, T, Dk]
    beta: Array | None  # [B, H, blocks, chunks, CHUNK], float32
    s0: Array  # [B, H, Dv, Dk], float32


def sum_matrices() -> np.ndarray:
    """`[S * CHUNK, CHUNK]`: inner sums (signed, from the middle of a block of 8), sums by level, running sums."""
    i, t = np.mgrid[:CHUNK, :CHUNK]
    middle = i // 8 * 8 + 4
    out = [((t >= middle) & (t <= i)).astype(np.float32) - ((t < middle) & (t > i))]
    for w in LEVELS:
        right = i // w % 2 == 1
        border = np.where(right, i // w, i // w + 1) * w
        out.append(np.where(right, (t >= border) & (t <= i), (t > i) & (t < border)))
    return np.concatenate([*out, t <= i]).astype(np.float32)


def chunk_sums(g, sums) -> Array:
    """All signed sums of a chunk's log-decays `[S, CHUNK, Dk]`: the log-decays in bfloat16 parts against 0 and 1."""
    rest = jnp.maximum(g.astype(jnp.float32), FLOOR)
    found = jnp.zeros((sums.shape[0], g.shape[-1]), jnp.float32)
    for _ in range(1 if g.dtype == jnp.bfloat16 else 3):
        part = rest.astype(jnp.bfloat16)
        found, rest = found + dot(sums, part, (1, 0)), rest - part.astype(jnp.float32)
    return found.reshape(-1, CHUNK, g.shape[-1])


def level_masks():
    """Which pairs (i, j) of a chunk, j <= i, belong to the inner blocks and to each level."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), d) for d in (0, 1))
    apart = (i // 8) ^ (j // 8)
    yield (apart == 0) & (j <= i)
    for w in LEVELS:
        yield (apart >= w // 8) & (apart < w // 4) & (j < i)


def level_factors(x):
    """Row and column factors of the inner blocks and of each level."""
    for n in range(1 + len(LEVELS)):
        factor = jnp.exp(x[n])
        yield factor, jnp.exp(-x[n]) if n == 0 else factor


def decayed_products(rows: tuple[Array, ...], columns, factors, kind) -> list[Array]:
    """`sum_c row[i,c] column[j,c] decay(j -> i)[c]` for j <= i, else 0, of each of `rows`."""
    found = [jnp.zeros((CHUNK, CHUNK), jnp.float32) for _ in rows]
    for mask, (row, column) in zip(level_masks(), factors, strict=True):
        decayed = (columns * column).astype(kind)
        found = [
            jnp.where(mask, dot((x * row).astype(kind), decayed, (1, 1)), y) for x, y in zip(rows, found, strict=True)
        ]
    return found


def _forward_body(sums, q, k, v, g, beta, s0, o, last, states, state, *, scale: float):
    block, blocks = pl.program_id(2), pl.num_programs(2)

    @pl.when(block == 0)
    def _():
        state[...] = s0[0, 0]

    @pl.loop(0, q.shape[2] // CHUNK)
    def _(n):
        at = (0, 0, pl.ds(n * CHUNK, CHUNK))
        qc, kc, vc, s = q[at].astype(jnp.float32), k[at].astype(jnp.float32), v[at], state[...]
        kind = vc.dtype
        if states is not None:
            states[0, 0, n] = s
        x = chunk_sums(g[at], sums[...])
        prefix, whole = jnp.exp(x[PREFIX]), x[PREFIX][CHUNK - 1 :]
        scores, *keys = decayed_products((qc,) if beta is None else (qc, kc), kc, level_factors(x), kind)
        if beta is not None:
            read = dot((kc * prefix).astype(kind), s.astype(kind), (1, 1))
            vc = Written.of(vc, read, beta[0, 0, 0, pl.ds(n, 1)], *keys).values.astype(kind)
        out = dot((qc * prefix).astype(kind), s.astype(kind), (1, 1)) + dot(scores.astype(kind), vc, (1, 0))
        o[at] = (out * scale).astype(o.dtype)
        state[...] = s * jnp.exp(whole) + dot(vc, (kc * jnp.exp(whole - x[PREFIX])).astype(kind), (0, 0))

    @pl.when(block == blocks - 1)
    def _():
        last[0, 0] = state[...]


class Specs(NamedTuple):
    """Of a call whose grid is (batch row, head, block of tokens)."""

    grid: tuple[int, int, int]
    sums: pl.BlockSpec  # `sum_matrices`
    keys: pl.BlockSpec  # of `[B, H, T, Dk]`
    values: pl.BlockSpec  # of `[B, H, T, Dv]`
    beta: pl.BlockSpec  # of `[B, H, blocks, chunks, CHUNK]`
    whole: pl.BlockSpec  # of a state `[B, H, Dv, Dk]`
    per_chunk: pl.BlockSpec  # of states `[B, H, N, Dv, Dk]`

    @classmethod
    def of(cls, q, dv: int, *, reverse: bool = False) -> "Specs":
        b, h, t, dk = q.shape
        tokens = min(BLOCK_TOKENS, t)
        blocks, chunks = t // tokens, tokens // CHUNK

        def along(*shape):
            zeros = (0,) * (len(shape) - 1)
            return pl.BlockSpec((1, 1, *shape), lambda b, h, n: (b, h, blocks - 1 - n if reverse else n, *zeros))

        return cls(
            (b, h, blocks),
            pl.BlockSpec(((PREFIX + 1) * CHUNK, CHUNK), lambda b, h, n: (0, 0)),
            along(tokens, dk),
            along(tokens, dv),
            along(1, chunks, CHUNK),
            pl.BlockSpec((1, 1, dv, dk), lambda b, h, n: (b, h, 0, 0)),
            along(chunks, dv, dk),
        )


def params():
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def forward(inputs: Inputs, *, scale: float, save: bool, interpret=None):
    """Outputs `[B, H, T, Dv]`, the last state, and (`save`) those that enter each chunk."""
    q, _, v, _, beta, s0 = inputs
    at = Specs.of(q, v.shape[-1])
    states = (*q.shape[:2], q.shape[2] // CHUNK, *s0.shape[2:])
    call = pl.pallas_call(
        functools.partial(_forward_body, scale=scale),
        grid=at.grid,
        in_specs=[at.sums, at.keys, at.keys, at.values, at.keys, None if beta is None else at.beta, at.whole],
        out_specs=[at.values, at.whole, at.per_chunk if save else None],
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(s0.shape, jnp.float32),
            jax.ShapeDtypeStruct(states, jnp.float32) if save else None,
        ],
        scratch_shapes=[pltpu.VMEM(s0.shape[2:], jnp.float32)],
        compiler_params=params(),
        interpret=interpret or False,
        name="gated_linear_fwd",
    )
    return call(jnp.asarray(sum_matrices(), jnp.bfloat16), *inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _kernel(inputs: Inputs, scale: float, interpret):
    return tuple(forward(inputs, scale=scale, save=False, interpret=interpret)[:2])


def _kernel_forward(inputs, scale, interpret):
    o, last, states = forward(inputs, scale=scale, save=True, interpret=interpret)
    return (o, last), (inputs, states, last)


def _kernel_backward(scale, interpret, residuals, cotangents):
    from pallas_kernels.gated_linear.mosaic_tpu_bwd import backward  # it builds on this module

    return (backward(*residuals, *cotangents, scale=scale, interpret=interpret),)


_kernel.defvjp(_kernel_forward, _kernel_backward)


def attend(p: Problem) -> tuple[Array, LinearState]:
    """The `mosaic_tpu` backend. `p` must have its segments folded. Log-decays count down to -16."""
    _check(p)
    v, s0 = widen(p)
    t = p.q.shape[1]
    step = CHUNK if t <= BLOCK_TOKENS else BLOCK_TOKENS

    def by_head(x):
        return jnp.pad(x, ((0, 0), (0, -t % step), (0, 0), (0, 0))).swapaxes(1, 2)

    g = varying_like(jnp.zeros_like(p.k), p.q) if p.log_decay is None else p.log_decay
    g = jnp.broadcast_to(g if g.ndim == 4 else g[..., None], p.k.shape)
    beta = None
    if p.beta is not None:
        beta = by_head(p.beta.astype(jnp.float32)[..., None])
        beta = beta.reshape(*beta.shape[:2], -1, min(BLOCK_TOKENS, beta.shape[2]) // CHUNK, CHUNK)
    inputs = Inputs(by_head(p.q), by_head(p.k), by_head(v), by_head(g), beta, s0.swapaxes(2, 3))
    o, last = _kernel(inputs, p.scale, interpreter())
    return widened_results(p, o.swapaxes(1, 2)[:, :t], last.swapaxes(2, 3))


def _check(p: Problem) -> None:
    if interpreter() is None and platform() != "tpu":
        raise Unsupported(f"needs a TPU, this is {platform()}")
    if p.q.dtype not in (jnp.bfloat16, jnp.float32) or not p.q.dtype == p.k.dtype == p.v.dtype:
        raise Unsupported(f"q, k, v are {p.q.dtype}, {p.k.dtype}, {p.v.dtype}: give all in bfloat16 or all in float32")
    if max(p.q.shape[-1], p.v.shape[-1]) > MAX_WIDTH:
        raise Unsupported(f"q has {p.q.shape[-1]} and v {p.v.shape[-1]} features, the kernel takes at most {MAX_WIDTH}")

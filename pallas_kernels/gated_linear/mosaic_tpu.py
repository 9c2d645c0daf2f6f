"""Gated linear attention on TPU: forward kernel, what it takes, and its pairing with the backward.

The grid runs over (batch row, head, block of tokens), the last one in order; the state stays in scratch memory from
block to block. It is kept transposed, `[Dv, Dk]`, so that decays per key channel run along the lanes. Decay factors are
`exp` of signed sums of log-decays, and all the sums of a chunk come from one product with a constant matrix.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

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


def dot(a, b, contract: tuple[int, int]) -> Array:
    """A product over axis `contract[0]` of a and `contract[1]` of b, float32; exact where the inputs are float32."""
    exact = a.dtype == jnp.float32
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


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


def _forward_body(sums, q, k, v, g, s0, o, last, states, state, *, scale: float):
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
        scores = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        for mask, (row, column) in zip(level_masks(), level_factors(x), strict=True):
            found = dot((qc * row).astype(kind), (kc * column).astype(kind), (1, 1))
            scores = jnp.where(mask, found, scores)
        prefix, whole = x[PREFIX], x[PREFIX][CHUNK - 1 :]
        out = dot((qc * jnp.exp(prefix)).astype(kind), s.astype(kind), (1, 1)) + dot(scores.astype(kind), vc, (1, 0))
        o[at] = (out * scale).astype(o.dtype)
        state[...] = s * jnp.exp(whole) + dot(vc, (kc * jnp.exp(whole - prefix)).astype(kind), (0, 0))

    @pl.when(block == blocks - 1)
    def _():
        last[0, 0] = state[...]


def specs(shapes, tokens: int, reverse: bool = False):
    """Block specs of `[B, H, T, F]` arrays, and of per-row states and per-chunk states of widths (Dv, Dk)."""
    (b, h, t, dk), dv = shapes[0], shapes[1]
    blocks = t // tokens
    order = (lambda n: blocks - 1 - n) if reverse else (lambda n: n)
    rows = lambda f: pl.BlockSpec((1, 1, tokens, f), lambda b, h, n: (b, h, order(n), 0))
    whole = pl.BlockSpec((1, 1, dv, dk), lambda b, h, n: (b, h, 0, 0))
    per_chunk = pl.BlockSpec((1, 1, tokens // CHUNK, dv, dk), lambda b, h, n: (b, h, order(n), 0, 0))
    constant = pl.BlockSpec(((PREFIX + 1) * CHUNK, CHUNK), lambda b, h, n: (0, 0))
    return (b, h, blocks), rows, whole, per_chunk, constant


def params():
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def forward(q, k, v, g, s0, *, scale: float, save: bool, interpret=None):
    """q, k, g `[B,H,T,Dk]`, v `[B,H,T,Dv]`, s0 `[B,H,Dv,Dk]`, T in whole blocks. Returns o, last, chunk states."""
    (b, h, t, dk), dv = q.shape, v.shape[-1]
    tokens = min(BLOCK_TOKENS, t)
    grid, rows, whole, per_chunk, constant = specs((q.shape, dv), tokens)
    out_shape = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(s0.shape, jnp.float32)]
    out_specs = [rows(dv), whole]
    if save:
        out_shape.append(jax.ShapeDtypeStruct((b, h, t // CHUNK, dv, dk), jnp.float32))
        out_specs.append(per_chunk)

    def body(sums, q, k, v, g, s0, o, last, *rest):
        _forward_body(sums, q, k, v, g, s0, o, last, *(rest if save else (None, *rest)), scale=scale)

    call = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[constant, rows(dk), rows(dk), rows(dv), rows(dk), whole],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((dv, dk), jnp.float32)],
        compiler_params=params(),
        interpret=interpret or False,
        name="gated_linear_fwd",
    )
    o, last, *states = call(jnp.asarray(sum_matrices(), jnp.bfloat16), q, k, v, g, s0)
    return o, last, states[0] if save else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _kernel(q, k, v, g, s0, scale: float, interpret):
    return forward(q, k, v, g, s0, scale=scale, save=False, interpret=interpret)[:2]


def _kernel_forward(q, k, v, g, s0, scale, interpret):
    o, last, states = forward(q, k, v, g, s0, scale=scale, save=True, interpret=interpret)
    return (o, last), (q, k, v, g, states, last)


def _kernel_backward(scale, interpret, residuals, cotangents):
    from pallas_kernels.gated_linear.mosaic_tpu_bwd import backward  # it builds on this module

    return backward(*residuals, *cotangents, scale=scale, interpret=interpret)


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
    o, last = _kernel(by_head(p.q), by_head(p.k), by_head(v), by_head(g), s0.swapaxes(2, 3), p.scale, interpreter())
    return widened_results(p, o.swapaxes(1, 2)[:, :t], last.swapaxes(2, 3))


def _check(p: Problem) -> None:
    if interpreter() is None and platform() != "tpu":
        raise Unsupported(f"needs a TPU, this is {platform()}")
    if p.beta is not None:
        raise Unsupported("the delta rule (beta) has no TPU kernel")
    if p.q.dtype not in (jnp.bfloat16, jnp.float32) or not p.q.dtype == p.k.dtype == p.v.dtype:
        raise Unsupported(f"q, k, v are {p.q.dtype}, {p.k.dtype}, {p.v.dtype}: give all in bfloat16 or all in float32")
    if max(p.q.shape[-1], p.v.shape[-1]) > MAX_WIDTH:
        raise Unsupported(f"q has {p.q.shape[-1]} and v {p.v.shape[-1]} features, the kernel takes at most {MAX_WIDTH}")

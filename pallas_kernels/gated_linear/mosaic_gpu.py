"""Gated linear attention on Hopper: what the kernels take, and their pairing into a differentiable function."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.gated_linear import mosaic_gpu_bwd, mosaic_gpu_fwd
from pallas_kernels.gated_linear.mosaic_gpu_delta import delta_rule
from pallas_kernels.gated_linear.mosaic_gpu_parts import CHUNK, WIDTH, add_tiles, add_up
from pallas_kernels.gated_linear.problem import NORMALISER_FLOOR, LinearState, Problem, repeat_heads, varying_like
from pallas_kernels.op import Unsupported, interpreter, require_hopper

MAX_WIDTH = 256
MAX_DELTA_WIDTH = 128  # of shared memory


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _kernel(q, k, v, g, start: LinearState, scale: float, interpret):
    found = mosaic_gpu_fwd.forward(q, k, v, g, start, scale=scale, interpret=interpret)
    return _divided(found, scale)[0], found.state


def _kernel_forward(q, k, v, g, start, scale, interpret):
    found = mosaic_gpu_fwd.forward(q, k, v, g, start, scale=scale, save=True, interpret=interpret)
    o, weights = _divided(found, scale)
    divided = None if weights is None else (o, weights)
    return (o, found.state), (q, k, v, g, found.saved, found.state, divided)


def _kernel_backward(scale, interpret, residuals, cotangents):
    *kept, divided = residuals
    do, d_last = cotangents
    d_weights = None
    if divided is not None:
        o, weights = divided
        wide = do.astype(jnp.float32) / weights
        do, d_weights = wide.astype(do.dtype), -(wide * o.astype(jnp.float32)).sum(-1)
    grads, d_first = mosaic_gpu_bwd.backward(*kept, (do, d_weights, d_last), scale=scale, interpret=interpret)
    return *(add_up(x, array.shape[2]) for x, array in zip(grads, residuals[:4], strict=True)), d_first


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _divided(found: mosaic_gpu_fwd.Result, scale: float) -> tuple[Array, Array | None]:
    """Outputs `[B, T, H, Dv]`, and the sums of weights `[B, T, H, 1]` that they are divided by, if any."""
    if found.weights is None:
        return add_tiles(found.o), None
    weights = scale * jnp.moveaxis(found.weights.sum(0), 1, 2)[..., None] + NORMALISER_FLOOR
    if len(found.o) == 1:
        return found.o[0], weights
    return (found.o.astype(jnp.float32).sum(0) / weights).astype(found.o.dtype), weights


def attend(p: Problem) -> tuple[Array, LinearState]:
    """The `mosaic_gpu` backend. `p` must have its segments folded. Log-decays are read in bfloat16, down to -16."""
    _check(p)
    if p.beta is not None:
        p = repeat_heads(p)
    padded = LinearState(_pad_state(p.state.s), None if p.state.z is None else _pad_state(p.state.z[..., None])[..., 0])
    arrays = (_pad(p.q), _pad(p.k), _pad(p.v), _log_decay(p))
    if p.beta is None:
        o, last = _kernel(*arrays, padded, p.scale, interpreter())
    else:
        o, s = delta_rule(*arrays, _pad_tokens(p.beta.astype(jnp.float32)), padded.s, p.scale, interpreter())
        last = LinearState(s, None)
    (_, t, _, dk), dv = p.q.shape, p.v.shape[-1]
    return o[:, :t, :, :dv], LinearState(last.s[:, :, :dk, :dv], None if last.z is None else last.z[..., :dk])


def _pad_state(s: Array) -> Array:
    """Up to whole tiles."""
    return jnp.pad(s, [(0, 0)] * 2 + [(0, -n % WIDTH) for n in s.shape[2:]])


def _pad_tokens(x: Array) -> Array:
    """Zeros up to whole chunks: tokens that do nothing."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK), *[(0, 0)] * (x.ndim - 2)))


def _pad(x: Array) -> Array:
    """Zeros up to whole chunks and tiles: tokens that do nothing, features that weigh nothing."""
    return jnp.pad(_pad_tokens(x), ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % WIDTH)))


def _log_decay(p: Problem) -> Array:
    b, t, _, dk = p.q.shape
    if p.log_decay is None:  # one head serves all
        return _pad(varying_like(jnp.zeros((b, t, 1, dk), jnp.bfloat16), p.q))
    g = p.log_decay.astype(jnp.bfloat16)
    return _pad(g if g.ndim == 4 else jnp.broadcast_to(g[..., None], (*g.shape, dk)))


def _check(p: Problem) -> None:
    require_hopper()
    if p.beta is not None and p.log_decay is not None and p.log_decay.ndim == 4:
        raise Unsupported("the delta rule (beta) has a Hopper kernel for decays per head, not per key channel")
    widest = MAX_WIDTH if p.beta is None else MAX_DELTA_WIDTH
    for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}, the kernel takes bfloat16")
        if x.shape[-1] > widest:
            raise Unsupported(f"{name} has {x.shape[-1]} features, the kernel takes at most {widest}")

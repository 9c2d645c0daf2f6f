"""Gated linear attention on Hopper: what the kernels take, and their pairing into a differentiable function."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.gated_linear import mosaic_gpu_bwd, mosaic_gpu_fwd
from pallas_kernels.gated_linear.mosaic_gpu_parts import CHUNK, WIDTH
from pallas_kernels.gated_linear.problem import LinearState, Problem, varying_like, widen, widened_results
from pallas_kernels.op import Unsupported, interpreter, platform

MAX_WIDTH = 256


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _kernel(q, k, v, g, s0, scale: float, interpret):
    o, last, _ = mosaic_gpu_fwd.forward(q, k, v, g, s0, scale=scale, save=False, interpret=interpret)
    return _add_tiles(o), last


def _kernel_forward(q, k, v, g, s0, scale, interpret):
    o, last, saved = mosaic_gpu_fwd.forward(q, k, v, g, s0, scale=scale, save=True, interpret=interpret)
    return (_add_tiles(o), last), (q, k, v, g, saved, last)


def _kernel_backward(scale, interpret, residuals, cotangents):
    do, d_last = cotangents
    *grads, d_first = mosaic_gpu_bwd.backward(*residuals, do, d_last, scale=scale, interpret=interpret)
    return *(_add_tiles(x) for x in grads), d_first


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _add_tiles(x: Array) -> Array:
    return x[0] if len(x) == 1 else x.astype(jnp.float32).sum(0).astype(x.dtype)


def attend(p: Problem) -> tuple[Array, LinearState]:
    """The `mosaic_gpu` backend. `p` must have its segments folded. Log-decays are read in bfloat16, down to -16."""
    _check(p)
    v, s0 = widen(p)
    q, k = _pad(p.q), _pad(p.k)
    g = _log_decay(p, k.shape)
    s0 = jnp.pad(s0, [(0, 0)] * 2 + [(0, -n % WIDTH) for n in s0.shape[2:]])
    o, last = _kernel(q, k, _pad(v), g, s0, p.scale, interpreter())
    return widened_results(p, o[:, : p.q.shape[1]], last[:, :, : p.q.shape[-1]])


def _pad(x: Array) -> Array:
    """Zeros up to whole chunks and tiles: tokens that do nothing, features that weigh nothing."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK), (0, 0), (0, -x.shape[3] % WIDTH)))


def _log_decay(p: Problem, shape: tuple[int, ...]) -> Array:
    if p.log_decay is None:
        return varying_like(jnp.zeros(shape, jnp.bfloat16), p.q)
    g = p.log_decay.astype(jnp.bfloat16)
    g = g if g.ndim == 4 else jnp.broadcast_to(g[..., None], p.q.shape)
    return _pad(g)


def _check(p: Problem) -> None:
    if interpreter() is None and platform() != "gpu":
        raise Unsupported(f"needs a Hopper GPU, this is {platform()}")
    if interpreter() is None and jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "unknown")
        if capability != "9.0":
            raise Unsupported(f"needs a Hopper GPU (compute capability 9.0), this one has {capability}")
    if p.beta is not None:
        raise Unsupported("the delta rule (beta) has no Hopper kernel")
    for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}, the kernel takes bfloat16")
        if x.shape[-1] > MAX_WIDTH:
            raise Unsupported(f"{name} has {x.shape[-1]} features, the kernel takes at most {MAX_WIDTH}")

"""Hedgehog features (arXiv 2402.04347), alone and of a convolution (LAWCAT, arXiv 2509.18467)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv.api import causal_conv1d
from pallas_kernels.gated_linear.segments import Segments, read_segments
from pallas_kernels.op import dispatch, lazy, platform

FEATURE_FLOOR = 1e-12


class Problem(NamedTuple):
    """Of `hedgehog_conv1d`; `tail` is None where nothing comes before the row."""

    x: Float[Array, "B T K D"]
    w: Float[Array, "W H D"]
    maps: Float[Array, "H D f"]
    tail: Float[Array, "B W1 K D"] | None
    segment_ids: Int[Array, "B T"] | None
    segments: Segments | None


def hedgehog(x: Float[Array, "B T H D"], maps: Float[Array, "H D f"]) -> Float[Array, "B T H f2"]:
    """[softmax(x W), softmax(-x W)] of each head in float32: non-negative, with sum 2."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    u = jnp.einsum("bthd,hdf->bthf", x, maps.astype(x.dtype), precision=precision).astype(jnp.float32)
    signs = jnp.array([1, -1], u.dtype)[:, None]  # one softmax of both: one kernel reads u and writes the result
    features = jax.nn.softmax(u[..., None, :] * signs, axis=-1).reshape(*u.shape[:-1], -1)
    return jnp.maximum(features, FEATURE_FLOOR)


def by_parts(p: Problem) -> Float[Array, "B T H f2"]:
    """The convolution on its fastest backend, then the features."""
    batch, tokens, *_ = p.x.shape
    width, heads, _ = p.w.shape

    def channels(x):
        return jnp.repeat(x, heads // x.shape[2], axis=2).reshape(*x.shape[:2], -1)

    tail = None if p.tail is None else channels(p.tail)
    y, _ = causal_conv1d(channels(p.x), p.w.reshape(width, -1), tail=tail, segment_ids=p.segment_ids)
    return hedgehog(y.reshape(batch, tokens, heads, -1), p.maps).astype(p.x.dtype)


BACKENDS: dict[str, Callable[[Problem], Array]] = {
    "mosaic_gpu": lazy("pallas_kernels.causal_conv.mosaic_gpu_features", "features_mosaic_gpu"),
    "parts": by_parts,
}
ORDER = {"cpu": ("parts",), "gpu": ("mosaic_gpu", "parts"), "tpu": ("parts",)}


def hedgehog_conv1d(
    x: Float[Array, "B T K D"],
    w: Float[Array, "W H D"],
    maps: Float[Array, "H D f"],
    *,
    tail: Float[Array, "B W1 K D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H f2"]:
    """Features of a short causal convolution over time: `[softmax(y W), softmax(-y W)]`, y being `causal_conv1d(x, w)`.

    Args:
      x: inputs, in as many heads as w or fewer, a divisor: each serves a group of heads.
      w: taps, width 2 to 8. maps: W of each head.
      tail, segment_ids: as in `causal_conv1d`; padding has the features of y = 0.
      implementation: a backend to force; by default the first one that supports the call.

    Returns:
      Features in the dtype of x, at least 1e-12.

    Raises:
      ValueError: as `causal_conv1d`; heads or maps that do not fit.
      Unsupported: the named backend cannot run the call; the reason is given.
    """
    _check(x, w, maps, tail)
    segments = None if segment_ids is None else read_segments(segment_ids)
    tail = None if tail is None else tail.astype(x.dtype)
    problem = Problem(x, w, maps, tail, segment_ids, segments)
    return dispatch("hedgehog_conv1d", BACKENDS, ORDER[platform()], implementation)(problem)


def _check(x, w, maps, tail) -> None:
    width, heads, dim = w.shape
    if not 2 <= width <= 8:
        raise ValueError(f"w has width {width}: hedgehog_conv1d takes widths 2 to 8")
    if x.shape[3] != dim or heads % x.shape[2]:
        raise ValueError(f"x has heads {x.shape[2:]}, w {w.shape[1:]}: give x {dim} channels and a divisor of {heads}")
    if maps.shape[:2] != (heads, dim):
        raise ValueError(f"maps has shape {maps.shape}: give ({heads}, {dim}, features), as w has heads")
    if tail is not None and tail.shape != (x.shape[0], width - 1, *x.shape[2:]):
        raise ValueError(f"tail has shape {tail.shape}: width {width} needs {(x.shape[0], width - 1, *x.shape[2:])}")

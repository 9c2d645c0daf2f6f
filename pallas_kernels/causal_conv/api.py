"""`causal_conv1d`: a short depthwise causal convolution over time that knows packed rows and streams."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv.problem import Activation, Problem, ids_with_tail
from pallas_kernels.causal_conv.xla import convolve_xla
from pallas_kernels.gated_linear.segments import Segments, read_segments
from pallas_kernels.op import dispatch, lazy, platform

BACKENDS: dict[str, Callable[[Problem], Array]] = {
    "mosaic_gpu": lazy("pallas_kernels.causal_conv.mosaic_gpu", "convolve_mosaic_gpu"),
    "xla": convolve_xla,
}
ORDER = {"cpu": ("xla",), "gpu": ("mosaic_gpu", "xla"), "tpu": ("xla",)}


def causal_conv1d(
    x: Float[Array, "B T C"],
    w: Float[Array, "W C"],
    *,
    bias: Float[Array, "C"] | None = None,
    tail: Float[Array, "B W1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: Activation | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W1 C"]]:
    """Computes `y[t] = sum_i w[i] x[t - (W-1) + i]`, so that the last tap weighs the current token.

    Args:
      x: inputs. w: taps, width 2 to 8.
      bias: added before the activation.
      tail: the W-1 inputs before x (a previous call's second result), part of the first segment; zeros without it.
      segment_ids: as in `gated_linear_attention`: a tap never reaches into another segment, and padding (which must
        follow the last segment) counts as absent and yields 0.
      activation: "silu" or None.
      implementation: a backend to force; by default the first one that supports the call.

    Returns:
      Outputs, and the tail for the next call: the last W-1 inputs of the row's last segment, older ones as 0.

    Raises:
      ValueError: a width out of range, a shape that does not fit, an unknown activation, a concrete id that decreases.
      Unsupported: the named backend cannot run the call; the reason is given.
    """
    width = check(x, w, tail, activation)
    segments = None if segment_ids is None else read_segments(segment_ids)
    problem = Problem(x, w, bias, None if tail is None else tail.astype(x.dtype), segments, activation)
    y = dispatch("causal_conv1d", BACKENDS, ORDER[platform()], implementation)(problem)
    if segments is None:
        return y, problem.padded[:, x.shape[1] :]
    where, same = last_inputs(segments, ids_with_tail(segments, width), width)
    return y, jnp.where(same, jnp.take_along_axis(problem.padded, where[..., None], axis=1), 0)


def causal_conv1d_step(
    x: Float[Array, "B C"],
    w: Float[Array, "W C"],
    tail: Float[Array, "B W1 C"],
    *,
    bias: Float[Array, "C"] | None = None,
    activation: Activation | None = None,
) -> tuple[Float[Array, "B C"], Float[Array, "B W1 C"]]:
    """One token of `causal_conv1d` for a batch of requests: `(y, new tail)`; donate the tail to update it in place."""
    y, tail = causal_conv1d(x[:, None], w, bias=bias, tail=tail, activation=activation)
    return y[:, 0], tail


def last_inputs(segments: Segments, ids: Int[Array, "B T1"], width: int):
    """Where the W-1 inputs up to the last valid one lie among a row's inputs with its tail `[B, W-1]`, and which of
    them belong to the last segment `[B, W-1, 1]`."""
    length = segments.valid.shape[1]
    count = length - jnp.argmax(segments.valid[:, ::-1], axis=1)  # tokens up to the last valid one
    count = jnp.where(segments.valid.any(axis=1), count, 0)
    where = count[:, None] + jnp.arange(width - 1)
    return where, (jnp.take_along_axis(ids, where, axis=1) == segments.ids[:, -1:])[..., None]


def check(x, w, tail, activation) -> int:
    """The width, of arguments that fit."""
    width, channels = w.shape
    if not 2 <= width <= 8:
        raise ValueError(f"w has width {width}: causal_conv1d takes widths 2 to 8")
    if channels != x.shape[-1]:
        raise ValueError(f"w has {channels} channels, x has {x.shape[-1]}: they must agree")
    if tail is not None and tail.shape != (x.shape[0], width - 1, channels):
        raise ValueError(f"tail has shape {tail.shape}: width {width} needs {(x.shape[0], width - 1, channels)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r} is unknown: give 'silu' or None")
    return width

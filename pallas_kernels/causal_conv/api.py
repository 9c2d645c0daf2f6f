"""`causal_conv1d`: a short depthwise causal convolution over time that knows packed rows and streams."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_linear.segments import Segments, read_segments

Activation = Literal["silu"]


def causal_conv1d(
    x: Float[Array, "B T C"],
    w: Float[Array, "W C"],
    *,
    bias: Float[Array, "C"] | None = None,
    tail: Float[Array, "B W1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: Activation | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W1 C"]]:
    """Computes `y[t] = sum_i w[i] x[t - (W-1) + i]`, so that the last tap weighs the current token.

    Written as W shifted multiply-adds, which XLA fuses with what comes before and after.

    Args:
      x: inputs. w: taps, width 2 to 8.
      bias: added before the activation.
      tail: the W-1 inputs before x (a previous call's second result), part of the first segment; zeros without it.
      segment_ids: as in `gated_linear_attention`: a tap never reaches into another segment, and padding (which must
        follow the last segment) counts as absent and yields 0.
      activation: "silu" or None.

    Returns:
      Outputs, and the tail for the next call: the last W-1 inputs of the row's last segment, older ones as 0.

    Raises:
      ValueError: a width out of range, a shape that does not fit, an unknown activation, a concrete id that decreases.
    """
    width = check(x, w, tail, activation)
    batch, length, channels = x.shape
    tail = jnp.zeros((batch, width - 1, channels), x.dtype) if tail is None else tail.astype(x.dtype)
    if segment_ids is None:
        padded = jnp.concatenate([tail, x], axis=1)
        return convolve(padded, None, w, bias, activation), padded[:, length:]
    segments = read_segments(segment_ids)
    padded = jnp.concatenate([tail, jnp.where(segments.valid[..., None], x, 0)], axis=1)
    ids = ids_with_tail(segments, width)
    y = convolve(padded, ids, w, bias, activation)
    where, same = last_inputs(segments, ids, width)
    last = jnp.where(same, jnp.take_along_axis(padded, where[..., None], axis=1), 0)
    return jnp.where(segments.valid[..., None], y, 0), last


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


def convolve(
    padded: Float[Array, "B T1 C"], ids: Int[Array, "B T1"] | None, w: Float[Array, "W C"], bias, activation
) -> Float[Array, "B T C"]:
    """Outputs of the last T of `T1 = W - 1 + T` inputs; a tap counts where its id is that of the current token."""
    width = len(w)
    length = padded.shape[1] - width + 1
    acc = jnp.promote_types(padded.dtype, jnp.float32)
    y = jnp.zeros((), acc)
    for i in range(width):
        tap = padded[:, i : i + length]
        if ids is not None:
            tap = jnp.where((ids[:, i : i + length] == ids[:, width - 1 :])[..., None], tap, 0)
        y = y + tap.astype(acc) * w[i].astype(acc)
    y = y if bias is None else y + bias.astype(acc)
    return (jax.nn.silu(y) if activation == "silu" else y).astype(padded.dtype)


def ids_with_tail(segments: Segments, width: int) -> Int[Array, "B T1"]:
    """Ids of the W-1 inputs before the row, which belong to its first segment, and of the row."""
    before = jnp.broadcast_to(segments.ids[:, :1], (segments.ids.shape[0], width - 1))
    return jnp.concatenate([before, segments.ids], axis=1)


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

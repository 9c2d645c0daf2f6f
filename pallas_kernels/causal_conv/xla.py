"""`causal_conv1d` on any device: W shifted multiply-adds, which XLA fuses with what comes before and after."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv.problem import Problem, ids_with_tail


def convolve_xla(p: Problem) -> Float[Array, "B T C"]:
    """The `xla` backend."""
    if p.segments is None:
        return convolve(p.padded, None, p.w, p.bias, p.activation)
    y = convolve(p.padded, ids_with_tail(p.segments, p.width), p.w, p.bias, p.activation)
    return jnp.where(p.segments.valid[..., None], y, 0)


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

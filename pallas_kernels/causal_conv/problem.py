"""The convolution that the backends of `causal_conv1d` solve, with every default filled in."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_linear.segments import Segments

Activation = Literal["silu"]


class Problem(NamedTuple):
    """Of `causal_conv1d`; `tail` is None where nothing comes before the row."""

    x: Float[Array, "B T C"]  # padding may hold anything
    w: Float[Array, "W C"]
    bias: Float[Array, "C"] | None
    tail: Float[Array, "B W1 C"] | None  # in the dtype of x
    segments: Segments | None
    activation: Activation | None

    @property
    def width(self) -> int:
        return len(self.w)

    @property
    def padded(self) -> Float[Array, "B T1 C"]:
        """The W-1 inputs before the row, then the row, with zeros for padding."""
        x = self.x if self.segments is None else jnp.where(self.segments.valid[..., None], self.x, 0)
        tail = self.tail
        if tail is None:
            tail = jnp.zeros((x.shape[0], self.width - 1, x.shape[2]), x.dtype)
        return jnp.concatenate([tail, x], axis=1)


def ids_with_tail(segments: Segments, width: int) -> Int[Array, "B T1"]:
    """Ids of the W-1 inputs before the row, which belong to its first segment, and of the row."""
    before = jnp.broadcast_to(segments.ids[:, :1], (segments.ids.shape[0], width - 1))
    return jnp.concatenate([before, segments.ids], axis=1)

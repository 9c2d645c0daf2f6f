"""`causal_conv1d` of a sequence that lies in shards along a mesh axis: each shard gets the W-1 inputs on its left."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv.api import check, last_inputs
from pallas_kernels.causal_conv.problem import Activation, ids_with_tail
from pallas_kernels.causal_conv.xla import convolve
from pallas_kernels.gated_linear.problem import varying_like
from pallas_kernels.gated_linear.segments import gather_segments


def causal_conv1d_sharded(
    x: Float[Array, "B T C"],
    w: Float[Array, "W C"],
    *,
    axis_name: str,
    bias: Float[Array, "C"] | None = None,
    tail: Float[Array, "B W1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: Activation | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W1 C"]]:
    """`causal_conv1d` inside `jax.shard_map`, x being this shard's T tokens of a longer sequence.

    Arguments and results are those of `causal_conv1d`, and only these differ:

    Args:
      axis_name: mesh axis along which the sequence lies in order; every shard holds the same number of tokens.
      tail: the W-1 inputs before the whole sequence, the same on every shard.
      segment_ids: this shard's part of ids that never decrease along the whole row.

    Returns:
      This shard's outputs, and the tail after the whole sequence, the same on every shard.

    Raises:
      ValueError: as `causal_conv1d`; a shard shorter than W-1 tokens.
    """
    width = check(x, w, tail, activation)
    batch, length, channels = x.shape
    if length < width - 1:
        raise ValueError(f"x has {length} tokens on each shard: a convolution of width {width} needs {width - 1}")
    here, shards = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    start = here * length
    tail = jnp.zeros((batch, width - 1, channels), x.dtype) if tail is None else tail.astype(x.dtype)
    if segment_ids is None:
        padded = _with_halo(x, tail, width, axis_name)
        last = jnp.where(here == shards - 1, padded[:, length:], 0)
        return convolve(padded, None, w, bias, activation), jax.lax.psum(last, axis_name)
    segments = gather_segments(segment_ids, axis_name)
    valid = jax.lax.dynamic_slice_in_dim(segments.valid, start, length, axis=1)[..., None]
    padded = _with_halo(jnp.where(valid, x, 0), tail, width, axis_name)
    ids = ids_with_tail(segments, width)
    own_ids = jax.lax.dynamic_slice_in_dim(ids, start, length + width - 1, axis=1)
    y = jnp.where(valid, convolve(padded, own_ids, w, bias, activation), 0)
    where, same = last_inputs(segments, ids, width)
    own = (where < start + length + width - 1) & ((where >= start + width - 1) | (here == 0))
    last = jnp.take_along_axis(padded, jnp.clip(where - start, 0, length + width - 2)[..., None], axis=1)
    return y, jax.lax.psum(jnp.where(own[..., None] & same, last, 0), axis_name)


def _with_halo(x, tail, width: int, axis_name: str) -> Float[Array, "B T1 C"]:
    """This shard's inputs after the W-1 before them: the left neighbour's last, or the tail of the sequence."""
    here, shards = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    halo = jax.lax.ppermute(x[:, x.shape[1] - width + 1 :], axis_name, [(i, i + 1) for i in range(shards - 1)])
    return jnp.concatenate([jnp.where(here == 0, varying_like(tail, x), halo), x], axis=1)

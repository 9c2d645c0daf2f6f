"""Packed rows: which tokens count, and where a new document starts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.checks import check_values


class Segments(NamedTuple):
    """A packed row in the form a recurrence needs."""

    valid: Bool[Array, "B T"]  # False: padding, the token is skipped
    reset: Bool[Array, "B T"]  # True: the state is emptied before this token
    ids: Int[Array, "B T"]  # non-decreasing; padding continues the segment before it


def blank_padding(o: Float[Array, "B T H Dv"], segments: Segments | None) -> Float[Array, "B T H Dv"]:
    """Outputs with zeros where a packed row is padding."""
    return o if segments is None else jnp.where(segments.valid[..., None, None], o, 0)


def read_segments(segment_ids: Int[Array, "B T"]) -> Segments:
    """Splits packed rows into segments and padding.

    Ids never decrease along a row, except that 0 after a positive id marks padding; a negative id is padding anywhere.
    Padding neither reads nor writes the state. What enters the row from before belongs to its first segment.

    Raises:
      ValueError: a concrete id decreases.
    """
    check_values(
        lambda ids: (ids >= _running_max(ids)) | (ids <= 0),
        "segment_ids decreases to {found}: number the segments of a row upwards, with 0 only after them as padding",
        segment_ids,
    )
    positive_before = jax.lax.cummax(segment_ids, axis=1) > 0
    valid = (segment_ids > 0) | ((segment_ids == 0) & ~positive_before)
    largest = jnp.iinfo(segment_ids.dtype).max
    first = jnp.min(jnp.where(valid, segment_ids, largest), axis=1, keepdims=True)
    running = jax.lax.cummax(jnp.where(valid, segment_ids, -1), axis=1)
    ids = jnp.where(valid.any(axis=1, keepdims=True), jnp.maximum(running, first), 0)
    changed = ids[:, 1:] != ids[:, :-1]
    reset = jnp.concatenate([jnp.zeros_like(changed, shape=(ids.shape[0], 1)), changed], axis=1)
    return Segments(valid, reset, ids)


def _running_max(ids: Array | np.ndarray) -> Array | np.ndarray:
    return np.maximum.accumulate(ids, axis=1) if isinstance(ids, np.ndarray) else jax.lax.cummax(ids, axis=1)


def gather_segments(segment_ids: Int[Array, "B T"], axis_name: str) -> Segments:
    """`read_segments` of the whole row whose shards lie along a mesh axis: four bytes a token are gathered."""
    return read_segments(jax.lax.all_gather(segment_ids, axis_name, axis=1, tiled=True))

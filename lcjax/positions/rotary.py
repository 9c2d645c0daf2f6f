"""Rotary tables that stay exact to 2^24 positions in float32, and the half-split rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcjax.positions.laws import Rope


def _fixed_point(frequencies: np.ndarray | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turns per token modulo 1 with 56 fraction bits: the upper 32 and the lower 24 as uint32."""
    if isinstance(frequencies, np.ndarray):
        bits = np.round(frequencies.astype(np.float64) / (2 * math.pi) * 2.0**56).astype(np.uint64) % np.uint64(2**56)
        return jnp.asarray((bits >> 24).astype(np.uint32)), jnp.asarray((bits & 0xFFFFFF).astype(np.uint32))
    turns = frequencies * np.float32(1 / (2 * math.pi))
    scaled = (turns - jnp.floor(turns)) * np.float32(
        2.0**32
    )  # below 2^32, with 24 significant bits: both parts are exact
    whole = jnp.floor(scaled)
    return whole.astype(jnp.uint32), ((scaled - whole) * np.float32(2.0**24)).astype(jnp.uint32)


def _angles(positions: Int[Array, "B T"], frequencies: np.ndarray | jax.Array) -> Float[Array, "B T n"]:
    """position * frequency modulo 2 pi, in [-pi, pi), by wrapping integer products: only the end is rounded."""
    upper, lower = _fixed_point(frequencies)
    p = positions.astype(jnp.uint32)[..., None]
    p_hi, p_lo, l_hi, l_lo = p >> 12, p & 0xFFF, lower >> 12, lower & 0xFFF
    carry = p_hi * l_hi + ((p_hi * l_lo + p_lo * l_hi + ((p_lo * l_lo) >> 12)) >> 12)  # (p * lower) >> 24
    turns = jax.lax.bitcast_convert_type(p * upper + carry, jnp.int32)
    return turns.astype(jnp.float32) * np.float32(2 * math.pi / 2.0**32)


def rope_table(
    law: Rope, head_dim: int, positions: Int[Array, "B T"], length: int | Int[Array, ""] | None = None
) -> tuple[Float[Array, "B T n"], Float[Array, "B T n"]]:
    """cos and sin of every pair at every position, times the law's attention factor, float32.

    Positions lie in [0, 2^24). `length` (tokens seen so far) matters to laws with `follows_length`.
    """
    frequencies, factor = law.frequencies(head_dim, length)
    angles = _angles(positions, frequencies)
    return jnp.cos(angles) * np.float32(factor), jnp.sin(angles) * np.float32(factor)


def apply_rope(
    x: Float[Array, "B T N D"], table: tuple[Float[Array, "B T n"], Float[Array, "B T n"]]
) -> Float[Array, "B T N D"]:
    """Rotate pairs (i, i + n) of the first 2n features in float32; the others pass through. Keeps x's dtype."""
    cos, sin = (t[:, :, None, :] for t in table)
    n = cos.shape[-1]
    first, second, rest = x[..., :n].astype(jnp.float32), x[..., n : 2 * n].astype(jnp.float32), x[..., 2 * n :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [rest], axis=-1)

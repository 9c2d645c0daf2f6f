"""Rotary tables that stay exact to 2^24 positions in float32, and the half-split rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcjax.positions.laws import Frequencies, Rope

type Table = tuple[Float[Array, "B T n"], Float[Array, "B T n"]]
"""cos and sin of every pair at every position."""

type Positions = Int[Array, "B T"] | Int[Array, "B T n"] | Float[Array, "B T"]
"""Tokens since the start: whole, or of each pair its own, or fractions (in training with sampled positions)."""

TURN = 1 / (2 * math.pi)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x as a sum of two floats of 12 significant bits: products of such halves are exact in float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFF000)
    upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return upper, x - upper


def _turns(frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """frequencies / (2 pi) as an unevaluated sum of two float32."""
    c = np.float32(TURN)
    c_hi = (c.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    c_lo, c_rest = np.float32(c - c_hi), np.float32(TURN - float(c))
    f_hi, f_lo = _halves(frequencies)
    product = frequencies * c
    error = ((f_hi * c_hi - product) + f_hi * c_lo + f_lo * c_hi) + f_lo * c_lo
    return product, error + frequencies * c_rest


def _fixed_point(frequencies: np.ndarray | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turns per token modulo 1 with 56 fraction bits: the upper 32 and the lower 24 as uint32."""
    if isinstance(frequencies, np.ndarray):
        bits = np.round(frequencies.astype(np.float64) * TURN * 2.0**56).astype(np.uint64) % np.uint64(2**56)
        return jnp.asarray((bits >> 24).astype(np.uint32)), jnp.asarray((bits & 0xFFFFFF).astype(np.uint32))
    turns, rest = _turns(frequencies)
    scaled = (turns - jnp.floor(turns)) * np.float32(2.0**32)  # below 2^32, with 24 significant bits: exact
    whole = jnp.floor(scaled)
    low = (scaled - whole) * np.float32(2.0**24) + rest * np.float32(2.0**56)  # of either sign, far below 2^31
    low = jnp.round(low).astype(jnp.int32)
    return whole.astype(jnp.uint32) + (low >> 24).astype(jnp.uint32), (low & 0xFFFFFF).astype(jnp.uint32)


def angles(positions: Positions, frequencies: np.ndarray | jax.Array) -> Float[Array, "B T n"]:
    """position * frequency modulo 2 pi, in [-pi, pi), by wrapping integer products: only the end is rounded.

    frequencies: [n], or [B,n] for one set a row. A fraction of a token is added at the end.
    """
    p = positions if positions.ndim == 3 else positions[..., None]
    if frequencies.ndim == 2:
        frequencies = frequencies[:, None]
    fractions = jnp.issubdtype(p.dtype, jnp.floating)
    whole = jnp.floor(p) if fractions else p
    upper, lower = _fixed_point(frequencies)
    u = whole.astype(jnp.uint32)
    p_hi, p_lo, l_hi, l_lo = u >> 12, u & 0xFFF, lower >> 12, lower & 0xFFF
    carry = p_hi * l_hi + ((p_hi * l_lo + p_lo * l_hi + ((p_lo * l_lo) >> 12)) >> 12)  # (p * lower) >> 24
    turns = jax.lax.bitcast_convert_type(u * upper + carry, jnp.int32)
    found = turns.astype(jnp.float32) * np.float32(2 * math.pi / 2.0**32)
    return found + (p - whole) * frequencies if fractions else found


def table_of(frequencies: Frequencies, positions: Positions) -> Table:
    """cos and sin times the attention factor, float32, of what `Rope.frequencies` gave."""
    each, factor = frequencies
    found = angles(positions, each)
    factor = jnp.asarray(factor, jnp.float32)
    factor = factor if factor.ndim == 0 else factor[:, None, None]
    return jnp.cos(found) * factor, jnp.sin(found) * factor


def rope_table(law: Rope, head_dim: int, positions: Positions, length: int | Int[Array, "*B"] | None = None) -> Table:
    """cos and sin of every pair at every position, times the law's attention factor, float32.

    Positions lie in [0, 2^24). `length` (tokens seen so far, of all rows or of each) matters to laws with
    `follows_length`.
    """
    return table_of(law.frequencies(head_dim, length), positions)


def apply_rope(x: Float[Array, "B T N D"], table: Table) -> Float[Array, "B T N D"]:
    """Rotate pairs (i, i + n) of the first 2n features in float32; the others pass through. Keeps x's dtype."""
    cos, sin = (t[:, :, None, :] for t in table)
    n = cos.shape[-1]
    first, second, rest = x[..., :n].astype(jnp.float32), x[..., n : 2 * n].astype(jnp.float32), x[..., 2 * n :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [rest], axis=-1)

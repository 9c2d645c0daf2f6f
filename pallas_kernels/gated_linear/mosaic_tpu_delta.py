"""The delta rule inside a chunk, on TPU: which values the state is given, and the gradient through them.

A token writes `beta (v - k S)`, S being the decayed state before it. Over a chunk these values are `(I + N)^-1 beta
(V - K~ S)`: N is `beta` times the decayed products of a key with the earlier ones, K~ the keys decayed from the chunk's
entry (WY form, arXiv 2406.06484, 2412.06464).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dot(a, b, contract: tuple[int, int], precision=None) -> Array:
    """A product over axis `contract[0]` of a and `contract[1]` of b, float32; exact where the inputs are float32 and no
    other precision is named."""
    exact = a.dtype == jnp.float32
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = precision or (jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _places(size: int) -> tuple[Array, Array]:
    """Row and column of each element of a square."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (size, size), d) for d in (0, 1))
    return i, j


def _below(x: Float[Array, "C C"]) -> Float[Array, "C C"]:
    i, j = _places(len(x))
    return jnp.where(j < i, x, 0.0)


def as_column(row: Float[Array, "1 C"]) -> Float[Array, "C 1"]:
    """Numbers that lie along the lanes, one to each row of a tile."""
    i, j = _places(row.shape[1])
    return jnp.where(i == j, row, 0.0).sum(1, keepdims=True)


def as_row(column: Float[Array, "C 1"]) -> Float[Array, "1 C"]:
    """The inverse of `as_column`."""
    i, j = _places(len(column))
    return jnp.where(i == j, column, 0.0).sum(0, keepdims=True)


def unit_lower_inverse(n: Float[Array, "C C"], kind) -> Float[Array, "C C"]:
    """`(I + n)^-1` for strictly lower n, by halving: as stable as forward substitution, and all matrix products.

    For inputs in bfloat16 (`kind`) each product is one pass of the matrix unit, and a Newton step, whose residual keeps
    16 bits, squares the error: from 1e-3 to 1e-2 (random keys, nearly equal ones) to under 1e-4.
    """
    i, j = _places(len(n))
    apart, n, one = i ^ j, _below(n), jnp.where(i == j, 1.0, 0.0)
    multiply = lambda a, b: dot(a.astype(kind), b.astype(kind), (1, 0))
    inverse = one - jnp.where(apart == 1, n, 0.0)
    w = 2
    while w < len(n):  # inverse holds the blocks of w on the diagonal; `apart` of w up to 2w is between two of them
        between = jnp.where((apart >= w) & (apart < 2 * w), n, 0.0)
        inverse -= multiply(multiply(inverse, between), inverse)
        w *= 2
    if kind == jnp.bfloat16:
        inverse += multiply(inverse, one - inverse - dot(n, inverse, (1, 0), jax.lax.Precision.HIGH))
    return inverse


class Written(NamedTuple):
    """What a chunk writes, and what the gradient needs of how it came about."""

    values: Float[Array, "C Dv"]
    missing: Float[Array, "C Dv"]  # what the state before the chunk lacks: v - K~ S
    beta: Float[Array, "C 1"]
    keys: Float[Array, "C C"]  # decayed products of keys, strictly lower
    solve: Float[Array, "C C"]  # (I + N)^-1

    @classmethod
    def of(cls, v, read: Float[Array, "C Dv"], beta: Float[Array, "1 C"], keys: Float[Array, "C C"]) -> "Written":
        """From v, what the keys read from the state before the chunk, and their products with one another."""
        kind, strength, keys = v.dtype, as_column(beta), _below(keys)
        missing = v.astype(jnp.float32) - read
        solve = unit_lower_inverse(strength * keys, kind)
        values = dot(solve.astype(kind), (strength * missing).astype(kind), (1, 0))
        return cls(values, missing, strength, keys, solve)

    def gradients(self, d_values: Float[Array, "C Dv"], kind):
        """Of v (that of `read` is its negative), of the products of keys, and of beta `[1, C]`."""
        right = dot(self.solve.astype(kind), d_values.astype(kind), (0, 0))
        d_n = -_below(dot(right.astype(kind), self.values.astype(kind), (1, 1)))
        d_beta = (right * self.missing).sum(1, keepdims=True) + (d_n * self.keys).sum(1, keepdims=True)
        return self.beta * right, self.beta * d_n, as_row(d_beta)

"""Softmax attention over a short window, as sums that a linear branch can be added to before the division."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcjax.layers.linear import precision


class WindowSums(NamedTuple):
    """Numerator and denominator of each query's softmax, both scaled by exp(-its largest score)."""

    weighted: Float[Array, "B T H D"]
    total: Float[Array, "B T H"]


def window_sums(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    seen: Bool[Array, "B T w"],
    scale: float,
) -> WindowSums:
    """Query t looks at keys t + 1 ... t + w, of which `seen[b, t]` says which exist; S = w + T.

    So the first w keys are those before the queries; a query that sees none has sums 0.
    Memory: T (w + min(w, T)) scores per head.
    """
    batch, length, heads, dim = q.shape
    window, groups = seen.shape[2], k.shape[2]
    block = min(window, length)
    blocks = -(-length // block)
    pad = blocks * block - length
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(batch, blocks, block, groups, heads // groups, dim)
    at = jnp.arange(blocks)[:, None] * block + jnp.arange(1, block + window)  # [N, block + w - 1]
    k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))[:, at] for x in (k, v))
    exact = precision(q.dtype)
    scores = jnp.einsum("bncgrd,bnsgd->bngrcs", q, k, precision=exact, preferred_element_type=jnp.float32) * scale
    # seen[t, j] is about key t + 1 + j: row c of a block holds it in column c + j.
    seen = jnp.pad(seen, ((0, 0), (0, pad), (0, 0))).reshape(batch, blocks, block, window)
    column = jnp.arange(block + window - 1)[None] - jnp.arange(block)[:, None]  # [block, block + w - 1]
    inside = (column >= 0) & (column < window)
    allowed = jnp.take_along_axis(seen, jnp.clip(column, 0, window - 1)[None, None], axis=3) & inside
    scores = jnp.where(allowed[:, :, None, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.moveaxis(weights.sum(-1), -1, 2).reshape(batch, blocks * block, heads)
    weighted = jnp.einsum(
        "bngrcs,bnsgd->bncgrd", weights.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32
    )
    return WindowSums(weighted.reshape(batch, blocks * block, heads, dim)[:, :length], total[:, :length])
